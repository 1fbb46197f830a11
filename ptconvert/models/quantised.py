"""Quantised weights, as data: which tensors a linear's weight is kept as, and what cutting it means
for each of them.

A quantised linear is the same linear with more tensors: packed values, scales, zero points, indices
of groups. Their axes are the weight's own, in some order, and how many of the weight's elements one
of theirs stands for follows from their shapes: 8 where int32 hold four bits each, the group where
there is a scale for each. So nothing here depends on a family, and little on a format: one that
calls its tensors otherwise is a few rows more.
"""

from __future__ import annotations

import contextlib
import enum
import fnmatch
import math
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from ptconvert.errors import ConfigError
from ptconvert.models.families import ONE, TensorRule
from ptconvert.models.wrappers import TEXT
from ptconvert.shorten import clipped

QUANTIZATION = "quantization_config"
_OUT, _IN = 0, 1  # axes of a linear's weight


class Role(enum.Enum):
    """What a tensor in a weight's place holds."""

    VALUES = "the quantised values"
    SCALES = "what the values of a group, block or row have in common: scales, zero points"
    GROUPS = "of each input, its group's index"
    SHAPE = "the weight's shape"
    SCALAR = "one number"


@dataclass(frozen=True)
class Kept:
    """A tensor in a weight's place: what it holds, along which of the weight's axes its own run,
    one after the other, and along which of these an integer may hold several values."""

    role: Role
    axes: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()


# By what takes the place of `weight` in a linear's names.
_LINEAR: Mapping[str, Kept] = MappingProxyType(
    {
        # compressed-tensors, transformers' fp8 and ModelOpt
        "weight": Kept(Role.VALUES, (_OUT, _IN), (_IN,)),
        "weight_packed": Kept(Role.VALUES, (_OUT, _IN), (_IN,)),
        "weight_scale": Kept(Role.SCALES, (_OUT, _IN)),
        "weight_scale_inv": Kept(Role.SCALES, (_OUT, _IN)),
        "weight_zero_point": Kept(Role.SCALES, (_OUT, _IN), (_OUT,)),
        "weight_g_idx": Kept(Role.GROUPS, (_IN,)),
        "weight_shape": Kept(Role.SHAPE, (_OUT, _IN)),
        "weight_global_scale": Kept(Role.SCALAR),
        "weight_scale_2": Kept(Role.SCALAR),
        "input_scale": Kept(Role.SCALAR),
        "input_zero_point": Kept(Role.SCALAR),
        "input_global_scale": Kept(Role.SCALAR),
        "input_scale_ub": Kept(Role.SCALAR),
        "activation_scale": Kept(Role.SCALAR),
        "output_scale": Kept(Role.SCALAR),
        "output_zero_point": Kept(Role.SCALAR),
        "k_scale": Kept(Role.SCALAR),
        "v_scale": Kept(Role.SCALAR),
        # GPTQ, AWQ and AutoRound
        "qweight": Kept(Role.VALUES, (_IN, _OUT), (_IN, _OUT)),
        "qzeros": Kept(Role.SCALES, (_IN, _OUT), (_OUT,)),
        "scales": Kept(Role.SCALES, (_IN, _OUT)),
        "g_idx": Kept(Role.GROUPS, (_IN,)),
    }
)
# By what is put behind the name of all experts' weights (E, inputs, outputs): MXFP4 of gpt-oss, a
# group's values along an axis of their own.
_EXPERTS: Mapping[str, Kept] = MappingProxyType(
    {"_blocks": Kept(Role.VALUES, (0, 2, 1)), "_scales": Kept(Role.SCALES, (0, 2, 1))}
)
# Scales of what is cached, beside attention's linears.
CACHE_SCALES = tuple(f"self_attn.{name}_scale" for name in ("q", "k", "v", "kv"))
_PACKINGS = frozenset((2, 4, 8, 16))  # values in an integer

