"""What sublayers make of the residual stream that they read. Shapes: D width, R rows."""

from __future__ import annotations

from typing import Any

import torch

from ptconvert.models.families import Block, D, TensorRule
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.lower import Step
from ptconvert.schedule.stages import Sublayer

# Share of the mean that errors count by in directions which nobody reads: later ones do, a little.
UNREAD = 0.01
ROWS = 4096  # at once


def gain(norm: Any) -> torch.Tensor:
    """What a norm multiplies each channel by (D,), whatever it keeps of that: its answer to
    channels of size one, of which as many are positive as negative."""
    sign_D = torch.ones_like(norm.weight)
    sign_D[1::2] = -1
    both_D: torch.Tensor = norm(sign_D[None])[0] - norm(-sign_D[None])[0]
    return (both_D / 2 * sign_D).float()


def epsilon(norm: Any) -> float:
    """What a norm adds to the mean square that it divides by."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def is_output(rule: TensorRule, block: Block) -> bool:
    """Whether a tensor is what a block writes with: the weight of its output projection."""
    return rule.name.removesuffix(".weight").endswith(f".{block.output}")


def by_width(layer: Any, rule: TensorRule) -> torch.Tensor:
    """A matrix of a layer with the stream's channels last, (R, D), or each expert's, (E, R, D)."""
    weight: torch.Tensor = layer.get_parameter(rule.name)
    return weight.movedim(rule.axes.index(D), -1)


def readers_metric(decoder: Any, shape: ModelShape, step: Step, track: int) -> torch.Tensor:
    """What errors in a stage's guess count by, where its track reads them (D, D): e M e is their
    share, squared, of what the input projections W of its sublayers give until the merge.

    M sums (W G)' (W G) over these, each by its trace, with the gains G of the norm before it.
    """
    metric_DD = torch.zeros(shape.width, shape.width, device=decoder.device)
    for later in decoder.layers.schedule.program[step.index + 1 :]:
        for sublayer in later.sublayers if step.bucket in later.reads else ():
            _add_reader(metric_DD, decoder.layers[sublayer.layer], shape, sublayer, track)
    mean = metric_DD.trace() / shape.width
    least = UNREAD * mean if mean > 0 else torch.ones_like(mean)  # nobody reads: plain squares
    metric_DD.diagonal().add_(least)
    return metric_DD


def _add_reader(
    metric_DD: torch.Tensor, layer: Any, shape: ModelShape, sublayer: Sublayer, track: int
) -> None:
    """Adds what a track's sublayer reads by."""
    own = layer.tracks[str(track)] if hasattr(layer, "tracks") else layer
    block = shape.block(sublayer)
    gain_D = 1.0 if block.norm is None else gain(getattr(own, block.norm))
    for rule in shape.rules_of(sublayer.layer):
        # biases of experts' outputs have two axes, and the stream's is one
        if len(rule.axes) < 2 or D not in rule.axes or rule.name.endswith("bias"):
            continue
        if is_output(rule, block) or not shape.runs_in(rule, sublayer):
            continue
        weight = by_width(own, rule)
        one_DD = torch.zeros_like(metric_DD)
        for matrix_RD in weight if rule.is_of_experts else (weight,):
            for rows_RD in matrix_RD.split(ROWS):
                read_RD = rows_RD.float() * gain_D
                one_DD += read_RD.T @ read_RD
        if (trace := one_DD.trace()) > 0:
            metric_DD += one_DD / trace
