"""Links from measured all-reduces: the constants with which the formulas of `collective` give the
times of a sweep, by least squares on relative errors.

Libraries move small messages in other ways than large ones (NCCL's LL, LL128 and Simple, gloo's
whole and segmented rings), so that time over bytes is a line with kinks. Each protocol is fitted to
a run of neighbouring sizes; one more is taken only where it makes the mean error, if that is over
1%, a quarter less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from ptconvert.estimate.collective import all_reduce
from ptconvert.estimate.hardware import Link, Protocol

_PROTOCOLS = 3  # at most, as NCCL has
_BETTER, _GOOD = 0.75, 0.01
_ROUNDS = 5
_LEAST = 0.05  # of a time, that an outer level takes where the levels below leave less


class Point(NamedTuple):
    """One measured all-reduce: ranks, bytes, seconds."""

    ranks: int
    nbytes: float
    seconds: float


@dataclass(frozen=True)
class _Fit:
    base: float
    steps: tuple[float, ...]
    per_byte: tuple[float, ...]

    def _lines(self, point: Point) -> list[float]:
        hops, moved = _ring(point)
        pairs = zip(self.steps, self.per_byte, strict=True)
        return [step * hops + byte * moved for step, byte in pairs]

    def fastest(self, point: Point) -> int:
        lines = self._lines(point)
        return lines.index(min(lines))

    def seconds(self, point: Point) -> float:
        return self.base + min(self._lines(point))

    def error(self, points: Sequence[Point]) -> float:
        return float(np.mean([abs(self.seconds(p) / p.seconds - 1) for p in points]))


def fit_links(
    points: Sequence[Point], levels: Sequence[int], names: Sequence[str]
) -> tuple[Link, ...]:
    """Links from the innermost outwards, of levels that join so many ranks each, from times among
    the ranks of each and of the powers of two below.

    What an outer level takes is what the formulas for those below leave of a time.
    """
    links: list[Link] = []
    for (below, ranks), name in zip(pairwise([1, *levels]), names, strict=True):
        own = [point for point in points if below < point.ranks <= ranks]
        if below > 1:
            own = [_left(point, below, links) for point in own]
        best = _fit(own)
        protocols = tuple(
            Protocol(step_us=digits(step * 1e6), gb_s=digits(1e-9 / max(per_byte, 1e-12)))
            for step, per_byte in zip(best.steps, best.per_byte, strict=True)
        )
        base = digits(best.base * 1e6)
        links.append(
            Link(name=name, ranks=ranks, base_us=base, algorithm="ring", protocols=protocols)
        )
    return tuple(links)


def with_token(links: tuple[Link, ...], nbytes: float, seconds: float) -> tuple[Link, ...]:
    """The links with the outermost's fixed time such that one all-reduce of `nbytes` over all ranks
    takes so many seconds: between the stages of a model ranks also wait for each other."""
    *inner, outer = links
    free = replace(outer, base_us=0.0)
    left = seconds - all_reduce(nbytes, outer.ranks, [*inner, free]).seconds
    return (*inner, replace(outer, base_us=digits(max(left, 0.0) * 1e6)))


def with_one_shot(links: tuple[Link, ...], points: Sequence[Point]) -> tuple[Link, ...]:
    """The links with the innermost's one-shot kernel as it was measured: its fixed time, at the
    median of the points, beside what the formula has for the bytes."""
    if not points:
        return links
    inner, *others = links
    widest = max(protocol.gb_s * 1e9 for protocol in inner.protocols)
    left = [p.seconds - (p.ranks - 1) * p.nbytes / widest for p in points]
    fixed = max(float(np.median(left)), _LEAST * min(p.seconds for p in points))
    return (replace(inner, one_shot_us=digits(fixed * 1e6)), *others)


def digits(value: float) -> float:
    """The value to 4 significant digits: more would suggest a precision that isn't there."""
    return float(f"{value:.4g}")


def _ring(point: Point) -> tuple[float, float]:
    """Hops of a ring, and the bytes that each rank sends."""
    return 2 * (point.ranks - 1), 2 * (point.ranks - 1) / point.ranks * point.nbytes


def _left(point: Point, group: int, inner: Sequence[Link]) -> Point:
    """What an all-reduce over several groups leaves to the level that joins them."""
    within = all_reduce(point.nbytes, group, inner).seconds
    left = max(point.seconds - within, _LEAST * point.seconds)
    return Point(point.ranks // group, point.nbytes / group, left)


def _fit(points: Sequence[Point]) -> _Fit:
    sizes = sorted({point.nbytes for point in points})
    best: _Fit | None = None
    for protocols in range(1, min(_PROTOCOLS, len(sizes) // 2) + 1):
        runs = _runs(sizes, protocols)
        fits = [fit for bounds in runs for fit in _refined(points, bounds)]
        one = min(fits, key=lambda fit: fit.error(points))
        if best is None or one.error(points) < _BETTER * best.error(points):
            best = one
        if best.error(points) < _GOOD:
            break
    assert best is not None, "two sizes at least are measured"
    return best


def _runs(sizes: Sequence[float], count: int) -> Iterator[list[float]]:
    """The largest size of each of `count` runs of neighbours, two at least in each."""
    for cuts in combinations(range(2, len(sizes) - 1), count - 1):
        ends = [*cuts, len(sizes)]
        if all(b - a > 1 for a, b in pairwise([0, *ends])):
            yield [sizes[end - 1] for end in ends]


def _refined(points: Sequence[Point], bounds: Sequence[float]) -> Iterator[_Fit]:
    """Fits with a protocol for each run of sizes, then with each point in the protocol that is its
    fastest: where one gives way to the next differs by the number of ranks."""
    chosen = [next(i for i, bound in enumerate(bounds) if p.nbytes <= bound) for p in points]
    for _ in range(_ROUNDS):
        fit = _solved(points, chosen, len(bounds))
        yield fit
        fastest = [fit.fastest(point) for point in points]
        if fastest == chosen or len({*fastest}) < len(bounds):
            return
        chosen = fastest


def _solved(points: Sequence[Point], chosen: Sequence[int], count: int) -> _Fit:
    """One base, and a step and a time per byte for each protocol, from the points it is for."""
    rows = np.zeros((len(points), 1 + 2 * count))
    for row, point, index in zip(rows, points, chosen, strict=True):
        row[0], row[1 + index], row[1 + count + index] = 1.0, *_ring(point)
    if len({point.ranks for point in points}) == 1:
        rows[:, 1] = 0.0  # the first protocol's steps can't be told from the base
    seconds = np.array([point.seconds for point in points])
    solved = _not_negative(rows / seconds[:, None])
    return _Fit(solved[0], tuple(solved[1 : 1 + count]), tuple(solved[1 + count :]))


def _not_negative(rows: np.ndarray) -> np.ndarray:
    """The least-squares solution of rows x = 1 without the columns that would be negative."""
    kept = [column for column in range(rows.shape[1]) if rows[:, column].any()]
    solved = np.zeros(rows.shape[1])
    while kept:
        found = np.linalg.lstsq(rows[:, kept], np.ones(len(rows)))[0]
        if found.min() >= 0:
            solved[kept] = found
            break
        kept.pop(int(np.argmin(found)))
    return solved
