"""The carving: which channels of the parent's feed-forward networks each expert keeps, and who routes to it.

Every method ends in a carving and everything after it starts from one: the runnable model (``moe.build``),
training, evaluation, the report and the exports. It is a small delta on its parent: index lists, routers,
and what compensation or training changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moesmith.arguments import path_of
from moesmith.errors import MoesmithError
from moesmith.files.artefact import check_format, read_json, read_tensors
from moesmith.files.parse import as_written
from moesmith.files.write import write_json, write_tensors
from moesmith.mixture.attention import CarvedAttention
from moesmith.mixture.gates import GateSpec
from moesmith.mixture.layer import Analytic, Expert, Layer, Linear
from moesmith.parent.digests import model_digest
from moesmith.parent.load import Parent
from moesmith.parent.proof.family import NATIVE
from moesmith.parent.stored import DEEPEST, WIDEST

FORMAT = 3  # 2 added attention; 3 layers that differ, shared experts, sums, experts' own matrices
OWN = ("down_DF", "gate_FD", "up_FD")  # an expert's own matrices, each a tensor of its own in the file
ZEROS = 0.2  # the largest share of a stock folder's channels that may be there only to make experts equally wide
ROUTED = {"down_DF": "down", "gate_FD": "gate", "up_FD": "up"}


def _as(parent: Parent, dtype: torch.dtype) -> str:
    """Compute the digest that a parent's weights would have in another dtype."""
    rounded = ((name, tensor.to(dtype)) for name, tensor in parent.model.named_parameters())
    model: Any = SimpleNamespace(config=parent.config, named_parameters=lambda: rounded)
    return model_digest(model)


@dataclass(frozen=True)
class Header:
    """What ``carving.json`` says, without the tensors in the file next to it.

    Attributes:
        d_ff: the parent's FFN width F.
        gates: the gate of every layer.
        compensation: ``refit``, ``bias``, ``none``, or what the method calls it.
        provenance: where the carving came from.
    """

    d_ff: int
    gates: list[GateSpec]
    compensation: str
    provenance: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Header:
        """Read the header of a carving's folder, written by this version or an older one.

        Raises:
            MoesmithError: the folder holds no carving, or one of a newer format.
        """
        path = folder / "carving.json"
        found = read_json(path)
        with as_written(path):
            check_format(path, found["format"], FORMAT)
            # formats 1 and 2 have one gate for all layers
            gates = found["gates"] if "gates" in found else [found["gate"]] * min(found["layers"], DEEPEST)
            gates = [GateSpec.read(values) for values in gates]
            if not 1 <= found["d_ff"] <= WIDEST:
                raise ValueError(f"d_ff is {found['d_ff']}")
            return cls(int(found["d_ff"]), gates, str(found["compensation"]), dict(found["provenance"]))

    @property
    def experts(self) -> int:
        """Routed experts of the layer that has the most."""
        return max(gate.experts for gate in self.gates)

    @property
    def top_k(self) -> int:
        """Routed experts that a token visits in the layer where it visits the most."""
        return max(gate.top_k for gate in self.gates)


