"""The schedule: stages that keep its rules, and what follows from them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ptconvert.errors import ScheduleError
from ptconvert.schedule.lower import Step, lower
from ptconvert.schedule.stages import MAX_LAYERS, Kind, Stage, Sublayer, parse_stages, refused


@dataclass(frozen=True)
class Counts:
    """All-reduces of one forward pass, and how many of them nothing hides."""

    all_reduces: int
    waited_for: int


@dataclass(frozen=True)
class Schedule:
    """A valid schedule: every sublayer runs exactly once, a mixture whole or in its two parts, and
    nothing is left pending.

    Raises ScheduleError when built from stages that break a rule.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ScheduleError("the schedule has no stages; it must run every sublayer once")
        seen: dict[int, str] = {}  # by position, the kinds that ran there
        for index, stage in enumerate(self.stages):
            for sublayer in stage.sublayers:
                if why := _unfit(sublayer, seen):
                    raise refused(self.stages, index, why)
                seen[sublayer.position] = seen.get(sublayer.position, "") + sublayer.kind.value
            for sublayer in stage.sublayers:
                if sublayer.kind is not Kind.ATTENTION and 2 * sublayer.layer not in seen:
                    raise refused(
                        self.stages,
                        index,
                        f"runs {sublayer} before {Sublayer.at(2 * sublayer.layer)}; an attention "
                        "runs before its layer's MLP or beside it",
                    )
        for position in range(2 * self.layers):
            other = {"": "am"[position % 2], "s": "r", "r": "s"}.get(seen.get(position, ""))
            if other is not None:
                raise ScheduleError(
                    f"{other}{position // 2} is missing; each sublayer runs once: {self}"
                )
        if not self.stages[-1].ending.kind.launches:
            raise refused(
                self.stages,
                len(self.stages) - 1,
                "leaves its partial pending; the last stage must reduce, as with !",
            )

    @staticmethod
    def parse(text: str) -> Schedule:
        """Reads the text form; `Schedule.parse(str(s)) == s`. Raises ScheduleError."""
        return Schedule(parse_stages(text))

    def __str__(self) -> str:
        return " ".join(map(str, self.stages))

    @cached_property
    def layers(self) -> int:
        """How many layers the schedule runs."""
        return 1 + max(s.layer for stage in self.stages for s in stage.sublayers)

    @cached_property
    def ran(self) -> tuple[int, ...]:
        """How many of the dense model's sublayers have run before each stage, and after the last
        one; a mixture once both of its parts have."""
        begun: set[int] = set()  # positions of which one part has run
        counts = []
        for stage in self.stages:
            parts = [s.position for s in stage.sublayers if s.kind.is_part]
            counts.append(len(stage.sublayers) - len(parts))
            for position in parts:
                counts[-1] += position in begun
                begun.add(position)
        return tuple(itertools.accumulate(counts, initial=0))

    @cached_property
    def divided(self) -> frozenset[int]:
        """The layers whose MLP runs in two parts."""
        return frozenset(
            s.layer for stage in self.stages for s in stage.sublayers if s.kind.is_part
        )

    @cached_property
    def program(self) -> tuple[Step, ...]:
        """The steps that run it, one for each stage."""
        return lower(self.stages)

    @cached_property
    def counts(self) -> Counts:
        """All-reduces per forward pass; waited for are those with no stage before their merge."""
        return Counts(
            all_reduces=sum(step.launches for step in self.program),
            waited_for=sum(step.waits for step in self.program),
        )

    @cached_property
    def carried(self) -> tuple[int, ...]:
        """Of how many sublayers the all-reduce after each stage takes partials; 0 of none."""
        taken = Counter(step.bucket for step in self.program for _ in step.sublayers)
        return tuple(taken[i] * step.launches for i, step in enumerate(self.program))

    def own_read(self) -> Iterator[tuple[Sublayer, Sublayer]]:
        """Writer and reader, where a track reads its own partial without the others'."""
        for wrote in self.program:
            for reading in self.program[wrote.index + 1 :]:
                seen = wrote.keeps_own or reading.index > wrote.bucket
                if seen and wrote.bucket in reading.reads:
                    yield from itertools.product(wrote.sublayers, reading.sublayers)

    def own_kept(self, tracks: int) -> tuple[Sublayer, ...]:
        """The sublayers after which tracks go on without each other's partials, in order."""
        return tuple(
            sublayer
            for step in self.program
            for sublayer in step.sublayers
            if tracks > 1 and step.keeps_own
        )

    def running(self, sublayers: Iterable[Sublayer]) -> range:
        """A dense model's stages that run just these sublayers."""
        positions = [sublayer.position for sublayer in sublayers]
        return range(self.ran.index(min(positions)), self.ran.index(max(positions) + 1))

    def blocks(self, dense: Schedule) -> Iterator[range]:
        """Stages in the shortest runs that can be exchanged for the dense model's.

        At both ends of a run all tracks agree on one stream (nothing is pending or in flight), and
        the sublayers run so far are just those that the dense model has run at some point.
        """
        first, furthest = 0, -1
        outstanding: set[int] = set()
        for step in self.program:
            run = self.ran[step.index + 1]
            furthest = max(furthest, *(sublayer.position for sublayer in step.sublayers))
            outstanding.add(step.bucket)
            outstanding.difference_update(step.merges)
            if not outstanding and run == furthest + 1 and run in dense.ran:
                yield range(first, step.index + 1)
                first = step.index + 1

    @cached_property
    def track_layers(self) -> frozenset[int]:
        """The layers in which tracks differ, and which a checkpoint therefore holds per track.

        A single track is held as one too: its partial is apart from the output bias, which nobody
        sees before the merge.
        """
        return frozenset(s.layer for step in self.program if step.diverged for s in step.sublayers)


def _unfit(sublayer: Sublayer, seen: dict[int, str]) -> str | None:
    """Why a sublayer can't run, after those that ran by position; None if it can."""
    if sublayer.layer >= MAX_LAYERS:
        return f"is past layer {MAX_LAYERS - 1}"
    before, layer = seen.get(sublayer.position, ""), sublayer.layer
    if sublayer.kind.value in before:
        return f"runs {sublayer} again; each sublayer runs once"
    if before and not (sublayer.kind.is_part and before in "sr"):
        return (
            f"runs {sublayer} beside {before[0]}{layer}; an MLP runs whole, as m{layer}, or a "
            f"mixture in its two parts, as s{layer} and r{layer}"
        )
    return None
