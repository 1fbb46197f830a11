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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ptconvert.errors import ScheduleError, SpecError
from ptconvert.models.shape import ModelShape
from ptconvert.schedule import presets
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import MAX_LAYERS, Stage, parse_stages
from ptconvert.shorten import few
from ptconvert.spec.strict_yaml import Value, YAMLError, load
from ptconvert.spec.terms import ASSIGNMENTS, DEFERRED_RULES, MAX_GUESS_RANK, MAX_TRACKS

FORMAT = 1
_RANGE = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")


@dataclass(frozen=True)
class Item:
    """One range of layers and how it runs: a preset with its parameters, or stages as text."""

    layers: range
    line: int
    use: str | None = None
    parameters: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    stages: tuple[Stage, ...] = ()

    def resolve(self) -> tuple[Stage, ...]:
        """The stages of this range."""
        if self.use is None:
            return self.stages
        return presets.PRESETS[self.use](self.layers, **self.parameters)


@dataclass(frozen=True)
class Spec:
    """A spec as read; `digest` is the SHA-256 of its text, `name` its file as given."""

    name: str
    tracks: int
    items: tuple[Item, ...]
    deferred: str
    assignment: str
    text: str
    tracks_line: int = 1
    guess: int | None = None  # the largest rank that a guess may have

    @property
    def needs_text(self) -> bool:
        """Whether a conversion by it has something to compute from a text."""
        return self.assignment != ASSIGNMENTS[0] or self.guess is not None

    @property
    def digest(self) -> str:
        """`sha256:` and the hex digest of the file's text."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def layers(self) -> int:
        """How many layers the spec covers."""
        return max(item.layers.stop for item in self.items)

    def schedule(self) -> Schedule:
        """The schedule of all ranges together. Raises SpecError where they break a rule."""
        try:
            return presets.join((item.use, item.resolve()) for item in self.items)
        except ScheduleError as error:
            raise SpecError([f"{self.name}:{self.items[0].line}: {error}"]) from None

    def check(self, shape: ModelShape) -> None:
        """Raises SpecError, all faults at once, where the spec doesn't fit a model."""
        reason = shape.indivisible(self.tracks)
        faults = [f"{self.name}:{self.tracks_line}: {reason}"] if reason else []
        faults += self._layer_faults(shape.layers)
        if faults:
            raise SpecError(faults)

    def check_layers(self, layers: int) -> None:
        """Raises SpecError, all faults at once, where the spec doesn't cover a model's layers."""
        if faults := self._layer_faults(layers):
            raise SpecError(faults)

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


