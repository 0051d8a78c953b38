"""Speed and memory of ToMoE, each as a ratio within one run on SmolLM2-135M.

python benchmarks/tomoe_speed.py --out benchmarks/results/tomoe_speed.json      # about 5 minutes on two idle cores
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speed import Step, blocks, peak_memory, ratio
from torch import Tensor

from moesmith.export.native import write_native
from moesmith.files.write import write_json
from moesmith.methods.tomoe import hypernetwork
from moesmith.methods.tomoe.estimators import exponential, masked_reference
from moesmith.methods.tomoe.harvest import harvest
from moesmith.methods.tomoe.hypernetwork import Masks
from moesmith.methods.tomoe.objective import MaskObjective
from moesmith.methods.tomoe.settings import MasksSection
from moesmith.methods.tomoe.student import masked_model
from moesmith.mixture.folder import load_folder
from moesmith.parent.load import Parent, load_parent
from moesmith.parent.sizes import Sizes
from moesmith.run.versions import versions
from moesmith.training.loop import Masters

PEAKS = ("ours", "transcribed")


def mask_step(parent: Parent, ids: Tensor, objective: type[MaskObjective] = MaskObjective, **settings: Any) -> Step:
    """A whole training step: teacher, student, loss, backward, optimiser."""
    spec = MasksSection(tokens=1024, weight_decay=0.05, **settings)
    masks = Masks(Sizes.of(parent), 8, spec, 0)
    student = objective(masked_model(parent, masks), parent.model, masks, spec)
    masters = Masters(dict(masks.named_parameters()), spec)

    def step() -> None:
        student(ids).backward()
        masters.step(1e-3, None)

    return step


class Transcribed(MaskObjective):
    """The loss as the published code writes it: both sets of logits of the whole sequence in fp32."""

    def forward(self, ids_BS: Tensor) -> Tensor:
        """As the objective, without chunks."""
        self.masks.draw()
        with torch.no_grad():
            wanted = self._teacher[0](input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        given = self.model(input_ids=ids_BS, use_cache=False).logits.float().log_softmax(-1)
        kl = F.kl_div(given[:, :-1], wanted[:, :-1], log_target=True, reduction="none").sum(-1).mean()
        return self.spec.kl_weight * kl + self.penalties()[0]


def _per_token(
    v_TF: Tensor, h_TR: Tensor, decoder_FR: Tensor, logits_NF: Tensor, ids_T: Tensor, **given: Any
) -> Tensor:
    noise_TF = exponential(*v_TF.shape, like=v_TF)
    kept = {name: given[name] for name in ("temperature", "bias", "double")}
    return masked_reference(v_TF, h_TR, decoder_FR, noise_TF, **kept)


@contextmanager
def transcribed() -> Iterator[None]:
    """Inside the ``with`` every token has fp32 mask logits of its own, in plain autograd."""
    ours = hypernetwork.masked
    hypernetwork.masked = _per_token
    try:
        yield
    finally:
        hypernetwork.masked = ours


def memory(model: str, tokens: int) -> dict[str, Any]:
    """Growth of the peak by one step, and by the transcription's, each in a fresh process: what an earlier step freed
    stays with the allocator and would hide the next one's growth."""
    found = []
    for which in PEAKS:
        words = [sys.executable, __file__, "--model", model, "--peak", which, "--tokens", str(tokens)]
        answer = subprocess.run(words, capture_output=True, text=True, check=True)
        found.append(int(answer.stdout.split()[-1]))
    ours, other = found
    return {"ratio": round(ours / other, 3), "at_most": 0.5, "bytes_ours": ours, "bytes_other": other}


def peak(parent: Parent, which: str, tokens: int) -> int:
    """Bytes by which one step raises the peak, after a short step that makes what stays."""
    ids = blocks(parent, tokens, tokens)
    with transcribed() if which == "transcribed" else nullcontext():
        objective = Transcribed if which == "transcribed" else MaskObjective
        step = mask_step(parent, ids, objective)
        mask_step(parent, ids[:, :64], objective)()
        return peak_memory(step)


def prefill(parent: Parent, ids: Tensor, rounds: int, **settings: Any) -> dict[str, float]:
    """512 tokens through the exported native model over the parent; which masks are random does not matter."""
    masks = Masks(Sizes.of(parent), 8, MasksSection(tokens=1024, budget=0.5, **settings), 0)
    carving, facts = harvest(masks, parent, ids, {})
    with tempfile.TemporaryDirectory() as folder:
        write_native(parent, carving, Path(folder) / "native")
        native: Any = load_folder(Path(folder) / "native", parent.model.dtype)

        def run(model: Any) -> Step:
            def forward() -> None:
                with torch.inference_mode():
                    model(input_ids=ids, use_cache=False)

            return forward

        found = ratio(run(native), run(parent.model), rounds)
    return found | {
        name: round(float(facts[name]), 4)
        for name in ("active_share", "width_ffn", "width_qk", "width_vo")
        if name in facts
    }


def main() -> None:
    """Measure and write JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--out", type=Path)
    options.add_argument("--peak", choices=PEAKS, help="print the peak of one step and end")
    options.add_argument("--tokens", type=int, default=2048, help="of --peak")
    given = options.parse_args()
    parent = load_parent(given.model)
    if given.peak:
        print(peak(parent, given.peak, given.tokens))
        return
    ids = blocks(parent, 512, 512)

    def plain() -> None:
        with torch.no_grad():
            parent.model(input_ids=ids, use_cache=False)

    found: dict[str, Any] = {}
    for noise in ("token", "expert"):
        title = f"training step of 512 tokens, noise per {noise}: time over a plain forward pass"
        found[title] = ratio(mask_step(parent, ids, noise=noise), plain, given.rounds) | {"at_most": 4.5}
        print(title, json.dumps(found[title]), flush=True)
    for label, settings in (("", {}), (", attention whole", {"attention": "none"})):
        title = f"exported native model at p = 0.5{label}, prefill of 512 tokens: time over the parent's"
        found[title] = prefill(parent, ids, given.rounds, **settings)
        print(title, json.dumps(found[title]), flush=True)
    title = "training step of 2,048 tokens: peak memory over a straight transcription's"
    found[title] = memory(given.model, 2048)
    print(title, json.dumps(found[title]), flush=True)
    if given.out:
        setting = {"model": given.model, "rounds": given.rounds, "threads": torch.get_num_threads()}
        write_json(given.out, {"setting": setting | versions(), "results": found})


if __name__ == "__main__":
    main()
