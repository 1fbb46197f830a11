"""The published architectures as functions from a range of layers to its stages.

They are written in the stages of the model itself. Where its layers are `parallel`, each is one
stage `a3|m3`; else its attention and its MLP are one each, one after the other.

A range leaves nothing outstanding at its end: its last stage blocks, and lags are cut so that
everything in flight is merged by then. So the layers around it stay as they were. The one
exception is what `ladder` is: a property of the reader (see `join`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ptconvert.schedule.endings import BLOCKING, Ending
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Stage, parse_stages

Stages = tuple[Stage, ...]


def tensor_parallel(layers: range, parallel: bool = False) -> Stages:
    """The dense model: every sublayer is all-reduced and waited for (Megatron-LM, 1909.08053)."""
    return _read(f"{stage}!" for layer in _layers(layers, parallel) for stage in layer)


def parallel_block(layers: range, parallel: bool = False) -> Stages:
    """Attention and MLP of a layer side by side, as in GPT-J and PaLM (2204.02311)."""
    return _read(f"{'|'.join(layer)}!" for layer in _layers(layers, parallel))


def layer_parallel(layers: range, parallel: bool = False) -> Stages:
    """Pairs of layers side by side (2502.02790); a layer left over runs alone."""
    each = _layers(layers, parallel)
    pairs = [each[i : i + 2] for i in range(0, len(each), 2)]
    return _read(f"{'|'.join(stages)}!" for pair in pairs for stages in zip(*pair, strict=True))


def sync_point_drop(layers: range, parallel: bool = False) -> Stages:
    """No all-reduce after attention; the MLP's carries both (SPD, 2502.20727)."""
    return parallel_track(layers, parallel, depth=1)


def ladder(layers: range, parallel: bool = False) -> Stages:
    """Each sublayer reads the stream without the one just before it (2501.06589)."""
    return _merged_within(_read(f"{s}~1" for layer in _layers(layers, parallel) for s in layer))


def delayed(layers: range, parallel: bool = False, *, delay: int) -> Stages:
    """Every all-reduce arrives `delay` stages late; each track sees its own part at once (DTP)."""
    stages = (f"{s}^{delay}" for layer in _layers(layers, parallel) for s in layer)
    return _merged_within(_read(stages))


def desync(layers: range, parallel: bool = False, *, every: int) -> Stages:
    """One all-reduce in every `every` sublayers (Desync Residual, 2501.06589), or layers where they
    are parallel."""
    stages = (s for layer in _layers(layers, parallel) for s in layer)
    text = (f"{s}{'!' if n % every == 0 else '.'}" for n, s in enumerate(stages, 1))
    return _merged_within(_read(text))


def parallel_track(
    layers: range, parallel: bool = False, *, depth: int, overlap: int = 0
) -> Stages:
    """Tracks that merge once every `depth` layers, counted from the range's first (2602.07306).

    With `overlap` k the merge of a block arrives k stages into the next one. A last block of
    fewer layers is merged at the range's end.
    """
    end, text = f"^{overlap}" if overlap else "!", list[str]()
    for n, (*first, last) in enumerate(_layers(layers, parallel), 1):
        text += [f"{stage}." for stage in first]
        text.append(f"{last}{end if n % depth == 0 else '.'}")
    return _merged_within(_read(text))


def laneformer(layers: range, parallel: bool = False, *, delay: int) -> Stages:
    """Each track's own part at once, the others' `delay` layers late: Laneformer's lanes, as
    `broadcast_delay` and `use_early_comm` have them (kogai/laneformer-2b-it, modeling_laneformer).

    The first `delay` layers of the range reduce at once, as nothing arrives there yet.
    """
    each = _layers(layers, parallel)
    text = [f"{stage}!" for layer in each[:delay] for stage in layer]
    text += [f"{stage}^{delay * len(layer)}" for layer in each[delay:] for stage in layer]
    return _merged_within(_read(text))


def farskip(
    layers: range, _parallel: bool = False, divisible: Container[int] | None = None
) -> Stages:
    """Attention without the routed experts before it, MLPs without the attention beside them
    (FarSkip-Collective, 2511.11505).

    `divisible` are the layers whose MLP is a mixture with shared experts; None for all of them. The
    range's first attention reads everything before it.
    """
    return partial_inputs(layers, divisible, layers[1:], layers)


def partial_inputs(
    layers: range,
    divisible: Container[int] | None,
    without_routed: Container[int],
    without_attention: Container[int],
) -> Stages:
    """The stages of layers whose attention reads the stream without the routed experts of the
    layer before it, if it is among `without_routed`, and whose MLP reads it without the attention
    of its own layer, if among `without_attention`. For `divisible` see `farskip`.

    Layers whose routed experts nobody leaves out run their MLP whole.
    """
    text, hidden = list[str](), False  # whether the layer before's routed experts are in flight
    for i in layers:
        before, early = hidden, i in without_attention
        mixture = divisible is None or i in divisible
        hidden = mixture and i != layers[-1] and i + 1 in without_routed
        if hidden:
            text += [f"a{i}~2" if early else f"a{i}!", f"s{i}~1", f"r{i}~1"]
        elif early:  # beside it, unless the two read different streams
            text += [f"a{i}~1", f"m{i}!"] if before else [f"a{i}|m{i}!"]
        else:
            text += [f"a{i}!", f"m{i}!"]
    return _read(text)


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
            laneformer,
            farskip,
        )
    }
)


def parameters(preset: str) -> dict[str, int | None]:
    """The whole-number parameters that a preset takes: name to default, None where required."""
    taken = inspect.signature(PRESETS[preset]).parameters.values()
    keywords = [p for p in taken if p.kind is p.KEYWORD_ONLY]
    return {k.name: None if k.default is k.empty else k.default for k in keywords}


def stages_of(
    preset: str,
    layers: range,
    parallel: bool,
    divisible: Container[int] | None,
    parameters: Mapping[str, int],
) -> Stages:
    """A preset's stages in a model whose layers may be `parallel`, and of which the MLPs that are
    `divisible` are mixtures with shared experts; None where that isn't known."""
    if preset == farskip.__name__:
        return farskip(layers, parallel, divisible)
    return PRESETS[preset](layers, parallel, **parameters)


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
def dense_schedule(layers: int, parallel: bool = False) -> Schedule:
    """The schedule of the dense model, which every other is compared with."""
    return Schedule(tensor_parallel(range(layers), parallel))


def with_only(schedule: Schedule, block: range, dense: Schedule) -> Schedule:
    """The dense schedule with one of `schedule.blocks(dense)` in place of the same sublayers."""
    own = schedule.stages[block.start : block.stop]
    replaced = dense.running(sublayer for stage in own for sublayer in stage.sublayers)
    return Schedule(dense.stages[: replaced.start] + own + dense.stages[replaced.stop :])


def _layers(layers: range, parallel: bool) -> list[tuple[str, ...]]:
    """What each layer runs in the dense model, stage by stage: `a3` and `m3`, or `a3|m3`."""
    return [(f"a{i}|m{i}",) if parallel else (f"a{i}", f"m{i}") for i in layers]


def _read(stages: Iterable[str]) -> Stages:
    return parse_stages(" ".join(stages))


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
