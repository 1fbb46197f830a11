"""Assignment and guesses for no schedule in particular, which stand for those that a text will
decide for one: what a plan weighs with. Both take every stage's all-reduce to run beside the next
stage, so that each sublayer lacks what the others' tracks wrote just before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.affinity import assignments
from ptconvert.calibrate.guess import fit_alone, put_guesses
from ptconvert.checkpoint.calibration import Assignment
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.convert.transform import Plan, plan_conversion
from ptconvert.measure.progress import Progress
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import delayed
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec, written

TOKENS = 16384  # that they are fitted on
DELAY = 1


def overlapped(shape: ModelShape) -> Schedule:
    """The schedule that they are fitted for."""
    return Schedule(delayed(range(shape.layers), shape.family.parallel, delay=DELAY))


def conversion(source: Checkpoint, tracks: int, wanted: Mapping[str, Any]) -> Plan:
    """The conversion by it that wants them computed, for what it would hold. Raises
    PTConvertError."""
    last = int(str(source.language["num_hidden_layers"])) - 1
    lines = ["format: 1", f"tracks: {tracks}", *written(wanted), "schedule:"]
    lines.append(f"  - {{layers: 0-{last}, use: {delayed.__name__}, delay: {DELAY}}}")
    spec = parse_spec("\n".join(lines), "stand-ins")
    return plan_conversion(source, spec, source_name=source.path.name)


def assign(
    model: Any,
    shape: ModelShape,
    tracks: int,
    ids_NT: torch.Tensor,
    progress: Progress,
    scratch: Path,
) -> Mapping[int, Assignment]:
    """The assignment by the activity of a dense model on windows of token ids."""
    given = (tracks, ids_NT, progress, scratch)
    found, _ = assignments(model, shape, overlapped(shape), *given)
    return found


def guess(
    decoder: Any,
    shape: ModelShape,
    rank: int,
    ids_NT: torch.Tensor,
    progress: Progress,
    scratch: Path,
) -> None:
    """Gives guesses of at most that rank, fitted on windows of token ids, to a model that holds all
    layers as tracks."""
    decoder.layers.schedule = overlapped(shape)
    put_guesses(decoder, fit_alone(decoder, shape, ids_NT, rank, progress, scratch))
