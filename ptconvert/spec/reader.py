"""YAML read into frozen dataclasses: their fields say which keys there are, what each takes, and
what may be left out.

    @dataclass(frozen=True, kw_only=True)
    class Link:
        name: str                                       # a text
        ranks: int = number(1, 2**20)                   # a whole number, as its type is int
        algorithm: str = choice("ring", "tree")
        protocols: tuple[Protocol, ...]                 # a list of mappings, each a dataclass
        sources: Mapping[str, str] = field(...)         # texts by any keys

A list may be empty where it may be left out. A class can say more: `variant(value)` is the class
that a mapping is read as, and its name; `faults(found)` are faults of several fields together; a
field `lines` is given the line of each key; and a `loose` class leaves keys alone that it doesn't
know.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from ptconvert.errors import FileError, PTConvertError
from ptconvert.spec.strict_yaml import Value, YAMLError, load

FORMAT = 1  # of every file
T = TypeVar("T")
Field = dataclasses.Field[Any]


def number(least: float = 0, most: float = 1e9, default: Any = MISSING, **more: Any) -> Any:
    """A field for a number between `least` and `most`."""
    return field(default=default, metadata={"least": least, "most": most, **more})


def choice(*allowed: str, default: Any = MISSING, **more: Any) -> Any:
    """A field for one of a few words."""
    expected = " or ".join(allowed)
    more["allowed"] = allowed
    return parsed(lambda v: v.data if v.data in allowed else None, expected, default, **more)


def parsed(
    parse: Callable[[Value], Any], expected: str, default: Any = MISSING, **more: Any
) -> Any:
    """A field for what `parse` makes of a value: None where it isn't as `expected`, or a
    PTConvertError that says more exactly what is wrong.

    With `inside`, as any field, it stands in a mapping of that one key; with `bare` it needn't.
    """
    return field(default=default, metadata={"parse": parse, "expected": expected, **more})


@dataclass(frozen=True)
class Found:
    """A mapping as far as it could be read: what stands at its keys, and on which lines."""

    cls: type
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read(
    cls: type[T], text: str, where: str, what: str, error: type[FileError], /, **given: Any
) -> T:
    """A document's text as an instance of `cls`, whose fields in `given` stand in no file.

    Raises `error` with all faults, each `where:line: what, and what would be right`.
    """
    try:
        root, duplicates = load(text)
    except YAMLError as fault:
        raise error([f"{where}:{fault.line}: {fault}"]) from None
    reader = _Reader([(fault.line, str(fault)) for fault in duplicates], frozenset(given))
    if isinstance(root.data, dict):
        reader.check_format(*root.data.pop("format", (root.line, None)))
    found = reader.mapping(root, root.line, cls, what, "format")
    if reader.faults or found is None:
        raise error([f"{where}:{line}: {fault}" for line, fault in sorted(reader.faults)])
    found.values.update(given)
    built: T = _built(found)
    return built


def _built(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(_built, found))
    if not isinstance(found, Found):
        return found
    values = {name: _built(value) for name, value in found.values.items()}
    if any(f.name == "lines" for f in dataclasses.fields(found.cls)):
        values["lines"] = found.lines
    return found.cls(**values)


def _fields(cls: type) -> dict[str, tuple[Field, Any]]:
    """By key, a class's fields with their types, less None."""
    hints = typing.get_type_hints(cls)
    for name, hint in hints.items():
        if isinstance(hint, types.UnionType):
            hints[name], _ = typing.get_args(hint)
    return {f.metadata.get("key", f.name): (f, hints[f.name]) for f in dataclasses.fields(cls)}


class _Reader:
    """Collects the faults of a document while it is read, so that all can be reported at once."""

    def __init__(self, faults: list[tuple[int, str]], given: frozenset[str]) -> None:
        self.faults = faults
        self._not_keys = {"lines", *given}

    def check_format(self, line: int, value: Value | None) -> None:
        if value is None:
            self._fault(line, f"format is missing; it must be {FORMAT}")
        elif value.whole_number() != FORMAT:
            what = f"format must be {FORMAT}, not {value}; this version reads format {FORMAT}"
            self._fault(line, what)

    def mapping(self, value: Value, line: int, cls: Any, what: str, *also: str) -> Found | None:
        """A mapping as `cls`, and `what` it is called; `also` are keys that were read already."""
        if hasattr(cls, "variant"):
            cls, what = cls.variant(value, what)
        fields = {k: f for k, f in _fields(cls).items() if f[0].name not in self._not_keys}
        takes = ", ".join((*also, *fields))
        if not isinstance(value.data, dict):
            self._fault(line, f"{what} is {value}; it must be a mapping of {takes}")
            return None
        found = Found(cls)
        for key, (key_line, given) in value.data.items():
            found.lines[key] = key_line
            if key in fields:
                f, hint = fields[key]
                one = self._field(given, key_line, f, hint, key)
                if one is not None:
                    found.values[f.name] = one
            elif not getattr(cls, "loose", False):
                self._fault(key_line, f"unknown key {key!r}; {what} takes {takes}")
        for key, (f, hint) in fields.items():
            required = f.default is MISSING and f.default_factory is MISSING
            if required and key not in value.data:
                must = _expected(hint, f.metadata)
                self._fault(value.line, f"{key} is missing; it must be {must}")
        if hasattr(cls, "faults"):
            self.faults += cls.faults(found)
        return found

    def _field(self, value: Value, line: int, f: Field, hint: Any, key: str) -> Any:
        """What a field takes, of a value; None after a fault."""
        about = f.metadata
        inside = about.get("inside")
        if inside and (isinstance(value.data, dict) or "bare" not in about):
            own = field(metadata={**about, "inside": None})
            wrapped = dataclasses.make_dataclass(key, [(inside, hint, own)])
            found = self.mapping(value, line, wrapped, key)
            return found and found.values.get(inside)
        origin = None if "parse" in about else typing.get_origin(hint)
        if origin is Mapping and isinstance(value.data, dict):
            return {k: self._field(v, at, f, str, k) for k, (at, v) in value.data.items()}
        items = value.data if origin is tuple and isinstance(value.data, list) else None
        if items or (items is not None and f.default is not MISSING):
            of, _ = typing.get_args(hint)
            return tuple(self.mapping(item, item.line, of, "this item") for item in items)
        if dataclasses.is_dataclass(hint):
            return self.mapping(value, line, hint, key)
        try:
            one = _scalar(value, hint, about)
        except PTConvertError as fault:
            return self._fault(line, str(fault))
        if one is None:
            self._fault(line, f"{key} is {value}; it must be {_expected(hint, about)}")
        return one

    def _fault(self, line: int, what: str) -> Any:
        """Notes a fault, and gives nothing."""
        self.faults.append((line, what))


def _scalar(value: Value, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """What a field takes that is neither a mapping of fields nor a list; None where it can't."""
    if "parse" in metadata:
        return metadata["parse"](value)
    if "least" in metadata:
        found = value.whole_number() if hint is int else value.number()
        inside = found is not None and metadata["least"] <= found <= metadata["most"]
        return found if inside else None
    is_text = hint is str and isinstance(value.data, str) and value.data.strip()
    return value.data if is_text else None


def _expected(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    if "expected" in metadata:
        return str(metadata["expected"])
    if "least" in metadata:
        limits = f"{metadata['least']:.10g} to {metadata['most']:.10g}"
        return f"a {'whole ' if hint is int else ''}number, {limits}"
    if hint is str:
        return "text"
    return "a list of mappings" if typing.get_origin(hint) is tuple else "a mapping of texts"
