"""Whatever is imported from here: a class with any attribute. Nothing calls it."""

from __future__ import annotations

from typing import Any


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return object()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})
