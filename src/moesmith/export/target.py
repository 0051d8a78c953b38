"""What a target is: whether it holds a model, what it drops, how it is written and proved; and its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from moesmith.arguments import parse_size
from moesmith.errors import MoesmithError
from moesmith.mixture.carving import Carving
from moesmith.mixture.home import Home, home_of, padding
from moesmith.parent.load import Parent
from moesmith.parent.structure import attention_window
from moesmith.run.folder import STOCK, Run, finished_of

Quant = Literal["f32", "bf16", "q8_0", "q4_k_m"]
WASTE = 0.05  # share of channels of zeros that is worth mentioning
SMALLEST = 1000  # bytes of a shard


@dataclass(frozen=True)
class Source:
    """A finished run, as given to every target.

    Attributes:
        parent: the dense parent.
        carving: the run's last carving.
        run: the run's folder.
        ids: held-out text of the run, (N, S) token ids.
    """

    parent: Parent
    carving: Carving
    run: Path
    ids: Tensor

    def metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics in a stage's manifest; empty if there is no such stage."""
        return Run(self.run).metrics(stage)

    @property
    def reach(self) -> int | None:
        """The longest text in which a runtime without sliding windows sees no more than the parent does."""
        window = attention_window(self.parent.config)
        longest = self.parent.config.max_position_embeddings
        return window if window is not None and window < longest else None

    @property
    def context(self) -> int | None:
        """The context to write for a runtime without sliding windows; ``None`` if the parent has none either."""
        window = attention_window(self.parent.config)
        return None if window is None else min(window, self.parent.config.max_position_embeddings)


@dataclass(frozen=True)
class Options:
    """What may be asked of a target; ``None`` and ``False`` mean not asked for.

    Attributes:
        quant: type of the weights in a GGUF file.
        untie: write the output head as a tensor of its own.
        shard_bytes: the most bytes in one file of weights.
    """

    quant: Quant | None = None
    untie: bool = False
    shard_bytes: int | None = None

    @classmethod
    def parse(cls, quant: str | None, untie: bool, shard_size: str | None) -> Options:
        """Parse options from the words of a command line.

        Raises:
            MoesmithError: an unknown quantisation, or an invalid size.
        """
        if quant is not None and quant not in get_args(Quant):
            raise MoesmithError(f"--quant {quant} is not known", f"Give one of {', '.join(get_args(Quant))}.")
        return cls(quant, untie, _shard(shard_size))  # type: ignore[arg-type]

    def given(self) -> dict[str, str]:
        """Return the options that were asked for: field and flag."""
        flags = {"quant": "--quant", "untie": "--untie", "shard_bytes": "--shard-size"}
        return {name: flag for name, flag in flags.items() if getattr(self, name) not in (None, False)}


def _shard(text: str | None) -> int | None:
    size = parse_size(text, "no size of a file")
    if size is not None and size < SMALLEST:
        raise MoesmithError(f"--shard-size {text} is too small", "Give 1KB or more, such as 5GB.")
    return size


class Target(Protocol):
    """One kind of export.

    Attributes:
        name: the word after ``--to``.
        takes: the fields of :class:`Options` that it supports; others are refused.
        suffix: the suffix of the file it writes; empty for a folder.
    """

    name: str
    takes: frozenset[str]
    suffix: str

    def explain(self, source: Source) -> str | None:
        """Name the one property that rules this target out, or ``None`` if it fits."""

    def lost(self, source: Source, options: Options | None) -> list[str]:
        """List what the source has but this target lacks, with these options or, if ``None``, with some options."""

    def write(self, source: Source, out: Path, options: Options) -> dict[str, Any]:
        """Write ``out``, which does not exist yet, whole or not at all.

        Returns:
            facts about what was written, JSON-able.

        Raises:
            MoesmithError: it does not fit, or cannot be written.
        """

    def verify(self, source: Source, out: Path, ids: Tensor) -> dict[str, Any]:
        """Load ``out`` in its runtime and compare it with the source on token ids (N, S).

        Returns:
            how much they differ, JSON-able.

        Raises:
            MoesmithError: they answer differently, or one fails to answer. ``out`` is only read.
        """

    def beside(self, out: Path) -> list[str]:
        """Return the names of files that :meth:`accompany` writes next to ``out``."""
        return []

    def accompany(self, source: Source, made: Path, out: Path) -> dict[str, Any]:
        """Write what belongs next to ``made``, a proved export that becomes ``out``; return the lines that serve it."""
        return {}


def stock_losses(source: Source, home: Home | None = None) -> list[str]:
    """List what a stock architecture drops of a carving, its cost in the run's own evaluation, and wasted space.

    Args:
        source: the model.
        home: how it would be written; if left out, as ``hf`` writes it.
    """
    found, carving = [], source.carving
    home = home or home_of(source.parent.family, carving)
    if any(attention.proj_in_RD is not None for attention in source.carving.attention):
        measured = source.metrics("evaluate")
        cost = ""
        if STOCK in measured:
            cost = f": perplexity {measured[finished_of(measured)]:.2f} -> {measured[STOCK]:.2f} on held-out text"
        found.append(f"attention's masks by token (V and O are whole){cost}")
    if source.carving.biased:
        kl = source.metrics("export").get("constant_channel_logits_kl")
        cost = "" if kl is None else f": mean KL {kl:.1e} nats on held-out text"
        found.append(f"exact biases (a constant channel stands in){cost}")
    if (zeros := padding(carving, home)) >= WASTE:
        found.append(f"room: {zeros:.0%} of the experts' channels on disk are zeros, for all must be {home.width} wide")
    if home.folded:
        found.append(f"room: the shared expert is written into each of {home.experts} experts")
    return found


def reach_loss(source: Source) -> list[str]:
    """Say what a runtime without sliding windows drops."""
    return [] if source.reach is None else [f"text beyond {source.reach:,} tokens: it knows no sliding window"]
