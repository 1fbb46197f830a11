"""The notation: sublayers, stages, and their text form.

A schedule says which sublayers run on which view of the residual stream, and where it merges.
It prints as its stages in order and parses back to itself:

    a0! m0! a1. m1. a2. m2! a3~1 m3~1

`a3` is the attention of layer 3, `m3` its MLP, `a3|m3` both on the same input. An MLP that is a
mixture with shared experts runs whole, as `m3`, or in two parts, each with an input of its own:
`s3`, the experts that all tokens go to, and `r3`, those that tokens are routed to.

A stage ends with

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
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ptconvert.errors import ScheduleError
from ptconvert.schedule.endings import KINDS, Ending

MAX_LAYERS = 4096
_SUBLAYER = r"[amsr](?:0|[1-9][0-9]{0,3})"
_STAGE = re.compile(
    rf"(?P<sublayers>{_SUBLAYER}(?:\|{_SUBLAYER})*)"
    rf"(?P<kind>[{re.escape(''.join(KINDS))}])(?P<lag>[0-9]{{0,4}})"
)


class Kind(enum.Enum):
    """The kind of a sublayer, by the letter that prints it."""

    ATTENTION = "a"
    MLP = "m"
    SHARED = "s"
    ROUTED = "r"

    @property
    def is_part(self) -> bool:
        """Whether it is one of the two parts in which a mixture may run, not all of an MLP."""
        return self is Kind.SHARED or self is Kind.ROUTED


BLOCKS = (Kind.ATTENTION, Kind.MLP)  # of which every layer has one each


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of one layer, or one of the two parts of a mixture."""

    layer: int
    kind: Kind

    @property
    def position(self) -> int:
        """Its place among the dense model's 2L sublayers, which run one after the other; the parts
        of a mixture have that of the whole."""
        return 2 * self.layer + (self.kind is not Kind.ATTENTION)

    @property
    def whole(self) -> Sublayer:
        """The dense model's sublayer that it is, or is a part of."""
        return Sublayer(self.layer, Kind.MLP) if self.kind.is_part else self

    @staticmethod
    @functools.cache
    def at(position: int) -> Sublayer:
        """The dense model's sublayer at a position."""
        return Sublayer(position // 2, Kind.MLP if position % 2 else Kind.ATTENTION)

    def __str__(self) -> str:
        return f"{self.kind.value}{self.layer}"


@dataclass(frozen=True)
class Stage:
    """Sublayers that read the same input, and what happens to their partials."""

    sublayers: tuple[Sublayer, ...]
    ending: Ending

    def __str__(self) -> str:
        return "|".join(map(str, self.sublayers)) + str(self.ending)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Reads stages separated by white space, each on its own terms (`Schedule` checks the whole).

    Raises ScheduleError, with the stage marked, for what isn't a stage.
    """
    words = text.split()
    stages = []
    for index, word in enumerate(words):
        match = _STAGE.fullmatch(word)
        if match is None:
            raise refused(words, index, "is not a stage such as a3! m3. a3~1 m3^2 or a3|m3!")
        symbol, lag = match["kind"], match["lag"]
        lagged = KINDS[symbol].lagged
        if lagged and not int(lag or 0):
            raise refused(words, index, f"needs a lag of at least 1, such as {symbol}1")
        if lag and not lagged:
            takers = " and ".join(kind.symbol for kind in KINDS.values() if kind.lagged)
            raise refused(words, index, f"has a lag, which only {takers} take: {word.rstrip(lag)}")
        sublayers = tuple(Sublayer(int(s[1:]), Kind(s[0])) for s in match["sublayers"].split("|"))
        stages.append(Stage(sublayers, Ending(symbol, int(lag or 0))))
    return tuple(stages)


def refused(stages: Sequence[str] | Sequence[Stage], index: int, what: str) -> ScheduleError:
    """The error for stage `index`, with the schedule printed and that stage marked."""
    marked = [f">>{stage}<<" if i == index else str(stage) for i, stage in enumerate(stages)]
    return ScheduleError(f"stage {index + 1}, {stages[index]}, {what}: {' '.join(marked)}")