def read_spec(path: Path) -> Spec:
    """Reads and checks a spec file. Raises SpecError with all faults."""
    try:
        text = path.read_bytes()[: 16 * 1024 * 1024].decode("utf-8")
    except FileNotFoundError:
        raise SpecError([f"{path}: there is no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError([f"{path}: can't be read as UTF-8 text: {error}"]) from None
    return parse_spec(text, str(path))


def parse_spec(text: str, name: str) -> Spec:
    """Reads and checks a spec's text; `name` stands in its errors. Raises SpecError."""
    try:
        root, duplicates = load(text)
    except YAMLError as error:
        raise SpecError([f"{name}:{error.line}: {error}"]) from None
    reader = _Reader(name)
    for fault in duplicates:
        reader.fault(fault.line, str(fault))
    top = reader.mapping(root, "the spec", _TOP_KEYS)
    reader.constant(top.pop("format", None), root.line, FORMAT)
    tracks_line, tracks_value = top.get("tracks", (root.line, None))
    tracks = reader.number(tracks_value, tracks_line, "tracks", 1, MAX_TRACKS)
    deferred = reader.choice(top.get("deferred"), "deferred", DEFERRED_RULES)
    assignment, guess = reader.assignment(top.get("assignment")), reader.guess(top.get("guess"))
    items = reader.items(top.get("schedule"), root.line)
    reader.check_coverage(items)
    reader.raise_faults()
    spec = Spec(name, tracks, tuple(items), deferred, assignment, text, tracks_line, guess)
    schedule = spec.schedule()
    if assignment != ASSIGNMENTS[0] and not schedule.own_kept(tracks):
        reader.fault(top["assignment"][0], f"assignment is {assignment}, {_NO_TRACKS}")
    if guess is not None and not schedule.own_kept(tracks):
        reader.fault(top["guess"][0], f"guess: {_NO_GUESSES}")
    reader.raise_faults()
    return spec


_TOP_KEYS = ("format", "tracks", "schedule", "deferred", "assignment", "guess")
_NO_TRACKS = "but the tracks' streams never differ, so it can change nothing; leave it out"
_NO_GUESSES = (
    "no track goes on without the others' partials, so there is nothing to guess; leave it out"
)
_Entry = tuple[int, Value]


class _Reader:
    """Collects faults while a spec is read, so that all can be reported at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults: list[tuple[int, str]] = []
        self.gaps_known = True  # until a range can't be read

    def fault(self, line: int, what: str) -> None:
        self.faults.append((line, what))

    def raise_faults(self) -> None:
        if self.faults:
            raise SpecError([f"{self.name}:{line}: {what}" for line, what in sorted(self.faults)])

    def mapping(self, value: Value, what: str, keys: tuple[str, ...]) -> dict[str, _Entry]:
        """A mapping's entries, of which only `keys` are allowed."""
        if not isinstance(value.data, dict):
            self.fault(value.line, f"{what} is {value}; it must be a mapping of {', '.join(keys)}")
            return {}
        for key, (line, _) in value.data.items():
            if key not in keys:
                self.fault(line, f"unknown key {key!r}; {what} takes {', '.join(keys)}")
        return {k: v for k, v in value.data.items() if k in keys}

    def constant(self, entry: _Entry | None, line: int, expected: int) -> None:
        if entry is None:
            self.fault(line, f"format is missing; it must be {expected}")
        elif entry[1].whole_number() != expected:
            self.fault(entry[0], f"format is {entry[1]}; this version reads format {expected}")

    def number(self, value: Value | None, line: int, key: str, least: int, most: int) -> int:
        if value is None:
            self.fault(line, f"{key} is missing; it must be a whole number, {least} to {most}")
            return least
        number = value.whole_number()
        if number is None or not least <= number <= most:
            self.fault(line, f"{key} is {value}; it must be a whole number, {least} to {most}")
            return least
        return number

    def choice(self, entry: _Entry | None, key: str, allowed: tuple[str, ...]) -> str:
        if entry is None or entry[1].data in allowed:
            return allowed[0] if entry is None else str(entry[1].data)
        self.fault(entry[0], f"{key} is {entry[1]}; it must be {' or '.join(allowed)}")
        return allowed[0]

    def assignment(self, entry: _Entry | None) -> str:
        """`assignment: METHOD`, or a mapping with the method."""
        if entry is not None and isinstance(entry[1].data, dict):
            found = self.mapping(entry[1], "assignment", ("method",))
            if "method" not in found:
                allowed = " or ".join(ASSIGNMENTS)
                self.fault(entry[0], f"assignment has no method; it must be {allowed}")
            return self.choice(found.get("method"), "method", ASSIGNMENTS)
        return self.choice(entry, "assignment", ASSIGNMENTS)

    def guess(self, entry: _Entry | None) -> int | None:
        """`guess: {rank: r}`."""
        if entry is None:
            return None
        found = self.mapping(entry[1], "guess", ("rank",))
        if not isinstance(entry[1].data, dict):
            return None
        line, rank = found.get("rank", (entry[0], None))
        return self.number(rank, line, "rank", 1, MAX_GUESS_RANK)

    def items(self, entry: _Entry | None, line: int) -> list[Item]:
        if entry is None or not isinstance(entry[1].data, list) or not entry[1].data:
            was = "missing" if entry is None else str(entry[1]) or "empty"
            where = line if entry is None else entry[0]
            self.fault(where, f"schedule is {was}; it must be a list of `- layers: 0-3` items")
            return []
        items = [self._item(value) for value in entry[1].data]
        return [item for item in items if item is not None]

    def _item(self, value: Value) -> Item | None:
        if not isinstance(value.data, dict):
            self.fault(value.line, f"this item is {value}; it must have layers and use (or stages)")
            self.gaps_known = False
            return None
        use_line, use = value.data.get("use", (value.line, None))
        preset = use.data if use is not None else None
        known = isinstance(preset, str) and preset in presets.PRESETS
        takes = presets.parameters(str(preset)) if known else {}
        keys = ("layers", "use", *takes) if known else ("layers", "use", "stages")
        if known or use is None:
            self.mapping(value, f"{preset}" if known else "an item", keys)
        if not known and (use is not None or "stages" not in value.data):
            was = "use is missing" if use is None else f"unknown preset {use}"
            self.fault(use_line, f"{was}; it must be one of {', '.join(presets.PRESETS)}")
        layers = self._layers(value)
        numbers = self._parameters(value, str(preset), takes)
        stages = self._stages(value, layers) if use is None else ()
        if layers is None:
            self.gaps_known = False
            return None
        name = str(preset) if known else None
        return Item(layers, value.line, name, MappingProxyType(numbers), stages)

    def _layers(self, item: Value) -> range | None:
        assert isinstance(item.data, dict)
        line, value = item.data.get("layers", (item.line, None))
        match = (
            _RANGE.fullmatch(value.data)
            if value is not None and isinstance(value.data, str)
            else None
        )
        if match is None:
            was = "missing" if value is None else str(value) or "empty"
            self.fault(line, f"layers is {was}; it must be a layer or a range such as 2-29")
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= MAX_LAYERS:
            self.fault(line, f"layers {value} is not a range; it must run upwards, such as 2-29")
            return None
        return range(first, last + 1)

    def _parameters(
        self, item: Value, preset: str, takes: Mapping[str, int | None]
    ) -> dict[str, int]:
        assert isinstance(item.data, dict)
        numbers = {}
        for key, default in takes.items():
            entry = item.data.get(key)
            if entry is None and default is None:
                what = f"{preset} needs {key}; it must be a whole number, 1 to {MAX_LAYERS}"
                self.fault(item.line, what)
            elif entry is not None:
                least = 1 if default is None else default
                numbers[key] = self.number(entry[1], entry[0], key, least, MAX_LAYERS)
        return numbers

    def _stages(self, item: Value, layers: range | None) -> tuple[Stage, ...]:
        assert isinstance(item.data, dict)
        line, value = item.data.get("stages", (item.line, None))
        if value is None:
            return ()
        if not isinstance(value.data, str) or not value.data.strip():
            self.fault(line, f'stages is {value}; it must be text such as "a0! m0!"')
            return ()
        try:
            stages = parse_stages(value.data)
        except ScheduleError as error:
            self.fault(line, str(error))
            return ()
        ran = {s.layer for stage in stages for s in stage.sublayers}
        if layers is not None and ran != set(layers):
            self.fault(
                line, f"stages runs layers {few(sorted(ran), 8)}; its item has {_print(layers)}"
            )
        return stages

    def check_coverage(self, items: list[Item]) -> None:
        """Faults for ranges that overlap, leave gaps or are out of order."""
        expected = 0
        for item in items if self.gaps_known else []:
            if item.layers.start < expected:
                what = (
                    f"layers {_print(item.layers)} come again or out of order; "
                    f"this range must begin at layer {expected}"
                )
                self.fault(item.line, what)
            elif item.layers.start > expected:
                gap = _print(range(expected, item.layers.start))
                what = f"layers {gap} are left out before {_print(item.layers)}"
                self.fault(item.line, f"{what}; every layer must be in one range")
            expected = max(expected, item.layers.stop)


def _print(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
