"""The schedule: which sublayers run on which view of the residual stream, and where it merges.

A schedule is frozen data. It prints as its stages in order and parses back to itself:

    a0! m0! a1. m1. a2. m2! a3~1 m3~1

`a3` is the attention of layer 3, `m3` its MLP, `a3|m3` both on the same input. A stage ends with

    !    blocking: all-reduce everything pending, merge before the next stage
    ~k   overlapped, hidden: launch the all-reduce, merge after k further stages; until then no
         track sees any of it, its own part included
    ^k   overlapped, own part seen: the same, but each track already sees its own part
    .    deferred: no all-reduce; the partial stays pending and its own track sees it

With `base` the stream that all tracks agree on, track t reads at each stage

    base + sum of its pending partials + sum of its in-flight ^ partials

and a merge adds to `base` what was reduced, and the common terms (output biases) of the sublayers
merged. Nothing here needs torch.
"""

from __future__ import annotations

import enum
import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ptconvert.errors import ScheduleError

MAX_LAYERS = 4096
_SUBLAYER = r"[am](?:0|[1-9][0-9]{0,3})"
_STAGE = re.compile(
    rf"(?P<sublayers>{_SUBLAYER}(?:\|{_SUBLAYER})*)(?P<kind>[!.~^])(?P<lag>[0-9]{{0,4}})"
)


class Kind(enum.Enum):
    """The kind of a sublayer, by the letter that prints it."""

    ATTENTION = "a"
    MLP = "m"


