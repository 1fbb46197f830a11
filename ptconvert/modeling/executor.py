"""The executor: a schedule becomes calls to sublayers and to a communicator.

It works on the tracks that are local to this process, all n of them in one process or n/R on each
of R ranks, and is the only place that knows how a schedule runs. Shape suffixes: B batch, S
sequence, D residual stream width.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ptconvert.schedule import Merge, Schedule, Sublayer

# A value of each local track: one tensor where all of them agree, else one tensor per track.
PerTrack = list[torch.Tensor]


@dataclass  # not frozen: torch.compile can't rebuild frozen dataclasses
class Update:
    """What sublayers contribute to the residual stream.

    `partials` are per local track, or a single one where the sublayer isn't divided into tracks;
    over all processes they sum to the sublayer's output less `common`, its output bias, which
    every process knows and which is counted once, at the merge.
    """

    partials: PerTrack
    common: torch.Tensor | None = None

    def __add__(self, other: Update) -> Update:
        common = other.common if self.common is None else self.common
        if self.common is not None and other.common is not None:
            common = self.common + other.common
        return Update(add_per_track(self.partials, other.partials), common)


RunSublayer = Callable[[Sublayer, PerTrack], Update]


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
        merged_BSD = base_BSD + self.wait()
        return merged_BSD if self.common is None else merged_BSD + self.common


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

    `run_sublayer` gives a sublayer's Update for its input. `tracks` is n over all processes.
    `deferred` is "sum", which keeps a dense model's meaning, or "mean": partials that waited
    since an earlier stage are merged with weight 1/n (the Desync rule, arXiv 2501.06589).
    `entered` is called with each stage's index as it begins. `first` is the stage to begin at, for
    a `base_BSD` that the stages before it have left with nothing outstanding, and `stop` the one
    to end before, likewise.
    """
    waiting: Update | None = None
    in_flight: list[_InFlight] = []
    for index in range(first, len(schedule.stages) if stop is None else stop):
        stage = schedule.stages[index]
        if entered is not None:
            entered(index)
        view = [base_BSD]
        if waiting is not None:
            view = add_per_track(view, waiting.partials)
        for flight in in_flight:
            view = view if flight.seen is None else add_per_track(view, flight.seen)
        own = functools.reduce(operator.add, [run_sublayer(s, view) for s in stage.sublayers])
        pending = own if waiting is None else waiting + own
        merged_after = schedule.merged_after(index)
        if merged_after is None:
            waiting = pending
        else:
            reduced = pending
            if waiting is not None and deferred == "mean":
                reduced = Update([p / tracks for p in waiting.partials]) + own
            local_BSD = functools.reduce(operator.add, reduced.partials)
            if stage.ending.merge is Merge.BLOCKING:
                wait = _already(communicator.all_reduce(local_BSD))
            else:
                wait = communicator.start_all_reduce(local_BSD)
            seen = pending.partials if stage.ending.merge is Merge.OWN_SEEN else None
            in_flight.append(_InFlight(merged_after, wait, seen, pending.common))
            waiting = None
        for flight in [f for f in in_flight if f.merged_after == index]:
            base_BSD = flight.merge(base_BSD)
            in_flight.remove(flight)
    return base_BSD


def _already(reduced_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: reduced_BSD


def add_per_track(a: PerTrack | None, b: PerTrack) -> PerTrack:
    """The sum track by track; a single tensor stands for every track, None for nothing."""
    if a is None:
        return b
    count = max(len(a), len(b))
    return [a[t % len(a)] + b[t % len(b)] for t in range(count)]
