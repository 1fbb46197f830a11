"""The executor: a schedule becomes calls to sublayers and to a communicator.

It works on the tracks that are local to this process, all n of them in one process or n/R on each
of R ranks, and is the only place that knows how a schedule runs. Shape suffixes: B batch, S
sequence, D residual stream width.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ptconvert.schedule.stages import Merge, Schedule, Sublayer

# A value of each local track: one tensor where all of them agree, else one tensor per track.
PerTrack = list[torch.Tensor]


@dataclass  # not frozen: torch.compile can't rebuild frozen dataclasses
class Update:
    """What sublayers contribute to the residual stream.

    `partials` are those of the local tracks, or a single one where the sublayer isn't divided into
    tracks: shares of a sum, of which there may be any number. Over all processes they sum to the
    output of the sublayers less `common`, output biases that every process knows and that are
    counted once, at the merge. `guesses`, per local track, stand for the partials of all other
    tracks until the merge: each track sees its own guess beside its own partial, and none is ever
    summed or merged.
    """

    partials: list[torch.Tensor]
    common: torch.Tensor | None = None
    guesses: PerTrack | None = None

    def __add__(self, other: Update) -> Update:
        common = other.common if self.common is None else self.common
        if self.common is not None and other.common is not None:
            common = self.common + other.common
        guesses = self.guesses
        if other.guesses is not None:
            guesses = add_per_track(guesses, other.guesses)
        return Update(add_partials(self.partials, other.partials), common, guesses)

    @property
    def seen(self) -> PerTrack:
        """What each track sees of it before the merge: its own partial, and its guess."""
        return self.partials if self.guesses is None else add_per_track(self.guesses, self.partials)

    def to(self, device: torch.device) -> Update:
        """The same on a device."""
        common = None if self.common is None else self.common.to(device)
        guesses = None if self.guesses is None else _all_to(self.guesses, device)
        return Update(_all_to(self.partials, device), common, guesses)


# A sublayer's Update for what each track reads, and whether with guesses: where no track goes on
# without the others' partials, there is nothing to guess.
RunSublayer = Callable[[Sublayer, PerTrack, bool], Update]


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


@dataclass(eq=False)
class _InFlight:
    """An all-reduce that was launched; `seen` is what each track sees of it before its merge."""

    merged_after: int
    wait: Callable[[], torch.Tensor]
    seen: PerTrack | None
    common: torch.Tensor | None

    def merge(self, base_BSD: torch.Tensor) -> torch.Tensor:
        merged_BSD = base_BSD + self.wait().to(base_BSD.device)
        return merged_BSD if self.common is None else merged_BSD + self.common.to(base_BSD.device)


@dataclass(eq=False)
class Streams:
    """The residual stream of each local track between two stages: what is merged, and what waits.

    `base` (BSD) is merged, `waiting` deferred, `in_flight` launched and not merged yet.
    """

    base: torch.Tensor
    waiting: Update | None = None
    in_flight: list[_InFlight] = field(default_factory=list)

    def view(self) -> PerTrack:
        """What the tracks read at the next stage."""
        view = [self.base]
        if self.waiting is not None:
            view = add_per_track(view, self.waiting.seen)
        for flight in self.in_flight:
            view = view if flight.seen is None else add_per_track(view, flight.seen)
        return view

    def landed(self) -> PerTrack:
        """What the tracks would read if all that is in flight were merged already."""
        base_BSD = self.base
        for flight in self.in_flight:
            base_BSD = flight.merge(base_BSD)
        return Streams(base_BSD, self.waiting).view()

    def end_stage(
        self,
        schedule: Schedule,
        index: int,
        own: Update,
        communicator: Communicator,
        waiting_weight: float = 1.0,
    ) -> None:
        """Ends stage `index`, whose sublayers gave `own`: reduces and merges as it says.

        `waiting_weight` is what partials of earlier stages count at the all-reduce.
        """
        self._follow(own.partials[0].device)
        pending = own if self.waiting is None else self.waiting + own
        merged_after, merge = schedule.merged_after(index), schedule.stages[index].ending.merge
        if merged_after is None:
            self.waiting = pending
        else:
            reduced = pending
            if self.waiting is not None and waiting_weight != 1.0:
                reduced = Update([p * waiting_weight for p in self.waiting.partials]) + own
            local_BSD = functools.reduce(operator.add, reduced.partials)
            if merge is Merge.BLOCKING:
                wait = _already(communicator.all_reduce(local_BSD))
            else:
                wait = communicator.start_all_reduce(local_BSD)
            seen = pending.seen if merge is Merge.OWN_SEEN else None
            self.in_flight.append(_InFlight(merged_after, wait, seen, pending.common))
            self.waiting = None
        for flight in [f for f in self.in_flight if f.merged_after == index]:
            self.base = flight.merge(self.base)
            self.in_flight.remove(flight)

    def _follow(self, device: torch.device) -> None:
        """Brings the streams to the device of the layer that ran last: layers may lie on several,
        as transformers' `device_map` has them, and the streams move on with them."""
        if self.base.device == device:
            return
        self.base = self.base.to(device)
        self.waiting = None if self.waiting is None else self.waiting.to(device)
        for flight in self.in_flight:
            flight.seen = None if flight.seen is None else _all_to(flight.seen, device)


def run_schedule(
    schedule: Schedule,
    base_BSD: torch.Tensor,
    run_sublayer: RunSublayer,
    communicator: Communicator,
    tracks: int,
    deferred: str = "sum",
    entered: Callable[[int], object] | None = None,
    first: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Runs every stage of a schedule on the embedded tokens; returns the merged stream, BSD.

    `tracks` is n over all processes.
    `deferred` is "sum", which keeps a dense model's meaning, or "mean": partials that waited
    since an earlier stage are merged with weight 1/n (the Desync rule, arXiv 2501.06589).
    `entered` is called with each stage's index as it begins. `first` is the stage to begin at, for
    a `base_BSD` that the stages before it have left with nothing outstanding, and `stop` the one
    to end before, likewise.
    """
    streams = Streams(base_BSD)
    waiting_weight = 1 / tracks if deferred == "mean" else 1.0
    for index in range(first, len(schedule.stages) if stop is None else stop):
        if entered is not None:
            entered(index)
        own = run_stage(schedule, index, streams.view(), run_sublayer)
        streams.end_stage(schedule, index, own, communicator, waiting_weight)
    return streams.base


def run_stage(schedule: Schedule, index: int, view: PerTrack, run_sublayer: RunSublayer) -> Update:
    """What the sublayers of stage `index` give together for what each track reads."""
    guess = schedule.keeps_own(index)
    updates = [run_sublayer(s, view, guess) for s in schedule.stages[index].sublayers]
    device = updates[-1].partials[0].device
    return functools.reduce(operator.add, [update.to(device) for update in updates])


def _already(reduced_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: reduced_BSD


def _all_to(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def add_partials(a: list[torch.Tensor] | None, b: list[torch.Tensor]) -> list[torch.Tensor]:
    """Partials whose sum is that of all in both; of what each track owns, track by track.

    Not `add_per_track`: the single partial of a sublayer that isn't divided is one share, and
    joins that of one track. (Beside tracks it is never seen, only summed: such a stage reduces.)
    """
    pairs = itertools.zip_longest(a or (), b)
    return [x if y is None else y if x is None else x + y for x, y in pairs]


def add_per_track(a: PerTrack | None, b: PerTrack) -> PerTrack:
    """The sum track by track; a single tensor stands for every track, None for nothing."""
    if a is None:
        return b
    count = max(len(a), len(b))
    return [a[t % len(a)] + b[t % len(b)] for t in range(count)]
