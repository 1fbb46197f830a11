"""What a converted checkpoint's config.json says about its conversion: the `ptconvert` section.

"ptconvert": {
  "format": 1,               the version of this section
  "tracks": 8,
  "schedule": "a0! m0! ...", the resolved schedule's text form
  "deferred": "sum",
  "assignment": "contiguous", or "affinity": each layer of tracks then has the order of its units
  "scale": {"a3": 0.7, ...}, what tracks multiply the norm of their own partial by, where it was
                             fitted; not there where it wasn't
  "guess": {"a3": 64, ...},  sublayers whose tracks guess each other's partials, with the rank; not
                             there where none does
  "together": {"intermediate_size": 128}, how many neurons of this count go to a track as one: of
                             the groups some tracks have one more; not there where all have as many
  "trained": true,           not there where the weights are still the source's, each in its place
  "adapter": true,           not there where no LoRA lies beside quantised weights
  "tensors_digest": "sha256:...", of the source's tensors as they lie here (`tensors_digest`)
  "spec_digest": "sha256:...",
  "source_name": "meta-llama/Llama-3.1-8B",
  "source": {...}            what the conversion replaced in the source's config.json
}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ptconvert.errors import ConfigError
from ptconvert.models.families import COUNTS, parallel_layers
from ptconvert.models.mixtures import divisible_layers, indivisible_mlp
from ptconvert.models.wrappers import language_config
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer
from ptconvert.schedule.theirs import schedule_of
from ptconvert.spec.terms import ASSIGNMENTS, DEFERRED_RULES, MAX_GUESS_RANK, MAX_TRACKS

SECTION = "ptconvert"
SECTION_FORMAT = 1
MODELING_FILE = "modeling_ptconvert.py"
SPEC_FILE = "ptconvert.yaml"
ADAPTER_FOLDER = "ptconvert_adapter"  # of a LoRA beside quantised weights, as peft writes it
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
    compensations: Mapping[str, Any] = field(default_factory=dict)  # those that there are, by key
    trained: bool = False
    tensors_digest: object = None
    adapter: bool = False  # whether a LoRA lies beside quantised weights
    together: Mapping[str, int] = field(default_factory=dict)
    parallel: bool = False  # whether the source's layers are, as its family has them
    divisible: frozenset[int] = frozenset()  # its layers that are mixtures with shared experts

    @property
    def dense(self) -> Schedule:
        """What the source model runs."""
        return dense_schedule(self.schedule.layers, self.parallel)

    @property
    def assigned(self) -> bool:
        """Whether units went to tracks in an order of their own, which the checkpoint holds."""
        return "assignment" in self.compensations

    @property
    def guesses(self) -> Mapping[Sublayer, int]:
        """The ranks of the tracks' guesses, by sublayer."""
        ranks: Mapping[Sublayer, int] = self.compensations.get("guess", {})
        return ranks

    @property
    def scales(self) -> Mapping[Sublayer, float]:
        """What tracks multiply the norm of their own partial by, of the sublayers where that was
        fitted."""
        scales: Mapping[Sublayer, float] = self.compensations.get("scale", {})
        return scales

    @property
    def waiting_weight(self) -> float:
        """What partials that waited since an earlier stage count at the all-reduce."""
        return 1 / self.tracks if self.deferred == "mean" else 1.0


