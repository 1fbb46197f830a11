"""What a spec wants to be computed from a text, computed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptconvert.calibrate.affinity import assignments
from ptconvert.calibrate.guess import HELD_OUT, Fitted, fit_guesses, guess_tensors
from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import EvaluationError
from ptconvert.measure.opening import Progress, open_model
from ptconvert.measure.windows import DEFAULT_LENGTH, Windows, positions, windows_for
from ptconvert.models.shape import DTYPE_BYTES, TORCH_NAMES, ModelShape
from ptconvert.spec.document import Spec
from ptconvert.spec.terms import ASSIGNMENTS

DEFAULT_TOKENS = 65536


@dataclass(frozen=True)
class Calibrated:
    """What was computed, and what there is to say about it.

    `lost` are the shares of affinity between units of different tracks, assigned contiguously and
    as they are now.
    """

    calibration: Calibration
    tokens: int
    lost: tuple[float, float] | None
    fitted: tuple[Fitted, ...]

    def figures(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "tokens": self.tokens,
            "affinity_between_tracks": self.lost
            and {"before": self.lost[0], "after": self.lost[1]},
            "guesses": [
                {"sublayer": str(f.sublayer), "rank": f.rank, "error": f.error} for f in self.fitted
            ],
        }


def calibration_windows(
    source: Checkpoint,
    texts: Sequence[Path],
    window: int | None = None,
    windows: int | None = None,
    tokens: int | None = None,
) -> Windows:
    """So many windows over the texts, or as many as there are without overlap, of about `tokens`
    in all, by default DEFAULT_TOKENS. Raises PTConvertError.
    """
    return windows_for(source, texts, window, windows, tokens or DEFAULT_TOKENS)


def calibration_size(
    source: Checkpoint,
    spec: Spec,
    texts: Sequence[Path],
    window: int | None,
    windows: int | None,
    tokens: int | None,
) -> tuple[int, int]:
    """How many windows there are, and of how many tokens; where no text is given, as many as are
    read of a long one. Raises PTConvertError."""
    if texts:
        found = calibration_windows(source, texts, window, windows, tokens)
        count, length = len(found.ids), found.length
    else:
        longest = positions(source)
        length = window or min(DEFAULT_LENGTH, longest)
        if length > longest:
            raise EvaluationError(f"--window {length}: the model has {longest} positions")
        count = windows or max(1, (tokens or DEFAULT_TOKENS) // length)
    _check_windows(spec, count, length)
    return count, length


def _check_windows(spec: Spec, count: int, length: int) -> None:
    """Raises EvaluationError where there are too few to fit guesses on and to judge them by."""
    if spec.guess is not None and count < HELD_OUT:
        raise EvaluationError(
            f"the text gives {count} windows of {length} tokens; guesses need at least {HELD_OUT}: "
            "a longer text, more --windows or a smaller --window"
        )


def calibration_dtype(source: Checkpoint, shape: ModelShape, dtype: str, device: str) -> str:
    """torch's name of what it is computed in: `auto` is float32 on the CPU, elsewhere what is
    stored."""
    if dtype != "auto":
        return dtype
    stored = weights_dtype(source, shape)
    return "float32" if device == "cpu" else TORCH_NAMES[stored]


def calibrate(
    source: Checkpoint,
    spec: Spec,
    windows: Windows,
    device: str,
    dtype: str,
    scratch: Path,
    progress: Progress,
) -> Calibrated:
    """Computes a spec's assignment and guesses on windows of a text.

    Opens the dense model for the one, and for the other a conversion that lies in the directory
    `scratch` meanwhile, as do streams that are too many for memory. `dtype` is torch's name of one,
    or `auto` (see `calibration_dtype`). Raises PTConvertError.
    """
    _check_windows(spec, len(windows.ids), windows.length)
    shape = ModelShape.from_config(source.config, str(source.path / "config.json"))
    ids_NT = windows.ids[:, :-1]
    dtype = calibration_dtype(source, shape, dtype, device)
    found: Mapping[int, Assignment] = {}
    lost, fitted = None, []
    if spec.assignment != ASSIGNMENTS[0]:
        progress("opening the source", 0, None)
        model = open_model(source, dtype, device)
        schedule = spec.schedule()
        found, lost = assignments(model, shape, schedule, spec.tracks, ids_NT, progress, scratch)
        del model
    if spec.guess is not None:
        progress("converting without guesses", 0, None)
        plan = plan_conversion(
            source,
            replace(spec, guess=None),
            source_name=source.path.name,
            calibration=Calibration(found),
        )
        with tempfile.TemporaryDirectory(prefix=".ptconvert-guess-", dir=scratch) as directory:
            execute(plan, Path(directory) / "model")
            model = open_model(open_checkpoint(Path(directory) / "model"), dtype, device)
        fitted = fit_guesses(model.model, ids_NT, spec.guess, progress, scratch)
    tensors = {
        name: _stored(tensor, weights_dtype(source, shape))
        for name, tensor in guess_tensors(fitted, shape.width)
    }
    ranks = {f.sublayer: f.rank for f in fitted if f.rank}
    return Calibrated(Calibration(found, ranks, tensors), ids_NT.numel(), lost, tuple(fitted))


def _stored(tensor: torch.Tensor, dtype: str) -> NDArray[np.uint8]:
    """A tensor's bytes in a dtype by safetensors' name."""
    stored = (
        tensor.to(getattr(torch, TORCH_NAMES[dtype])).cpu().flatten()
    )  # view needs strides of 1, rank 1 too
    assert stored.element_size() == DTYPE_BYTES[dtype]
    raw: NDArray[np.uint8] = stored.view(torch.uint8).numpy()
    return raw
