"""YAML read as data only: no tags, anchors or aliases, bounded, and every value with its line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from ptconvert.shorten import clipped

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,3})?", re.ASCII)


class YAMLError(ValueError):
    """YAML that is not accepted, and the line (from 1) where it stands."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


@dataclass(frozen=True)
class Value:
    """A scalar, mapping or list, with the line (from 1) on which it begins.

    `data` is a str (any scalar, as written; see `quoted`), a dict of key to (key line, Value), or
    a list of Value.
    """

    data: str | dict[str, tuple[int, Value]] | list[Value]
    line: int
    quoted: bool = False

    def whole_number(self) -> int | None:
        """The value as a whole number; None when it isn't one, as a plain scalar."""
        plain = isinstance(self.data, str) and not self.quoted
        if plain and isinstance(self.data, str) and self.data.isascii() and self.data.isdigit():
            return int(self.data) if len(self.data) <= 9 else None
        return None

    def number(self) -> float | None:
        """The value as a finite decimal number; None when it isn't one, as a plain scalar."""
        if isinstance(self.data, str) and not self.quoted and _NUMBER.fullmatch(self.data):
            number = float(self.data)
            return number if math.isfinite(number) else None
        return None

    def __str__(self) -> str:
        if isinstance(self.data, str):
            shown = clipped(self.data, 60)
            return f"'{shown}'" if self.quoted else shown or "empty"
        kind = "mapping" if isinstance(self.data, dict) else "list"
        return f"a {kind}" if self.data else f"an empty {kind}"


def load(text: str) -> tuple[Value, list[YAMLError]]:
    """Reads one YAML document; returns its root and the duplicate keys found.

    Raises YAMLError for what can't be read at all, or is refused (tags, anchors, aliases, more
    than MAX_BYTES or MAX_DEPTH).
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise YAMLError(1, f"the file is larger than {MAX_BYTES // 1024} KiB, the most allowed")
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        raise YAMLError(mark.line + 1 if mark else 1, f"not valid YAML: {what}") from None
    except yaml.error.YAMLError as error:
        raise YAMLError(1, f"not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise YAMLError(1, "the file is empty")
    duplicates: list[YAMLError] = []
    return _value(root, duplicates), duplicates


def _check_events(events: Iterator[yaml.Event]) -> None:
    depth = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise YAMLError(line, "anchors and aliases are not allowed; write the value out")
        if tag := getattr(event, "tag", None):
            raise YAMLError(line, f"the tag {tag} is not allowed; write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise YAMLError(line, f"nested deeper than {MAX_DEPTH}, the most allowed")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(node: yaml.Node, duplicates: list[YAMLError]) -> Value:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return Value(node.value, line, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Value([_value(item, duplicates) for item in node.value], line)
    mapping: dict[str, tuple[int, Value]] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YAMLError(key_line, "a key must be a plain word")
        if key_node.value in mapping:
            first = mapping[key_node.value][0]
            what = f"{key_node.value} stands twice (first on line {first}); keep one"
            duplicates.append(YAMLError(key_line, what))
            continue
        mapping[key_node.value] = key_line, _value(value_node, duplicates)
    return Value(mapping, line)
