"""What makes up for the partials that tracks go on without: a row for each kind.

A compensation is wanted by a key of the spec, computed from a text, and kept in the checkpoint: a
value in the section, under the same key, and tensors that hold nothing of the source's. Here is
what it is as data; beside it are

- the spec's key: a field of `spec.document.Spec`
- how its value is read: `checkpoint.section.READERS`
- how it is computed, and what that takes: `calibrate.conversion.FITS`, `calibrate.needs.PHASES`
- its modules: `modeling.layers`, `engines.base`; its time: `estimate.roofline`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.filesize import decimal

from ptconvert.models.guesses import guess_cost, guess_tensors, most_guesses
from ptconvert.models.orders import order_tensors
from ptconvert.models.shape import ORDER_DTYPE, ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import Spec
from ptconvert.spec.terms import ASSIGNMENTS


class Added(NamedTuple):
    """A tensor of the converted checkpoint that holds nothing of the source's.

    `track` owns it; None where it is shared by all. `dtype` is None where it is the model's.
    """

    track: int | None
    name: str
    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True)
class Compensation:
    """One kind. Its value is what the section has of it; None where it has nothing.

    - `most(shape, schedule, tracks, wanted)`: the value at most, before a text has decided
    - `tensors(shape, schedule, tracks, value)`: what the checkpoint holds for a value
    - `entry(value)`: what stands in the section; None where it is left out
    - `figure(shape, tracks, value)`: what it is and costs, as plain data; `told(figure)`: in words,
      none where there is nothing to tell; `card(value)`: a sentence for the model card
    - `undecided`: what to say of figures before a text has decided, where it decides about them;
      `yet`: what they are until then, in a word or two
    """

    key: str
    label: str
    most: Callable[[ModelShape, Schedule, int, Any], Any]
    tensors: Callable[[ModelShape, Schedule, int, Any], Iterator[Added]]
    entry: Callable[[Any], Any]
    figure: Callable[[ModelShape, int, Any], Any]
    told: Callable[[Any], str]
    card: Callable[[Any], str] = lambda _: ""
    undecided: str = ""
    yet: str = "at most"


def _orders(shape: ModelShape, schedule: Schedule, _: int, __: Any) -> Iterator[Added]:
    for _layer, _field, name, size in order_tensors(shape, schedule):
        yield Added(None, name, size, ORDER_DTYPE)


def _guesses(shape: ModelShape, _: Schedule, tracks: int, ranks: Any) -> Iterator[Added]:
    return (Added(*one) for one in guess_tensors(shape, ranks, tracks))


def _told_scales(scales: Mapping[str, float] | None) -> str:
    """Of how many sublayers, and between what."""
    if not scales:
        return ""
    return f"{len(scales)} sublayers, {min(scales.values()):.2f} to {max(scales.values()):.2f}"


def _told_guesses(cost: Mapping[str, Any] | None) -> str:
    """What guesses add over all tracks, against the dense model."""
    if cost is None:
        return ""
    ranks = cost["ranks"].values()
    largest = max(ranks)
    return (
        f"{len(ranks)} sublayers, rank {largest if min(ranks) == largest else f'up to {largest}'}: "
        f"{cost['parameters']:,} parameters (+{cost['parameters_share']:.1%}), "
        f"{decimal(cost['bytes'])}, {cost['flops_per_token']:,} FLOPs per token "
        f"(+{cost['flops_share']:.1%})"
    )


# In the order in which they are computed, each with those before it in place.
COMPENSATIONS = (
    Compensation(
        key="assignment",
        label="assignment",
        most=lambda _shape, _schedule, _tracks, wanted: wanted,
        tensors=_orders,
        entry=lambda value: value or ASSIGNMENTS[0],
        figure=lambda _shape, _tracks, value: value or ASSIGNMENTS[0],
        told=lambda figure: "" if figure in (None, ASSIGNMENTS[0]) else figure,
    ),
    Compensation(
        key="scale",
        label="scales",
        most=lambda _shape, schedule, tracks, _: dict.fromkeys(
            schedule.own_kept(tracks), 1 / math.sqrt(tracks)
        ),
        tensors=lambda *_: iter(()),
        entry=lambda scales: {str(s): c for s, c in scales.items()} if scales else None,
        figure=lambda _shape, _tracks, scales: {str(s): c for s, c in (scales or {}).items()},
        told=_told_scales,
        undecided="Scales are those that aren't fitted: the text decides.",
        yet="not fitted yet",
    ),
    Compensation(
        key="guess",
        label="guesses",
        most=lambda shape, schedule, tracks, rank: most_guesses(schedule, tracks, rank, shape),
        tensors=_guesses,
        entry=lambda ranks: {str(s): r for s, r in ranks.items()} if ranks else None,
        figure=lambda shape, tracks, ranks: guess_cost(shape, ranks or {}, tracks),
        told=_told_guesses,
        card=lambda ranks: (
            f" After {len(ranks)} sublayers each guesses the others' partials until they are "
            "merged, by low-rank maps\nfitted on a text."
        ),
        undecided="Guesses are counted at their full rank: the text decides.",
    ),
)


def most(shape: ModelShape, schedule: Schedule, spec: Spec) -> dict[str, Any]:
    """The values at most of what a spec wants."""
    wanted = spec.wanted
    values = {
        c.key: c.most(shape, schedule, spec.tracks, wanted[c.key])
        for c in COMPENSATIONS
        if c.key in wanted
    }
    return {key: value for key, value in values.items() if value}


def added_tensors(
    shape: ModelShape, schedule: Schedule, tracks: int, values: Mapping[str, Any]
) -> list[Added]:
    """What a checkpoint holds for the compensations of these values."""
    return [
        added
        for c in COMPENSATIONS
        if values.get(c.key)
        for added in c.tensors(shape, schedule, tracks, values[c.key])
    ]


def entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of them stands in the section."""
    found = {c.key: c.entry(values.get(c.key)) for c in COMPENSATIONS}
    return {key: entry for key, entry in found.items() if entry is not None}


def figures(shape: ModelShape | None, tracks: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What they are and cost, by key; None of a model that isn't known."""
    return {c.key: shape and c.figure(shape, tracks, values.get(c.key)) for c in COMPENSATIONS}
