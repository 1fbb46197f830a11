"""Texts and lists cut to what a message or a table has room for."""

from __future__ import annotations

from collections.abc import Sequence


def clipped(text: str, width: int) -> str:
    """A text of at most `width` characters, its end left out."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def without_middle(text: str, width: int) -> str:
    """A text of at most `width` characters, its middle left out."""
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]} … {text[-half:]}"


def counted(count: int, what: str, several: str | None = None) -> str:
    """`1 rank`, `2 ranks`; of `several` where that isn't a letter more, `2 passes`."""
    return f"{count:,} {what if count == 1 else several or f'{what}s'}"


def few(names: Sequence[object], most: int = 3, joint: str = ", ") -> str:
    """The first names of a list, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return joint.join(map(str, names[:most])) + more
