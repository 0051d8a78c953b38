"""Send calibration text through a decoder, one layer at a time: what a method sees of each layer.

All tokens wait in front of a layer, in memory or on disk. There a method may ask for statistics as often as it likes:
by group of text, or by any assignment of tokens to experts that it computes from the router's input. Then the tokens go
on: through the parent's layer (``dense``: one pass for all layers, if every layer is asked once), or through what the
method made of the layer (``carved``).

Batches pass a layer as in an ordinary forward pass, so statistics are the same to the last bit.

Shapes: B sequences, S positions, T tokens, D model width, F channels, E experts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.calibration.moments import Channel, Second, Sums, fast_products, rows_of, watch
from moesmith.calibration.view import Activations, Assign, LayerView, Stats, Tokens, spread
from moesmith.console import Meter, meter
from moesmith.errors import MoesmithError
from moesmith.parent.hooks import hidden_output
from moesmith.parent.layerwise import Call, Layered, Seen, layered, share, starts
from moesmith.parent.load import Parent
from moesmith.parent.mapped import give_back
from moesmith.parent.structure import put
from moesmith.world import crew

NOT_ADDED = "The parent does something to its networks' outputs before it adds them, and experts would make up for sums"
BATCH = 8  # windows per forward pass
WAITING = ".waiting"  # the folder of tokens that wait on disk
HEAVIEST = 10.0  # times the mean weight of a token
HELD, WORKED = 0.4, 0.5  # of a layer's time where tokens are held: to hold them, and the method's own work


def _energy(rows_BSD: Tensor) -> Tensor:
    """‖row‖² of every token, (T,) fp32 on the CPU."""
    return rows_BSD.float().square().sum(-1).flatten().cpu()


def buffers(activations: Activations, *, held: bool, repair: bool) -> int:
    """Count the places for hidden states of all tokens that a :class:`Stream` takes."""
    return (2 if activations == "dense" else 1) + (2 if held else 0) + (1 if repair else 0)


class Stream:
    """Text waiting between two layers; a context manager.

    Args:
        parent: the dense model.
        texts: token ids (N, window) by group and text.
        activations: what a layer sees: the parent's activations, or those after the carved layers before it.
        held: the method asks for all tokens of every layer, and changes nothing of a layer but its network; with
            carved activations only.
        repair: what these tokens should give makes up for what earlier carved layers lost; one more buffer and pass.
        around: the layers that tokens pass, where they are not the parent's in all but their networks: attention that
            is carved already. What tokens should give is the parent's in any case.
        folder: where tokens that do not fit into ``room`` wait on disk.
        room: bytes of memory for waiting tokens.
        batch: windows per forward pass.
        label: what the progress line says.
    """

    def __init__(
        self,
        parent: Parent,
        texts: Sequence[Sequence[Tensor]],
        activations: Activations = "dense",
        *,
        held: bool = False,
        repair: bool = False,
        around: Layered | None = None,
        folder: Path | None = None,
        room: int = 2**30,
        batch: int = BATCH,
        label: str = "carve",
    ) -> None:
        if held and activations == "dense":
            raise MoesmithError("a layer's tokens are held where activations are carved", "Set activations = 'carved'.")
        if repair and not parent.additive:
            raise MoesmithError(NOT_ADDED, "Set carve.repair to false.")
        self.parent, self.activations, self.label = parent, activations, label
        self.model = parent.turned(layered(parent.model))
        self.around = around or self.model
        parts = [(g, t, windows) for g, group in enumerate(texts) for t, windows in enumerate(group)]
        self.every = [ids for _, _, windows in parts for ids in windows.split(batch)]  # batches of all processes
        self.mine = list(crew().mine(range(len(self.every))))
        self.batches = [self.every[index] for index in self.mine]
        self.owner = crew().mine([(g, t) for g, t, windows in parts for _ in windows.split(batch)])
        self.texts = [len(group) for group in texts]
        self.tokens, self.total = (sum(ids.numel() for ids in some) for some in (self.batches, self.every))
        self.calls: dict[tuple[int, ...], list[Call]] = {}  # of every layer, by the shape of a batch
        self.index = self.position = 0  # of the layer, and of the batch that is passing it
        self.left = 1.0  # of the layer's work, for the progress bar
        self.passed = False  # whether the tokens have gone on from the layer of the last view
        self.scratch = None if folder is None else folder / f"{WAITING}{crew().rank or ''}"
        self._drop()  # left by a process that was killed
        places = buffers(activations, held=False, repair=repair) * self.tokens + 2 * held * self.total
        self.fits = places * parent.D * parent.dtype.itemsize <= room
        self.waiting = self._buffer("waiting")
        self.beyond = self._buffer("beyond") if activations == "dense" else []
        self.held = held  # then every process has all processes' batches of these two
        self.inputs, self.outputs = (self._buffer(name, self.every) if held else [] for name in ("inputs", "outputs"))
        self.intact = self._buffer("intact") if repair else []  # the parent's own states
        self.view: LayerView | None = None  # of this layer
        self.tokens_now: Tokens | None = None  # of this layer, once a method has asked; then states wait without them

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_error: Any) -> None:
        self.waiting, self.beyond, self.inputs, self.outputs, self.intact = [], [], [], [], []
        self.tokens_now = self.view = None
        self._drop()

    def _drop(self) -> None:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _buffer(self, name: str, batches: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Make a place for hidden states, (B, S, D) for every batch, on the CPU or, where all are too large, on disk.

        The parts follow each other in memory.

        Args:
            name: of the file on disk.
            batches: of token ids; this process's own if left out.
        """
        D, dtype, batches = self.parent.D, self.parent.dtype, self.batches if batches is None else batches
        sizes = [ids.numel() * D for ids in batches]
        if self.scratch is None or self.fits or not sizes:
            whole_N = torch.empty(sum(sizes), dtype=dtype)
        else:
            self.scratch.mkdir(exist_ok=True)
            whole_N = torch.from_file(str(self.scratch / name), shared=True, size=sum(sizes), dtype=dtype)
        parts = whole_N.split(sizes) if sizes else ()
        return [part.view(*ids.shape, D) for part, ids in zip(parts, batches, strict=True)]

    def _whole(self, buffer: list[Tensor]) -> Tensor:
        """Fetch other processes' batches of a buffer that has places for all; view its parts as one, (T, D)."""
        if not buffer:
            return torch.zeros(0, self.parent.D, dtype=self.parent.dtype)
        for number, part_BSD in enumerate(buffer):  # each into its place: a second copy of all text may not fit
            crew().hand_out(crew().owner(number), part_BSD)
        first = buffer[0]
        return first.as_strided((self.total, self.parent.D), (self.parent.D, 1), first.storage_offset())

    def views(self, generator: torch.Generator) -> Iterator[LayerView]:
        """Yield every layer in turn; ask each one before taking the next."""
        self.parent.model.eval()
        with torch.no_grad(), meter(self.label, self.tokens) as bar:
            self.bar: Meter = bar
            for state_BSD, (hidden_BSD, calls) in zip(self.waiting, starts(self.model, self.batches), strict=True):
                self.calls.setdefault(tuple(hidden_BSD.shape), calls)
                state_BSD.copy_(hidden_BSD)
            for state_BSD, hidden_BSD in zip(self.intact, self.waiting, strict=False):
                state_BSD.copy_(hidden_BSD)
            for index in range(self.parent.L):
                self.index, self.passed, self.left = index, False, 1.0
                self.view = LayerView(self.parent, index, generator, len(self.texts), self)
                yield self.view
                if not self.passed and index + 1 < self.parent.L:
                    self._on(lambda: self.around.layer(self.index))
                self.advance(1.0)  # what the last layer's text did not pass
                self.tokens_now = None
                if self.activations == "dense":
                    self.waiting, self.beyond = self.beyond, self.waiting

    def carved(self, make: Callable[[], nn.Module]) -> None:
        """Send the current layer's tokens on through its carved form; dense activations go on by themselves."""
        if self.activations == "carved" and self.index + 1 < self.parent.L:
            self._on(make)

    def _on(self, make: Callable[[], nn.Module]) -> None:
        """Send the tokens on to the next layer through a form of this one.

        Where the method holds tokens, they have passed the layer's attention already, and only its network is left;
        unless the layer does more to the network's output than to add it.
        """
        vars(self.view).pop("network", None)  # a copy would stand beside the layer that is made
        if not self.held or not self.parent.additive:
            self._pass(make(), keep=True)
            return
        self.hold(self.index)  # a layer that was carved before a restart goes the same way
        network, left = make().get_submodule(self._inside(self.index)), self.left
        for state_BSD, number in zip(self.waiting, self.mine, strict=True):
            x_BSD = self.inputs[number]
            rest_BSD = state_BSD.to(self.parent.device).float()
            state_BSD.copy_(rest_BSD + network(x_BSD.to(self.parent.device)).float())
            self.advance(left * self._share(state_BSD))
        self.passed = True
        del network
        give_back()

    def work(self, share: float) -> None:
        """Report a share of the method's own work on a layer's held tokens as done."""
        self.advance(WORKED * share)

    def advance(self, share: float) -> None:
        """Report a share of a layer's work as done; never more than the whole."""
        share = min(share, self.left)
        self.left -= share
        self.bar.advance(share * self.tokens / self.parent.L)

    def _share(self, state_BSD: Tensor) -> float:
        """What a batch is of all tokens."""
        return state_BSD.shape[0] * state_BSD.shape[1] / self.tokens

    def _pass(self, layer: nn.Module, *, keep: bool, which: Sequence[int] | None = None) -> None:
        """Run a layer over waiting batches, and ``keep`` its outputs for the next layer or not."""
        if self.tokens_now is not None and self.parent.additive:
            raise MoesmithError("this layer's text has passed its attention", "Ask for a layer's tokens() last.")
        into = self.beyond if self.activations == "dense" else self.waiting
        for position in range(len(self.batches)) if which is None else which:
            self.position, state_BSD = position, self.waiting[position]
            out_BSD = self._run(layer, state_BSD)
            if keep:
                into[position].copy_(out_BSD)
                self.advance(self._share(state_BSD))
        self.passed |= keep
        del layer
        give_back()

    def sample(self, index: int, tokens: int) -> Tensor:
        """See :meth:`LayerView.sample`."""
        found: dict[int, Tensor] = {}
        step = max(1, self.total // max(1, tokens))
        ffn, stream = self.parent.ffns[index], self
        few = max(1, len(self.every) // 64)  # not every batch, but every token of the chosen ones

        class Rows:
            def add(self, x_TD: Tensor) -> None:
                # a copy: a view would keep the whole batch
                rows_ND = x_TD[:: max(1, step // few)].to(torch.float32, copy=True)
                found[stream.mine[stream.position]] = rows_ND

        which = [position for position, number in enumerate(self.mine) if number % few == 0]
        with watch([ffn.module], [Rows()]):
            self._pass(self.around.layer(index), keep=False, which=which)
        if crew().size > 1:
            found = crew().merged({number: x_TD.cpu() for number, x_TD in found.items()})
        rows = torch.cat([found[number] for number in sorted(found)]).to(self.parent.device)
        return spread(rows, tokens)  # the first ones alone would be those of the first texts

    def hold(self, index: int) -> Tokens:
        """See :meth:`LayerView.tokens`.

        Where the parent was proved to add its network's output to the rest (``parent/proof``), the layer runs without
        its network, and what it gives takes the waiting states' place. Elsewhere, behind a norm or a factor, the layer
        runs twice, with its network and without: the difference is what becomes of the output.
        """
        if self.tokens_now is not None:
            return self.tokens_now
        if not self.held:
            raise MoesmithError("this stream holds no tokens", "Say so in the method's needs(): held=True.")
        layer = self.model.layer(index)
        around = layer if self.around is self.model else self.around.layer(index)
        seen, rest, network = Seen(), share(around), layer.get_submodule(self._inside(index))
        put(rest, self._inside(index), seen)
        # of every batch; a process may have none, and still takes part in what all exchange
        energies, shares, factors = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
        for position, state_BSD in enumerate(self.waiting):
            rest_BSD = self._run(rest, state_BSD)
            y_BSD = network(seen.x)
            if self.intact:  # what carved layers make of a token, or the parent's own where that is larger
                most_T = _energy(rest_BSD.float() + y_BSD.float())
                behind_BSD = self._run(layer, self.intact[position])
                self.intact[position].copy_(behind_BSD)
                y_BSD = behind_BSD.float() - rest_BSD.float()
                most_T = torch.maximum(_energy(behind_BSD), most_T)
            else:
                behind_BSD = rest_BSD + y_BSD if self.parent.additive else self._run(around, state_BSD)
                most_T = _energy(behind_BSD)
            energies.append(most_T.clamp_min(1e-20))
            shares.append(_energy(y_BSD if self.parent.additive else behind_BSD - rest_BSD) / energies[-1])
            if not self.parent.additive:  # how far an error of the output goes: as far as the output itself
                factors.append(shares[-1] * energies[-1] / _energy(y_BSD).clamp_min(1e-20))
            self.inputs[self.mine[position]].copy_(seen.x)
            self.outputs[self.mine[position]].copy_(y_BSD)
            if self.parent.additive:
                state_BSD.copy_(rest_BSD)
            self.advance(HELD * self._share(state_BSD))
        del layer, around, rest, network
        give_back()
        weight_T, share_T = 1 / self._everyones(torch.cat(energies)), self._everyones(torch.cat(shares))
        if not self.parent.additive:
            weight_T = weight_T * self._everyones(torch.cat(factors))
        weight_T = weight_T.clamp_max(HEAVIEST * float(weight_T.mean()))
        lengths = torch.tensor([ids.shape[1] for ids in self.every for _ in ids], dtype=torch.int64)
        sequence_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
        parts = self._whole(self.inputs), self._whole(self.outputs)
        self.tokens_now = Tokens(*parts, weight_T / weight_T.mean(), sequence_T, share_T)
        return self.tokens_now

    def _everyones(self, mine_T: Tensor) -> Tensor:
        """Put the numbers of all processes' tokens in the order of the text."""
        team = crew()
        if team.size == 1:
            return mine_T
        parts: list[Tensor] = [mine_T] * len(self.every)
        for rank, rows_T in enumerate(team.rows(mine_T)):
            numbers = range(len(self.every))[rank :: team.size]
            found = rows_T.split([self.every[number].numel() for number in numbers])
            for number, part in zip(numbers, found, strict=True):
                parts[number] = part
        return torch.cat(parts)

    def _run(self, layer: nn.Module, state_BSD: Tensor) -> Tensor:
        args, options = self.calls[tuple(state_BSD.shape)][self.index]
        out: Tensor = hidden_output(layer(state_BSD.to(self.parent.device), *args, **options))
        return out

    def _inside(self, index: int) -> str:
        """The name of a layer's network inside the layer."""
        return self.parent.ffns[index].path.removeprefix(f"{self.model.place}.{index}.")

    def statistics(self, index: int, assign: Assign | None, experts: int, *, gram: bool, parts: bool) -> list[Stats]:
        """See :meth:`LayerView.statistics`."""
        ffn, device = self.parent.ffns[index], self.parent.device
        if parts and assign is not None:
            raise MoesmithError("parts are moments of texts, but an assignment is not by text", "Leave parts out.")
        inputs = [Sums(self.parent.D, device) for _ in range(experts)]
        channels = [Sums(self.parent.F, device) for _ in range(experts if gram else 0)]
        texts = [[Channel() for _ in range(count)] for count in self.texts if parts]
        stream = self
        ids_T: Tensor | None = None

        class Inputs:
            def add(self, x_TD: Tensor) -> None:
                nonlocal ids_T
                group, _ = stream.owner[stream.position]
                if assign is None:
                    inputs[group].add(x_TD)
                else:
                    ids_T = assign(x_TD, group)
                    for expert, rows_ND, count in rows_of(x_TD, ids_T, experts):
                        inputs[expert].add(rows_ND, count)

        class Hidden:
            def add(self, a_TF: Tensor) -> None:
                group, text = stream.owner[stream.position]
                if parts:
                    texts[group][text].add(a_TF)
                if gram and assign is None:
                    channels[group].add(a_TF)
                elif gram:
                    assert ids_T is not None
                    for expert, rows_NF, count in rows_of(a_TF, ids_T, experts):
                        channels[expert].add(rows_NF, count)

        looked = [(ffn.module, Inputs()), *([(ffn.down, Hidden())] if gram or parts else [])]
        # the tokens may go on at once, through the parent's layer
        keep = self.activations == "dense" and not self.passed
        with fast_products(self.parent.dtype), watch(*zip(*looked, strict=True)):
            self._pass(self.around.layer(index), keep=keep)
        team, found = crew(), []
        counts = team.exchange([sums.count for sums in inputs])
        for expert, sums in enumerate(inputs):
            sums.count = sum(each[expert] for each in counts)
            team.add(sums.sum_N, sums.gram_NN)
            own = [_everyones(channel) for channel in texts[expert]] if parts else []
            found.append(Stats(sums.result(), self._owned(expert, channels, sums.count) if gram else None, own))
        return found

    def _owned(self, expert: int, channels: list[Sums], count: int) -> Second | None:
        """Add up all processes' moments of an expert's channels in its owner; the others let theirs go."""
        team, sums = crew(), channels[expert]
        sums.count, owner = count, team.owner(expert)
        team.reduce(owner, sums.sum_N, sums.gram_NN)
        channels[expert] = Sums()
        return sums.result() if owner == team.rank else None


def _everyones(channel: Channel) -> tuple[Tensor, Tensor]:
    """Mean and variance of a text whose batches several processes have read, (F,) fp32 on the CPU."""
    team = crew()
    if team.size == 1:
        return channel.result()
    some = [part for part in team.exchange((channel.count, *channel.result()) if channel.count else None) if part]
    count = sum(n for n, _, _ in some)
    mean_F = sum((n / count * mean.double() for n, mean, _ in some), torch.zeros((), dtype=torch.float64))
    square_F = sum((n / count * (var.double() + mean.double() ** 2) for n, mean, var in some), torch.zeros_like(mean_F))
    return mean_F.float(), (square_F - mean_F**2).clamp_min(0).float()
