"""Serving engines that run converted checkpoints, found by the entry-point group GROUP.

`base` says what an engine gives and walks the schedule over it; a folder beside it, or another
package, is an engine. Importing this module imports none of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path
from typing import Any

from ptconvert.checkpoint.section import SECTION, Section, read_section, source_config
from ptconvert.errors import EngineError
from ptconvert.models.shape import ModelShape

GROUP = "ptconvert.engines"


@dataclass(frozen=True)
class ServingEngine:
    """What an entry point of GROUP names.

    `package` must be importable, else `install` says how to get it. `verify` runs a checkpoint with
    `ptconvert.verify`'s settings in the engine, eagerly or compiled, and returns its report.
    `own_all_reduce` makes the engine's own all-reduce by itself, where it has one
    (`estimate.sweep.Maker`). `unserved` says in lines why it wouldn't serve a checkpoint with such
    a config.json, of a source of such a shape, with such a section, on so many ranks, as far as
    that is known without the engine.
    """

    package: str
    install: str
    verify: Callable[[Path, Any, bool], Any]
    own_all_reduce: Callable[[Any, Any], Any] | None = None
    unserved: Callable[[Mapping[str, Any], ModelShape, Section, int], Iterable[str]] = lambda *_: ()

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def engine_names() -> list[str]:
    """The engines that are registered, installed or not."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def unserved(
    config: Mapping[str, Any], section: Section, ranks: int | None = None, name: str = ""
) -> dict[str, list[str]]:
    """Why registered engines, installed or not, wouldn't serve a conversion on GPUs, by their
    names, of those that wouldn't; or of the one of that `name`.

    `config` is the conversion's config.json or its source's. There is a rank for each track, or
    there are so many `ranks`.
    """
    own = read_section(config)
    shape = ModelShape.from_config(source_config(config, own) if SECTION in config else config)
    found = {}
    for entry in sorted(entry_points(group=GROUP), key=attrgetter("name")):
        if name not in ("", entry.name):
            continue
        try:
            engine: ServingEngine = entry.load()
        except (ImportError, AttributeError, TypeError) as error:
            found[entry.name] = [f"its plugin can't be loaded: {error}"]
            continue
        if why := list(engine.unserved(config, shape, section, ranks or section.tracks)):
            found[entry.name] = why
    return found


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
