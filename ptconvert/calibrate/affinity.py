"""Which track gets which KV head and which neuron: those that read each other share one.

A track that goes on without the others' partials lacks what their units wrote. The affinity of a
writing and a reading unit is what the writer puts into the reader's inputs, squared and as a share
of what these usually are, times what the reader itself writes: what is lost, to second order,
where they are on different tracks. Shapes: U units, K columns of a writer, R rows of a reader, D
width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

from ptconvert.calibrate.on_disk import MEMORY_BYTES, mapped
from ptconvert.calibrate.reading import by_width, epsilon, gain, is_output
from ptconvert.calibrate.streams import check_finite
from ptconvert.checkpoint.calibration import Assignment, contiguous
from ptconvert.measure.progress import Progress
from ptconvert.modeling.layers import multiplied, norm_after
from ptconvert.models.families import ORDERS, Block, Cut, D, TensorRule
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

PASSES = 10
CHUNK = 256  # units that are assigned together: the time goes with the cube


@dataclass(frozen=True)
class Units:
    """The units of a sublayer that go to tracks by an order of their own, `of` which is what an
    assignment calls it: neurons, KV heads with their query heads, or, where there are fewer KV
    heads than tracks, each track's query heads with a copy of the KV head that they read."""

    sublayer: Sublayer
    of: str

    @property
    def layer(self) -> int:
        """Whose they are."""
        return self.sublayer.layer

    @property
    def are_heads(self) -> bool:
        """Whether they are attention's."""
        return self.sublayer.kind is Kind.ATTENTION

    def size(self, shape: ModelShape, tracks: int) -> tuple[int, ...]:
        """How many there are; of experts (experts, neurons), as a track has its share of each."""
        return shape.orders_of(self.layer)[self.of] if self.move(shape, tracks) else (tracks,)

    def move(self, shape: ModelShape, tracks: int) -> bool:
        """Whether they can change places."""
        return not self.are_heads or shape.attention_units(self.layer) % tracks == 0


def units_of(shape: ModelShape, sublayer: Sublayer) -> list[Units]:
    """What of a sublayer goes to tracks: of a mixture its experts' neurons, and the shared ones; of
    a part of one its own. Units are the whole mixture's, in whichever way it runs."""
    found = [Units(sublayer.whole, of) for of in shape.orders_of(sublayer.layer)]
    found = [units for units in found if units.are_heads == (units.of == "kv_heads")]
    if not sublayer.kind.is_part:
        return found
    shared = sublayer.kind is Kind.SHARED
    return [units for units in found if shared == (units.of == ORDERS[Cut.SHARED_NEURONS])]


@dataclass
class Activity:
    """Sums over P tokens of units of the dense model that read and write by the same tensors: of a
    sublayer's, or of one expert's.

    `written` are second moments of what the output projection reads, within each unit, times what
    its output is weighed with: (U, m, m) with m channels per unit. `read` are squares of the input
    projections' rows, by name, over the `passed` of the `tokens`, which come to these units;
    `inverse` those of the norms' factors: of what each divides its input by, by its name.
    """

    written: torch.Tensor
    read: dict[str, torch.Tensor]
    inverse: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    passed: int = 0

    def add_read(self, name: str, out: torch.Tensor) -> None:
        """What an input projection gives (..., R)."""
        self.read[name] += out.float().flatten(0, -2).pow(2).sum(0)

    def add_written(self, h: torch.Tensor) -> None:
        """What an output projection takes (..., U * m), as it is weighed."""
        units, channels, _ = self.written.shape
        h_PUm = h.float().reshape(-1, units, channels)
        self.written += torch.einsum("pum,pun->umn", h_PUm, h_PUm)
        self.passed += len(h_PUm)

    def scale(self, norm: str | None) -> float:
        """The mean square of a norm's factor; 1 where there is none."""
        return 1.0 if norm is None else self.inverse[norm] / self.tokens


