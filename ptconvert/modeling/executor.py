"""The executor: a lowered schedule becomes calls to an engine's layers and all-reduces.

It works on the tracks that are local to this process, all n of them in one process or n/R on each
of R ranks, and is the only place that walks a schedule's program over tensors: transformers'
layers run under it (`TorchEngine`), and those of every serving engine. Shape suffixes: B batch,
S sequence, D residual stream width.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ptconvert.schedule.lower import Step
from ptconvert.schedule.stages import Sublayer

# A value of each local track: one tensor where all of them agree, else one tensor per track.
PerTrack = list[torch.Tensor]
# What joins the stream, from the sum over all tracks of what a sublayer gives; both BSD.
Normed = Callable[[torch.Tensor], torch.Tensor]
# What the stream is multiplied by after a layer, by its index; None where it isn't.
Scalar = Callable[[int], torch.Tensor | None]


@dataclass  # not frozen: torch.compile can't rebuild frozen dataclasses
class Update:
    """What sublayers contribute to the residual stream.

    `partials` are those of the local tracks, or a single one where the sublayer isn't divided into
    tracks: shares of a sum, of which there may be any number. Over all processes they sum to the
    output of the sublayers less `common`, output biases that every process knows and that are
    counted once, at the merge. `guesses`, per local track, stand for the partials of all other
    tracks until the merge: each track sees its own guess beside its own partial, and none is ever
    summed or merged.

    Where a model norms what a sublayer gives before it joins the stream (post-norm), the sums of
    several sublayers can't be added up before they are `normed`, each by its own. They lie one
    after another along a first axis then (k of kBSD), in one partial for all local tracks; and what
    each track sees of its own is apart, `own`, where it goes on with that.
    """

    partials: list[torch.Tensor]
    common: torch.Tensor | None = None
    guesses: PerTrack | None = None
    own: PerTrack | None = None
    normed: tuple[Normed, ...] = ()

    def __add__(self, later: Update) -> Update:
        guesses, own = self.guesses, None
        if later.guesses is not None:
            guesses = add_per_track(guesses, later.guesses)
        if self.own is not None and later.own is not None:
            own = add_per_track(self.own, later.own)
        if self.normed:
            (before,), (after,) = self.partials, later.partials
            partials = [torch.cat([before.to(after.device), after])]
        else:
            partials = add_partials(self.partials, later.partials)
        common = _sum_of(self.common, later.common)
        return Update(partials, common, guesses, own, self.normed + later.normed)

    def times(self, factor: torch.Tensor) -> Update:
        """The same of sublayers that give so many times as much."""

        def scaled(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [_times(tensor, factor) for tensor in tensors]

        return Update(
            # what is normed has its factor afterwards
            self.partials if self.normed else scaled(self.partials),
            None if self.common is None else _times(self.common, factor),
            None if self.guesses is None else scaled(self.guesses),
            None if self.own is None else scaled(self.own),
            times(self.normed, factor),
        )

    @property
    def kept(self) -> PerTrack:
        """What each track sees of its own partial before the merge."""
        return self.partials if self.own is None else self.own

    @property
    def seen(self) -> PerTrack:
        """What each track sees of it before the merge: of its own partial, and its guess."""
        return self.kept if self.guesses is None else add_per_track(self.guesses, self.kept)


def times(normed: tuple[Normed, ...], factor: torch.Tensor) -> tuple[Normed, ...]:
    """What joins the stream, so many times."""

    def of(norm: Normed) -> Normed:
        return lambda sum_BSD: _times(norm(sum_BSD), factor)

    return tuple(of(norm) for norm in normed)


@dataclass(eq=False)
class Bucket:
    """Partials that one all-reduce takes: those that wait for it, then their sum in flight.

    Of what is `shown` each track reads its own part; what is `hidden` waits and nobody reads it
    yet. `wait` gives the sum once it is launched, where the engine leaves it here.
    """

    shown: Update | None = None
    hidden: Update | None = None
    common: torch.Tensor | None = None
    normed: tuple[Normed, ...] = ()
    wait: Callable[[], torch.Tensor] | None = None

    def scale(self, factor: torch.Tensor) -> None:
        """Makes its sublayers give so many times as much."""
        self.shown, self.hidden = (
            None if update is None else update.times(factor) for update in (self.shown, self.hidden)
        )
        if self.common is not None:
            self.common = _times(self.common, factor)
        if self.wait is not None and not self.normed:
            self.wait = functools.partial(_waited, self.wait, factor)
        self.normed = times(self.normed, factor)

    def joins(self, sum_BSD: torch.Tensor) -> torch.Tensor:
        """What joins the stream, from the all-reduce's sum."""
        if self.normed:
            sums = zip(self.normed, sum_BSD.unbind(0), strict=True)
            return functools.reduce(operator.add, [norm(one_BSD) for norm, one_BSD in sums])
        return sum_BSD if self.common is None else sum_BSD + self.common.to(sum_BSD.device)

    def take(self, step: Step, own: Update, waiting_weight: float) -> torch.Tensor:
        """Takes a stage's partials. Returns what this process gives to the all-reduce that is
        launched after it; where none is, the stage's last partial."""
        if not step.launches:
            if step.keeps_own:
                self.shown = own if self.shown is None else self.shown + own
            else:
                self.hidden = own if self.hidden is None else self.hidden + own
            return own.partials[-1]
        waited = [update for update in (self.shown, self.hidden) if update is not None]
        whole = functools.reduce(operator.add, [*waited, own])
        reduced = whole
        if waiting_weight != 1.0:
            assert not whole.normed, "a norm takes the weight away again"
            weighed = [Update([p * waiting_weight for p in update.partials]) for update in waited]
            reduced = functools.reduce(operator.add, [*weighed, own])
        self.shown = Update(whole.seen) if step.keeps_own else None
        self.hidden, self.common, self.normed = None, whole.common, whole.normed
        return functools.reduce(operator.add, reduced.partials)


