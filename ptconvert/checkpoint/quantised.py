"""What the weights of a checkpoint are kept as, where they are quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, read_tensor
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.models.families import ONE, TensorRule
from ptconvert.models.quantised import (
    CACHE_SCALES,
    QUANTIZATION,
    kept_rules,
    of_tracks,
    quantization_of,
    unit_sizes,
)
from ptconvert.models.shape import DTYPE_BYTES, HEAD, ModelShape
from ptconvert.models.wrappers import TEXT, layer_of

_INTEGERS = {"I32": np.int32, "I64": np.int64}


def with_quantised(
    shape: ModelShape, checkpoint: Checkpoint, tracks: int = 1, tracked: Set[int] = frozenset()
) -> ModelShape:
    """A model's shape that knows what a checkpoint's quantised weights are kept as.

    Of a converted one the `tracked` layers are divided into `tracks`. Raises CheckpointError for
    tensors that can't belong to one weight.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None:
        return shape
    found: dict[int | None, tuple[TensorRule, ...]] = {}
    for layer, tensors in _by_layer(shape, checkpoint, tracked).items():
        sizes = {name: entry.shape for name, entry in tensors.items()}

        def in_order(name: str, group: int, tensors: Mapping[str, TensorEntry] = tensors) -> bool:
            index = integers(tensors[name])
            return np.array_equal(index, in_groups(len(index), group))

        try:
            divided = tracks if layer in tracked else 1
            kept = _kept(shape, layer, divided, sizes, quantization, in_order)
        except ConfigError as error:
            where = shape.layer(layer) if layer is not None else ""
            raise CheckpointError(f"{checkpoint.path}: {where}{error}") from None
        if any(rule.kept is not None for rule in kept):
            found[layer] = kept
    return replace(shape, quantised=found)


def as_dequantised(
    shape: ModelShape, checkpoint: Checkpoint, tracks: int = 1, tracked: Set[int] = frozenset()
) -> Checkpoint:
    """A checkpoint as its model is opened: each quantised weight one tensor of the model's dtype,
    which lies in no file."""
    tensors, dtype = dict(checkpoint.tensors), shape.dtype or "BF16"
    plain = shape.unquantised
    for layer, kept in shape.quantised.items():
        begin = shape.layer(layer) if layer is not None else ""
        divided = tracks if layer in tracked else 1
        begins = [f"{begin}tracks.{t}." for t in range(tracks)] if layer in tracked else [begin]
        weights = plain.stored_head if layer is None else plain.stored_of(layer)
        for track, before in enumerate(begins):
            for rule in kept:
                if rule.kept is not None:
                    del tensors[before + rule.name]
            for rule in weights:
                name, size = before + rule.name, shape.share(rule, track, divided)
                if name not in tensors and f"{begin}common.{rule.name}" not in tensors:
                    nbytes = math.prod(size) * DTYPE_BYTES[dtype]
                    tensors[name] = TensorEntry(name, checkpoint.path, dtype, size, 0, nbytes)
    return replace(checkpoint, tensors=tensors)


def check_undoable(
    shape: ModelShape, checkpoint: Checkpoint, tracks: int, tracked: Set[int]
) -> None:
    """Raises CheckpointError where the tensors of tracks wouldn't tell how the whole ones lie."""
    quantization = quantization_of(checkpoint.config) or {}
    for layer in tracked & shape.quantised.keys():
        rules = shape.quantised[layer]
        sizes = {rule.name: shape.share(rule, 0, tracks) for rule in rules}
        told = {rule.name for rule in rules if rule.told is not None}

        def in_order(name: str, _: int, told: Set[str] = told) -> bool:
            return name in told  # nobody asks of those that aren't cut

        found = _kept(shape, layer, tracks, sizes, quantization, in_order)
        for one, other in zip(rules, found, strict=True):
            if one != other:
                raise CheckpointError(
                    f"{checkpoint.path}: {one.name} of {list(shape.size(one))} can't be told from "
                    f"others once {tracks} tracks have it; take another number of tracks"
                )


