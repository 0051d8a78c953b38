"""Translate how a GGUF file scales positions into transformers' ``rope_parameters``.

llama.cpp has a scaling type (none, linear, yarn, longrope) with its numbers, and tensors of divisors, one per rotary
frequency: ``rope_freqs.weight`` for every length (Llama 3.1's scaling is stored in it), or one tensor for texts up to
the original context and one for longer ones (longrope). A config holds longrope's divisors as they are, and others only
as the parameters of Llama 3.1's rule; so these are found from the divisors and must reproduce each of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moesmith.errors import MoesmithError

if TYPE_CHECKING:
    from moesmith.parent.gguf.load import Keys

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG, SHORT)
CURE = "Give the model as a folder in safetensors."
EXACT = 1e-5  # relative: the divisors are stored in f32


def rope_parameters(keys: Keys, width: int, context: int, factors: dict[str, list[float]]) -> dict[str, Any]:
    """Make the ``rope_parameters`` with which transformers computes what llama.cpp computes.

    Args:
        keys: the architecture's keys; those about positions are taken.
        width: width of a head.
        context: the longest text.
        factors: the tensors of :data:`FACTORS` that the file has.

    Raises:
        MoesmithError: no ``rope_parameters`` express a key or tensor; it is named.
    """
    theta = keys.take("rope.freq_base", 10000.0)
    factor = keys.take("rope.scaling.factor", 0.0) or keys.take("rope.scale_linear", 0.0) or 1.0
    # llama.cpp takes a factor without a type for a linear one
    kind = keys.take("rope.scaling.type", "linear" if factor != 1 else "none")
    original = keys.take("rope.scaling.original_context_length", context)
    attention = keys.take("rope.scaling.attn_factor", 1.0)
    found: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    tensors = {name: values for name, values in factors.items() if name != FREQS or any(v != 1 for v in values)}
    used: set[str] = set()
    if kind == "yarn":
        found |= _yarn(keys, factor, original, attention)
    elif kind == "longrope" or (kind == "none" and LONG in tensors):  # Phi-3's files name no type
        if LONG not in tensors or SHORT not in tensors:
            raise MoesmithError(f"{keys.file} scales positions by longrope but lacks {LONG} or {SHORT}", CURE)
        used = {LONG, SHORT}
        found |= {
            "rope_type": "longrope",
            "short_factor": tensors[SHORT],
            "long_factor": tensors[LONG],
            "factor": context / original,
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    elif attention != 1:
        raise keys.unknown(f"{keys.prefix}rope.scaling.attn_factor", attention)
    elif kind == "linear":
        found |= {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    elif kind == "none" and FREQS in tensors:
        used = {FREQS}
        found |= llama3(keys.file, theta, width, context, tensors[FREQS])
    elif kind != "none":
        raise keys.unknown(f"{keys.prefix}rope.scaling.type", kind)
    for name in tensors.keys() - used:
        raise MoesmithError(f"{keys.file} has the tensor {name} along with positions scaled by {kind}", CURE)
    keys.left.pop("rope.scaling.finetuned", None)  # says whether the model was trained with the scaling
    return found


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> dict[str, Any]:
    """Make YaRN's parameters. llama.cpp multiplies queries and keys by 0.1 ln(factor) + 1 and by its attention factor.

    Its graphs of these architectures read none of the keys ``yarn_…``, so a value other than theirs is refused: the
    model was made with it, and llama.cpp does not compute with it.
    """
    level = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    fixed = {"ext_factor": 1.0, "log_multiplier": 0.0, "attn_factor": level, "beta_fast": 32.0, "beta_slow": 1.0}
    for name, value in fixed.items():
        odd = keys.take(f"rope.scaling.yarn_{name}", value)
        if not math.isclose(odd, value, rel_tol=EXACT):
            raise keys.unknown(f"{keys.prefix}rope.scaling.yarn_{name}", odd)
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return found | ({"attention_factor": attention * level} if attention != 1 else {})


def llama3(file: str, theta: float, width: int, context: int, divisors: list[float]) -> dict[str, Any]:
    """Find the parameters of Llama 3.1's rule that reproduce each divisor.

    The rule divides a frequency of wavelength w by 1 where w < o/h, by the factor F where w > o/l, and between them by
    1 / ((1 - s)/F + s), s = (o/w - l)/(h - l), with o the original context. (o, l, h) and (c·o, c·l, c·h) are the same
    rule, so l is 1, as in Llama.

    Raises:
        MoesmithError: the divisors do not come from such a rule.
    """
    wavelengths = [2 * math.pi * theta ** (2 * i / width) for i in range(width // 2)]
    if len(divisors) != len(wavelengths):
        raise MoesmithError(f"{file} has {len(divisors)} values in {FREQS} for {len(wavelengths)} frequencies", CURE)
    factor = max(divisors)
    pairs = list(zip(wavelengths, divisors, strict=True))
    between = [(1 / w, (1 / d - 1 / factor) / (1 - 1 / factor)) for w, d in pairs if 1 < d < factor]
    rules = [(float(original), 4.0) for original in (8192, round(context / factor), context)]
    if len(between) > 1:
        (x0, s0), (x1, s1) = between[0], between[-1]
        slope = (s0 - s1) / (x0 - x1)  # o/(h - 1)
        offset = slope * x0 - s0  # 1/(h - 1)
        if offset > 0:
            rules += [(float(round(slope / offset)), float(round(1 + 1 / offset, 3))), (slope / offset, 1 + 1 / offset)]
    else:  # at most one frequency between the two wavelengths: many rules give these divisors
        last = max((w for w, d in pairs if d == 1), default=wavelengths[0] / 2)
        first = min((w for w, d in pairs if d == factor), default=wavelengths[-1] * 2)
        middle = math.sqrt(last * first)
        rules += [((1 + (high - 1) * s) / x, high) for x, s in between for high in (4.0, 2.0, 1.1)]
        rules += [(middle, math.sqrt(middle / last))]
    for original, high in rules:
        if all(math.isclose(_divisor(w, factor, original, high), d, rel_tol=EXACT) for w, d in pairs):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original) if original.is_integer() else original,
            }
    raise MoesmithError(f"{file} has the tensor {FREQS}, whose divisors are not those of Llama 3.1's rule", CURE)


def _divisor(wavelength: float, factor: float, original: float, high: float) -> float:
    if wavelength < original / high:
        return 1.0
    if wavelength > original:
        return factor
    smooth = (original / wavelength - 1) / (high - 1)
    return 1 / ((1 - smooth) / factor + smooth)
