"""The three strengths of the ready specs, for a model of any depth: gentle, balanced, aggressive.

Early layers cost the most when changed, so each recipe leaves the first ones as they are and gives
the rest one preset. `specs/` holds what they are for the models there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

from ptconvert.schedule.presets import PRESETS, join, ladder, parallel_track, tensor_parallel
from ptconvert.schedule.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """`preset` with its `arguments`, after the first layers, which stay dense: `share` of them all,
    rounded down, and at least `least`, but never the last layer."""

    name: str
    share: Fraction
    least: int
    preset: str
    arguments: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def dense(self, layers: int) -> int:
        """How many of a model's layers stay as they are."""
        return min(max(self.least, int(layers * self.share)), layers - 1)

    def schedule(self, layers: int, parallel: bool = False) -> Schedule:
        """The recipe for a model of so many layers, which may be `parallel` (`presets`)."""
        first, rest = range(self.dense(layers)), range(self.dense(layers), layers)
        return join(
            (
                (tensor_parallel.__name__, tensor_parallel(first, parallel)),
                (self.preset, PRESETS[self.preset](rest, parallel, **self.arguments)),
            )
        )

    def says(self, layers: int) -> str:
        """The item of a spec that changes layers; those before it stay `tensor_parallel`."""
        item = {"layers": f"{self.dense(layers)}-{layers - 1}", "use": self.preset}
        return ", ".join(f"{name}: {value}" for name, value in {**item, **self.arguments}.items())


RECIPES = (
    Recipe("gentle", Fraction(1, 2), 0, ladder.__name__),
    Recipe("balanced", Fraction(1, 8), 2, parallel_track.__name__, {"depth": 2}),
    Recipe("aggressive", Fraction(0), 2, parallel_track.__name__, {"depth": 4, "overlap": 1}),
)
