"""The carving: which channels of the parent's feed-forward networks each expert keeps, and who routes to it.

Every method ends in a carving and everything after it starts from one: the runnable model (``moe.build``),
training, evaluation, the report and the exports. It is a small delta on its parent: index lists, routers,
and what compensation or training changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moesmith.arguments import path_of
from moesmith.artefact import read_json, read_tensors, write_json, write_tensors
from moesmith.attention import CarvedAttention
from moesmith.digests import model_digest
from moesmith.errors import MoesmithError
from moesmith.gates import GateSpec
from moesmith.parents import Parent
from moesmith.proof import NATIVE
from moesmith.recipe import Compensation
from moesmith.sizes import Sizes
from moesmith.structure import attention_weights, decoder_layers

FORMAT = 2  # 2: attention
ALIGN = 32  # channels of a stock expert; quantisation blocks and grouped matrix kernels want multiples of it


def _as(parent: Parent, dtype: torch.dtype) -> str:
    """The digest that a parent's weights have in another dtype."""
    rounded = ((name, tensor.to(dtype)) for name, tensor in parent.model.named_parameters())
    model: Any = SimpleNamespace(config=parent.config, named_parameters=lambda: rounded)
    return model_digest(model)


@dataclass
class CarvedLayer:
    """One layer's experts.

    Attributes:
        channels: E sorted int64 vectors, the kept rows of gate/up and columns of down; widths may differ.
        router_ED: router matrix (E, D), fp32, bias-free.
        noise_ED: noise matrix of DIVE's training gate (E, D), or ``None``.
        bias_ED: FLAP's compensation bias (E, D) fp32 when the carving's compensation is ``bias``.
        constant_D: v with v·x ≈ 1 on router inputs (``router.constant_direction``); carries a bias in a stock file.
        down: E refitted ``down_proj`` matrices (D, F_e) when the compensation is ``refit``.
    """

    channels: list[Tensor]
    router_ED: Tensor
    noise_ED: Tensor | None = None
    bias_ED: Tensor | None = None
    constant_D: Tensor | None = None
    down: list[Tensor] | None = None


