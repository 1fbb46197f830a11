"""The files beside a checkpoint's tensors: config.json, the index, and what comes along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.compensations import entries
from ptconvert.checkpoint.files import INDEX, refuse_pointer, small_files
from ptconvert.checkpoint.section import (
    MODELING_FILE,
    REPLACED_KEYS,
    SECTION,
    SECTION_FORMAT,
    SPEC_FILE,
)
from ptconvert.checkpoint.writer import Target
from ptconvert.errors import SpecError
from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX, own_name
from ptconvert.models.wrappers import WRAPPERS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.theirs import to_ladder_layers
from ptconvert.spec.document import Spec


def converted_config(
    source: Mapping[str, object],
    spec: Spec,
    schedule: Schedule,
    source_name: str,
    known: Calibration,
    replaced: Mapping[str, object],
    together: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, object]:
    """config.json of the result: every field of the source's, and the `ptconvert` section.

    `replaced` are fields that are other than the source's, which the section keeps; `together` is
    `ModelShape.together`.
    """
    model_type = str(source["model_type"])
    described = WRAPPERS.get(model_type) or FAMILIES[model_type]
    classes = {auto: own_name(name) for auto, name in described.classes.items()}
    stem = MODELING_FILE.removesuffix(".py")
    return {
        **source,
        **replaced,
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "architectures": [list(classes.values())[-1]],
        "auto_map": {auto: f"{stem}.{name}" for auto, name in classes.items()},
        SECTION: {
            "format": SECTION_FORMAT,
            "tracks": spec.tracks,
            "schedule": str(schedule),
            "deferred": spec.deferred,
            **entries(known.values),
            **({"together": dict(together)} if together else {}),
            "spec_digest": spec.digest,
            "source_name": source_name,
            "source": {k: source[k] for k in (*REPLACED_KEYS, *replaced) if k in source},
        },
    }


def ladder_layers_key(spec: Spec, schedule: Schedule) -> int | list[int]:
    value = to_ladder_layers(schedule)
    if value is None:
        raise SpecError(
            [
                f"{spec.name}:1: --ladder-layers-config: the Ladder authors' format knows only "
                "ladder and tensor_parallel layers, the MLP after the attention"
            ]
        )
    return value


def as_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def index_text(targets: tuple[Target, ...]) -> str:
    total = sum(t.nbytes for t in targets)
    weight_map = {t.name: t.file for t in targets}
    return as_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def carried_files(source: Path, written: Mapping[str, str]) -> tuple[Path, ...]:
    """The source's small files that go along untouched, less those that are written anew.

    Raises CheckpointError for one that Git left as a pointer.
    """
    own = {"config.json", INDEX, SPEC_FILE, MODELING_FILE, *written}
    carried = tuple(p for p in small_files(source) if p.name not in own)
    for path in carried:
        refuse_pointer(path)
    return carried
