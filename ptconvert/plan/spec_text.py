"""A schedule as a spec that `transform` takes: by presets where they express it, else by stages."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ptconvert.plan.segments import HIDDEN, per_layer
from ptconvert.schedule import presets
from ptconvert.schedule.endings import BLOCKING
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Stage
from ptconvert.spec.document import Spec, parse_spec

# What an item of a spec costs to read: one by a preset 1, one by stages more for each layer.
_PRESET, _STAGES, _LAYER = 1.0, 1.0, 1.2


@dataclass(frozen=True)
class _Item:
    """Layers and how they run: a preset with parameters, or stages."""

    layers: range
    use: str | None
    parameters: tuple[tuple[str, int], ...]
    stages: tuple[Stage, ...]

    @property
    def cost(self) -> float:
        return _PRESET if self.use else _STAGES + _LAYER * len(self.layers)


def spec_text(
    schedule: Schedule,
    tracks: int,
    head: Sequence[str],
    remark: Callable[[range], str],
    tail: Sequence[str] = (),
    parallel: bool = False,
) -> str:
    """The YAML text; `head` are comment lines above it, `remark` a comment at each range, `tail`
    further lines below. `parallel` says what layers the model has, which presets mean."""
    lines = [f"# {line}".rstrip() for line in head]
    lines += ["format: 1", f"tracks: {tracks}", "schedule:"]
    for item in _items(schedule, parallel):
        first, last = item.layers[0], item.layers[-1]
        layers = f"  - layers: {first}-{last}" if last > first else f"  - layers: {first}"
        lines.append(f"{layers:32}# {remark(item.layers)}".rstrip(" #"))
        if item.use is None:
            lines.append(f'    stages: "{" ".join(map(str, item.stages))}"')
        else:
            lines.append(f"    use: {item.use}")
            lines += [f"    {name}: {value}" for name, value in item.parameters]
    text = "\n".join([*lines, *tail]) + "\n"
    assert _read(text).schedule(parallel) == schedule, "the spec doesn't say what was planned"
    return text


def _read(text: str) -> Spec:
    return parse_spec(text, "the planned spec")


@functools.cache  # it takes 10 seconds for 80 layers, and a report asks twice
def _items(schedule: Schedule, parallel: bool) -> tuple[_Item, ...]:
    """The items that are easiest to read, by dynamic programming from the last layer back.

    A ladder range turns the `!` before it into `~1`; so what comes before it must end so, and is
    written with `!`.
    """
    cuts = _layer_boundaries(schedule)
    layers = sorted(cuts)
    # By first layer, and whether the first item is ladder: cost and items.
    best: dict[tuple[int, bool], tuple[float, tuple[_Item, ...]]] = {(layers[-1], False): (0.0, ())}
    for place in reversed(range(len(layers) - 1)):
        first = layers[place]
        for stop in layers[place + 1 :]:
            for ladder_next in (False, True):
                if (stop, ladder_next) not in best:
                    continue
                rest_cost, rest = best[stop, ladder_next]
                stages = schedule.stages[cuts[first] : cuts[stop]]
                if ladder_next and stages[-1].ending != HIDDEN:
                    continue
                if ladder_next:
                    stages = (*stages[:-1], replace(stages[-1], ending=BLOCKING))
                for item in _ways(range(first, stop), stages, parallel):
                    key = (first, item.use == presets.ladder.__name__)
                    cost = item.cost + rest_cost
                    if key not in best or cost < best[key][0]:
                        best[key] = (cost, (item, *rest))
    return min((best[k] for k in ((0, False), (0, True)) if k in best), key=lambda b: b[0])[1]


def _layer_boundaries(schedule: Schedule) -> dict[int, int]:
    """Layers before which just the layers before them have run, to the stage that begins there."""
    cuts, furthest = {0: 0}, -1
    for index, stage in enumerate(schedule.stages, 1):
        run = schedule.ran[index]
        furthest = max(furthest, *(s.position for s in stage.sublayers))
        if run == furthest + 1 and run % 2 == 0:
            cuts[run // 2] = index
    return cuts


def _ways(layers: range, stages: tuple[Stage, ...], parallel: bool) -> Iterator[_Item]:
    """The ways to write a range of layers: any preset that gives its stages, or the stages."""
    # desync last: what it has in common with others has a better known name.
    desync = presets.desync.__name__
    for name, preset in sorted(presets.PRESETS.items(), key=lambda found: found[0] == desync):
        if name == presets.farskip.__name__:
            continue  # nothing that is planned divides a mixture
        for parameters in _parameters(name, stages, per_layer(parallel)):
            if preset(layers, parallel, **parameters) == stages:
                yield _Item(layers, name, tuple(parameters.items()), stages)
                break
    yield _Item(layers, None, (), stages)


def _parameters(preset: str, stages: tuple[Stage, ...], each: int) -> Iterator[dict[str, int]]:
    """The values of a preset's parameters that could give these stages, so many for each layer."""
    reducing = (i for i, s in enumerate(stages, 1) if s.ending.kind.launches)
    reduces = next(reducing, len(stages))
    lag = stages[reduces - 1].ending.lag
    worth = {"delay": {lag}, "every": {reduces}, "depth": {reduces // each}, "overlap": {0, lag}}
    names = presets.parameters(preset)
    for values in itertools.product(*(sorted(worth[name]) for name in names)):
        found = dict(zip(names, values, strict=True))
        if all(value or names[name] == 0 for name, value in found.items()):
            yield {name: value for name, value in found.items() if value}