@dataclass
class Carving:
    """A Mixture-of-Experts as a delta on its parent. Its tensors are the CPU's, wherever the parent is.

    Attributes:
        layers: one :class:`CarvedLayer` per decoder layer.
        gate: the gate's semantics.
        d_ff: the parent's FFN width F.
        compensation: ``none``, ``bias`` (FLAP's, dive.md §3.3) or ``refit`` (ridge least squares, ``refit.py``).
        lora: merged by :meth:`expert_weights`; ``"{layer}.{gate|up|down}.{A|B}"`` to (E, r, in) or (E, out, r);
            the scale alpha / r is already in B.
        norms: parent parameter name to the trained weight or bias of a norm.
        provenance: where it came from (method, recipe, hashes), JSON-able.
        attention: one :class:`CarvedAttention` per layer where attention is pruned as well (ToMoE), else empty.

    Example:
        >>> carving = Carving.load("RUN/stages/carve")        # doctest: +SKIP
        >>> carving.union().mean()                            # doctest: +SKIP
        tensor(0.83)
    """

    layers: list[CarvedLayer]
    gate: GateSpec
    d_ff: int
    compensation: Compensation = "none"
    lora: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    attention: list[CarvedAttention] = field(default_factory=list)

    def check(self, parent: Parent) -> None:
        """Refuse a parent that the carving was not made from.

        The digest of the parent's weights is compared where the carving's provenance names one. A parent in a wider
        dtype is rounded for that; in a narrower one it cannot be told, and its shapes have to do.

        Raises:
            MoesmithError: its layers or widths are others, or its weights.
        """
        cure = "Give the dense model that it was made from."
        E, D = self.gate.experts, parent.D
        found = {
            "layers": (len(self.layers), parent.L),
            "channels": (self.d_ff, parent.F),
            "model width": (self.layers[0].router_ED.shape[-1] if self.layers else D, D),
        }
        for what, (mine, its) in found.items():
            if mine != its:
                raise MoesmithError(f"the carving has {what} {mine}, and {parent.source} has {its}", cure)
        for index, layer in enumerate(self.layers):
            if len(layer.channels) != E or len(layer.router_ED) != E:
                raise MoesmithError(f"layer {index} of the carving does not have the gate's {E} experts")
            if any(len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < self.d_ff for kept in layer.channels):
                raise MoesmithError(f"layer {index} of the carving keeps channels that are not there", cure)
        made = self.provenance.get("parent", {})
        known, dtype = made.get("model_digest"), getattr(torch, str(made.get("dtype")), None)
        if not known or not parent.digest or known == parent.digest or dtype is None:
            return
        if dtype == parent.model.dtype or (
            dtype.itemsize < parent.model.dtype.itemsize and known != _as(parent, dtype)
        ):
            raise MoesmithError(
                f"{parent.source} is not the parent of this carving (weights {parent.digest}, not {known})", cure
            )

    def widths(self) -> Tensor:
        """Kept channels per layer and expert, (L, E) int64."""
        return torch.tensor([[len(kept) for kept in layer.channels] for layer in self.layers])

    def stock_width(self) -> int:
        """Expert width in a stock folder: the widest expert and a bias's channel, rounded up to :data:`ALIGN`."""
        widest = int(self.widths().max()) + (self.compensation == "bias")
        return -(-widest // ALIGN) * ALIGN

    def mask(self, layer: int) -> Tensor:
        """The layer's channel masks, (E, F) bool."""
        mask_EF = torch.zeros(self.gate.experts, self.d_ff, dtype=torch.bool)
        for expert, kept in enumerate(self.layers[layer].channels):
            mask_EF[expert, kept] = True
        return mask_EF

    def overlap(self) -> Tensor:
        """Intersection over union of every two experts' channels, (L, E, E) in [0, 1]."""
        layers = []
        for index in range(len(self.layers)):
            mask_EF = self.mask(index).float()
            both_EE = mask_EF @ mask_EF.T
            sizes_E = mask_EF.sum(-1)
            layers.append(both_EE / (sizes_E[:, None] + sizes_E[None, :] - both_EE))
        return torch.stack(layers)

    def union(self) -> Tensor:
        """Share of the parent's channels that at least one expert keeps, (L,) in [0, 1]."""
        return torch.stack([self.mask(i).any(0).float().mean() for i in range(len(self.layers))])

    def expert_weights(self, parent: Parent, layer: int, expert: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """One expert's merged weights in fp32: gate (F_e, D), up (F_e, D) or ``None`` without a gate, down (D, F_e).

        On the parent's device. Compensation by refit and LoRA are merged; biases are :meth:`expert_biases`.
        """
        carved, ffn = self.layers[layer], parent.ffns[layer]
        kept = carved.channels[expert].to(ffn.gate_FD.device)
        weights = {
            "gate": ffn.gate_FD[kept].float(),
            "down": ffn.down_DF[:, kept].float()
            if carved.down is None
            else carved.down[expert].to(kept.device).float(),
        }
        if ffn.up_FD is not None:
            weights["up"] = ffn.up_FD[kept].float()
        for name, weight in weights.items():
            if f"{layer}.{name}.A" in self.lora:
                A_rI, B_Or = (self.lora[f"{layer}.{name}.{half}"][expert].float() for half in "AB")
                if name == "down":  # ragged experts: A's columns beyond this expert's width are padding
                    A_rI = A_rI[:, : len(kept)]
                else:
                    B_Or = B_Or[: len(kept)]
                # in double precision and on the CPU the product is the same on every machine and for every device
                weights[name] = weight + (B_Or.double() @ A_rI.double()).float().to(weight.device)
        return weights["gate"], weights.get("up"), weights["down"]

    def expert_biases(self, parent: Parent, layer: int, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """One expert's biases in fp32: of its gate rows (F_e,) and of its output (D,); ``None`` where there is none.

        The output's is the parent's own, whole, since the weights of a token's experts sum to 1; a compensation bias
        is added to it.
        """
        carved, ffn = self.layers[layer], parent.ffns[layer]
        gate_bias_F, device = ffn.gate_bias_F, ffn.gate_FD.device
        if gate_bias_F is not None:
            gate_bias_F = gate_bias_F[carved.channels[expert].to(device)].float()
        parts = [ffn.down_bias_D, None if carved.bias_ED is None else carved.bias_ED[expert]]
        given = [part.to(device, torch.float32) for part in parts if part is not None]
        return gate_bias_F, torch.stack(given).sum(0) if given else None

    @property
    def subsets(self) -> bool:
        """Whether experts are subsets of the parent's own channels, so that each channel need be stored once only."""
        return self.gate.experts > 1 and self.compensation != "refit" and not self.lora

    def active_share(self, parent: Parent) -> float:
        """Active parameters over the parent's, block matrices only, each layer's widest expert counted (tomoe.md §3.5).

        The number a ToMoE budget fixes; for experts of equal width it is the exact share of every token.
        """
        sizes = Sizes.of(parent)
        active = sum(sizes.ffn(width * self.gate.top_k) for width in self.widths().amax(1).tolist())
        widths = [(a.width_qk, a.width_vo) for a in self.attention] or [(sizes.h, sizes.h)] * sizes.L
        return (active + sum(sizes.attention(qk, vo) for qk, vo in widths)) / sizes.total

    def is_native(self, parent: Parent) -> bool:
        """Whether ``RUN/model`` is in moesmith's own format: no stock architecture holds the parent, or attention."""
        return parent.family == NATIVE or bool(self.attention)

    def parameters(self, parent: Parent, native: bool | None = None) -> dict[str, int]:
        """Parameter counts: the parent's, and the MoE's in total and active per token.

        The total is the number of weights in the files of ``RUN/model``, embeddings included: in our own format experts
        that are subsets of one network share their channels, other experts are padded to their layer's widest, and
        attention has the dimensions that some token keeps; in a stock folder all experts have one width, rounded up, a
        bias is one more channel, and Qwen2-MoE has a shared expert of zeros. Index lists and a gate's bool and scalar
        values are no weights. Active is the total without the experts that a token does not visit.

        Args:
            parent: the dense parent, or its shapes.
            native: count for our own format, or for a stock folder; ``RUN/model``'s (:meth:`is_native`) if ``None``.
        """
        native = self.is_native(parent) if native is None else native
        first, dense = parent.ffns[0], sum(p.numel() for p in parent.model.parameters())
        E, K, L, D = self.gate.experts, self.gate.top_k, parent.L, parent.D
        channel = first.matrices * D + (first.gate_bias_F is not None)
        rest = dense - L * (channel * parent.F + (0 if first.down_bias_D is None else D)) + L * E * D  # routers
        counts = {"parent_parameters": dense}
        if not native:
            width = self.stock_width()
            zeros = 3 * ALIGN * D + D if parent.family == "qwen2_moe" else 0
            total = rest + L * (E * width * channel + zeros)
            return counts | {"parameters_total": total, "parameters_active": total - L * (E - K) * width * channel}
        bias = D if self.compensation == "bias" or first.down_bias_D is not None else 0
        widths_LE = self.widths()
        if self.subsets:
            stored = sum(int(self.mask(i).any(0).sum()) for i in range(L))
            # a token's expert is not known beforehand: the layer's mean width
            used = float(widths_LE.double().mean(1).sum()) * K
        else:
            widest = int(widths_LE.amax(1).sum())
            stored, used = E * widest, K * widest
        total = rest + stored * channel + L * E * bias
        active = rest + round(used * channel) + L * K * bias
        layers = decoder_layers(parent.model)[1]
        for layer, attention in zip(layers, self.attention, strict=bool(self.attention)):
            weights, gate = attention_weights(layer, parent.config), attention.gate_parameters()
            total += gate - attention.removed(weights, active=False)
            active += gate - attention.removed(weights, active=True)
        return counts | {"parameters_total": total, "parameters_active": active}

    def save(self, folder: str | Path) -> None:
        """Write ``carving.safetensors`` and ``carving.json`` into ``folder``."""
        folder = path_of("folder", folder)
        tensors: dict[str, Tensor] = {"widths": self.widths().to(torch.int32)}
        for index, layer in enumerate(self.layers):
            tensors[f"{index}.channels"] = torch.cat(layer.channels).to(torch.int32)
            for name in ("router_ED", "noise_ED", "bias_ED", "constant_D"):
                if (value := getattr(layer, name)) is not None:
                    tensors[f"{index}.{name}"] = value
            for expert, down_DF in enumerate(layer.down or ()):
                tensors[f"{index}.down.{expert}"] = down_DF
        for index, attention in enumerate(self.attention):
            tensors |= {f"{index}.attention.{name}": value for name, value in attention.tensors().items()}
        tensors |= {f"lora.{name}": value for name, value in self.lora.items()}
        tensors |= {f"norm.{name}": value for name, value in self.norms.items()}
        write_tensors(folder / "carving.safetensors", tensors)
        header = {"format": FORMAT, "gate": self.gate.model_dump(), "d_ff": self.d_ff, "layers": len(self.layers)}
        header |= {"compensation": self.compensation, "provenance": self.provenance}
        write_json(folder / "carving.json", header)

    @classmethod
    def load(cls, folder: str | Path) -> Carving:
        """Read what :meth:`save` wrote.

        Raises:
            MoesmithError: the folder holds no carving, or one of a newer format.
        """
        folder = path_of("folder", folder)
        header = read_json(folder / "carving.json")
        if header["format"] > FORMAT:
            raise MoesmithError(f"{folder} was written by a newer moesmith", "Upgrade moesmith to read it.")
        tensors = read_tensors(folder / "carving.safetensors")
        experts = header["gate"]["experts"]
        layers = []
        for index in range(header["layers"]):
            widths = tensors["widths"][index].tolist()
            down = [tensors[f"{index}.down.{e}"] for e in range(experts)] if f"{index}.down.0" in tensors else None
            layers.append(
                CarvedLayer(
                    channels=list(tensors[f"{index}.channels"].long().split(widths)),
                    router_ED=tensors[f"{index}.router_ED"],
                    noise_ED=tensors.get(f"{index}.noise_ED"),
                    bias_ED=tensors.get(f"{index}.bias_ED"),
                    constant_D=tensors.get(f"{index}.constant_D"),
                    down=down,
                )
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}

        gated = [part(f"{index}.attention.") for index in range(header["layers"])]
        return cls(
            layers=layers,
            gate=GateSpec(**header["gate"]),
            d_ff=header["d_ff"],
            compensation=header["compensation"],
            lora=part("lora."),
            norms=part("norm."),
            provenance=header["provenance"],
            attention=[CarvedAttention(**tensors) for tensors in gated if tensors],
        )
