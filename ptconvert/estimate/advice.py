"""Whether to convert: every way to serve a model on a box, and a sentence that may say no.

Each way is estimated for the workload as asked, and for as many of its batches at once as there are
ranks, where replicas have something to do on every device. A conversion changes what the model
computes and has to be measured and healed, so it must gain `WORTH` over the fastest way that leaves
the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptconvert.estimate.alternatives import ALTERNATIVES, Served
from ptconvert.estimate.compare import BASELINE, Candidate, Row, Setting, compare
from ptconvert.schedule.recipes import RECIPES

WORTH = 0.05  # the least gain in tokens per second that makes a conversion worth its healing
_AS_IT_IS = {
    BASELINE: "tensor parallel as it is",
    "pipeline": "as it is, in pipeline stages",
    "replicas": "as it is, a replica on each device",
}


@dataclass(frozen=True)
class Way:
    """A way to serve the model: as asked, and with `Advice.crowd` requests at once.

    `fits` and `crowd_fits` say whether a device holds weights and cache.
    """

    name: str
    converts: bool
    about: str
    asked: Served
    crowded: Served
    fits: bool
    crowd_fits: bool

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
            "ttft_seconds": self.asked.ttft,
            "tpot_seconds": self.asked.tpot,
            "tokens_per_second": self.rate,
            "tokens_per_second_of_requests_at_once": self.crowded_rate or None,
            "bytes_per_rank": self.asked.memory,
        }


@dataclass(frozen=True)
class Advice:
    """The ways to serve a model: the rows of a comparison, in order, then the alternatives."""

    ways: tuple[Way, ...]
    crowd: int

    @property
    def schedules(self) -> list[Way]:
        """The schedules that fit, the fastest first."""
        ways = (way for way in self.ways if way.converts and way.fits)
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
    """The ways to serve a model, from the rows that `compare` gave for it."""
    workload, device = setting.workload, setting.hardware.device
    many = replace(setting, workload=replace(workload, batch=workload.batch * setting.ranks))

    def way(name: str, asked: Served, crowded: Served, about: str | None = None) -> Way:
        fits, crowd_fits = (x.memory <= device.memory_gb * 1e9 for x in (asked, crowded))
        return Way(name, about is not None, about or "", asked, crowded, fits, crowd_fits)

    ways = []
    for row, full in zip(rows, compare([r.candidate for r in rows[1:]], many), strict=True):
        about = None if row is rows[0] else row.candidate.about
        ways.append(
            way(row.candidate.name, Served.of(row.estimate), Served.of(full.estimate), about)
        )
    if setting.ranks > 1:
        ways += [way(name, serve(setting), serve(many)) for name, serve in ALTERNATIVES.items()]
    return Advice(tuple(ways), many.workload.batch)


def verdict(advice: Advice) -> str:
    """Convert, with which schedule and what for, or don't, and what to do instead."""
    other = advice.instead
    if other is None:
        least = min(way.asked.memory for way in advice.ways) / 1e9
        return f"Nothing serves it here: weights and cache take {least:,.0f} GB or more of a rank."
    if not advice.schedules:
        return f"Don't convert: no schedule fits the devices. {_as_it_is(advice, other)}"
    best = advice.schedules[0]
    gains = best.gains(other)
    if not advice.worth:
        gain = gains["tokens_per_second"]
        found = f"gains {gain:.1%} over" if gain >= 0 else f"is {-gain:.1%} slower than"
        return (
            f"Don't convert: the best schedule, {best.name}, {found} {other.name}, and "
            f"{WORTH:.0%} is the least that is worth it. {_as_it_is(advice, other)}"
        )
    about = f" ({best.about})" if best.about else ""
    text = (
        f"Convert with {best.name}{about}: {_faster(gains['ttft'])} prefill, "
        f"{_faster(gains['tpot'])} decode, {_faster(gains['tokens_per_second'])} as a whole than "
        f"{other.name}."
    )
    if more := [f"{w.name}, {w.rate / other.rate - 1:.0%}" for w in advice.worth[1:]]:
        text += f" Also worth it: {'; '.join(more)}."
    return f"{text} What it costs in quality, `plan` and `eval` measure.{_crowd(advice, best)}"


def _as_it_is(advice: Advice, way: Way) -> str:
    return f"Serve it {_AS_IT_IS[way.name]}.{_crowd(advice, way)}"


def _crowd(advice: Advice, chosen: Way) -> str:
    """What to take for many requests at once, where another way gains enough there."""
    kept = (way for way in advice.ways if not way.converts)
    most = max(kept, key=lambda way: way.crowded_rate)
    changed = (way for way in advice.ways if way.converts)
    other = max(changed, key=lambda way: way.crowded_rate, default=most)
    if other.crowded_rate >= (1 + WORTH) * most.crowded_rate:
        most = other
    if most.crowded_rate <= (1 + WORTH) * chosen.crowded_rate:
        return ""
    ours = f"{chosen.crowded_rate:,.0f}" if chosen.crowd_fits else "no room for their cache"
    return (
        f" For {advice.crowd} requests at once take {most.name}: {most.crowded_rate:,.0f} "
        f"tokens/s, where {chosen.name} has {ours}."
    )


def _faster(gain: float) -> str:
    return f"{abs(gain):.0%} {'faster' if gain >= 0 else 'slower'}"
