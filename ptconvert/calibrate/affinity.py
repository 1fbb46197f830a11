"""Which track gets which KV head and which neuron: those that read each other share one.

A track that goes on without the others' partials lacks what their units wrote. The affinity of a
writing and a reading unit is what the writer puts into the reader's inputs, squared and as a share
of what these usually are, times what the reader itself writes: what is lost, to second order,
where they are on different tracks. Shapes: U units, K columns of a writer, R rows of a reader, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

from ptconvert.calibrate.on_disk import MEMORY_BYTES, mapped
from ptconvert.checkpoint.calibration import Assignment
from ptconvert.measure.progress import Progress
from ptconvert.modeling.layers import multiplied, norm_after
from ptconvert.models.families import Block, D
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

PASSES = 10
CHUNK = 256  # units that are assigned together: the time goes with the cube


@dataclass
class Activity:
    """Sums over P tokens of a sublayer of the dense model.

    `written` are second moments of what the output projection reads, within each unit: (U, m, m)
    with m channels per unit. `read` are squares of the input projections' rows, `inverse` those of
    the norms' factors: of what each divides its input by, by its name.
    """

    written: torch.Tensor
    read: dict[str, torch.Tensor]
    inverse: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def scale(self, norm: str | None) -> float:
        """The mean square of a norm's factor; 1 where there is none."""
        return 1.0 if norm is None else self.inverse[norm] / self.tokens


