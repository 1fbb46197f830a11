"""What a converted checkpoint's config.json says about its conversion: the `ptconvert` section.

"ptconvert": {
  "format": 1,               the version of this section
  "tracks": 8,
  "schedule": "a0! m0! ...", the resolved schedule's text form
  "deferred": "sum",
  "assignment": "contiguous",
  "spec_digest": "sha256:...",
  "source_name": "meta-llama/Llama-3.1-8B",
  "source": {...}            what the conversion replaced in the source's config.json
}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ptconvert.errors import ConfigError
from ptconvert.presets import from_ladder_layers
from ptconvert.schedule import Schedule

SECTION = "ptconvert"
SECTION_FORMAT = 1
MODEL_TYPE_PREFIX = "ptconvert_"
MODELING_FILE = "modeling_ptconvert.py"
SPEC_FILE = "ptconvert.yaml"
DEFERRED_RULES = ("sum", "mean")
MAX_TRACKS = 1024
# The keys of config.json that a conversion writes; `--to-dense` restores or removes them.
REPLACED_KEYS = ("model_type", "architectures", "auto_map", "ladder_layers")

_parse = lru_cache(maxsize=64)(Schedule.parse)


@dataclass(frozen=True)
class Section:
    """The part of the `ptconvert` section that decides what the model computes."""

    schedule: Schedule
    tracks: int
    deferred: str
    source: Mapping[str, object]
    spec_digest: object = None


def read_section(config: Mapping[str, Any], where: str = "config.json") -> Section:
    """The conversion that a config.json describes.

    A config without the section is a source model's: its schedule follows from `ladder_layers`,
    the Ladder authors' key, and is the dense model's where that is absent.
    Raises ConfigError or ScheduleError for a section that this version can't read.
    """
    layers = config.get("num_hidden_layers")
    if type(layers) is not int:
        raise ConfigError(f"{where}: num_hidden_layers must be a whole number")
    section = config.get(SECTION)
    if section is None:
        ladder_layers = config.get("ladder_layers")
        schedule = from_ladder_layers([] if ladder_layers is None else ladder_layers, layers)
        return Section(schedule, 1, "sum", {})
    if not isinstance(section, Mapping) or section.get("format") != SECTION_FORMAT:
        raise ConfigError(
            f"{where}: {SECTION} must be a section of format {SECTION_FORMAT}; convert the source "
            "again with this version"
        )
    tracks, deferred = section.get("tracks"), section.get("deferred")
    text, source = section.get("schedule"), section.get("source", {})
    if type(tracks) is not int or not 1 <= tracks <= MAX_TRACKS:
        raise ConfigError(f"{where}: {SECTION}.tracks must be a whole number, 1 to {MAX_TRACKS}")
    if deferred not in DEFERRED_RULES:
        raise ConfigError(f"{where}: {SECTION}.deferred must be {' or '.join(DEFERRED_RULES)}")
    if not isinstance(text, str) or not isinstance(source, Mapping):
        raise ConfigError(f"{where}: {SECTION} must have a schedule (text) and a source (mapping)")
    schedule = _parse(text)
    if schedule.layers != layers:
        raise ConfigError(
            f"{where}: the schedule runs {schedule.layers} layers, the model has {layers}"
        )
    return Section(schedule, tracks, deferred, source, section.get("spec_digest"))


def source_config(config: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """The source model's config.json, from a converted one's."""
    kept = {k: v for k, v in config.items() if k not in (SECTION, *REPLACED_KEYS)}
    return kept | dict(section.source)
