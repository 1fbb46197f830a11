"""Fitting what tracks multiply the norm of their own partial by, where sums are normed (post-norm).

Of the sum over tracks a track knows its own partial only, and a norm gives both one size: c times
the norm of its own stands for the norm of the sum until that is merged. Over tokens and tracks
c = <whole, own> / <own, own> errs least, squared. Shapes: B windows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.streams import Batch, fitted_by_stage
from ptconvert.measure.progress import Progress
from ptconvert.modeling.executor import PerTrack, Update
from ptconvert.models.families import guesses_of
from ptconvert.schedule.lower import Step
from ptconvert.schedule.stages import Sublayer


@dataclass(frozen=True)
class Scaled:
    """A sublayer's scale. `error` is what tracks go on with, squared, as a share of what it is
    with the scale that isn't fitted."""

    sublayer: Sublayer
    scale: float
    error: float


@torch.inference_mode()
def fit_scales(
    decoder: Any, ids_NT: torch.Tensor, progress: Progress, scratch: Path | None = None
) -> list[Scaled]:
    """Fits the scales of a converted model, which has no guesses yet, on windows of token ids,
    sublayer after sublayer, each on the streams that those before it leave. `scratch` is the
    directory for streams that memory is not to hold. Raises EvaluationError.
    """

    def fit(step: Step, given: Sequence[Batch]) -> list[Scaled]:
        return [_fit(decoder, step, place, given) for place in range(len(step.sublayers))]

    def use(fitted: Scaled, _: PerTrack, update: Update) -> None:
        update.own = _rescaled(decoder, fitted, update.kept)

    return fitted_by_stage(decoder, ids_NT, "scales", progress, scratch, fit, use)


def _fit(decoder: Any, step: Step, place: int, given: Sequence[Batch]) -> Scaled:
    """The scale of one of a stage's sublayers. The batches keep the stage."""
    sublayer = step.sublayers[place]
    before = _scale_of(decoder, sublayer)
    products = torch.zeros(3, dtype=torch.float64)  # whole with itself, with own, own with itself
    for batch in given:
        whole_BTD = batch.to_device(batch.wholes[place]).float()
        for own in batch.updates[place].kept:
            own_BTD = batch.to_device(own).float() / before
            pairs = ((whole_BTD, whole_BTD), (whole_BTD, own_BTD), (own_BTD, own_BTD))
            products += torch.tensor([float((a * b).sum()) for a, b in pairs]).double()
    whole, both, own_only = map(float, products)
    if not own_only > 0:  # a sublayer that writes nothing
        return Scaled(sublayer, before, 1.0)
    scale = both / own_only
    left, was = (whole - 2 * c * both + c * c * own_only for c in (scale, before))
    return Scaled(sublayer, scale, left / was if was > 0 else 1.0)


def _rescaled(decoder: Any, fitted: Scaled, own: PerTrack) -> PerTrack:
    """What tracks see of their own partials by a fitted scale."""
    factor = fitted.scale / _scale_of(decoder, fitted.sublayer)
    return [factor * own_BTD for own_BTD in own]


def _scale_of(decoder: Any, sublayer: Sublayer) -> float:
    """The scale that the model has."""
    layer = decoder.layers[sublayer.layer]
    return float(layer.scales[guesses_of(sublayer.kind)])