def read_section(config: Mapping[str, Any], where: str = "config.json") -> Section:
    """The conversion that a config.json describes.

    A config without the section is a source model's: its schedule follows from others' keys, such
    as `ladder_layers`, and is the dense model's where these are absent.
    Raises ConfigError or ScheduleError for a section that this version can't read.
    """
    language = language_config(config)
    layers, parallel = language.get("num_hidden_layers"), parallel_layers(language)
    if type(layers) is not int:
        raise ConfigError(f"{where}: num_hidden_layers must be a whole number")
    divisible = divisible_layers(language, layers, where)
    section = config.get(SECTION)
    if section is None:
        theirs = schedule_of(config, layers, parallel, divisible)
        schedule = theirs or dense_schedule(layers, parallel)
        return Section(schedule, 1, "sum", {}, parallel=parallel, divisible=divisible)
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
    if reason := indivisible_mlp(schedule, divisible, language.get("model_type")):
        raise ConfigError(f"{where}: {reason}")
    found = {
        key: read(section[key], schedule, tracks, where)
        for key, read in READERS.items()
        if key in section
    }
    return Section(
        schedule,
        tracks,
        deferred,
        source,
        section.get("spec_digest"),
        {key: value for key, value in found.items() if value},
        section.get("trained") is True,
        section.get("tensors_digest"),
        section.get("adapter") is True,
        _together(section.get("together", {}), where),
        parallel,
        divisible,
    )


def trained_config(config: Mapping[str, Any], adapter: bool = False) -> dict[str, Any]:
    """A converted checkpoint's config.json once its weights were trained, or an `adapter` beside
    them."""
    beside = {"adapter": True} if adapter else {}
    return {**config, SECTION: {**config[SECTION], "trained": True, **beside}}


def with_digest(config: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """A converted checkpoint's config.json with the digest of its tensors."""
    return {**config, SECTION: {**config[SECTION], "tensors_digest": digest}}


def _together(given: object, where: str) -> Mapping[str, int]:
    """How many neurons go to a track as one, by what config.json calls their count."""
    sizes = given if isinstance(given, Mapping) else {"": None}
    for key, size in sizes.items():
        if key not in COUNTS.values() or type(size) is not int or size < 1:
            raise ConfigError(
                f"{where}: {SECTION}.together must give how many go to a track as one, of counts "
                "of neurons"
            )
    return dict(sizes)


def _assignment(given: object, _schedule: Schedule, _tracks: int, where: str) -> str | None:
    """How units were assigned; None where contiguously."""
    if given not in ASSIGNMENTS:
        raise ConfigError(f"{where}: {SECTION}.assignment must be {' or '.join(ASSIGNMENTS)}")
    return None if given == ASSIGNMENTS[0] else str(given)


def _scales(given: object, schedule: Schedule, tracks: int, where: str) -> Mapping[Sublayer, float]:
    """What tracks multiply the norm of their own partial by."""

    def fits(scale: object) -> bool:
        return type(scale) in (int, float) and math.isfinite(float(str(scale)))

    return _by_sublayer("scale", "a number", given, schedule, tracks, where, fits)


def _guesses(given: object, schedule: Schedule, tracks: int, where: str) -> Mapping[Sublayer, int]:
    """The ranks of the guesses."""

    def fits(rank: object) -> bool:
        return type(rank) is int and 1 <= rank <= MAX_GUESS_RANK

    what = f"a rank, 1 to {MAX_GUESS_RANK},"
    return _by_sublayer("guess", what, given, schedule, tracks, where, fits)


def _by_sublayer(
    key: str,
    what: str,
    given: object,
    schedule: Schedule,
    tracks: int,
    where: str,
    fits: Callable[[object], bool],
) -> Mapping[Sublayer, Any]:
    """A value for each of some sublayers that go on without each other's partials, in the
    schedule's order."""
    values = given if isinstance(given, Mapping) else {"": None}
    own_kept = {str(s): s for s in schedule.own_kept(tracks)}
    if not all(name in own_kept and fits(value) for name, value in values.items()):
        raise ConfigError(
            f"{where}: {SECTION}.{key} must give {what} to sublayers after which tracks go on "
            "without each other's partials"
        )
    return {s: values[name] for name, s in own_kept.items() if name in values}


# What each compensation's value in the section is read as; nothing of it where there is none.
READERS: Mapping[str, Callable[[object, Schedule, int, str], Any]] = {
    "assignment": _assignment,
    "scale": _scales,
    "guess": _guesses,
}


def source_config(config: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """The source model's config.json, from a converted one's."""
    kept = {k: v for k, v in config.items() if k not in (SECTION, *REPLACED_KEYS)}
    return kept | dict(section.source)