_READ = (
    "compressed-tensors",
    "fp8",
    "fbgemm_fp8",
    "gptq",
    "awq",
    "auto-round",
    "modelopt",
    "mxfp4",
)
_GROUPS = ("group_size", "q_group_size")  # along a weight's inputs
BLOCKS = ("block_structure", "weight_block_size")  # along both of its axes
# Of methods whose quantization_config needn't say it.
_IMPLIED: Mapping[object, frozenset[int]] = MappingProxyType(
    {"mxfp4": frozenset((32,)), "modelopt": frozenset((16,))}
)
_INSTEAD = "convert the unquantised checkpoint, and quantise the result"


def check_method(quantization: Any, where: str) -> None:
    """Raises ConfigError for weights that are kept in a way that can't be cut."""
    given = quantization if isinstance(quantization, Mapping) else {}
    what, method = f"{where}: {QUANTIZATION}", given.get("quant_method")
    if method not in _READ:
        raise ConfigError(
            f"{what}: what {clipped(repr(method), 60)} has quantised can't be cut; supported are "
            f"{', '.join(_READ)}; {_INSTEAD}"
        )
    groups = given.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ConfigError(f"{what}: config_groups must be a mapping of mappings; {_INSTEAD}")
    sparsity = given.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ConfigError(f"{what}: weights kept sparse can't be cut; {_INSTEAD}")
    if given.get("transform_config"):
        raise ConfigError(
            f"{what}: its transform_config mixes what all heads or neurons give, which tracks that "
            f"have a few of them each can't do; {_INSTEAD}"
        )


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, which may be its language model's; None where
    nothing is quantised."""
    parts = (config, config.get(TEXT))
    given = (p[QUANTIZATION] for p in parts if isinstance(p, Mapping) and p.get(QUANTIZATION))
    return next(given, None)


def unit_sizes(
    quantization: Mapping[str, Any],
    module: str | None = None,
    keys: Collection[str] = (*_GROUPS, *BLOCKS),
) -> frozenset[int]:
    """Sizes of the groups and blocks that a quantization_config speaks of, anywhere in it, by some
    of the `keys` that it has for them; of one module where it says which scheme is whose."""
    if module is not None and (own := scheme_of(quantization, module)) is not None:
        quantization = {**quantization, "config_groups": {"own": own}}

    def found(value: Any, is_unit: bool = False) -> Iterator[int]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from found(inner, key in keys)
        elif isinstance(value, list) and is_unit:
            for inner in value:
                yield from found(inner, is_unit)
        elif type(value) is int and is_unit and value > 1:
            yield value

    implied = _IMPLIED.get(_method(quantization)) if "group_size" in keys else None
    return frozenset(found(quantization)) | (implied or frozenset())


def _method(quantization: Mapping[str, object]) -> object:
    return quantization.get("quant_method")


def kept_rules(
    rule: TensorRule,
    part: tuple[int, ...],
    whole: tuple[int, ...],
    sizes: Mapping[str, tuple[int, ...]],
    units: frozenset[int],
    in_order: Callable[[str, int], bool],
) -> tuple[TensorRule, ...]:
    """What a layer's weight is kept as, of the tensors of that layer, or of one track's share.

    `sizes` are the shapes of these, by names relative to the layer; `part` is the weight's there,
    and `whole` that of the whole layer's. `units` are sizes of groups and blocks that there may be.
    `in_order(name, group)` says whether a tensor of indices has group after group of so many
    inputs. Gives the rule itself where the weight isn't quantised. Raises ConfigError where a
    tensor's size is none that it can have.
    """
    before = beginning(rule.name, sizes)
    found = {before + end: kept for end, kept in in_place_of(rule.name, sizes).items()}
    if not found:
        return (rule,)
    _check_found(before, found, sizes)
    group = _inputs_of_a_group(part, [(k, sizes[n]) for n, k in found.items()], units)
    # Where groups lie in no order, a track's inputs may be of any of them, and it has them all.
    all_groups = (rule.is_cut and rule.axis == _IN) and any(
        kept.role is Role.GROUPS and not in_order(name, group or part[_IN])
        for name, kept in found.items()
    )
    rules = []
    for name, kept in found.items():
        own = replace(rule, name=name, apart=(), kept=sizes[name])
        if kept.role is not Role.SHAPE:
            together = kept.role is Role.SCALES and all_groups
            own = _along(own, kept, part, whole, units, together)
        if own.is_cut and kept.role is Role.SHAPE:
            own = replace(own, told=kept.role.value)
        elif own.is_cut and kept.role is Role.GROUPS and not all_groups and group is not None:
            own = replace(own, told=kept.role.value, per=group)
        rules.append(own)
    return tuple(rules)


def in_place_of(weight: str, names: Container[str]) -> Mapping[str, Kept]:
    """Which of some tensors a weight is kept as, by what ends their names; none where it is one of
    them itself, alone."""
    before, table = beginning(weight, names), _EXPERTS
    if before != weight:
        table = _LINEAR
    found = {end: kept for end, kept in table.items() if before + end in names}
    return {} if found.keys() <= {"weight"} else found


def weight_of(name: str) -> str:
    """What a linear's weight is called, by the name of one of the tensors that it may be kept as;
    the name itself where it is none of them."""
    before, dot, end = name.rpartition(".")
    return f"{before}{dot}weight" if end in _LINEAR else name


def beginning(weight: str, names: Container[str]) -> str:
    """What the names of the tensors begin with that a weight is kept as."""
    return weight if f"{weight}_blocks" in names else weight.removesuffix("weight")


def _check_found(
    before: str, found: Mapping[str, Kept], sizes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ConfigError where tensors are no whole weight."""
    roles = {kept.role for kept in found.values()}
    for role, what in ((Role.VALUES, "values"), (Role.SCALES, "scales")):
        if role not in roles:
            raise ConfigError(f"{before}* has no {what} beside {' and '.join(found)}")
    if before + "qweight" in found and not {before + "scales", before + "qzeros"} <= found.keys():
        raise ConfigError(f"{before}* has no scales or zero points beside {' and '.join(found)}")
    for name, kept in found.items():
        if kept.role is Role.SCALAR and math.prod(sizes[name]) != 1:
            raise ConfigError(f"{name} has shape {list(sizes[name])}, not one number")


