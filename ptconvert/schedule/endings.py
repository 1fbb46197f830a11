"""How a stage ends: one row for each way, which is all that the package knows of it.

Text form, lowering, counts, diagrams and legends read these rows; nothing branches on a symbol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What the text form has after a sublayer, and how it is shown.

    `words` explain it; `style` is rich's for terminals, `fill` and `ink` are a page's colours.
    """

    symbol: str
    words: str
    style: str
    fill: str
    ink: str = "#1c2126"


@dataclass(frozen=True, kw_only=True)
class EndingKind(Mark):
    """One way for a stage to end.

    `launches`: everything pending is all-reduced from here on; otherwise it stays pending.
    `lagged`: the all-reduce runs beside the next stages and is merged after so many of them, which
    the ending's text says; otherwise it is merged before the next stage.
    `own_seen`: until the merge each track reads its own partial, and not the others'.
    """

    launches: bool
    lagged: bool
    own_seen: bool


_KINDS = (
    EndingKind(
        symbol="!",
        launches=True,
        lagged=False,
        own_seen=False,
        words="blocking all-reduce, waited for",
        style="bold red",
        fill="#b3422b",
        ink="#fff",
    ),
    EndingKind(
        symbol="~",
        launches=True,
        lagged=True,
        own_seen=False,
        words="~k overlapped all-reduce, merged k stages later, hidden until then",
        style="yellow",
        fill="#e9c46a",
    ),
    EndingKind(
        symbol="^",
        launches=True,
        lagged=True,
        own_seen=True,
        words="^k overlapped all-reduce, merged k stages later, own part seen",
        style="cyan",
        fill="#8ecae6",
    ),
    EndingKind(
        symbol=".",
        launches=False,
        lagged=False,
        own_seen=True,
        words="deferred: no all-reduce, the track keeps its partial",
        style="green",
        fill="#dcefe3",
    ),
)
KINDS: Mapping[str, EndingKind] = MappingProxyType({kind.symbol: kind for kind in _KINDS})
BESIDE = Mark(symbol="|", words="side by side with the next", style="magenta", fill="#d8c7ea")
MARKS: Mapping[str, Mark] = MappingProxyType({**KINDS, BESIDE.symbol: BESIDE})


@dataclass(frozen=True)
class Ending:
    """How a stage ends, by its kind's symbol; `lag` counts the further stages before the merge."""

    symbol: str
    lag: int = 0

    @property
    def kind(self) -> EndingKind:
        """Its row."""
        return KINDS[self.symbol]

    def __str__(self) -> str:
        return f"{self.symbol}{self.lag if self.kind.lagged else ''}"


BLOCKING = Ending("!")
DEFERRED = Ending(".")