@torch.inference_mode()
def observe(
    model: Any,
    shape: ModelShape,
    sublayers: Sequence[Sublayer],
    tracks: int,
    ids_NT: torch.Tensor,
    progress: Progress,
) -> dict[Sublayer, Activity]:
    """One pass of the dense model over windows of token ids."""
    found, hooks = {}, []
    for sublayer in sublayers:
        activity, placed = _hooked(model, shape, sublayer, _units(shape, sublayer, tracks))
        found[sublayer] = activity
        hooks += placed
    try:
        for done, ids_T in enumerate(ids_NT):
            progress("observing the source", done, len(ids_NT))
            model.get_decoder()(input_ids=ids_T[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _hooked(
    model: Any, shape: ModelShape, sublayer: Sublayer, units: int
) -> tuple[Activity, list[Any]]:
    """The sums of a sublayer of so many units, and the hooks that fill them."""
    layer = model.get_decoder().layers[sublayer.layer]
    block = shape.block(sublayer)
    output = getattr(getattr(layer, block.name), block.output)
    channels = output.in_features // units
    activity = Activity(torch.zeros(units, channels, channels, device=model.device), {})

    def wrote(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        h_PUm = inputs[0].float().reshape(-1, units, channels)
        activity.written += torch.einsum("pum,pun->umn", h_PUm, h_PUm)
        activity.tokens += len(h_PUm)

    def normed(name: str) -> Any:
        def hook(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            norm_P = inputs[0].float().var(-1, correction=0)
            if not isinstance(norm, nn.LayerNorm):  # which takes the mean away first
                norm_P = inputs[0].float().pow(2).mean(-1)
            inverse = float((1 / (norm_P + _epsilon(norm))).sum())
            activity.inverse[name] = activity.inverse.get(name, 0.0) + inverse

        return hook

    def reader(name: str) -> Any:
        def read(_: Any, __: Any, out: torch.Tensor) -> None:
            rows_R = out.float().flatten(0, -2).pow(2).sum(0)
            activity.read[name] = activity.read.get(name, 0) + rows_R

        return read

    hooks = [output.register_forward_pre_hook(wrote)]
    for norm in filter(None, (block.norm, _after(layer, block))):
        hooks.append(getattr(layer, norm).register_forward_pre_hook(normed(norm)))
    for name in dict.fromkeys(name for name, *_ in _inputs(shape, sublayer)):
        hooks.append(layer.get_submodule(name).register_forward_hook(reader(name)))
    return activity, hooks


def _after(layer: Any, block: Block) -> str | None:
    """The norm of what joins the stream, if there is one."""
    return None if norm_after(layer, block) is None else block.after


def _epsilon(norm: Any) -> float:
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return float(epsilon)


def _inputs(shape: ModelShape, sublayer: Sublayer) -> Iterator[tuple[str, int, int, int]]:
    """What reads a sublayer's input: each projection by its name in the layer, the rows
    [start, stop) of it that are one of those fused into it, and in how many groups these are
    divided."""
    block = shape.block(sublayer)
    for rule in shape.rules_of(sublayer.layer):
        name, _, tensor = rule.name.rpartition(".")
        inside = name.startswith(f"{block.name}.")
        reads = len(rule.axes) == 2 and rule.axis == 0 and rule.axes[1] is D  # no latent
        if inside and reads and tensor == "weight":
            for segment, begin in shape.segments(rule) if rule.is_cut else ():
                groups = int(getattr(shape, segment.count))
                yield name, begin, begin + shape.length(segment), groups


def _gain(norm: Any) -> torch.Tensor:
    """What a norm multiplies each channel by (D,), whatever it keeps of that: its answer to
    channels of size one, of which as many are positive as negative."""
    sign_D = torch.ones_like(norm.weight)
    sign_D[1::2] = -1
    both_D: torch.Tensor = norm(sign_D[None])[0] - norm(-sign_D[None])[0]
    return (both_D / 2 * sign_D).float()


def _units(shape: ModelShape, sublayer: Sublayer, tracks: int) -> int:
    """How many units of a sublayer go to one track each: neurons, KV heads with their query heads,
    or, where there are fewer KV heads than tracks, each track's query heads with a copy of the KV
    head that they read."""
    if sublayer.kind is Kind.MLP:
        return shape.neuron_units(sublayer.layer)
    units = shape.attention_units(sublayer.layer)
    return units if _moves(shape, sublayer, tracks) else tracks


def _moves(shape: ModelShape, sublayer: Sublayer, tracks: int) -> bool:
    """Whether a sublayer's units can change places."""
    return sublayer.kind is Kind.MLP or shape.attention_units(sublayer.layer) % tracks == 0


@torch.inference_mode()
def affinity(
    model: Any,
    shape: ModelShape,
    writer: tuple[Sublayer, Activity],
    reader: tuple[Sublayer, Activity],
) -> torch.Tensor:
    """The affinity of each writing unit and each reading unit, (U, U)."""
    layers = model.get_decoder().layers
    columns_DK = _columns(layers[writer[0].layer], shape, *writer)
    sublayer, activity = reader
    layer, block = layers[sublayer.layer], shape.block(sublayer)
    gain_D = torch.ones(shape.width, device=columns_DK.device)
    if block.norm is not None:
        gain_D = _gain(getattr(layer, block.norm))
    units, writers = len(activity.written), len(writer[1].written)
    importance_U = _columns(layer, shape, *reader).pow(2).sum(0).view(units, -1).sum(1)
    scale = activity.scale(block.norm)
    found = torch.zeros(units, writers, device=gain_D.device)
    for name, start, stop, count in _inputs(shape, sublayer):
        rows_RD = layer.get_submodule(name).weight[start:stop].float() * gain_D
        groups = min(units, count)  # fewer KV heads than units, it may be
        energy_G = activity.read[name][start:stop].view(groups, -1).sum(1) / activity.tokens
        put_GK = (rows_RD @ columns_DK).pow(2).view(groups, len(rows_RD) // groups, -1).sum(1)
        share_GU = put_GK.view(groups, writers, -1).sum(2) / energy_G.clamp(min=1e-20)[:, None]
        # units that read the same KV head have a copy of its rows each
        found += scale * importance_U[:, None] * share_GU.repeat_interleave(units // groups, 0)
    return found.T.cpu()


def _columns(layer: Any, shape: ModelShape, sublayer: Sublayer, activity: Activity) -> torch.Tensor:
    """What the units write, as columns (D, K) whose outer products sum to the second moments. A
    norm after it gives all tokens' outputs one size; its factor is taken for the same for all."""
    block = shape.block(sublayer)
    weight_DH = getattr(getattr(layer, block.name), block.output).weight.float()
    weight_DH = multiplied(layer, shape.family, weight_DH)
    if (after := _after(layer, block)) is not None:
        factor = math.sqrt(activity.scale(after))
        weight_DH = weight_DH * (factor * _gain(getattr(layer, after)))[:, None]
    values, vectors = torch.linalg.eigh(activity.written / activity.tokens)
    roots_Umm = vectors * values.clamp(min=0).sqrt()[:, None, :]
    weight_DUm = weight_DH.view(len(weight_DH), len(roots_Umm), -1)
    return torch.einsum("dum,umn->dun", weight_DUm, roots_Umm).flatten(1)


Affinities = Mapping[tuple[Sublayer, Sublayer], NDArray[np.float32]]
Owners = dict[Sublayer, NDArray[np.int64]]  # the track of each unit


def assign(
    shape: ModelShape, affinities: Affinities, tracks: int, passes: int = PASSES
) -> tuple[Owners, float, float]:
    """Balanced owners of all units in the affinities, and the share of affinity between tracks,
    before (contiguous) and after.

    Each sublayer in turn is assigned best for the others as they are, until nothing changes.
    """
    sublayers = sorted({s for pair in affinities for s in pair}, key=lambda s: s.position)
    owners: Owners = {}
    for sublayer in sublayers:
        units = _units(shape, sublayer, tracks)
        owners[sublayer] = np.arange(units) * tracks // units
    before = lost(affinities, owners)
    generator = np.random.default_rng(0)
    for _ in range(passes):
        changed = False
        for sublayer in sublayers:
            if _moves(shape, sublayer, tracks):
                kept = _kept(sublayer, affinities, owners, tracks)
                new = _reassigned(kept, owners[sublayer], generator)
                changed |= not np.array_equal(new, owners[sublayer])
                owners[sublayer] = new
        if not changed:
            break
    return owners, before, lost(affinities, owners)


def lost(affinities: Affinities, owners: Owners) -> float:
    """The share of all affinity that lies between units of different tracks."""
    total = between = 0.0
    for (writer, reader), found in affinities.items():
        apart = owners[writer][:, None] != owners[reader][None, :]
        total += float(found.sum(dtype=np.float64))
        between += float(found.sum(where=apart, dtype=np.float64))
    return between / total if total else 0.0


def _kept(
    sublayer: Sublayer, affinities: Affinities, owners: Owners, tracks: int
) -> NDArray[np.float64]:
    """The affinity that each unit of a sublayer has with what each track owns, (U, n)."""
    kept = np.zeros((len(owners[sublayer]), tracks))
    for (writer, reader), found in affinities.items():
        if sublayer == writer:
            kept += found @ np.eye(tracks)[owners[reader]]
        elif sublayer == reader:
            kept += found.T @ np.eye(tracks)[owners[writer]]
    return kept


def _reassigned(
    kept: NDArray[np.float64], owners: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """The best exchange of the units' places, among so many units at a time as can be solved."""
    new = owners.copy()
    count = max(1, round(len(owners) / CHUNK))
    for chunk in np.array_split(generator.permutation(len(owners)), count):
        gains = kept[chunk][:, owners[chunk]]
        units, places = linear_sum_assignment(gains, maximize=True)
        moved = gains[units, places].sum() > gains.trace() * (1 + 1e-9)
        if moved:
            new[chunk[units]] = owners[chunk[places]]
    return new


def group_bytes(shape: ModelShape, group: Iterable[tuple[Sublayer, Sublayer]], tracks: int) -> int:
    """What the affinities of a group take."""
    return sum(4 * math.prod(_units(shape, s, tracks) for s in pair) for pair in group)


def group_flops(shape: ModelShape, group: Iterable[tuple[Sublayer, Sublayer]]) -> float:
    """What the affinities of a group take: of each pair the reader's rows times the writer's
    columns."""

    def columns(writer: Sublayer) -> int:
        block = shape.block(writer)
        output = f"{block.name}.{block.output}.weight"
        return next(shape.size(r)[1] for r in shape.rules_of(writer.layer) if r.name == output)

    def rows(reader: Sublayer) -> int:
        return sum(stop - start for _, start, stop, _ in _inputs(shape, reader))

    pairs = [rows(reader) * columns(writer) for writer, reader in group]
    return 2.0 * shape.width * sum(pairs)


def own_read(shape: ModelShape, schedule: Schedule, tracks: int) -> list[tuple[Sublayer, Sublayer]]:
    """The pairs of sublayers of which one reads the other's partial of its own track only, less
    those with a mixture of experts, which has no units that could change places."""
    return [pair for pair in schedule.own_read() if all(_units(shape, s, tracks) for s in pair)]


def components(
    pairs: Iterable[tuple[Sublayer, Sublayer]],
) -> Iterator[list[tuple[Sublayer, Sublayer]]]:
    """The pairs of writers and readers, in groups that share no sublayer."""
    groups: list[list[tuple[Sublayer, Sublayer]]] = []
    for pair in dict.fromkeys(pairs):
        touched = [g for g in groups if any(set(pair) & set(other) for other in g)]
        groups = [g for g in groups if g not in touched]
        groups.append([p for g in touched for p in g] + [pair])
    yield from groups


def assignments(
    model: Any,
    shape: ModelShape,
    schedule: Schedule,
    tracks: int,
    ids_NT: torch.Tensor,
    progress: Progress,
    scratch: Path | None = None,
) -> tuple[dict[int, Assignment], tuple[float, float]]:
    """The assignments of all layers held as tracks, and the share of affinity that lies between
    tracks, contiguous and so. A group's affinities of more than MEMORY_BYTES lie in files of the
    directory `scratch` meanwhile. Raises EvaluationError."""
    read = own_read(shape, schedule, tracks)
    sublayers = sorted({s for pair in read for s in pair}, key=lambda s: s.position)
    activity = observe(model, shape, sublayers, tracks, ids_NT, progress)
    owners: Owners = {}
    groups, shares = list(components(read)), []
    for done, group in enumerate(groups):
        progress("assigning units", done, len(groups))
        large = group_bytes(shape, group, tracks) > MEMORY_BYTES
        found = dict[tuple[Sublayer, Sublayer], NDArray[np.float32]]()
        for writer, reader in group:
            one = affinity(model, shape, (writer, activity[writer]), (reader, activity[reader]))
            found[writer, reader] = (mapped(scratch, one) if large else one).numpy()
        own, before, after = assign(shape, found, tracks)
        owners.update(own)
        shares.append((before, after))
    orders = {
        s: np.argsort(o, kind="stable").astype(np.int32)
        for s, o in owners.items()
        if _moves(shape, s, tracks)
    }
    mean = [float(np.mean(column)) for column in zip(*shares, strict=True)] or [0.0, 0.0]
    return {
        layer: Assignment(
            *(
                orders.get(Sublayer(layer, k), np.arange(size, dtype=np.int32))
                for k, size in (
                    (Kind.ATTENTION, shape.attention_units(layer)),
                    (Kind.MLP, shape.neuron_units(layer)),
                )
            )
        )
        for layer in schedule.track_layers
    }, (mean[0], mean[1])