@torch.inference_mode()
def observe(
    model: Any,
    shape: ModelShape,
    every: Sequence[Units],
    tracks: int,
    ids_NT: torch.Tensor,
    progress: Progress,
) -> dict[Units, list[Activity]]:
    """One pass of the dense model over windows of token ids; of experts, each one's activity.
    Raises EvaluationError where it isn't finite."""
    found, hooks = {}, []
    for units in every:
        activities, placed = _hooked(model, shape, units, tracks)
        found[units] = activities
        hooks += placed
    try:
        for done, ids_T in enumerate(ids_NT):
            progress("observing the source", done, len(ids_NT))
            model.get_decoder()(input_ids=ids_T[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for units, activities in sorted(found.items(), key=lambda one: one[0].layer):
        for activity in activities:
            check_finite(units.layer, activity.written, *activity.read.values())
    return found


def _hooked(
    model: Any, shape: ModelShape, units: Units, tracks: int
) -> tuple[list[Activity], list[Any]]:
    """The sums of units, and the hooks that fill them."""
    layer = model.get_decoder().layers[units.layer]
    block, output, size = (
        shape.block(units.sublayer),
        _output(shape, units),
        units.size(shape, tracks),
    )
    channels = shape.size(output)[output.axis] // size[-1]
    inputs = dict.fromkeys(rule for rule, *_ in _inputs(shape, units))
    inverse = dict[str, float]()
    activities = [
        Activity(
            torch.zeros(size[-1], channels, channels, device=model.device),
            {r.name: torch.zeros(shape.size(r)[r.axis], device=model.device) for r in inputs},
            inverse,
        )
        for _ in range(math.prod(size[:-1]))
    ]

    def normed(name: str) -> Any:
        def hook(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            norm_P = inputs[0].float().var(-1, correction=0)
            if not isinstance(norm, nn.LayerNorm):  # which takes the mean away first
                norm_P = inputs[0].float().pow(2).mean(-1)
            inverse[name] = inverse.get(name, 0.0) + float((1 / (norm_P + epsilon(norm))).sum())

        return hook

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        for activity in activities:
            activity.tokens += inputs[0].shape[:-1].numel()

    writer = layer.get_submodule(_module(output))
    hooks = [writer.register_forward_pre_hook(count)]
    for norm in filter(None, (block.norm, _after(layer, block))):
        hooks.append(getattr(layer, norm).register_forward_pre_hook(normed(norm)))
    if output.is_of_experts:
        (rule,) = inputs
        hooks.append(writer.register_forward_pre_hook(_routed(layer, rule, activities)))
        return activities, hooks
    (activity,) = activities
    for rule in inputs:

        def read(_: Any, __: Any, out: torch.Tensor, name: str = rule.name) -> None:
            activity.add_read(name, out)

        hooks.append(layer.get_submodule(_module(rule)).register_forward_hook(read))
    if units.of == "shared_neurons":
        return activities, hooks + _weighed(layer, shape, units, activity)

    def wrote(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        activity.add_written(inputs[0])

    return activities, [*hooks, writer.register_forward_pre_hook(wrote)]


def _routed(layer: Any, reads: TensorRule, activities: Sequence[Activity]) -> Any:
    """A hook before a module of experts. All they do is one function of fused tensors, in which no
    hook could see what neurons give; so each expert's are computed again, by transformers' own
    gate, from what is given to the module."""
    biases_ER = dict(layer.named_parameters()).get(f"{reads.name}_bias")  # as transformers names it

    def hook(experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x_PD, chosen_PK, weights_PK = (given.flatten(0, -2) for given in inputs)
        for expert, activity in enumerate(activities):
            tokens, places = torch.where(chosen_PK == expert)
            bias_R = None if biases_ER is None else biases_ER[expert]
            if len(tokens):
                out_PR = nn.functional.linear(x_PD[tokens], _rows(layer, reads, expert), bias_R)
                activity.add_read(reads.name, out_PR)
                h_PN = experts._apply_gate(out_PR)
                activity.add_written(h_PN * weights_PK[tokens, places, None])

    return hook


def _weighed(layer: Any, shape: ModelShape, units: Units, activity: Activity) -> list[Any]:
    """Hooks for experts that all tokens go to. What each token weighs their output with is read off
    what the whole mixture gives beyond the routed experts, whatever a family makes it of."""
    seen: dict[str, torch.Tensor] = {}
    routed, shared = (_output(shape, Units(units.sublayer, of)) for of in ("neurons", units.of))

    def keep(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen[name] = out.float().flatten(0, -2).clone()  # sums may be taken in place
            seen[f"into {name}"] = inputs[0].flatten(0, -2)

        return hook

    def whole(_: Any, __: Any, out: torch.Tensor) -> None:
        out_PD = seen["shared"]
        rest_PD = out.float().flatten(0, -2) - seen["routed"]
        weights_P = (rest_PD * out_PD).sum(-1) / out_PD.pow(2).sum(-1).clamp(min=1e-20)
        activity.add_written(seen["into shared"].float() * weights_P[:, None])
        seen.clear()

    modules = {"routed": _module(routed), "shared": _module(shared)}
    hooks = [
        layer.get_submodule(m).register_forward_hook(keep(name)) for name, m in modules.items()
    ]
    block = getattr(layer, shape.block(units.sublayer).name)
    return [*hooks, block.register_forward_hook(whole)]


def _after(layer: Any, block: Block) -> str | None:
    """The norm of what joins the stream, if there is one."""
    return None if norm_after(layer, block) is None else block.after


def _rules(shape: ModelShape, units: Units) -> Iterator[tuple[TensorRule, bool]]:
    """The matrices of which each unit has its own rows or columns, and whether these write."""
    block = shape.block(units.sublayer)
    for rule in shape.rules_of(units.layer):
        cut = rule.segments(rule.axis)[0].cut if rule.is_cut else None
        if cut is not None and ORDERS[cut] == units.of and D in rule.axes:  # reads no latent
            yield rule, is_output(rule, block)


def _output(shape: ModelShape, units: Units) -> TensorRule:
    """What units write with."""
    return next(rule for rule, writes in _rules(shape, units) if writes)


def _inputs(shape: ModelShape, units: Units) -> Iterator[tuple[TensorRule, int, int, int]]:
    """What units read with: each projection, the rows [start, stop) of it (of each expert's) that
    are one of those fused into it, and in how many groups these are divided."""
    for rule, writes in _rules(shape, units):
        for segment, begin in () if writes else shape.segments(rule):
            yield rule, begin, begin + shape.length(segment), int(getattr(shape, segment.count))


def _module(rule: TensorRule) -> str:
    """Whose tensor it is, in a layer."""
    return rule.name.rpartition(".")[0]


def _rows(layer: Any, rule: TensorRule, expert: int) -> torch.Tensor:
    """A matrix of a layer, or an expert's, as what is cut of it by width (R, D)."""
    weight = by_width(layer, rule)
    return weight[expert] if rule.is_of_experts else weight


@torch.inference_mode()
def affinity(
    model: Any,
    shape: ModelShape,
    writer: tuple[Units, Sequence[Activity]],
    reader: tuple[Units, Sequence[Activity]],
) -> torch.Tensor:
    """The affinity of each writing unit and each reading unit, (U, U), expert after expert."""
    layers = model.get_decoder().layers
    (writes, wrote), (reads, read) = writer, reader
    layer = layers[reads.layer]
    importances = [
        _columns(layer, shape, reads, expert, own).pow(2).sum(0).view(len(own.written), -1).sum(1)
        for expert, own in enumerate(read)
    ]
    found = []
    for number, own in enumerate(wrote):
        columns_DK = _columns(layers[writes.layer], shape, writes, number, own)
        columns_DUm = columns_DK.view(len(columns_DK), len(own.written), -1)
        shares = (_shares(layer, shape, reads, e, a, columns_DUm) for e, a in enumerate(read))
        lost = [i_U[:, None] * share for i_U, share in zip(importances, shares, strict=True)]
        found.append(torch.cat(lost).T.cpu())
    return torch.cat(found)


def _shares(
    layer: Any,
    shape: ModelShape,
    reader: Units,
    expert: int,
    activity: Activity,
    columns_DUm: torch.Tensor,
) -> torch.Tensor:
    """What the writing units put into each reading unit's inputs, as a share of what these are,
    (reading U, writing U)."""
    norm = shape.block(reader.sublayer).norm
    gain_D = 1.0 if norm is None else gain(getattr(layer, norm))
    units, writers = len(activity.written), columns_DUm.shape[1]
    found = torch.zeros(units, writers, device=columns_DUm.device)
    for rule, start, stop, count in _inputs(shape, reader):
        rows_RD = _rows(layer, rule, expert)[start:stop].float() * gain_D
        groups = min(units, count)  # fewer KV heads than units, it may be
        energy_G = activity.read[rule.name][start:stop].view(groups, -1).sum(1)
        energy_G = energy_G / max(activity.passed, 1)
        put_GK = (rows_RD @ columns_DUm.flatten(1)).pow(2)
        put_GK = put_GK.view(groups, len(rows_RD) // groups, -1).sum(1)
        share_GU = put_GK.view(groups, writers, -1).sum(2) / energy_G.clamp(min=1e-20)[:, None]
        # units that read the same KV head have a copy of its rows each
        found += share_GU.repeat_interleave(units // groups, 0)
    return activity.scale(norm) * found


def _columns(
    layer: Any, shape: ModelShape, units: Units, expert: int, activity: Activity
) -> torch.Tensor:
    """What the units write, as columns (D, K) whose outer products sum to the second moments. A
    norm after it gives all tokens' outputs one size; its factor is taken for the same for all."""
    block = shape.block(units.sublayer)
    weight_DH = _rows(layer, _output(shape, units), expert).mT.float()
    weight_DH = multiplied(layer, shape.family, weight_DH)
    if (after := _after(layer, block)) is not None:
        factor = math.sqrt(activity.scale(after))
        weight_DH = weight_DH * (factor * gain(getattr(layer, after)))[:, None]
    values, vectors = torch.linalg.eigh(activity.written / activity.tokens)
    roots_Umm = vectors * values.clamp(min=0).sqrt()[:, None, :]
    weight_DUm = weight_DH.reshape(len(weight_DH), len(roots_Umm), -1)
    return torch.einsum("dum,umn->dun", weight_DUm, roots_Umm).flatten(1)


Pair = tuple[Units, Units]  # a writer and a reader
Affinities = Mapping[Pair, NDArray[np.float32]]
Owners = dict[Units, NDArray[np.int64]]  # the track of each, expert after expert


def assign(
    shape: ModelShape, affinities: Affinities, tracks: int, passes: int = PASSES
) -> tuple[Owners, float, float]:
    """Balanced owners of all units in the affinities, and the share of affinity between tracks,
    before (contiguous) and after.

    Each sublayer in turn is assigned best for the others as they are, until nothing changes; of
    experts each keeps its balance.
    """
    every = _all_units(affinities)
    sizes = {units: units.size(shape, tracks) for units in every}
    shared = shape.shared_by(tracks)
    owners: Owners = {
        units: np.tile(_contiguous_owners(units, shared, tracks), math.prod(size[:-1]))
        for units, size in sizes.items()
    }
    before = lost(affinities, owners)
    generator = np.random.default_rng(0)
    for _ in range(passes):
        changed = False
        for units in every:
            if units.move(shape, tracks):
                kept, each = _kept(units, affinities, owners, tracks), sizes[units][-1]
                kept, own = kept.reshape(-1, each, tracks), owners[units].reshape(-1, each)
                apart = [_reassigned(*one, generator) for one in zip(kept, own, strict=True)]
                new = np.concatenate(apart)
                changed |= not np.array_equal(new, owners[units])
                owners[units] = new
        if not changed:
            break
    return owners, before, lost(affinities, owners)


def _contiguous_owners(units: Units, shape: ModelShape, tracks: int) -> NDArray[np.int64]:
    """The track of each, of an expert's, in the shape as the tracks share it."""
    shares = [1] * tracks
    if units.move(shape, tracks):
        shares = shape.shares(units.layer, units.of, tracks)
    return np.repeat(np.arange(tracks, dtype=np.int64), shares)


def _all_units(pairs: Iterable[Pair]) -> list[Units]:
    """The units in some pairs, in the order of the model."""
    found = {units for pair in pairs for units in pair}
    return sorted(found, key=lambda units: (units.sublayer.position, units.of))


def lost(affinities: Affinities, owners: Owners) -> float:
    """The share of all affinity that lies between units of different tracks."""
    total = between = 0.0
    for (writer, reader), found in affinities.items():
        apart = owners[writer][:, None] != owners[reader][None, :]
        total += float(found.sum(dtype=np.float64))
        between += float(found.sum(where=apart, dtype=np.float64))
    return between / total if total else 0.0


def _kept(units: Units, affinities: Affinities, owners: Owners, tracks: int) -> NDArray[np.float64]:
    """The affinity that each of some units has with what each track owns, (U, n)."""
    kept = np.zeros((len(owners[units]), tracks))
    for (writer, reader), found in affinities.items():
        if units == writer:
            kept += found @ np.eye(tracks)[owners[reader]]
        elif units == reader:
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


def pair_numbers(shape: ModelShape, pair: Pair, tracks: int) -> int:
    """How many affinities a pair has."""
    return math.prod(math.prod(units.size(shape, tracks)) for units in pair)


def product_numbers(shape: ModelShape, pair: Pair) -> int:
    """How many numbers come at once where they are computed: of one projection, of one expert."""
    writer, reader = pair
    return _columns_of(shape, writer) * max(
        (stop - start for _, start, stop, _ in _inputs(shape, reader)), default=0
    )


def group_bytes(shape: ModelShape, group: Iterable[Pair], tracks: int) -> int:
    """What the affinities of a group take."""
    return sum(4 * pair_numbers(shape, pair, tracks) for pair in group)


def group_flops(shape: ModelShape, group: Iterable[Pair]) -> float:
    """What the affinities of a group take: of each pair the reader's rows times the writer's
    columns, of all experts."""

    def experts(units: Units) -> int:
        return math.prod(shape.orders_of(units.layer)[units.of][:-1])

    def rows(reader: Units) -> int:
        return sum(stop - start for _, start, stop, _ in _inputs(shape, reader))

    pairs = [experts(w) * _columns_of(shape, w) * experts(r) * rows(r) for w, r in group]
    return 2.0 * shape.width * sum(pairs)


def _columns_of(shape: ModelShape, writer: Units) -> int:
    output = _output(shape, writer)
    return shape.size(output)[output.axis]


def own_read(shape: ModelShape, schedule: Schedule) -> list[Pair]:
    """The pairs of units of which one reads the other's partial of its own track only. With
    experts' neurons only attention is paired: with an MLP's, or other experts', they would have as
    many affinities as the square of all of them."""
    pairs = [
        (writer, reader)
        for sublayers in schedule.own_read()
        for writer, reader in itertools.product(*(units_of(shape, s) for s in sublayers))
    ]

    def many(units: Units) -> bool:
        return len(shape.orders_of(units.layer)[units.of]) > 1

    return [p for p in pairs if not any(map(many, p)) or any(units.are_heads for units in p)]


def components(
    pairs: Iterable[Pair],
) -> Iterator[list[Pair]]:
    """The pairs of writers and readers, in groups that share no sublayer."""
    groups: list[list[Pair]] = []
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
    read = own_read(shape, schedule)
    activity = observe(model, shape, _all_units(read), tracks, ids_NT, progress)
    owners: Owners = {}
    groups, shares = list(components(read)), []
    for done, group in enumerate(groups):
        progress("assigning units", done, len(groups))
        large = group_bytes(shape, group, tracks) > MEMORY_BYTES
        found = dict[Pair, NDArray[np.float32]]()
        for writer, reader in group:
            one = affinity(model, shape, (writer, activity[writer]), (reader, activity[reader]))
            found[writer, reader] = (mapped(scratch, one) if large else one).numpy()
        own, before, after = assign(shape, found, tracks)
        owners.update(own)
        shares.append((before, after))
    orders = dict[int, dict[str, NDArray[np.int32]]]()
    for units, tracks_of in owners.items():
        if units.move(shape, tracks):
            apart = tracks_of.reshape(units.size(shape, tracks))
            order = np.argsort(apart, kind="stable").astype(np.int32)
            orders.setdefault(units.layer, {})[units.of] = order
    mean = [float(np.mean(column)) for column in zip(*shares, strict=True)] or [0.0, 0.0]
    return {
        layer: replace(contiguous(shape, layer), **orders.get(layer, {}))
        for layer in schedule.track_layers
    }, (mean[0], mean[1])