def _inputs_of_a_group(
    part: tuple[int, ...], found: list[tuple[Kept, tuple[int, ...]]], units: frozenset[int]
) -> int | None:
    """For how many of a linear's inputs there is one scale; None where for all, however many."""
    for kept, size in found:
        if kept.role is Role.SCALES and len(size) == len(part) == 2:
            with contextlib.suppress(ValueError):  # which is told of the tensor itself
                return per_element(part[_IN], size[kept.axes.index(_IN)], units)
    return None


def _along(
    rule: TensorRule,
    kept: Kept,
    part: tuple[int, ...],
    whole: tuple[int, ...],
    units: frozenset[int],
    all_groups: bool,
) -> TensorRule:
    """A tensor's rule, from its size beside a weight that is `part` of the `whole`."""
    size = rule.kept
    assert size is not None
    order = () if len(size) < len(kept.axes) and math.prod(size) == 1 else kept.axes[: len(size)]
    axes, of_one = [rule.axes[axis] for axis in order], [1] * len(size)
    for place, axis in enumerate(order):
        per = None
        if not (all_groups and axis == _IN):
            try:
                per = per_element(part[axis], size[place], units, axis in kept.packed)
            except ValueError:
                raise ConfigError(
                    f"{rule.name} has shape {list(size)}, which is none beside a weight of "
                    f"{list(part)}"
                ) from None
        if per is None:
            axes[place] = ONE
        else:
            of_one[place] = per
    own = replace(rule, axes=(*axes, *[ONE] * (len(size) - len(axes))))
    if not own.is_cut:
        return own
    cut, per = own.axis, of_one[own.axis]
    length = math.ceil(whole[order[cut]] / per)
    return replace(own, per=per, kept=(*size[:cut], length, *size[cut + 1 :]))


