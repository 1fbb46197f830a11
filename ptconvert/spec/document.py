"""The spec: a YAML file that says which layers run how, read strictly.

    format: 1
    tracks: 8
    schedule:                     # every layer exactly once, ranges inclusive
      - layers: 0-1
        use: tensor_parallel
      - layers: 2-31
        use: parallel_track
        depth: 4

Every fault is a line `file:line: what, and what would be right`; all are reported at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ptconvert.errors import ScheduleError, SpecError
from ptconvert.models.mixtures import indivisible_mlp
from ptconvert.models.shape import ModelShape
from ptconvert.schedule import presets
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import MAX_LAYERS, Stage, parse_stages
from ptconvert.shorten import few
from ptconvert.spec.reader import Found, choice, number, parsed, read
from ptconvert.spec.strict_yaml import Value
from ptconvert.spec.terms import (
    ASSIGNMENTS,
    DEFERRED_RULES,
    MAX_GUESS_RANK,
    MAX_TRACKS,
    SCALES,
)

_RANGE = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")
_ONE_OF = f"one of {', '.join(presets.PRESETS)}"


def _layers(value: Value) -> range | None:
    match = _RANGE.fullmatch(value.data) if isinstance(value.data, str) else None
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first or last >= MAX_LAYERS:
        raise SpecError([f"layers {value} is not a range; it must run upwards, such as 2-29"])
    return range(first, last + 1)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One range of layers and how it runs: a preset with its parameters, or stages as text."""

    layers: range = parsed(_layers, "a layer or a range such as 2-29")
    use: str | None = None
    lines: Mapping[str, int]

    @property
    def line(self) -> int:
        """Where its layers stand."""
        return self.lines["layers"]

    def resolve(self, parallel: bool, divisible: Container[int] | None) -> tuple[Stage, ...]:
        """The stages of this range, for the model as `presets.stages_of` has it."""
        parameters = {name: getattr(self, name) for name in presets.parameters(str(self.use))}
        return presets.stages_of(str(self.use), self.layers, parallel, divisible, parameters)

    @staticmethod
    def variant(value: Value, what: str) -> tuple[type[Item], str]:
        """The kind of item that a value is."""
        data = value.data if isinstance(value.data, dict) else {}
        use = data["use"][1].data if "use" in data else None
        if isinstance(use, str) and use in _PRESETS:
            return _PRESETS[use], use
        return (_Stages if use is None and "stages" in data else _Unknown), what


def _preset(name: str) -> type[Item]:
    """An item's class with a preset's parameters."""
    parameters = [
        (key, int, number(default or 1, MAX_LAYERS, MISSING if default is None else default))
        for key, default in presets.parameters(name).items()
    ]
    return make_dataclass(name, parameters, bases=(Item,), frozen=True, kw_only=True)


_PRESETS = {name: _preset(name) for name in presets.PRESETS}


def _read_stages(value: Value) -> tuple[Stage, ...] | None:
    is_text = isinstance(value.data, str) and value.data.strip()
    return parse_stages(str(value.data)) if is_text else None


@dataclass(frozen=True, kw_only=True)
class _Stages(Item):
    stages: tuple[Stage, ...] = parsed(_read_stages, 'text such as "a0! m0!"')

    def resolve(self, _parallel: bool, _divisible: Container[int] | None) -> tuple[Stage, ...]:
        return self.stages

    @staticmethod
    def faults(found: Found) -> Iterator[tuple[int, str]]:
        """Where the stages aren't those of the item's layers."""
        layers, stages = found.values.get("layers"), found.values.get("stages", ())
        ran = {s.layer for stage in stages for s in stage.sublayers}
        if layers is not None and stages and ran != set(layers):
            what = f"stages runs layers {few(sorted(ran), 8)}; its item has {_print(layers)}"
            yield found.lines["stages"], what


def _unknown(value: Value) -> None:
    raise SpecError([f"unknown preset {value}; it must be {_ONE_OF}"])


