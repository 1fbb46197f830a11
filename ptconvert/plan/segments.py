"""What a mixed schedule is put together from: sublayers that share an all-reduce, and its ending.

A segment runs consecutive stages of the dense model. Before it nothing is pending, and after it
nothing but what its own last all-reduce still has in flight; so any segments in a row that cover
all stages are a schedule. Positions count the dense model's stages: its 2L sublayers, or its L
layers where they are parallel, attention and MLP side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ptconvert.schedule.endings import BLOCKING, DEFERRED, Ending
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Stage, Sublayer

HIDDEN = Ending("~", 1)
OWN_SEEN = Ending("^", 1)
OWN_SEEN_LATER = Ending("^", 2)


class Segment(NamedTuple):
    """The dense model's stages at positions [start, stop), and how they run.

    One after the other, of which only the last one all-reduces (`a1. m1. a2!`); or, where `beside`,
    each of their first half beside one of the second, and each stage with this ending. `parallel`
    says what layers the model has. There are thousands in a search, looked up over and over: so
    stages are made when they are asked for.
    """

    start: int
    stop: int
    ending: Ending
    beside: bool = False
    parallel: bool = False

    def __str__(self) -> str:
        return " ".join(map(str, self.stages))

    @property
    def length(self) -> int:
        """How many of the dense model's stages it runs."""
        return self.stop - self.start

    @property
    def layers(self) -> range:
        """The layers that it runs, the first and the last perhaps in part."""
        each = per_layer(self.parallel)
        return range(self.start // each, (self.stop - 1) // each + 1)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What runs the sublayers."""
        if self.beside:
            half = self.length // 2
            firsts = range(self.start, self.start + half)
            return tuple(Stage((*self._at(p), *self._at(p + half)), self.ending) for p in firsts)
        deferred = (Stage(self._at(p), DEFERRED) for p in range(self.start, self.stop - 1))
        return (*deferred, Stage(self._at(self.stop - 1), self.ending))

    def _at(self, position: int) -> tuple[Sublayer, ...]:
        if self.parallel:
            return Sublayer.at(2 * position), Sublayer.at(2 * position + 1)
        return (Sublayer.at(position),)

    @property
    def waits(self) -> int:
        """How many all-reduces it waits for."""
        endings = self.length // 2 if self.beside else 1
        return endings if self.ending == BLOCKING else 0

    @property
    def dense(self) -> bool:
        """Whether it is one stage run as the dense model runs it, which costs nothing."""
        return self.length == 1 and self.ending == BLOCKING


def per_layer(parallel: bool) -> int:
    """How many stages the dense model has for each layer."""
    return 1 if parallel else 2


def run(start: int, stop: int, ending: Ending, parallel: bool = False) -> Segment:
    """Stages one after the other, of which only the last one all-reduces: `a1. m1. a2!`."""
    return Segment(start, stop, ending, parallel=parallel)


def menu(
    layers: int,
    singles: Iterable[Ending],
    runs: Iterable[Ending],
    longest: int,
    parallel: bool = False,
) -> Iterator[Segment]:
    """Every segment that a search may choose from, for a model of so many layers.

    Single stages with each ending of `singles`, runs of up to `longest` stages with each of `runs`,
    and attention and MLP of a layer (where they aren't anyway), or two layers, side by side and
    blocking. The last segment of the model blocks: nothing is left to run beside its all-reduce.
    """
    each = per_layer(parallel)
    last = each * layers
    for start in range(last):
        for stop in range(start + 1, min(start + longest, last) + 1):
            for ending in singles if stop - start == 1 else runs:
                if stop < last or not ending.kind.lagged:
                    yield run(start, stop, ending, parallel)
    for halves in range(1, each + 1):  # of a layer, if it has two stages, and of two layers
        for start in range(0, last - 2 * halves + 1, each):
            yield Segment(start, start + 2 * halves, BLOCKING, True, parallel)


def alone(segment: Segment, layers: int) -> Schedule:
    """The dense schedule with one segment in place of the same sublayers."""
    dense = dense_schedule(layers, segment.parallel).stages
    start, stop = segment.start, segment.stop
    changed = _saved((*segment.stages, *dense[stop : stop + 1]))
    return Schedule((*dense[:start], *changed, *dense[stop + 1 :]))


def together(segments: Iterable[Segment]) -> Schedule:
    """The schedule of segments in a row, which cover all stages."""
    return Schedule(_saved(tuple(stage for segment in segments for stage in segment.stages)))


def _saved(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Stages less the all-reduces that change nothing.

    `a1^1 m1!` is the same function as `a1. m1!`: the track sees its own part in the stage between,
    and the rest arrives after it, with that stage's all-reduce or in one of its own.
    """
    pairs = zip(stages, (*stages[1:], None), strict=True)
    return tuple(
        replace(stage, ending=DEFERRED)
        if stage.ending == OWN_SEEN and after is not None and after.ending == BLOCKING
        else stage
        for stage, after in pairs
    )
