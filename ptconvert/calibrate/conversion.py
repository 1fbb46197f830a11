"""What a spec wants to be computed from a text, computed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptconvert.calibrate.affinity import assignments
from ptconvert.calibrate.guess import fit_guesses, fitted_tensors
from ptconvert.calibrate.scale import fit_scales
from ptconvert.calibrate.streams import HELD_OUT
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.compensations import COMPENSATIONS
from ptconvert.checkpoint.inventory import weights_dtype
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import EvaluationError
from ptconvert.measure.opening import open_model
from ptconvert.measure.progress import Progress
from ptconvert.measure.windows import DEFAULT_LENGTH, Windows, positions, windows_for
from ptconvert.models.quantised import quantization_of
from ptconvert.models.shape import DTYPE_BYTES, TORCH_NAMES, ModelShape
from ptconvert.runtime.load import shape_of
from ptconvert.spec.document import Spec

DEFAULT_TOKENS = 65536


@dataclass(frozen=True)
class Case:
    """What a compensation is fitted for, and on; `dtype` is torch's name of one."""

    source: Checkpoint
    spec: Spec
    shape: ModelShape
    ids: torch.Tensor  # windows of tokens
    dtype: str
    device: str
    scratch: Path
    progress: Progress

    def dense(self) -> Any:
        """The source, opened."""
        self.progress("opening the source", 0, None)
        return open_model(self.source, self.dtype, self.device)

    def converted(self, known: Calibration) -> Any:
        """The conversion by what is known so far, opened; it lies in `scratch` for a moment."""
        self.progress("converting by what is known", 0, None)
        spec, name = self.spec.only(known.values), self.source.path.name
        plan = plan_conversion(self.source, spec, source_name=name, calibration=known)
        with tempfile.TemporaryDirectory(prefix=".ptconvert-guess-", dir=self.scratch) as directory:
            execute(plan, Path(directory) / "model")
            return open_model(open_checkpoint(Path(directory) / "model"), self.dtype, self.device)


Found = tuple[Calibration, dict[str, Any]]  # what is known with it, and its figures, for `--json`


def _assign(case: Case, wanted: str, known: Calibration) -> Found:
    """The assignment, by the dense model's activity."""
    schedule = case.spec.schedule(case.shape.family.parallel, case.shape.divisible)
    tracks = case.spec.tracks
    found, (before, after) = assignments(
        *(case.dense(), case.shape, schedule, tracks, case.ids, case.progress, case.scratch)
    )
    known = replace(known, assignments=found, values={**known.values, "assignment": wanted})
    return known, {"affinity_between_tracks": {"before": before, "after": after}}


def _scale(case: Case, _wanted: str, known: Calibration) -> Found:
    """The scales of tracks' own parts."""
    model = case.converted(known)
    fitted = fit_scales(model.get_decoder(), case.ids, case.progress, case.scratch)
    scales = {f.sublayer: f.scale for f in fitted}
    rows = [{"sublayer": str(f.sublayer), "scale": f.scale, "error": f.error} for f in fitted]
    return replace(known, values={**known.values, "scale": scales}), {"scales": rows}


def _guess(case: Case, rank: int, known: Calibration) -> Found:
    """The guesses of at most that rank."""
    model = case.converted(known)
    fitted = fit_guesses(
        model.get_decoder(), case.shape, case.ids, rank, case.progress, case.scratch
    )
    stored = weights_dtype(case.source, case.shape)
    tensors = {name: _stored(t, stored) for name, t in fitted_tensors(fitted, case.shape)}
    ranks = {f.sublayer: f.rank for f in fitted if f.rank}
    rows = [{"sublayer": str(f.sublayer), "rank": f.rank, "error": f.error} for f in fitted]
    values = {**known.values, "guess": ranks}
    return replace(known, values=values, tensors={**known.tensors, **tensors}), {"guesses": rows}


@dataclass(frozen=True)
class Fit:
    """How a compensation is computed for what a spec wants, with those before it known; of how
    many windows at least, and its figures where a spec doesn't want it."""

    run: Callable[[Case, Any, Calibration], Found]
    none: Mapping[str, Any]
    least: int = 1
    in_fp64: bool = False  # on the device
    reads_weights: bool = False


# By the spec's key.
FITS = {
    "assignment": Fit(_assign, {"affinity_between_tracks": None}, reads_weights=True),
    "scale": Fit(_scale, {"scales": []}),
    "guess": Fit(_guess, {"guesses": []}, HELD_OUT, in_fp64=True, reads_weights=True),
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
    check_windows(spec.wanted, count, length)
    return count, length


def check_windows(wanted: Collection[str], count: int, length: int) -> None:
    """Raises EvaluationError where windows are too few to fit what is wanted on, by the spec's key,
    and to judge it by."""
    for row in COMPENSATIONS:
        if row.key in wanted and count < FITS[row.key].least:
            raise EvaluationError(
                f"the text gives {count} windows of {length} tokens; {row.label} need at least "
                f"{FITS[row.key].least}: a longer text, more --windows or a smaller --window"
            )


def check_device(source: Checkpoint, device: str, wanted: Iterable[str]) -> None:
    """Raises EvaluationError where a device can't fit what is wanted, by the spec's key: it may
    need float64, or of quantised weights what they stand for."""
    kind = device.split(":")[0]
    quantised = kind != "cpu" and quantization_of(source.config) is not None
    for key in wanted:
        reason = ""
        if FITS[key].in_fp64 and kind == "mps":
            reason = "is fitted in float64, which it has not"
        if FITS[key].reads_weights and quantised:
            reason = "reads what weights stand for, and there quantised ones are their quantiser's"
        if reason:
            raise EvaluationError(f"--device {device}: {key} {reason}; give --device cpu")


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
) -> Found:
    """Computes what a spec wants on windows of a text.

    Opens the dense model for that, or a conversion that lies in the directory `scratch` meanwhile,
    as do streams that are too many for memory. `dtype` is torch's name of one, or `auto` (see
    `calibration_dtype`). Raises PTConvertError.
    """
    check_windows(spec.wanted, len(windows.ids), windows.length)
    check_device(source, device, spec.wanted)
    shape = shape_of(source)
    ids_NT = windows.ids[:, :-1]
    dtype = calibration_dtype(source, shape, dtype, device)
    case = Case(source, spec, shape, ids_NT, dtype, device, scratch, progress)
    known, figures = Calibration(), dict[str, Any](tokens=ids_NT.numel())
    for fit in FITS.values():
        figures |= fit.none
    for key, wanted in spec.wanted.items():
        known, found = FITS[key].run(case, wanted, known)
        figures |= found
    return known, figures


def _stored(tensor: torch.Tensor, dtype: str) -> NDArray[np.uint8]:
    """A tensor's bytes in a dtype by safetensors' name."""
    stored = (
        tensor.to(getattr(torch, TORCH_NAMES[dtype])).cpu().flatten()
    )  # view needs strides of 1, rank 1 too
    assert stored.element_size() == DTYPE_BYTES[dtype]
    raw: NDArray[np.uint8] = stored.view(torch.uint8).numpy()
    return raw
