"""What a mixed schedule is put together from: sublayers that share an all-reduce, and its ending.

A segment runs consecutive sublayers of the dense model. Before it nothing is pending, and after it
nothing but what its own last all-reduce still has in flight; so any segments in a row that cover
all sublayers are a schedule. Positions count the dense model's 2L sublayers (`Sublayer.position`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ptconvert.presets import dense_schedule
from ptconvert.schedule import BLOCKING, DEFERRED, Ending, Kind, Merge, Schedule, Stage, Sublayer

HIDDEN = Ending(Merge.HIDDEN, 1)
OWN_SEEN = Ending(Merge.OWN_SEEN, 1)
OWN_SEEN_LATER = Ending(Merge.OWN_SEEN, 2)


@dataclass(frozen=True)
class Segment:
    """The sublayers at positions [start, stop) and the stages that run them."""

    start: int
    stop: int
    stages: tuple[Stage, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.stages))

    @cached_property
    def waits(self) -> int:
        """How many all-reduces it waits for."""
        return sum(stage.ending == BLOCKING for stage in self.stages)

    @property
    def dense(self) -> bool:
        """Whether it is one sublayer run as the dense model runs it, which costs nothing."""
        return self.stop - self.start == 1 and self.stages[0].ending == BLOCKING


def run(start: int, stop: int, ending: Ending) -> Segment:
    """Sublayers one after the other, of which only the last one all-reduces: `a1. m1. a2!`."""
    stages = [Stage((_sublayer(p),), DEFERRED) for p in range(start, stop - 1)]
    return Segment(start, stop, (*stages, Stage((_sublayer(stop - 1),), ending)))


def menu(
    layers: int, singles: Iterable[Ending], runs: Iterable[Ending], longest: int
) -> Iterator[Segment]:
    """Every segment that a search may choose from, for a model of so many layers.

    Single sublayers with each ending of `singles`, runs of up to `longest` sublayers with each of
    `runs`, and attention and MLP of a layer, or two layers, side by side and blocking. The last
    segment of the model blocks: nothing is left to run beside its all-reduce.
    """
    last = 2 * layers
    for start in range(last):
        for stop in range(start + 1, min(start + longest, last) + 1):
            for ending in singles if stop - start == 1 else runs:
                if stop < last or not ending.merge.overlapped:
                    yield run(start, stop, ending)
    for start in range(0, last, 2):
        yield Segment(start, start + 2, (_beside(start, start + 1),))
    for start in range(0, last - 2, 2):
        stages = (_beside(start, start + 2), _beside(start + 1, start + 3))
        yield Segment(start, start + 4, stages)


def _beside(first: int, second: int) -> Stage:
    return Stage((_sublayer(first), _sublayer(second)), BLOCKING)


def _sublayer(position: int) -> Sublayer:
    return Sublayer(position // 2, Kind.MLP if position % 2 else Kind.ATTENTION)


def alone(segment: Segment, layers: int) -> Schedule:
    """The dense schedule with one segment in place of the same sublayers."""
    dense = dense_schedule(layers).stages
    return _saved((*dense[: segment.start], *segment.stages, *dense[segment.stop :]))


def together(segments: Iterable[Segment]) -> Schedule:
    """The schedule of segments in a row, which cover all sublayers."""
    return _saved(tuple(stage for segment in segments for stage in segment.stages))


def _saved(stages: tuple[Stage, ...]) -> Schedule:
    """The schedule of stages, less the all-reduces that change nothing.

    `a1^1 m1!` is the same function as `a1. m1!`: the track sees its own part in the stage between,
    and the rest arrives after it, with that stage's all-reduce or in one of its own.
    """
    pairs = zip(stages, (*stages[1:], None), strict=True)
    return Schedule(
        tuple(
            replace(stage, ending=DEFERRED)
            if after is not None and stage.ending == OWN_SEEN and after.ending == BLOCKING
            else stage
            for stage, after in pairs
        )
    )