@dataclass
class Carving:
    """A Mixture-of-Experts as a delta on its parent. Its tensors are on the CPU, wherever the parent is.

    Attributes:
        layers: one :class:`~moesmith.mixture.layer.Layer` per decoder layer.
        d_ff: the parent's FFN width F.
        lora: of the routed experts, merged by :meth:`expert_weights`; ``"{layer}.{gate|up|down}.{A|B}"`` to
            (E, r, in) or (E, out, r); the scale alpha / r is already in B.
        norms: parent parameter name to the trained weight or bias of a norm.
        provenance: where it came from (method, recipe, hashes), JSON-able.
        attention: one :class:`CarvedAttention` per layer where attention is pruned as well (ToMoE), else empty.

    Example:
        >>> carving = Carving.load("RUN/stages/carve")        # doctest: +SKIP
        >>> carving.union().mean()                            # doctest: +SKIP
        tensor(0.83)
    """

    layers: list[Layer]
    d_ff: int
    lora: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    attention: list[CarvedAttention] = field(default_factory=list)

    @property
    def experts(self) -> int:
        """Routed experts of the layer that has the most."""
        return max(len(layer.routed) for layer in self.layers)

    @property
    def top_k(self) -> int:
        """Routed experts that a token visits in the layer where it visits the most."""
        return max(layer.top_k for layer in self.layers)

    @property
    def dense(self) -> tuple[int, ...]:
        """The layers that have a single expert where others have several: ordinary networks that every token uses."""
        single = [
            i for i, layer in enumerate(self.layers) if len(layer.experts) == 1 and layer.routed[0].bias_D is None
        ]
        return tuple(single) if self.experts > 1 else ()

    @property
    def sparse(self) -> list[Layer]:
        """The layers that are not :attr:`dense`."""
        dense = self.dense
        return [layer for index, layer in enumerate(self.layers) if index not in dense]

    @property
    def alike(self) -> bool:
        """Whether all layers that are not dense have as many experts, and tokens visit as many of them."""
        return len({(len(layer.routed), layer.top_k) for layer in self.sparse}) == 1

    @property
    def biased(self) -> bool:
        """Whether experts have biases of their own."""
        return any(expert.bias_D is not None for layer in self.layers for expert in layer.experts)

    @property
    def compensation(self) -> str:
        """What makes up for dropped channels: ``refit`` (experts' own ``down_proj``), ``bias`` or ``none``.

        A method that changes ``down_proj`` in another way names it in the provenance.
        """
        if named := self.provenance.get("compensation"):
            return str(named)
        if any(expert.down_DF is not None for layer in self.layers for expert in layer.experts):
            return "refit"
        return "bias" if self.biased else "none"

    def check(self, parent: Parent) -> None:
        """Refuse a parent that the carving was not made from.

        The digest of the parent's weights is compared if the carving's provenance names one. A parent in a wider
        dtype is rounded first; of one in a narrower dtype only the shapes can be compared.

        Raises:
            MoesmithError: its layers, widths or weights differ.
        """
        cure = "Give the dense model that it was made from."
        found = {"layers": (len(self.layers), parent.L), "channels": (self.d_ff, parent.F)}
        if self.layers and isinstance(router := self.layers[0].router, Linear):
            found["model width"] = (router.weight_ED.shape[-1], parent.D)
        for what, (mine, its) in found.items():
            if mine != its:
                raise MoesmithError(f"the carving has {what} {mine}, and {parent.source} has {its}", cure)
        for index, layer in enumerate(self.layers):
            try:
                layer.check(parent.D, self.d_ff)
            except MoesmithError as error:
                raise MoesmithError(f"layer {index} of the carving {error}", cure) from error
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
        """Count the channels kept per layer and routed expert, (L, E) int64; 0 where a layer has fewer experts."""
        found = torch.zeros(len(self.layers), self.experts, dtype=torch.int64)
        for row, layer in zip(found, self.layers, strict=True):
            row[: len(layer.routed)] = torch.tensor(layer.widths)
        return found

    def mask(self, layer: int) -> Tensor:
        """Return the layer's channel masks, (E, F) bool."""
        return self.layers[layer].mask(self.d_ff)

    def overlap(self) -> Tensor:
        """Compare two experts' channels: intersection over union, (L, E, E) in [0, 1]; NaN where one is missing."""
        found = torch.full((len(self.layers), self.experts, self.experts), torch.nan)
        for index, layer in enumerate(self.layers):
            mask_EF = self.mask(index).float()
            both_EE = mask_EF @ mask_EF.T
            sizes_E = mask_EF.sum(-1)
            E = len(layer.routed)
            found[index, :E, :E] = both_EE / (sizes_E[:, None] + sizes_E[None, :] - both_EE)
        return found

    def union(self) -> Tensor:
        """Compute the share of the parent's channels that at least one expert keeps, (L,) in [0, 1]."""
        kept_LF = torch.zeros(len(self.layers), self.d_ff)
        for kept_F, layer in zip(kept_LF, self.layers, strict=True):
            for expert in layer.experts:
                kept_F[expert.channels] = 1
        return kept_LF.mean(1)

    def expert_weights(self, parent: Parent, layer: int, expert: int | Expert) -> tuple[Tensor, Tensor | None, Tensor]:
        """Merge one expert's weights in fp32: gate (F_e, D), up (F_e, D) or ``None`` without a gate, down (D, F_e).

        The expert's own matrices and LoRA are merged, on the parent's device. Biases: :meth:`expert_biases`.

        Args:
            parent: the dense model.
            layer: the layer's index.
            expert: a routed expert's index, or the shared expert itself.
        """
        number = expert if isinstance(expert, int) else None
        one = self.layers[layer].routed[expert] if isinstance(expert, int) else expert
        ffn = parent.ffns[layer]
        kept = one.channels.to(ffn.gate_FD.device)
        weights = {
            "gate": ffn.gate_FD[kept].float() if one.gate_FD is None else one.gate_FD.to(kept.device).float(),
            "down": ffn.down_DF[:, kept].float() if one.down_DF is None else one.down_DF.to(kept.device).float(),
        }
        if ffn.up_FD is not None:
            weights["up"] = ffn.up_FD[kept].float() if one.up_FD is None else one.up_FD.to(kept.device).float()
        for name, weight in weights.items():
            if number is not None and f"{layer}.{name}.A" in self.lora:
                A_rI, B_Or = (self.lora[f"{layer}.{name}.{half}"][number].float() for half in "AB")
                if name == "down":  # ragged experts: A's columns beyond this expert's width are padding
                    A_rI = A_rI[:, : len(kept)]
                else:
                    B_Or = B_Or[: len(kept)]
                # in double precision and on the CPU the product is the same on every machine and for every device
                weights[name] = weight + (B_Or.double() @ A_rI.double()).float().to(weight.device)
        return weights["gate"], weights.get("up"), weights["down"]

    def expert_biases(
        self, parent: Parent, layer: int, expert: int | Expert
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return one expert's fp32 biases: of gate and up (F_e,), of its output (D,); ``None`` where there is none.

        The output bias includes the parent's: all of it if the weights of a token's experts sum to 1, 1/K of it if
        every chosen expert counts in full, none of it in a shared expert. The expert's own bias is added.
        """
        carved, ffn = self.layers[layer], parent.ffns[layer]
        one = carved.routed[expert] if isinstance(expert, int) else expert
        *inner, down_bias_D = ffn.biases
        device = ffn.gate_FD.device
        gate_bias_F, up_bias_F = (None if b is None else b[one.channels.to(device)].float() for b in inner)
        if down_bias_D is not None and one is carved.shared:
            down_bias_D = None
        elif down_bias_D is not None and carved.mix == "sum":
            down_bias_D = down_bias_D.float() / carved.top_k
        given = [part.to(device, torch.float32) for part in (down_bias_D, one.bias_D) if part is not None]
        return gate_bias_F, up_bias_F, torch.stack(given).sum(0) if given else None

    @property
    def subsets(self) -> bool:
        """Whether experts are subsets of the parent's own channels, so that each channel need be stored only once."""
        plain = all(expert.plain for layer in self.layers for expert in layer.routed)
        return self.experts > 1 and plain and not self.lora

    def is_native(self, parent: Parent) -> bool:
        """Whether ``RUN/model`` is in moesmith's own format.

        That is so if no stock architecture holds the parent's decoder, the routers, or layers that differ in experts or
        top-k, but for dense ones; if attention is carved; and if experts differ so much in width that a stock folder,
        where all are as wide as the widest, would be zeros by more than :data:`ZEROS`.
        """
        widths = torch.cat([torch.tensor(layer.widths, dtype=torch.float32) for layer in self.sparse])
        padded = 1 - float(widths.mean() / widths.max()) > ZEROS
        routers = zip((layer.router for layer in self.layers), parent.ffns, strict=False)
        linear = all(isinstance(router, Linear) or router.linear(ffn) for router, ffn in routers)
        return parent.family == NATIVE or bool(self.attention) or not self.alike or not linear or padded

    def save(self, folder: str | Path) -> None:
        """Write ``carving.safetensors`` and ``carving.json`` into ``folder``."""
        folder = path_of("folder", folder)
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            tensors |= {f"{index}.{name}": value for name, value in _tensors(layer).items()}
        for index, attention in enumerate(self.attention):
            tensors |= {f"{index}.attention.{name}": value for name, value in attention.tensors().items()}
        tensors |= {f"lora.{name}": value for name, value in self.lora.items()}
        tensors |= {f"norm.{name}": value for name, value in self.norms.items()}
        write_tensors(folder / "carving.safetensors", tensors)
        header = {"format": FORMAT, "d_ff": self.d_ff, "gates": [layer.gate().model_dump() for layer in self.layers]}
        header |= {"compensation": self.compensation, "provenance": self.provenance}
        write_json(folder / "carving.json", header)

    @classmethod
    def load(cls, folder: str | Path) -> Carving:
        """Read what :meth:`save` wrote, in this version or an older one.

        Raises:
            MoesmithError: the folder holds no carving, or one of a newer format.
        """
        folder = path_of("folder", folder)
        header = Header.read(folder)
        tensors = read_tensors(folder / "carving.safetensors")
        if "widths" in tensors:  # formats 1 and 2: one tensor for all layers
            tensors |= {f"{index}.widths": row_E for index, row_E in enumerate(tensors.pop("widths"))}

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}

        with as_written(folder / "carving.safetensors"):
            gated = [part(f"{index}.attention.") for index in range(len(header.gates))]
            return cls(
                layers=[_layer(part(f"{index}."), gate) for index, gate in enumerate(header.gates)],
                d_ff=header.d_ff,
                lora=part("lora."),
                norms=part("norm."),
                provenance=header.provenance,
                attention=[CarvedAttention(**tensors) for tensors in gated if tensors],
            )


