"""Schedules that others' checkpoints say they run, by keys in their config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ptconvert.errors import ScheduleError
from ptconvert.schedule.presets import join, ladder, partial_inputs, tensor_parallel
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

LADDER_LAYERS, FARSKIP = "ladder_layers", "farskip"
_START, _END = "farskip_start_idx", "farskip_end_idx"
_ATTENTION_ONLY, _MLP_ONLY = "attn_only_farskip", "mlp_only_farskip"


def key_of(config: Mapping[str, object]) -> str | None:
    """The key of a config.json that says a schedule; None where there is none. Raises
    ScheduleError for two."""
    found = [key for key in (LADDER_LAYERS, FARSKIP) if config.get(key) not in (None, False)]
    if len(found) > 1:
        raise ScheduleError(f"{' and '.join(found)} say two schedules; only one can be")
    return found[0] if found else None


def schedule_of(
    config: Mapping[str, object], layers: int, parallel: bool, divisible: Collection[int]
) -> Schedule | None:
    """The schedule that a config.json of others says; None where it says none.

    `divisible` are the layers whose MLP is a mixture with shared experts. Raises ScheduleError for
    keys that say none that there could be.
    """
    key = key_of(config)
    if key == LADDER_LAYERS:
        return from_ladder_layers(config[key], layers, parallel)
    return from_farskip(config, layers, divisible) if key == FARSKIP else None


def from_ladder_layers(ladder_layers: object, layers: int, parallel: bool = False) -> Schedule:
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
    return join((p.__name__, p(range(i, i + 1), parallel)) for i, p in enumerate(presets))


def to_ladder_layers(schedule: Schedule) -> int | list[int] | None:
    """The `ladder_layers` that stands for a schedule; None when there is none.

    An int N where the last N layers are ladder, which older code of the authors needs.
    """
    hidden = {s for stage in schedule.stages if stage.ending.lag for s in stage.sublayers}
    chosen = [i for i in range(schedule.layers) if Sublayer(i, Kind.ATTENTION) in hidden]
    if from_ladder_layers(chosen, schedule.layers) != schedule:
        return None
    return len(chosen) if chosen == list(range(schedule.layers))[-len(chosen) :] else chosen


def from_farskip(config: Mapping[str, object], layers: int, divisible: Collection[int]) -> Schedule:
    """The schedule that `farskip: true` and the keys beside it stand for, as in the config.json of
    Instella-MoE (amd/Instella-MoE-16B-A3B-Think, FarSkipDecoderLayer in modeling_instella_moe).

    From layer `farskip_start_idx` to `farskip_end_idx` an attention reads the stream without the
    routed experts of the layer before it, unless `mlp_only_farskip`, and an MLP reads it without
    the attention of its own layer, unless `attn_only_farskip`. Raises ScheduleError for other
    values, and where no layer has shared experts.
    """
    if not divisible:
        raise ScheduleError(
            f"{FARSKIP} is {config[FARSKIP]!r}, but no layer is a mixture with shared experts; "
            f"without them it is {LADDER_LAYERS}"
        )
    for key in (FARSKIP, _ATTENTION_ONLY, _MLP_ONLY):
        if not isinstance(config.get(key, False), bool):
            raise ScheduleError(f"{key} is {config[key]!r}; it must be true or false")
    first, last = config.get(_START, 0), config.get(_END, layers)
    for key, value in ((_START, first), (_END, last)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise ScheduleError(f"{key} is {value!r}; it must be the number of a layer")
    assert isinstance(first, int | float) and isinstance(last, int | float)
    chosen = range(max(int(first), 0), min(int(last), layers - 1) + 1)
    nothing = range(0)
    return Schedule(
        partial_inputs(
            range(layers),
            divisible,
            nothing if config.get(_MLP_ONLY) else chosen,
            nothing if config.get(_ATTENTION_ONLY) else chosen,
        )
    )
