"""Assignment and guesses for no schedule in particular, which stand for those that a text will
decide for one: what a plan measures with. They take each stage's all-reduce to run beside the next
stage, so that a sublayer lacks what the others' tracks wrote just before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ptconvert.calibrate.affinity import assignments
from ptconvert.calibrate.guess import guess_alone, put_guesses
from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.convert.transform import Plan, plan_conversion
from ptconvert.measure.progress import Progress
from ptconvert.models.guesses import guess_tensors, most_guesses
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import delayed, desync
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec, written
from ptconvert.spec.terms import ASSIGNMENTS

KEYS = ("assignment", "guess")  # the spec's, of what there is one for
TOKENS = 16384  # that they are fitted on
DELAY = 1  # of each all-reduce, in stages
_GUESS = ".guess."


@dataclass(frozen=True)
class StandIns:
    """Which there are: as `wanted` by the spec's keys, fitted on windows (N, T + 1), which are
    `apart` from those that are measured on, or not."""

    wanted: Mapping[str, Any]
    ids: torch.Tensor
    apart: bool

    def orders(
        self,
        model: Any,
        shape: ModelShape,
        tracks: int,
        kept: Path,
        progress: Progress,
    ) -> Mapping[int, Assignment]:
        """The assignment by the activity of a dense model, or as it is kept; none where none is
        wanted."""
        if "assignment" not in self.wanted:
            return {}
        if _is_kept(kept):
            return read_orders(kept)
        given = (tracks, self.ids[:, :-1], progress, kept.parent)
        found, _ = assignments(model, shape, assigned_for(shape), *given)
        return found

    def complete(
        self,
        decoder: Any,
        shape: ModelShape,
        orders: Mapping[int, Assignment],
        kept: Path,
        progress: Progress,
    ) -> None:
        """Gives guesses to a model that holds all layers as tracks, assigned so, where they are
        wanted: fitted, or as they are kept; and keeps all there is."""
        if _is_kept(kept):
            put_guesses(decoder, read_guesses(kept))
            return
        if (rank := self.wanted.get("guess")) is not None:
            given = (self.ids[:, :-1], rank, progress, kept.parent)
            guess_alone(decoder, shape, overlapped(shape), *given)
        keep(kept, orders, decoder)

    def most(self, shape: ModelShape, tracks: int) -> int:
        """How many numbers the guesses have at most."""
        ranks = most_guesses(overlapped(shape), tracks, self.wanted.get("guess"), shape)
        return sum(math.prod(size) for _, _, size in guess_tensors(shape, ranks, tracks))


def known(orders: Mapping[int, Assignment]) -> Calibration:
    """An assignment as a conversion takes it; of none the dense model's own order."""
    return Calibration(orders, {"assignment": ASSIGNMENTS[1]} if orders else {})


def overlapped(shape: ModelShape) -> Schedule:
    """The schedule that guesses are fitted for."""
    return Schedule(delayed(range(shape.layers), shape.family.parallel, delay=DELAY))


def assigned_for(shape: ModelShape) -> Schedule:
    """The schedule that units are assigned for. Where layers are parallel, only every second one
    goes on without the others' partials: else each MLP would be paired with the next, all at once,
    in an 8B model tens of GB."""
    if shape.family.parallel:
        return Schedule(desync(range(shape.layers), parallel=True, every=2))
    return overlapped(shape)


def conversion(source: Checkpoint, tracks: int, wanted: Mapping[str, Any]) -> Plan:
    """A conversion that wants them computed, for what it would hold. Raises PTConvertError."""
    return all_by(source, tracks, f"{delayed.__name__}, delay: {DELAY}", wanted)


def all_by(
    source: Checkpoint,
    tracks: int,
    use: str,
    wanted: Mapping[str, Any],
    known: Calibration | None = None,
) -> Plan:
    """The conversion of all layers by one preset, as a spec has it. Raises PTConvertError."""
    last = int(str(source.language["num_hidden_layers"])) - 1
    lines = ["format: 1", f"tracks: {tracks}", *written(wanted), "schedule:"]
    lines.append(f"  - {{layers: 0-{last}, use: {use}}}")
    spec = parse_spec("\n".join(lines), f"all layers by {use}")
    return plan_conversion(source, spec, source_name=source.path.name, calibration=known)


def keep(file: Path, orders: Mapping[int, Assignment], decoder: Any) -> None:
    """Writes an assignment and a model's guesses."""
    tensors = {
        f"order.{layer}.{of}": torch.from_numpy(order.copy())
        for layer, assigned in orders.items()
        for of, order in vars(assigned).items()
    }
    tensors |= {name: t.contiguous() for name, t in decoder.state_dict().items() if _GUESS in name}
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.replace(file)


def read_orders(file: Path) -> dict[int, Assignment]:
    """The assignment that is kept, by layer."""
    orders: dict[int, dict[str, Any]] = {}
    for name, tensor in _read(file, guesses=False).items():
        _, layer, of = name.split(".")
        orders.setdefault(int(layer), {})[of] = tensor.numpy()
    return {layer: Assignment(**found) for layer, found in orders.items()}


def read_guesses(file: Path) -> dict[str, torch.Tensor]:
    """The guesses that are kept, as `guess.put_guesses` takes them."""
    return _read(file, guesses=True)


def _is_kept(file: Path) -> bool:
    """Whether it is there, and whole."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read(file: Path, guesses: bool) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as kept:
        names = kept.keys()
        return {name: kept.get_tensor(name) for name in names if (_GUESS in name) == guesses}