def _kept(
    shape: ModelShape,
    layer: int | None,
    tracks: int,
    sizes: Mapping[str, tuple[int, ...]],
    quantization: Mapping[str, Any],
    in_order: Callable[[str, int], bool],
) -> tuple[TensorRule, ...]:
    """The tensors of a layer, or of its tracks, by their names and shapes. Raises ConfigError."""
    weights = shape.stored_head if layer is None else shape.unquantised_of(layer)
    before, kept = "" if layer is None else shape.layer(layer), list[TensorRule]()
    for rule in weights:
        part, whole = shape.share(rule, 0, tracks), shape.size(rule)
        units = unit_sizes(quantization, before + rule.name.removesuffix(".weight"))
        kept += kept_rules(rule, part, whole, sizes, units, in_order)
    scales = [name for name in CACHE_SCALES if name in sizes]
    for name in scales:
        if math.prod(sizes[name]) != 1:
            raise ConfigError(
                f"{name} has shape {list(sizes[name])}; only one scale for all heads can be kept"
            )
    return (*kept, *(TensorRule(n, (ONE,) * len(sizes[n]), kept=sizes[n]) for n in scales))


def _by_layer(
    shape: ModelShape, checkpoint: Checkpoint, tracked: Set[int]
) -> dict[int | None, dict[str, TensorEntry]]:
    """The tensors of each layer, of the first track where there are tracks, by their names in it;
    None has those of lm_head."""
    found: dict[int | None, dict[str, TensorEntry]] = {}
    head = HEAD.partition(".")[0] + "."
    for name, entry in checkpoint.tensors.items():
        layer = layer_of(name)
        if name.startswith(head):
            found.setdefault(None, {})[name] = entry
        if layer is None or layer >= shape.layers:
            continue
        before = shape.layer(layer) + ("tracks.0." if layer in tracked else "")
        if name.startswith(before):
            found.setdefault(layer, {})[name.removeprefix(before)] = entry
    return found


def integers(entry: TensorEntry) -> NDArray[np.int64]:
    """A tensor of indices or sizes. Raises CheckpointError for one of another dtype."""
    if entry.dtype not in _INTEGERS:
        raise CheckpointError(
            f"{entry.file}: {entry.name} is {entry.dtype}, not {' or '.join(_INTEGERS)}"
        )
    return np.frombuffer(read_tensor(entry), _INTEGERS[entry.dtype]).astype(np.int64)


def check_values(entry: TensorEntry, values: tuple[int, ...] | None) -> None:
    """Raises CheckpointError where a tensor that describes a weight says something else of it."""
    if values is not None and not np.array_equal(integers(entry), values):
        raise CheckpointError(
            f"{entry.file}: {entry.name} isn't that of the weight it lies beside: it must begin "
            f"{list(values[:4])}"
        )


def as_stored(values: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Such values in a tensor's dtype."""
    return np.array(values, _INTEGERS[dtype])


def in_groups(inputs: int, group: int) -> NDArray[np.int64]:
    """The group of each input where they follow each other."""
    return np.arange(inputs) // group


def converted_quantization(
    config: Mapping[str, Any], shape: ModelShape, tracks: int, tracked: Set[int]
) -> dict[str, object]:
    """What the conversion replaces in a config.json so that it says of tracks which of their
    modules are quantised, and how."""
    modules = {
        module: [f"{shape.layer(layer)}tracks.{t}.{name}" for t in range(tracks)]
        for layer in sorted(tracked)
        for rule in shape.unquantised_of(layer)
        if (name := rule.name.removesuffix(".weight")) != rule.name
        and (module := shape.layer(layer) + name)
    }
    found = dict[str, object]()
    for key, part in ((None, config), (TEXT, config.get(TEXT))):
        if isinstance(part, Mapping) and part.get(QUANTIZATION):
            own = {QUANTIZATION: of_tracks(part[QUANTIZATION], modules)}
            found |= own if key is None else {key: {**part, **own}}
    return {key: value for key, value in found.items() if value != config[key]}
