"""A schedule lowered into the static program that a serving engine's model walks.

What happens around each stage is settled here, before any forward pass: what its tracks read, what
is all-reduced after it and what is merged. So the model only walks a tuple, torch.compile sees
straight code, and nothing asks a schedule anything while tokens are waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ptconvert.schedule.stages import Merge, Schedule, Sublayer


@dataclass(frozen=True)
class Step:
    """A stage, and the boundary after it. Stages are named by their index in the schedule.

    `sees`: stages in flight of which each track reads its own part.
    `ending`: whether the stage's partial is reduced, and how.
    `merged`: stages in flight whose all-reduce joins the stream at this boundary, the stage itself
    among them where nothing is left to run beside its all-reduce.
    `counted`: the sublayers that become part of the stream here, whose output biases join with
    them.
    """

    index: int
    sublayers: tuple[Sublayer, ...]
    sees: tuple[int, ...]
    ending: Merge
    merged: tuple[int, ...]
    counted: tuple[Sublayer, ...]

    @property
    def keeps_own(self) -> bool:
        """Whether tracks go on from here with their own partials, and guesses of the others'."""
        return self.ending is Merge.DEFERRED or (
            self.ending is Merge.OWN_SEEN and self.index not in self.merged
        )

    @property
    def boundary(self) -> bool:
        """Whether an asynchronous all-reduce is launched or waited for after the stage."""
        return self.ending.overlapped or bool(self.merged)


def lower(schedule: Schedule) -> tuple[Step, ...]:
    """The program of a schedule, one step for each of its stages."""
    return tuple(_steps(schedule))


def _steps(schedule: Schedule) -> Iterator[Step]:
    waiting: tuple[Sublayer, ...] = ()
    in_flight: dict[int, tuple[Sublayer, ...]] = {}
    for index, stage in enumerate(schedule.stages):
        merge = stage.ending.merge
        sees = tuple(i for i in in_flight if schedule.stages[i].ending.merge is Merge.OWN_SEEN)
        waiting += stage.sublayers
        counted: tuple[Sublayer, ...] = ()
        if merge.overlapped:
            in_flight[index], waiting = waiting, ()
        elif merge is Merge.BLOCKING:
            counted, waiting = waiting, ()
        merged = tuple(i for i in in_flight if schedule.merged_after(i) == index)
        counted = sum((in_flight.pop(i) for i in merged), start=counted)
        yield Step(index, stage.sublayers, sees, merge, merged, counted)
