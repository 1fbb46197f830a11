"""Where the numbers of a hardware or engine row come from, and how far each kind carries.

A row holds them under their kind, by the number's path:

    sources:
      measured:                     # on this hardware, by others or by --measure
        links.0.base_us: who, where and when
      data_sheet:                   # what the maker says; of an engine, its documentation or code
        device.memory_gb_s: which
      assumed:                      # measured or fitted elsewhere, a model's constant, reasoning
        device.kernel_us: from what
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from ptconvert.spec.reader import Found

KINDS = {"measured": "measured", "data_sheet": "data sheet", "assumed": "assumed"}
UNSAID = "without a source"


def _texts() -> Any:
    return field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Sources:
    """By kind, each number's path and where it comes from."""

    measured: Mapping[str, str] = _texts()
    data_sheet: Mapping[str, str] = _texts()
    assumed: Mapping[str, str] = _texts()

    @staticmethod
    def faults(found: Found) -> Iterator[tuple[int, str]]:
        """Where a number has sources of two kinds."""
        seen: dict[str, str] = {}
        for kind, texts in found.values.items():
            for path in texts:
                if path in seen:
                    yield found.lines[kind], f"{path} is {kind} and {seen[path]}; it must be one"
                seen[path] = kind

    def of(self, path: str) -> tuple[str, str]:
        """The kind, in words, and the source of a number."""
        held = ((KINDS[k], texts[path]) for k, texts in self.by_kind().items() if path in texts)
        return next(held, (UNSAID, ""))

    def by_kind(self) -> dict[str, dict[str, str]]:
        """As a row's file holds them: the kinds that there are."""
        texts = {kind: dict(getattr(self, kind)) for kind in KINDS}
        return {kind: held for kind, held in texts.items() if held}


class Number(NamedTuple):
    """A number of a row: its path, such as `links.0.protocols.1.gb_s`, and what it is about."""

    path: str
    value: float
    about: str
    is_default: bool


def numbers(row: object) -> Iterator[Number]:
    """Every number of a row."""
    return _numbers(row, "", None)


def _numbers(row: object, path: str, of: dataclasses.Field[Any] | None) -> Iterator[Number]:
    if isinstance(row, int | float):
        assert of is not None
        yield Number(path, row, of.metadata.get("about", ""), row == of.default)
    elif isinstance(row, tuple):
        for index, item in enumerate(row):
            yield from _numbers(item, f"{path}.{index}", of)
    elif dataclasses.is_dataclass(row):
        for f in dataclasses.fields(row):
            yield from _numbers(getattr(row, f.name), f"{path}.{f.name}".lstrip("."), f)


def origins(row: object, sources: Sources) -> str:
    """A line: which of a row's numbers are measured, from a data sheet, assumed, and which have no
    source; what is so in part is named under each."""
    found: dict[str, dict[str, None]] = {}
    for number in numbers(row):
        if number.about and not number.is_default:
            found.setdefault(sources.of(number.path)[0], {})[number.about] = None
    several = [about for abouts in found.values() for about in abouts]
    return "; ".join(
        f"{kind}: {', '.join(a + ' in part' * (several.count(a) > 1) for a in found[kind])}"
        for kind in (*KINDS.values(), UNSAID)
        if kind in found
    )