@dataclass(frozen=True, kw_only=True)
class _Unknown(Item):
    use: str = parsed(_unknown, _ONE_OF)
    stages: str = ""
    loose: ClassVar[bool] = True  # which keys it takes depends on the preset


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A spec as read; `digest` is the SHA-256 of its text, `name` its file as given."""

    name: str
    text: str
    lines: Mapping[str, int]
    tracks: int = number(1, MAX_TRACKS)
    items: tuple[Item, ...] = field(
        metadata={"key": "schedule", "expected": "a list of `- layers: 0-3` items"}
    )
    deferred: str = choice(
        *DEFERRED_RULES,
        default=DEFERRED_RULES[0],
        unfit=lambda shape: (
            "norms what sublayers give, which undoes a mean" if shape.norms_sums else ""
        ),
    )
    assignment: str = choice(
        *ASSIGNMENTS,
        default=ASSIGNMENTS[0],
        inside="method",
        bare=True,
        idle=" is {value}, but the tracks' streams never differ, so it can change nothing",
        says="which heads and neurons share a track. [contiguous]",
    )
    scale: str = choice(
        *SCALES,
        default=SCALES[0],
        inside="method",
        bare=True,
        idle=" is {value}, but no track goes on without the others' partials",
        unfit=lambda shape: (
            "" if shape.norms_sums else "doesn't norm what sublayers give, so there is none"
        ),
        says="where sums are normed (post-norm), what of it a track's own norm is. [even: 1/√n]",
    )
    guess: int | None = number(  # the largest rank that a guess may have
        1,
        MAX_GUESS_RANK,
        default=None,
        inside="rank",
        idle=": no track goes on without the others' partials, so there is nothing to guess",
        says="tracks guess each other's partials. [they don't]",
    )

    @staticmethod
    def faults(found: Found) -> Iterator[tuple[int, str]]:
        """Where ranges overlap, leave gaps or are out of order, once all of them can be read."""
        items = [item or Found(Item) for item in found.values.get("items", ())]
        expected = 0
        for item in items if all("layers" in i.values for i in items) else ():
            layers, line = item.values["layers"], item.lines["layers"]
            if layers.start < expected:
                what = f"layers {_print(layers)} come again or out of order"
                yield line, f"{what}; this range must begin at layer {expected}"
            elif layers.start > expected:
                gap = _print(range(expected, layers.start))
                what = f"layers {gap} are left out before {_print(layers)}"
                yield line, f"{what}; every layer must be in one range"
            expected = max(expected, layers.stop)

    @property
    def wanted(self) -> dict[str, Any]:
        """What is to be computed from a text, by its key in the spec."""
        values = [(f, getattr(self, f.name)) for f in COMPUTED]
        return {f.name: value for f, value in values if value != f.default}

    def only(self, keys: Collection[str]) -> Spec:
        """The same, wanting no more than what stands at these keys to be computed."""
        left_out: dict[str, Any] = {f.name: f.default for f in COMPUTED if f.name not in keys}
        return replace(self, **left_out)

    @property
    def needs_text(self) -> bool:
        """Whether a conversion by it has something to compute from a text."""
        return bool(self.wanted)

    @property
    def digest(self) -> str:
        """`sha256:` and the hex digest of the file's text."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def layers(self) -> int:
        """How many layers the spec covers."""
        return max(item.layers.stop for item in self.items)

    def schedule(self, parallel: bool = False, divisible: Container[int] | None = None) -> Schedule:
        """The schedule of all ranges together, of a model whose layers may be `parallel`: their
        attention and MLP side by side; and of which some are `divisible`: mixtures with shared
        experts (None: all). Raises SpecError where they break a rule."""
        try:
            return presets.join(
                (item.use, item.resolve(parallel, divisible)) for item in self.items
            )
        except ScheduleError as error:
            raise SpecError([f"{self.name}:{self.items[0].line}: {error}"]) from None

    def check(self, shape: ModelShape) -> None:
        """Raises SpecError, all faults at once, where the spec doesn't fit a model."""
        reason = shape.indivisible(self.tracks)
        faults = [f"{self.name}:{self.lines['tracks']}: {reason}"] if reason else []
        found = unfit(shape, {f.name: getattr(self, f.name) for f in fields(self)})
        faults += [f"{self.name}:{self.lines[key]}: {key} is {why}" for key, why in found.items()]
        faults += self._layer_faults(shape.layers)
        faults += self._divided_faults(shape)
        faults += self.idle_faults(shape.family.parallel)
        if faults:
            raise SpecError(faults)

    def check_layers(self, layers: int) -> None:
        """Raises SpecError, all faults at once, where the spec doesn't cover a model's layers."""
        if faults := self._layer_faults(layers):
            raise SpecError(faults)

    def idle_faults(self, parallel: bool) -> list[str]:
        """What it wants to be computed though no track goes on without the others' partials."""
        if not self.wanted or self.schedule(parallel).own_kept(self.tracks):
            return []
        faults = [
            (self.lines[f.name], f"{f.name}{f.metadata['idle'].format(value=value)}; leave it out")
            for f in COMPUTED
            if (value := self.wanted.get(f.name)) is not None
        ]
        return [f"{self.name}:{line}: {what}" for line, what in sorted(faults)]

    def _divided_faults(self, shape: ModelShape) -> list[str]:
        """Where it divides MLPs that aren't mixtures with shared experts."""
        if not shape.divisible:
            use = presets.farskip.__name__
            faults = [
                f"{self.name}:{item.line}: {use} is for mixtures with shared experts, which "
                f"{shape.model_type} has not; without them it is {presets.ladder.__name__}"
                for item in self.items
                if item.use == use
            ]
            if faults:
                return faults
        schedule = self.schedule(shape.family.parallel, shape.divisible)
        reason = indivisible_mlp(schedule, shape.divisible, shape.model_type)
        return [f"{self.name}:{self.items[0].line}: {reason}"] if reason else []

    def _layer_faults(self, layers: int) -> list[str]:
        faults = [
            f"{self.name}:{item.line}: layers {_print(item.layers)} exceed the model, "
            f"whose layers are 0-{layers - 1}"
            for item in self.items
            if item.layers.stop > layers
        ]
        if self.layers < layers:
            faults.append(
                f"{self.name}:{self.items[-1].line}: layers {_print(range(self.layers, layers))} "
                "of the model are not in the schedule; every layer must be, exactly once"
            )
        return faults


