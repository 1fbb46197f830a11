"""Random schedules of every kind, for whatever must hold for any."""

from __future__ import annotations

from random import Random

from ptconvert.schedule.endings import KINDS
from ptconvert.schedule.schedule import Schedule


def drawn_schedule(random: Random, layers: int) -> Schedule:
    """A valid schedule: sublayers alone and side by side, out of the dense model's order too, with
    every kind of ending. Half of the stages block, so that layers held dense come between tracks.
    """
    left = [f"{kind}{layer}" for layer in range(layers) for kind in "am"]
    stages: list[str] = []
    while left:
        chosen: list[str] = []
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            ready = [s for s in left if s[0] == "a" or f"a{s[1:]}" not in left]
            if ready:
                chosen.append(random.choice(ready[:3]))
                left.remove(chosen[-1])
        kinds = [kind for kind in KINDS.values() if left or kind.launches]
        chains = [KINDS["."]] if left else []  # several in a row want luck
        ending = random.choice([*kinds, *chains, *[KINDS["!"]] * len(kinds)])
        lag = str(random.randint(1, 4)) if ending.lagged else ""
        stages.append("|".join(chosen) + ending.symbol + lag)
    return Schedule.parse(" ".join(stages))


def spans_both(schedule: Schedule) -> bool:
    """Whether a stage runs sublayers of layers held dense beside those of layers of tracks."""
    kinds = [
        {s.layer in schedule.track_layers for s in stage.sublayers} for stage in schedule.stages
    ]
    return {True, False} in kinds
