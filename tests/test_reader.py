"""The reader of YAML into dataclasses, on one that has a field of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from ptconvert.errors import SpecError
from ptconvert.spec.reader import Found, choice, number, parsed, read
from ptconvert.spec.strict_yaml import Value


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int = number(1, 9)
    share: float = number(0.5, 1, default=1.0)
    of: str = choice("ring", "tree")

    @staticmethod
    def faults(found: Found) -> Iterator[tuple[int, str]]:
        """A tree of one is none."""
        if found.values.get("size") == 1 and found.values.get("of") == "tree":
            yield found.lines["of"], "a tree of one"


@dataclass(frozen=True, kw_only=True)
class Other(Part):
    more: str


def _word(value: Value) -> str | None:
    return value.data.upper() if isinstance(value.data, str) and value.data.isalpha() else None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    use: str

    @staticmethod
    def variant(value: Value, what: str) -> tuple[type, str]:
        """Other, where there is more."""
        more = isinstance(value.data, dict) and "more" in value.data
        return (Other, "an other") if more else (Part, what)


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    given: str
    lines: Mapping[str, int]
    part: Part
    parts: tuple[Part, ...]
    chosen: tuple[Chosen, ...] = field(default=(), metadata={"key": "choose"})
    rank: int | None = number(1, 9, default=None, inside="of")
    method: str = choice("a", "b", default="a", inside="by", bare=True)
    word: str = parsed(_word, "a word", default="")
    sources: Mapping[str, str] = field(default_factory=dict)


GOOD = """\
format: 1
name: a whole
part: {size: 2, of: tree}
parts:
  - {size: 3, share: 0.75, of: ring}
choose:
  - {size: 4, of: ring}
  - {size: 4, of: ring, more: x}
rank: {of: 5}
method: {by: b}
word: abc
sources: {any: text}
"""


def whole(text: str) -> Whole:
    return read(Whole, text, "w.yaml", "the whole", SpecError, given="by the caller")


def test_every_kind_of_field_is_read() -> None:
    found = whole(GOOD)
    assert found == Whole(
        name="a whole",
        given="by the caller",
        lines=found.lines,
        part=Part(size=2, of="tree"),
        parts=(Part(size=3, share=0.75, of="ring"),),
        chosen=(Part(size=4, of="ring"), Other(size=4, of="ring", more="x")),  # type: ignore[arg-type]
        rank=5,
        method="b",
        word="ABC",
        sources={"any": "text"},
    )
    assert (found.lines["name"], found.lines["choose"], found.lines["sources"]) == (2, 6, 12)
    assert whole(GOOD.replace("{by: b}", "b")).method == "b"
    fewer_text = "\n".join(GOOD.splitlines()[:5])
    fewer = whole(fewer_text)
    assert (fewer.chosen, fewer.rank, fewer.method, fewer.sources) == ((), None, "a", {})
    assert whole(f"{fewer_text}\nchoose: []\n").chosen == ()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("format: 1", "format: 2", "1: format must be 1, not 2; this version reads format 1"),
        ("format: 1", "#", "2: format is missing; it must be 1"),
        ("name: a whole", "#", "1: name is missing; it must be text"),
        ("name: a whole", "name:", "2: name is empty; it must be text"),
        (
            "name: a whole",
            "nam: a\nname: b",
            "2: unknown key 'nam'; the whole takes format, name, ",
        ),
        ("name: a whole", "given: b\nname: b", "2: unknown key 'given'; the whole takes format"),
        ("{size: 2, of: tree}", "3", "3: part is 3; it must be a mapping of size, share, of"),
        (
            "{size: 2, of: tree}",
            "{of: tree}",
            "3: size is missing; it must be a whole number, 1 to",
        ),
        ("size: 2", "size: 2.0", "3: size is 2.0; it must be a whole number, 1 to 9"),
        ("size: 2", "size: 10", "3: size is 10; it must be a whole number, 1 to 9"),
        ("size: 2", "size: 1", "3: a tree of one"),
        ("share: 0.75", "share: 0.4", "5: share is 0.4; it must be a number, 0.5 to 1"),
        ("of: ring}", "of: star}", "5: of is star; it must be ring or tree"),
        (
            "  - {size: 3,",
            "  - 3\n  - {size: 3,",
            "5: this item is 3; it must be a mapping of size",
        ),
        ("choose:\n", "choose:\n  - 4\n", "7: this item is 4; it must be a mapping of size"),
        ("parts:", "parts: []\nchose:", "4: parts is an empty list; it must be a list of mappings"),
        ("more: x", "more: x, y: 1", "8: unknown key 'y'; an other takes size, share, of, more"),
        ("{of: 5}", "5", "9: rank is 5; it must be a mapping of of"),
        ("{of: 5}", "{}", "9: of is missing; it must be a whole number, 1 to 9"),
        ("{by: b}", "c", "10: method is c; it must be a or b"),
        ("{by: b}", "{by: c}", "10: by is c; it must be a or b"),
        ("abc", "1", "11: word is 1; it must be a word"),
        ("{any: text}", "[a]", "12: sources is a list; it must be a mapping of texts"),
        ("{any: text}", "{any: [a]}", "12: any is a list; it must be text"),
        ("word: abc", "word: abc\nword: d", "12: word stands twice (first on line 11); keep one"),
    ],
)
def test_each_fault_is_said_with_what_would_be_right(old: str, new: str, fault: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        whole(GOOD.replace(old, new, 1))
    assert any(line.startswith(f"w.yaml:{fault}") for line in caught.value.faults), caught.value


def test_all_faults_come_at_once_in_the_order_of_their_lines() -> None:
    text = GOOD.replace("size: 2", "size: x").replace("format: 1", "format: x")
    with pytest.raises(SpecError) as caught:
        whole(text.replace("word: abc", "word: 1\nx: y"))
    assert [line.split(":")[1] for line in caught.value.faults] == ["1", "3", "11", "12"]