def _tensors(layer: Layer) -> dict[str, Tensor]:
    """Return a layer's tensors by the names that they have in a file."""
    router, shared = layer.router, layer.shared
    found = {
        "widths": torch.tensor(layer.widths, dtype=torch.int32),
        "channels": torch.cat([expert.channels for expert in layer.routed]).to(torch.int32),
    }
    if isinstance(router, Linear):
        found |= {"router_ED": router.weight_ED}
        found |= {} if router.noise_ED is None else {"noise_ED": router.noise_ED}
    else:
        found[f"router_{router.reads}"] = router.channels.to(torch.int32)
    for index, expert in enumerate(layer.routed):
        found |= {f"{ROUTED[n]}.{index}": value for n in OWN if (value := getattr(expert, n)) is not None}
    biases = [expert.bias_D for expert in layer.routed if expert.bias_D is not None]
    if biases:
        found["bias_ED"] = torch.stack(biases)
    if layer.constant_D is not None:
        found["constant_D"] = layer.constant_D
    if shared is not None:
        found["shared.channels"] = shared.channels.to(torch.int32)
        found |= {f"shared.{n}": value for n in (*OWN, "bias_D") if (value := getattr(shared, n)) is not None}
    return found


def _layer(found: Mapping[str, Tensor], gate: GateSpec) -> Layer:
    """Rebuild a layer from its tensors, the reverse of :func:`_tensors`."""
    channels = found["channels"].long().split(found["widths"].tolist())
    biases = found.get("bias_ED")
    routed = [
        Expert(
            kept,
            bias_D=None if biases is None else biases[index],
            **{name: found.get(f"{ROUTED[name]}.{index}") for name in OWN},
        )
        for index, kept in enumerate(channels)
    ]
    router: Linear | Analytic
    if "router_ED" in found:
        router = Linear(found["router_ED"], found.get("noise_ED"))
    else:
        reads: Any = "hidden" if "router_hidden" in found else "gate"
        router = Analytic(found[f"router_{reads}"].long(), reads)
    shared = None
    if "shared.channels" in found:
        own = {name: found.get(f"shared.{name}") for name in (*OWN, "bias_D")}
        shared = Expert(found["shared.channels"].long(), **own)
    return Layer(routed, router, gate.top_k, gate.mix, gate.noise, shared, found.get("constant_D"))