@dataclass(eq=False)
class Streams:
    """The residual stream of each local track between two stages: what is merged, and what waits.

    `base` (BSD) is merged; `merged` will be added to it where it is read next, which engines fuse
    with the norm; `buckets` are outstanding, by the stage that launches them.
    """

    base: torch.Tensor
    merged: torch.Tensor | None = None
    buckets: dict[int, Bucket] = field(default_factory=dict)

    def settled(self) -> torch.Tensor:
        """`base`, with `merged` added to it."""
        if self.merged is not None:
            self.base, self.merged = _sum(self.base, self.merged), None
        return self.base

    def own(self, step: Step) -> PerTrack | None:
        """What each track reads at a stage for itself only, beside the merged stream."""
        own: PerTrack | None = None
        for bucket in step.reads:
            shown = self.buckets[bucket].shown
            assert shown is not None
            own = add_per_track(own, shown.seen)
        return own

    def view(self, step: Step) -> PerTrack:
        """What the tracks read at a stage."""
        base_BSD, own = self.settled(), self.own(step)
        return [base_BSD] if own is None else add_per_track([base_BSD], own)

    def landed(self) -> PerTrack:
        """What the tracks would read if all that is in flight were merged already."""
        base_BSD = self.settled()
        view: PerTrack | None = None
        for bucket in self.buckets.values():
            if bucket.wait is not None:
                base_BSD = _sum(base_BSD, bucket.joins(bucket.wait()))
            elif bucket.shown is not None:
                view = add_per_track(view, bucket.shown.seen)
        return [base_BSD] if view is None else add_per_track([base_BSD], view)

    def complete(self, step: Step, scalar: Scalar) -> None:
        """Multiplies the streams, and with them what is outstanding, by what follows the layers
        that are complete with a stage."""
        for layer in step.completes:
            if (factor := scalar(layer)) is not None:
                self.base = _times(self.settled(), factor)
                for bucket in self.buckets.values():
                    bucket.scale(factor)

    def end(self, step: Step, own: Update, engine: Engine, waiting_weight: float = 1.0) -> None:
        """Ends a stage whose sublayers gave `own`: launches and merges as its step says.

        `waiting_weight` is what partials of earlier stages count at the all-reduce.
        """
        bucket = self.buckets.setdefault(step.bucket, Bucket())
        merged_BSD = engine.boundary(step, self, bucket.take(step, own, waiting_weight))
        for index in step.merges:
            del self.buckets[index]
        self.merged = _sum_of(self.merged, merged_BSD)


