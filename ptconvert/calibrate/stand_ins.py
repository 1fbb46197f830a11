"""Assignment and guesses for no schedule in particular, which stand for those that a text will
decide for one: what a plan measures with. Both take each stage's all-reduce to run beside the next
stage, so that a sublayer lacks what the others' tracks wrote just before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ptconvert.calibrate.affinity import assignments
from ptconvert.checkpoint.calibration import Assignment
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.convert.transform import Plan, plan_conversion
from ptconvert.measure.progress import Progress
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import delayed, desync
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec, written

TOKENS = 16384  # that they are fitted on
DELAY = 1  # of each all-reduce, in stages


def overlapped(shape: ModelShape) -> Schedule:
    """The schedule that guesses are fitted for."""
    return Schedule(delayed(range(shape.layers), shape.family.parallel, delay=DELAY))


def assign(
    model: Any,
    shape: ModelShape,
    tracks: int,
    ids_NT: torch.Tensor,
    progress: Progress,
    scratch: Path,
) -> Mapping[int, Assignment]:
    """The assignment by the activity of a dense model on windows of token ids."""
    schedule = overlapped(shape)
    if shape.family.parallel:
        # Each MLP would be paired with the next one, all at once: tens of GB in an 8B model.
        schedule = Schedule(desync(range(shape.layers), parallel=True, every=2))
    found, _ = assignments(model, shape, schedule, tracks, ids_NT, progress, scratch)
    return found


def conversion(source: Checkpoint, tracks: int, wanted: Mapping[str, Any]) -> Plan:
    """A conversion that wants them computed, for what it would hold. Raises PTConvertError."""
    last = int(str(source.language["num_hidden_layers"])) - 1
    lines = ["format: 1", f"tracks: {tracks}", *written(wanted), "schedule:"]
    lines.append(f"  - {{layers: 0-{last}, use: {delayed.__name__}, delay: {DELAY}}}")
    spec = parse_spec("\n".join(lines), "stand-ins")
    return plan_conversion(source, spec, source_name=source.path.name)


def keep(file: Path, orders: Mapping[int, Assignment], decoder: Any) -> None:
    """Writes an assignment and a model's guesses, which `read` gives back."""
    tensors = {
        f"order.{layer}.{of}": torch.from_numpy(order.copy())
        for layer, assigned in orders.items()
        for of, order in vars(assigned).items()
    }
    tensors |= {name: t.contiguous() for name, t in decoder.state_dict().items() if _GUESS in name}
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.replace(file)


def read(file: Path) -> tuple[dict[int, Assignment], dict[str, torch.Tensor]]:
    """An assignment, by layer, and guesses, as `guess.put_guesses` takes them."""
    orders: dict[int, dict[str, Any]] = {}
    guesses = dict[str, torch.Tensor]()
    for name, tensor in load_file(file).items():
        if _GUESS in name:
            guesses[name] = tensor
        else:
            _, layer, of = name.split(".")
            orders.setdefault(int(layer), {})[of] = tensor.numpy()
    return {layer: Assignment(**found) for layer, found in orders.items()}, guesses


_GUESS = ".guess."