def per_element(length: int, kept: int, units: frozenset[int], packed: bool = False) -> int | None:
    """How many of a weight's elements along an axis of so many one of a tensor's stands for, which
    has `kept` along it; None where one stands for all, however many there are. `units` are sizes of
    groups and blocks that there may be; where they may be `packed`, it can be an integer. Raises
    ValueError where none is possible."""
    if kept == 1 < length and length not in units:
        return length if packed else None
    for unit in (1, *sorted(units | (_PACKINGS if packed else frozenset()))):
        if math.ceil(length / unit) == kept:
            return unit
    if kept > 0 and length % kept == 0 and not packed:
        return length // kept
    raise ValueError(f"{kept} don't stand for {length}")


# Where a quantization_config names modules: in lists, and as keys of mappings.
_LISTS = ("ignore", "modules_to_not_convert", "exclude_modules", "targets")
_KEYED = ("extra_config", "dynamic")
_CLASS = "Linear"
_REGEX, _SIGN = "re:", re.compile(r"[+-]:")  # compressed-tensors', and gptqmodel's `dynamic`


def of_tracks(quantization: Any, modules: Mapping[str, Sequence[str]]) -> Any:
    """A quantization_config that says of each track's module what it says of the dense one's.

    `modules` are the names of both. Where a name or pattern meant a module, and doesn't mean the
    tracks', their names are put beside it.
    """

    method = str(_method(quantization))

    def walked(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: named(key, inner) for key, inner in value.items()}

    def named(key: str, value: Any) -> Any:
        if key in _LISTS and isinstance(value, list):
            return [*value, *added(value)]
        if key in _KEYED and isinstance(value, Mapping):
            return {**keyed(value), **value}  # what comes first counts
        return walked(value)

    def keyed(entries: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for dense, tracks in modules.items():
            entry = first(entries, dense)
            for own in tracks:
                if first(entries, own) == entry:
                    continue
                if entry is None:
                    raise unmeant(own, dense)
                sign = _SIGN.match(entry)
                found[f"{sign[0]}{re.escape(own)}$" if sign else own] = entries[entry]
        return found

    def first(entries: Mapping[str, Any], name: str) -> str | None:
        return next((e for e in entries if _meaning(method, (str(e),))(name)), None)

    def added(entries: Sequence[Any]) -> list[str]:
        means, found = _meaning(method, tuple(map(str, entries))), list[str]()
        for dense, tracks in modules.items():
            meant = means(dense)
            for own in tracks:
                if means(own) == meant:
                    continue
                if not meant:
                    raise unmeant(own, dense)
                found.append(own)
        return found

    def unmeant(own: str, dense: str) -> ConfigError:
        return ConfigError(
            f"{QUANTIZATION}: one of its patterns would mean {own}, though not {dense}, which "
            "that is a part of; write the names that it means"
        )

    return walked(quantization)


@lru_cache(maxsize=1024)
def _meaning(method: str, entries: tuple[str, ...]) -> Callable[[str], bool]:
    """Which modules some entries of a quantization_config mean, by their names.

    For compressed-tensors it is a name, or a pattern after `re:` (`match_name` of its
    utils/match.py), or the class of all linears; for ModelOpt a name with asterisks; after a sign
    gptqmodel's pattern that the name begins with; for the others a pattern that the name begins
    with, up to a dot, or what it ends with (`should_convert_module` of transformers'
    quantizers_utils.py), or a pattern with asterisks.
    """
    if method == "compressed-tensors":
        names = frozenset(entries)
        begins = _any_of([e.removeprefix(_REGEX) for e in entries if e.startswith(_REGEX)])
        return lambda name: _CLASS in names or name in names or begins(name)
    if method == "modelopt":
        return _any_of([fnmatch.translate(entry) for entry in entries])
    if any(map(_SIGN.match, entries)):
        return _any_of([_SIGN.sub("", entry, count=1) for entry in entries])
    begins = _any_of([rf"(?:{entry})(?:(?<=\.)|(?=\.|$))" for entry in entries])
    whole = _any_of([fnmatch.translate(entry) for entry in entries if "*" in entry])
    return lambda name: name.endswith(entries) or begins(name) or whole(name)


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether one of some patterns is what a name begins with; those that are none don't count."""
    good = []
    for pattern in patterns:
        with contextlib.suppress(re.error):
            good.append(re.compile(pattern).pattern)
    if not good:
        return lambda _: False
    joined = re.compile("|".join(f"(?:{pattern})" for pattern in good))
    return lambda name: joined.match(name) is not None


class Width(NamedTuple):
    """What a number of a quantised weight takes, `bits`, its scales and zero points included; and
    what it is multiplied in, one of `PRODUCTS`, or in the model's dtype where activations stay in
    that."""

    bits: float
    product: str | None = None


PRODUCTS = ("fp8", "int8", "fp4")
# Of compressed-tensors' activations, by type and bits.
_ACTIVATIONS = {"float8": "fp8", "int8": "int8", "float4": "fp4"}


def weight_width(quantization: Mapping[str, Any], module: str) -> Width | None:
    """What a module's weight takes by a quantization_config; None where that leaves the module as
    it was.

    `module` is a linear's name, or that of all experts' weights together.
    """
    method = str(_method(quantization))
    left = [e for key in _LISTS if key != "targets" for e in _list(quantization.get(key))]
    if _meaning(method, tuple(map(str, left)))(module):
        return None
    if method == "compressed-tensors":
        own = scheme_of(quantization, module)
        if own is None:
            return None
        taken = own.get("input_activations") or {}
        product = _ACTIVATIONS.get(f"{taken.get('type')}{taken.get('num_bits')}")
        return Width(_compressed_bits(own["weights"], str(own.get("format"))), product)
    if method == "mxfp4":
        return Width(4 + 8 / 32) if ".experts." in module else None
    if method == "modelopt":
        algorithm = str(quantization.get("quant_algo"))
        product = "fp4" if "FP4" in algorithm else "int8" if "W8A8" in algorithm else "fp8"
        bits = 4 + 8 / 16 if "FP4" in algorithm else 8.0
        return Width(bits, None if "A16" in algorithm or "WO" in algorithm else product)
    if method in ("fp8", "fbgemm_fp8"):
        return Width(8.0, "fp8")
    own = {"bits": quantization.get("w_bit", 4), **quantization}
    for key in _KEYED:
        entries = quantization.get(key)
        for entry, other in entries.items() if isinstance(entries, Mapping) else ():
            if _meaning(method, (entry,))(module):
                if entry.startswith("-:"):
                    return None
                own |= other
    bits, group = own["bits"], own.get("group_size", own.get("q_group_size", 128))
    if bits >= 16:
        return None
    return Width(bits + ((16 + bits) / group if group > 0 else 0.0))


def scheme_of(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """Which of compressed-tensors' schemes a module has: that of its name, of a pattern, or of its
    class, in this order; None where none is its."""
    groups = quantization.get("config_groups")
    if _method(quantization) != "compressed-tensors" or not isinstance(groups, Mapping):
        return None
    found = [
        group
        for group in groups.values()
        if _meaning("compressed-tensors", tuple(_list(group.get("targets"))))(module)
    ]

    def rank(group: Mapping[str, Any]) -> int:
        targets = _list(group.get("targets"))
        return 0 if module in targets else 2 if _CLASS in targets else 1

    return min(found, key=rank, default=None)


def _compressed_bits(weights: Mapping[str, Any], form: str) -> float:
    """Of one of compressed-tensors' schemes: a scale for each group has 16 bits, or 8 beside FP4
    values."""
    bits, group = float(weights["num_bits"]), weights.get("group_size")
    if not isinstance(group, int) or group < 1:
        return bits
    zeros = 0 if weights.get("symmetric", True) else bits
    return bits + ((8 if form.startswith(("nvfp4", "mxfp")) else 16) + zeros) / group


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
