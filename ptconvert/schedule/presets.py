"""The published architectures as functions from a range of layers to its stages.

A range leaves nothing outstanding at its end: its last stage blocks, and lags are cut so that
everything in flight is merged by then. So the layers around it stay as they were. The one
exception is what `ladder` is: a property of the reader (see `join`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ptconvert.errors import ScheduleError
from ptconvert.schedule.endings import BLOCKING, Ending
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Stage, Sublayer, parse_stages

Stages = tuple[Stage, ...]


def tensor_parallel(layers: range) -> Stages:
    """The dense model: every sublayer is all-reduced and waited for (Megatron-LM, 1909.08053)."""
    return parse_stages(" ".join(f"a{i}! m{i}!" for i in layers))


def parallel_block(layers: range) -> Stages:
    """Attention and MLP of a layer side by side, as in GPT-J and PaLM (2204.02311)."""
    return parse_stages(" ".join(f"a{i}|m{i}!" for i in layers))


def layer_parallel(layers: range) -> Stages:
    """Pairs of layers side by side (2502.02790); a layer left over runs alone."""
    text = [f"a{i}|a{i + 1}! m{i}|m{i + 1}!" for i in layers[:-1:2]]
    if len(layers) % 2:
        text.append(f"a{layers[-1]}! m{layers[-1]}!")
    return parse_stages(" ".join(text))


def sync_point_drop(layers: range) -> Stages:
    """No all-reduce after attention; the MLP's carries both (SPD, 2502.20727)."""
    return parse_stages(" ".join(f"a{i}. m{i}!" for i in layers))


def ladder(layers: range) -> Stages:
    """Each sublayer reads the stream without the one just before it (2501.06589)."""
    return _merged_within(parse_stages(" ".join(f"a{i}~1 m{i}~1" for i in layers)))


def delayed(layers: range, *, delay: int) -> Stages:
    """Every all-reduce arrives `delay` stages late; each track sees its own part at once (DTP)."""
    return _merged_within(parse_stages(" ".join(f"a{i}^{delay} m{i}^{delay}" for i in layers)))


def desync(layers: range, *, every: int) -> Stages:
    """One all-reduce in every `every` sublayers (Desync Residual, 2501.06589)."""
    sublayers = [f"{kind}{i}" for i in layers for kind in "am"]
    text = [f"{s}{'!' if n % every == 0 else '.'}" for n, s in enumerate(sublayers, 1)]
    return _merged_within(parse_stages(" ".join(text)))


def parallel_track(layers: range, *, depth: int, overlap: int = 0) -> Stages:
    """Tracks that merge once every `depth` layers, counted from the range's first (2602.07306).

    With `overlap` k the merge of a block arrives k stages into the next one. A last block of
    fewer layers is merged at the range's end.
    """
    end = f"^{overlap}" if overlap else "!"
    text = [f"a{i}. m{i}{end if n % depth == 0 else '.'}" for n, i in enumerate(layers, 1)]
    return _merged_within(parse_stages(" ".join(text)))


PRESETS: Mapping[str, Callable[..., Stages]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            tensor_parallel,
            parallel_block,
            layer_parallel,
            sync_point_drop,
            ladder,
            delayed,
            desync,
            parallel_track,
        )
    }
)


def parameters(preset: str) -> dict[str, int | None]:
    """The whole-number parameters that a preset takes: name to default, None where required."""
    keywords = list(inspect.signature(PRESETS[preset]).parameters.values())[1:]
    return {k.name: None if k.default is k.empty else k.default for k in keywords}


def join(parts: Iterable[tuple[str | None, Sequence[Stage]]]) -> Schedule:
    """The schedule of consecutive ranges, each given as its preset (or None) and its stages.

    A ladder layer's attention reads the stream without the MLP before it, so a ladder range
    turns the blocking end of the range before it into an overlapped one.
    Raises ScheduleError when the whole breaks a rule.
    """
    stages: list[Stage] = []
    for preset, part in parts:
        if preset == ladder.__name__ and stages and stages[-1].ending == BLOCKING:
            stages[-1] = replace(stages[-1], ending=Ending("~", 1))
        stages.extend(part)
    return Schedule(tuple(stages))


@functools.cache
def dense_schedule(layers: int) -> Schedule:
    """The schedule of the dense model, which every other is compared with."""
    return Schedule(tensor_parallel(range(layers)))


def with_only(schedule: Schedule, block: range) -> Schedule:
    """The dense schedule with one of `schedule.blocks()` in place of the same sublayers."""
    positions = [s.position for i in block for s in schedule.stages[i].sublayers]
    dense = dense_schedule(schedule.layers).stages
    before, after = dense[: min(positions)], dense[max(positions) + 1 :]
    return Schedule(before + schedule.stages[block.start : block.stop] + after)


def from_ladder_layers(ladder_layers: object, layers: int) -> Schedule:
    """The schedule of the Ladder authors' checkpoints, from `ladder_layers` in their config.json.

    `ladder_layers` is an int N for the last N layers, or a list of layers; the others are dense.
    Raises ScheduleError for anything else.
    """
    if isinstance(ladder_layers, int) and not isinstance(ladder_layers, bool):
        chosen = set(range(layers - ladder_layers, layers)) if ladder_layers >= 0 else {-1}
    elif isinstance(ladder_layers, list) and all(type(i) is int for i in ladder_layers):
        chosen = set(ladder_layers)
    else:
        chosen = {-1}
    if not chosen <= set(range(layers)):
        raise ScheduleError(
            f"ladder_layers is {ladder_layers!r}; it must be a number of last layers, at most "
            f"{layers}, or a list of layers from 0 to {layers - 1}"
        )
    presets = [ladder if i in chosen else tensor_parallel for i in range(layers)]
    return join((p.__name__, p(range(i, i + 1))) for i, p in enumerate(presets))


def to_ladder_layers(schedule: Schedule) -> int | list[int] | None:
    """The `ladder_layers` that stands for a schedule; None when there is none.

    An int N where the last N layers are ladder, which older code of the authors needs.
    """
    hidden = {s for stage in schedule.stages if stage.ending.lag for s in stage.sublayers}
    chosen = [i for i in range(schedule.layers) if Sublayer(i, Kind.ATTENTION) in hidden]
    if from_ladder_layers(chosen, schedule.layers) != schedule:
        return None
    return len(chosen) if chosen == list(range(schedule.layers))[-len(chosen) :] else chosen


def _merged_within(stages: Stages) -> Stages:
    """The stages with every lag cut to what is left of the range, and the last one blocking."""
    last = len(stages) - 1
    merged = []
    for index, stage in enumerate(stages):
        ending = stage.ending
        if index == last:
            ending = BLOCKING
        elif ending.kind.lagged:
            ending = replace(ending, lag=min(ending.lag, last - index))
        merged.append(replace(stage, ending=ending))
    return tuple(merged)
