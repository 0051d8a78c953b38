"""``--to sglang``: the dialect of a Hugging Face folder that SGLang reads correctly.

SGLang (read at 0.5.23) differs from transformers without an error: its MoE models never tie head and embedding, its
Mixtral reads only the base from ``rope_parameters``, its Mixtral and Qwen2-MoE take hidden_size / heads for the head's
width, and none of the three has a sliding window. So the head is written out, a Llama with scaled positions is written
as Qwen2-MoE with zero biases, and the context ends at the window. What is written is compared in transformers; SGLang
itself, which needs a GPU, is not run here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moesmith.errors import MoesmithError
from moesmith.export.stock.write import ARCHITECTURES, Layout, stock_reference, stock_refusal, write_stock
from moesmith.export.target import Options, Source, Target, reach_loss, stock_losses
from moesmith.export.verify import verify_folder
from moesmith.files.artefact import read_json
from moesmith.parent.load import Parent
from moesmith.parent.structure import head_dim, rope_of


class SGLang(Target):
    """Mixtral, Qwen2-MoE or Qwen3-MoE with the head untied."""

    name, takes, suffix = "sglang", frozenset({"untie", "shard_bytes"}), ""

    def explain(self, source: Source) -> str | None:
        """Name what no stock architecture holds, or what SGLang ignores."""
        parent, config = source.parent, source.parent.config
        if (refusal := stock_refusal(parent, source.carving)) is not None:
            return refusal[0]
        if (activation := parent.ffns[0].activation_name) != "silu":
            return f"SGLang's experts compute silu, and this model's compute {activation}"
        width, plain = head_dim(config), config.hidden_size // config.num_attention_heads
        if (dialect := dialect_of(parent)) != "qwen3_moe" and width != plain:
            return (
                f"SGLang's {ARCHITECTURES[dialect]} takes hidden_size / heads = {plain} for the width of a head,"
                f" and this model's is {width}"
            )
        return None

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """List masks by token, exact biases, and text beyond a sliding window."""
        return [*stock_losses(source), *reach_loss(source)]

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Write the folder in the parent's dtype; see :func:`stock.write_stock`."""
        layout = Layout(dialect_of(source.parent), untied=True, context=source.context, shard_bytes=options.shard_bytes)
        return write_stock(source.parent, source.carving, out, source.parent.model.dtype, layout)

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Compare logits in transformers, and check that SGLang would read the folder in the same way."""
        reference = stock_reference(source.parent, source.carving)
        found = verify_folder(source.parent, out, reference, ids[:, : source.reach])
        if (odd := misread(out)) is not None:
            raise MoesmithError(f"SGLang would misread {out}: {odd}", "Delete it if it is still there, and report it.")
        return found


def dialect_of(parent: Parent) -> str:
    """Choose the architecture to write: the parent's own, or Qwen2-MoE for a Mixtral with scaled positions."""
    scaled = rope_of(parent.config).get("rope_type", "default") != "default"
    return "qwen2_moe" if parent.family == "mixtral" and scaled else parent.family


def misread(folder: Path) -> str | None:
    """Say what SGLang would read in another way than transformers in this folder; ``None`` if nothing."""
    config = read_json(folder / "config.json")
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    kind = config["model_type"]
    if config.get("tie_word_embeddings") or "lm_head.weight" not in names:
        return "the head is not a tensor of its own"
    if kind == "mixtral" and "rope_scaling" in config:
        return "its Mixtral knows no scaling of positions"
    if kind != "mixtral" and not config.get("norm_topk_prob"):
        return "the gate's weights are not divided by their sum"
    if kind != "qwen3_moe" and config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]:
        return "the heads are not hidden_size / heads wide"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "it knows no sliding window"
    return None
