"""Serving engines that run converted checkpoints, found by the entry-point group GROUP.

`base` says what an engine gives and walks the schedule over it; a folder beside it, or another
package, is an engine. Importing this module imports none of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ptconvert.errors import EngineError

GROUP = "ptconvert.engines"


@dataclass(frozen=True)
class ServingEngine:
    """What an entry point of GROUP names.

    `package` must be importable, else `install` says how to get it. `verify` runs a checkpoint with
    `ptconvert.verify`'s settings in the engine, eagerly or compiled, and returns its report.
    `own_all_reduce` makes the engine's own all-reduce by itself, where it has one
    (`estimate.sweep.Maker`).
    """

    package: str
    install: str
    verify: Callable[[Path, Any, bool], Any]
    own_all_reduce: Callable[[Any, Any], Any] | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def engine_names() -> list[str]:
    """The engines that are registered, installed or not."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def own_all_reduces() -> list[Callable[[Any, Any], Any]]:
    """What makes the own all-reduce of each engine that is installed and has one."""
    engines: list[ServingEngine] = [entry.load() for entry in entry_points(group=GROUP)]
    return [e.own_all_reduce for e in engines if e.own_all_reduce is not None and e.installed]


def find_engine(name: str) -> ServingEngine:
    """A registered engine. Raises EngineError where there is none, or it needs what isn't there."""
    for entry in entry_points(group=GROUP, name=name):
        engine: ServingEngine = entry.load()
        break
    else:
        raise EngineError(f"{name} is no serving engine; there are {', '.join(engine_names())}")
    if not engine.installed:
        raise EngineError(f"{name} is not installed: {engine.install}")
    return engine
