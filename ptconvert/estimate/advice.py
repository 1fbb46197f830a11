"""Whether to convert: every way to serve a model on a box, and a sentence that may say no.

Each way is estimated for the workload as asked, and for as many of its batches at once as there are
ranks, where replicas have something to do on every device. A conversion changes what the model
computes and has to be measured and healed, so it must gain `WORTH` over the fastest way that leaves
the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptconvert.estimate.alternatives import ALTERNATIVES, Served, group_sizes, named
from ptconvert.estimate.compare import (
    BASELINE,
    Candidate,
    Row,
    Setting,
    compare,
    one_track_each,
    several_tracks,
)
from ptconvert.schedule.recipes import RECIPES

WORTH = 0.05  # the least gain in tokens per second that makes a conversion worth its healing
_AS_IT_IS = {
    BASELINE: "tensor parallel as it is",
    "pipeline": "as it is, in pipeline stages",
    "replicas": "as it is, in replicas",
}


@dataclass(frozen=True)
class Way:
    """A way to serve the model: as asked, and with `Advice.crowd` requests at once.

    `fits` and `crowd_fits` say whether a device holds weights and cache. `as_it_is` says how the
    model is served unconverted, empty where it is converted; `about` what a schedule is, and `kl`
    what it costs in nats per token before any training, where that is known. The engine runs it,
    as far as is known, or not (`served`).
    """

    name: str
    as_it_is: str
    about: str
    kl: float | None
    asked: Served
    crowded: Served
    fits: bool
    crowd_fits: bool
    served: bool = True

    @property
    def converts(self) -> bool:
        """Whether it is a schedule that the model is converted to."""
        return not self.as_it_is

    @property
    def rate(self) -> float:
        """Tokens per second of the workload as asked."""
        return self.asked.tokens_per_second

    @property
    def crowded_rate(self) -> float:
        """Tokens per second of all the requests at once, 0 where they don't fit."""
        return self.crowded.tokens_per_second if self.crowd_fits else 0.0

    def gains(self, other: Way) -> dict[str, float]:
        """How much faster than the other, as shares: 0.1 for a tenth."""
        ours, theirs = self.asked, other.asked
        return {
            "ttft": theirs.ttft / ours.ttft - 1,
            "tpot": theirs.tpot / ours.tpot - 1,
            "tokens_per_second": self.rate / other.rate - 1,
        }

    def to_json(self) -> dict[str, Any]:
        """In SI units."""
        return {
            "name": self.name,
            "converts": self.converts,
            "fits": self.fits,
            "served": self.served,
            "ttft_seconds": self.asked.ttft,
            "tpot_seconds": self.asked.tpot,
            "tokens_per_second": self.rate,
            "tokens_per_second_of_requests_at_once": self.crowded_rate or None,
            "bytes_per_rank": self.asked.memory,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Advice:
    """The ways to serve a model: the rows of a comparison, in order, then the alternatives; and the
    schedules whose ranks run several tracks of a layer, with a track for each rank instead.

    `batch` requests were asked for, and `crowd` are as many batches as there are ranks.
    """

    ways: tuple[Way, ...]
    batch: int
    crowd: int
    retracked: tuple[Way, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it is of one rank."""
        return self.crowd == self.batch

    @property
    def schedules(self) -> list[Way]:
        """The schedules that fit and that the engine runs, the fastest first."""
        ways = (way for way in self.ways if way.converts and way.fits and way.served)
        return sorted(ways, key=lambda way: way.rate, reverse=True)

    @property
    def instead(self) -> Way | None:
        """The fastest way that fits and leaves the model as it is."""
        ways = (way for way in self.ways if way.fits and not way.converts)
        return max(ways, key=lambda way: way.rate, default=None)

    @property
    def worth(self) -> list[Way]:
        """The schedules that gain enough, the fastest first: to convert, where there are any."""
        least = (1 + WORTH) * (self.instead.rate if self.instead else 0.0)
        return [way for way in self.schedules if way.rate >= least]

    def to_json(self) -> dict[str, Any]:
        """The verdict as data."""
        best, other = next(iter(self.schedules), None), self.instead
        return {
            "convert": bool(self.worth),
            "text": verdict(self),
            "threshold": WORTH,
            "schedule": best.name if best else None,
            "instead": other.name if other else None,
            "gains": best.gains(other) if best and other else None,
            "worth_it": [way.name for way in self.worth],
            "requests_at_once": self.crowd,
            "ways": [way.to_json() for way in self.ways],
        }


def recipes(setting: Setting) -> list[Candidate]:
    """The ready schedules for the model, with as many tracks as ranks."""
    shape, layers = setting.shape, setting.shape.layers
    return [
        Candidate(
            r.name,
            r.schedule(layers, shape.family.parallel),
            setting.ranks,
            about=r.says(layers),
        )
        for r in RECIPES
    ]


def advise(rows: Sequence[Row], setting: Setting) -> Advice:
    """The ways to serve a model, from the rows that `compare` gave for it.

    Of pipelines and replicas, whose groups may have several sizes, there are the fastest as asked
    and the fastest for the crowd, or where none fits that which needs the least memory.
    """
    workload, room = setting.workload, setting.hardware.device.memory_gb * 1e9
    many = replace(setting, workload=replace(workload, batch=workload.batch * setting.ranks))

    def way(candidate: Candidate, asked: Served, crowded: Served, as_it_is: str = "") -> Way:
        fits, crowd_fits = (x.memory <= room for x in (asked, crowded))
        about, kl = candidate.about, candidate.kl
        of = (candidate.name, as_it_is, about, kl, asked, crowded, fits, crowd_fits)
        return Way(*of, served=not candidate.unserved)

    def schedule(row: Row, full: Row) -> Way:
        as_it_is = _AS_IT_IS[BASELINE] if row.candidate.name == BASELINE else ""
        return way(row.candidate, Served.of(row.estimate), Served.of(full.estimate), as_it_is)

    crowded = compare([row.candidate for row in rows[1:]], many)
    ways = [schedule(row, full) for row, full in zip(rows, crowded, strict=True)]
    for kind, serve in ALTERNATIVES.items():
        tried = []
        for group in group_sizes(setting):
            candidate = Candidate(named(kind, group, setting.ranks), setting.shape.dense, group)
            devices = "one device" if group == 1 else f"{group} devices"
            told = f"{_AS_IT_IS[kind]} of {devices} each"
            tried.append(way(candidate, serve(setting, group), serve(many, group), told))
        ways += _best(tried)
    retracked = (
        schedule(one_track_each(row, setting), one_track_each(row, many))
        for row in several_tracks(rows, setting)
    )
    batches = workload.batch, many.workload.batch
    return Advice(tuple(ways), *batches, tuple(retracked))


def _best(tried: Sequence[Way]) -> list[Way]:
    """The fastest of an alternative's sizes."""
    fit = [way for way in tried if way.fits]
    if not fit:
        return [min(tried, key=lambda way: way.asked.memory)] if tried else []
    best = max(fit, key=lambda way: way.rate), max(fit, key=lambda way: way.crowded_rate)
    return [way for way in tried if way in best]


def verdict(advice: Advice) -> str:
    """Convert, with which schedule and what for, or don't, and what to do instead."""
    other = advice.instead
    if other is None:
        least = min(way.asked.memory for way in advice.ways) / 1e9
        return f"Nothing serves it here: weights and cache take {least:,.0f} GB or more of a rank."
    if advice.alone:
        return "Don't convert: one rank has no all-reduce to save. Serve it as it is."
    if not advice.schedules:
        fit = any(way.converts and way.fits for way in advice.ways)
        why = "the engine serves none of the schedules" if fit else "no schedule fits the devices"
        return f"Don't convert: {why}. Serve{_as_it_is(advice, other)}"
    best = advice.schedules[0]
    gains = best.gains(other)
    parts = f"{_faster(gains['ttft'])} prefill, {_faster(gains['tpot'])} decode"
    if not advice.worth:
        gain = gains["tokens_per_second"]
        # rounded down: what is too little mustn't look as if it were enough
        found = (
            f"gains {math.floor(gain * 1e3) / 1e3:.1%} over"
            if gain >= 0
            else f"is {-gain:.1%} slower than"
        )
        return (
            f"Don't convert{_limited(advice)}: the best schedule, {best.name}, {found} "
            f"{other.name} ({parts}), and {WORTH:.0%} is the least that is worth it. "
            f"{_retracked(advice, other) or 'Serve'}{_as_it_is(advice, other)}"
        )
    about = f" ({best.about})" if best.about else ""
    text = (
        f"Convert with {best.name}{about}: {parts}, {_faster(gains['tokens_per_second'])} as a "
        f"whole than {other.name}."
    )
    if more := [f"{w.name}, {w.rate / other.rate - 1:.0%}{_cost(w)}" for w in advice.worth[1:]]:
        text += f" Also worth it: {'; '.join(more)}."
    if best.kl is None:
        text += " What it costs in quality, `plan` and `eval` measure."
    else:
        text += f" {best.name} costs KL {best.kl:.4f} before any training."
    return text + _crowd(advice, best)


def _limited(advice: Advice) -> str:
    """For how many requests that is said, where it isn't so of the crowd."""
    chosen = _for_crowd(advice)
    many = f"{advice.batch} requests at once" if advice.batch > 1 else "one request at a time"
    return f" for {many}" if chosen is not None and chosen.converts else ""


def _retracked(advice: Advice, other: Way) -> str:
    """Which schedules would be worth it with fewer tracks."""
    found = [
        f"{way.name} with a track for each rank would gain {way.rate / other.rate - 1:.0%}"
        for way in advice.retracked
        if way.fits and way.served and way.rate >= (1 + WORTH) * other.rate
    ]
    return f"But {'; '.join(found)}: convert it so, or serve" if found else ""


def _cost(way: Way) -> str:
    return "" if way.kl is None else f" for KL {way.kl:.4f}"


def _as_it_is(advice: Advice, way: Way) -> str:
    return f" it {way.as_it_is}.{_crowd(advice, way)}"


def _for_crowd(advice: Advice) -> Way | None:
    """The fastest way for many requests at once: a schedule, where it gains enough there."""
    kept = (way for way in advice.ways if not way.converts)
    most = max(kept, key=lambda way: way.crowded_rate, default=None)
    changed = (way for way in advice.ways if way.converts and way.served)
    other = max(changed, key=lambda way: way.crowded_rate, default=most)
    if most is None or other is None:
        return other
    return other if other.crowded_rate >= (1 + WORTH) * most.crowded_rate else most


def _crowd(advice: Advice, chosen: Way) -> str:
    """What to take for many requests at once, where another way gains enough there."""
    most = _for_crowd(advice)
    if most is None or most.crowded_rate <= (1 + WORTH) * chosen.crowded_rate:
        return ""
    ours = f"{chosen.crowded_rate:,.0f}" if chosen.crowd_fits else "no room for their cache"
    take = "convert with" if most.converts and not chosen.converts else "take"
    return (
        f" For {advice.crowd} requests at once {take} {most.name}: {most.crowded_rate:,.0f} "
        f"tokens/s, where {chosen.name} has {ours}."
    )


def _faster(gain: float) -> str:
    return f"{abs(gain):.0%} {'faster' if gain >= 0 else 'slower'}"