class Engine(Protocol):
    """What runs sublayers and sums over ranks."""

    def run(self, step: Step, streams: Streams) -> Update:
        """What the sublayers of a stage give together; guesses, and what tracks see of their own
        where that is apart, only where `step.keeps_own`."""

    def boundary(
        self, step: Step, streams: Streams, local_BSD: torch.Tensor
    ) -> torch.Tensor | None:
        """Launches the stage's all-reduce of `local_BSD` over ranks, if it has one, and returns
        what joins the stream of those that are merged here, None where there is none. Where nothing
        is launched, `local_BSD` is only what the waiting comes after."""


class Communicator(Protocol):
    """Sums a tensor over the processes that hold the tracks."""

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, waited for."""

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Launches the sum; the function returned waits for it and gives it."""


class OneProcess:
    """The communicator where all tracks are local: the sum over processes is what is given."""

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        return partial_BSD

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: partial_BSD


# A sublayer's Update for what each track reads, and whether tracks go on with their own partials:
# where none does without the others', there is nothing to guess.
RunSublayer = Callable[[Sublayer, PerTrack, bool], Update]


@dataclass(eq=False)
class TorchEngine:
    """transformers' layers, and a communicator."""

    run_sublayer: RunSublayer
    communicator: Communicator

    def run(self, step: Step, streams: Streams) -> Update:
        view = streams.view(step)
        updates = [self.run_sublayer(s, view, step.keeps_own) for s in step.sublayers]
        return functools.reduce(operator.add, updates)

    def boundary(
        self, step: Step, streams: Streams, local_BSD: torch.Tensor
    ) -> torch.Tensor | None:
        if step.launches:
            launched = streams.buckets[step.index]
            if step.overlapped:
                launched.wait = self.communicator.start_all_reduce(local_BSD)
            else:
                launched.wait = _already(self.communicator.all_reduce(local_BSD))
        merged_BSD: torch.Tensor | None = None
        for index in step.merges:
            bucket = streams.buckets[index]
            assert bucket.wait is not None
            merged_BSD = _sum_of(merged_BSD, bucket.joins(bucket.wait()))
        return merged_BSD


def run_program(
    program: Iterable[Step],
    streams: Streams,
    engine: Engine,
    waiting_weight: float = 1.0,
    entered: Callable[[int], object] | None = None,
    scalar: Scalar = lambda _: None,
) -> None:
    """Runs steps on the streams that the steps before have left, the embedded tokens at first.

    `waiting_weight` is what partials that waited since an earlier stage count at the all-reduce: 1,
    which keeps a dense model's meaning, or 1/n (the Desync rule, arXiv 2501.06589). `entered` is
    called with each stage's index as it begins. `scalar` is what the stream is multiplied by after
    a layer, if it is.
    """
    for step in program:
        if entered is not None:
            entered(step.index)
        streams.end(step, engine.run(step, streams), engine, waiting_weight)
        streams.complete(step, scalar)


def _waited(wait: Callable[[], torch.Tensor], factor: torch.Tensor) -> torch.Tensor:
    return _times(wait(), factor)


def _times(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The product, on the tensor's device."""
    return tensor * factor.to(tensor.device)


def _already(reduced_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: reduced_BSD


def _sum(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """The sum, on the later one's device: layers may lie on several, as transformers' `device_map`
    has them, and the streams move on with them."""
    return earlier.to(later.device) + later


def _sum_of(earlier: torch.Tensor | None, later: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of those that there are."""
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return _sum(earlier, later)


def add_partials(a: list[torch.Tensor] | None, b: list[torch.Tensor]) -> list[torch.Tensor]:
    """Partials whose sum is that of all in both; of what each track owns, track by track.

    Not `add_per_track`: the single partial of a sublayer that isn't divided is one share, and
    joins that of one track. (Beside tracks it is never seen, only summed: such a stage reduces.)
    All come on the later ones' device.
    """
    pairs = itertools.zip_longest(a or (), b)
    return [x.to(b[0].device) if y is None else y if x is None else _sum(x, y) for x, y in pairs]


def add_per_track(a: PerTrack | None, b: PerTrack) -> PerTrack:
    """The sum track by track; a single tensor stands for every track, None for nothing."""
    if a is None:
        return b
    count = max(len(a), len(b))
    return [_sum(a[t % len(a)], b[t % len(b)]) for t in range(count)]