# The fields of what is computed from a text, in the order in which it is.
COMPUTED = tuple(f for f in fields(Spec) if "idle" in f.metadata)


def unfit(shape: ModelShape, given: Mapping[str, Any]) -> dict[str, str]:
    """What of the values given, by key, a model has no use for: the value, and the reason."""
    chosen = [(f, given.get(f.name)) for f in fields(Spec) if "unfit" in f.metadata]
    return {
        f.name: f"{value}, but {shape.model_type} {reason}; leave it out"
        for f, value in chosen
        if value not in (None, f.default) and (reason := f.metadata["unfit"](shape))
    }


def written(wanted: Mapping[str, Any]) -> list[str]:
    """The lines of a spec that want so much to be computed."""
    inside = {f.name: None if "bare" in f.metadata else f.metadata["inside"] for f in COMPUTED}
    return [
        f"{key}: {{{inside[key]}: {value}}}" if inside[key] else f"{key}: {value}"
        for key, value in wanted.items()
    ]


def read_spec(path: Path) -> Spec:
    """Reads and checks a spec file. Raises SpecError with all faults."""
    try:
        text = path.read_bytes()[: 16 * 1024 * 1024].decode("utf-8")
    except FileNotFoundError:
        raise SpecError([f"{path}: there is no such file"]) from None
    except IsADirectoryError:
        raise SpecError([f"{path} is a directory; it must be a file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError([f"{path}: can't be read as UTF-8 text: {error}"]) from None
    return parse_spec(text, str(path))


def parse_spec(text: str, name: str) -> Spec:
    """Reads and checks a spec's text; `name` stands in its errors. Raises SpecError."""
    spec = read(Spec, text, name, "the spec", SpecError, name=name, text=text)
    spec.schedule()  # which checks it
    if faults := spec.idle_faults(parallel=False):
        raise SpecError(faults)
    return spec


def _print(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