class Merge(enum.Enum):
    """How a stage ends, by the character that prints it."""

    BLOCKING = "!"
    HIDDEN = "~"
    OWN_SEEN = "^"
    DEFERRED = "."

    @property
    def overlapped(self) -> bool:
        """Whether the all-reduce is launched here and merged at a later stage."""
        return self in (Merge.HIDDEN, Merge.OWN_SEEN)


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of one layer."""

    layer: int
    kind: Kind

    @property
    def position(self) -> int:
        """Its place among the dense model's 2L sublayers, which run one after the other."""
        return 2 * self.layer + (self.kind is Kind.MLP)

    @staticmethod
    @functools.cache
    def at(position: int) -> Sublayer:
        """The sublayer at a position."""
        return Sublayer(position // 2, Kind.MLP if position % 2 else Kind.ATTENTION)

    def __str__(self) -> str:
        return f"{self.kind.value}{self.layer}"


@dataclass(frozen=True)
class Ending:
    """How a stage ends; `lag` counts the further stages before the merge (overlapped only)."""

    merge: Merge
    lag: int = 0

    def __str__(self) -> str:
        return f"{self.merge.value}{self.lag if self.merge.overlapped else ''}"


BLOCKING = Ending(Merge.BLOCKING)
DEFERRED = Ending(Merge.DEFERRED)


@dataclass(frozen=True)
class Stage:
    """Sublayers that read the same input, and what happens to their partials."""

    sublayers: tuple[Sublayer, ...]
    ending: Ending

    def __str__(self) -> str:
        return "|".join(map(str, self.sublayers)) + str(self.ending)


@dataclass(frozen=True)
class Counts:
    """All-reduces of one forward pass, and how many of them nothing hides."""

    all_reduces: int
    waited_for: int


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Reads stages separated by white space, each on its own terms (`Schedule` checks the whole).

    Raises ScheduleError, with the stage marked, for what isn't a stage.
    """
    words = text.split()
    stages = []
    for index, word in enumerate(words):
        match = _STAGE.fullmatch(word)
        if match is None:
            raise _refused(words, index, "is not a stage such as a3! m3. a3~1 m3^2 or a3|m3!")
        merge, lag = Merge(match["kind"]), match["lag"]
        if merge.overlapped and not int(lag or 0):
            raise _refused(words, index, f"needs a lag of at least 1, such as {match['kind']}1")
        if lag and not merge.overlapped:
            raise _refused(words, index, f"has a lag, which only ~ and ^ take: {word.rstrip(lag)}")
        sublayers = tuple(Sublayer(int(s[1:]), Kind(s[0])) for s in match["sublayers"].split("|"))
        stages.append(Stage(sublayers, Ending(merge, int(lag or 0))))
    return tuple(stages)


def _refused(stages: list[str] | tuple[Stage, ...], index: int, what: str) -> ScheduleError:
    """The error for stage `index`, with the schedule printed and that stage marked."""
    marked = [f">>{stage}<<" if i == index else str(stage) for i, stage in enumerate(stages)]
    return ScheduleError(f"stage {index + 1}, {stages[index]}, {what}: {' '.join(marked)}")


@dataclass(frozen=True)
class Schedule:
    """A valid schedule: every sublayer runs exactly once and nothing is left pending.

    Raises ScheduleError when built from stages that break a rule.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ScheduleError("the schedule has no stages; it must run every sublayer once")
        seen: set[int] = set()  # positions
        for index, stage in enumerate(self.stages):
            for sublayer in stage.sublayers:
                if sublayer.layer >= MAX_LAYERS:
                    raise _refused(self.stages, index, f"is past layer {MAX_LAYERS - 1}")
                position = sublayer.position
                if position in seen:
                    raise _refused(
                        self.stages, index, f"runs {sublayer} again; each sublayer runs once"
                    )
                seen.add(position)
            for sublayer in stage.sublayers:
                if sublayer.kind is Kind.MLP and 2 * sublayer.layer not in seen:
                    raise _refused(
                        self.stages,
                        index,
                        f"runs {sublayer} before {Sublayer.at(2 * sublayer.layer)}; an attention "
                        "runs before its layer's MLP or beside it",
                    )
        for position in range(2 * self.layers):
            if position not in seen:
                raise ScheduleError(
                    f"{Sublayer.at(position)} is missing; each sublayer runs once: {self}"
                )
        if self.stages[-1].ending == DEFERRED:
            raise _refused(
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

    def merged_after(self, index: int) -> int | None:
        """The index of the stage after which stage `index`'s all-reduce is merged.

        `index` itself when the result is needed at once; None when the stage reduces nothing.
        What is in flight at the end is merged after the last stage, before the final norm.
        """
        ending = self.stages[index].ending
        if ending == DEFERRED:
            return None
        return min(index + ending.lag, len(self.stages) - 1)

    @cached_property
    def counts(self) -> Counts:
        """All-reduces per forward pass; waited for are those with no stage before their merge."""
        merges = [self.merged_after(i) for i in range(len(self.stages))]
        return Counts(
            all_reduces=sum(m is not None for m in merges),
            waited_for=sum(m == i for i, m in enumerate(merges)),
        )

    def diverged(self) -> Iterator[tuple[Stage, bool]]:
        """Each stage, and whether tracks differ around it.

        They differ when they read different streams (something of their own is pending or in
        flight as `^`), or when each keeps its own partial of this stage for a later one.
        """
        pending, own_seen = False, -1
        for index, stage in enumerate(self.stages):
            reads_own = pending or own_seen >= index
            merged = self.merged_after(index)
            pending = merged is None
            if merged is not None and self.keeps_own(index):
                own_seen = max(own_seen, merged)
            yield stage, reads_own or self.keeps_own(index)

    def keeps_own(self, index: int) -> bool:
        """Whether tracks go on from stage `index` with their own partials, not the others'."""
        merge, merged = self.stages[index].ending.merge, self.merged_after(index)
        return merged is None or (merge is Merge.OWN_SEEN and merged > index)

    def own_read(self) -> Iterator[tuple[Sublayer, Sublayer]]:
        """Writer and reader, where a track reads its own partial without the others'."""
        for index, stage in enumerate(self.stages):
            if not self.keeps_own(index):
                continue
            reduces = next(
                i for i in range(index, len(self.stages)) if self.merged_after(i) is not None
            )
            seen = self.stages[reduces].ending.merge is Merge.OWN_SEEN
            last = self.merged_after(reduces) if seen else reduces
            assert last is not None
            for reading in self.stages[index + 1 : last + 1]:
                yield from itertools.product(stage.sublayers, reading.sublayers)

    def own_kept(self, tracks: int) -> tuple[Sublayer, ...]:
        """The sublayers after which tracks go on without each other's partials, in order."""
        return tuple(
            sublayer
            for index, stage in enumerate(self.stages)
            for sublayer in stage.sublayers
            if tracks > 1 and self.keeps_own(index)
        )

    def blocks(self) -> Iterator[range]:
        """Stages in the shortest runs that can be exchanged for the dense model's.

        At both ends of a run all tracks agree on one stream (nothing is pending or in flight), and
        the sublayers run so far are just those that the dense model has run at some point.
        """
        first, run, furthest, merged_by = 0, 0, -1, -1
        for index, stage in enumerate(self.stages):
            run += len(stage.sublayers)
            furthest = max(furthest, *(sublayer.position for sublayer in stage.sublayers))
            merged = self.merged_after(index)
            if merged is None:
                continue
            merged_by = max(merged_by, merged)
            if merged_by <= index and run == furthest + 1:
                yield range(first, index + 1)
                first = index + 1

    @cached_property
    def track_layers(self) -> frozenset[int]:
        """The layers in which tracks differ, and which a checkpoint therefore holds per track.

        A single track is held as one too: its partial is apart from the output bias, which nobody
        sees before the merge.
        """
        return frozenset(
            s.layer for stage, diverged in self.diverged() if diverged for s in stage.sublayers
        )
