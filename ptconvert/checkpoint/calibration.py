"""What a converted checkpoint holds that comes from no tensor of its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.reader import Checkpoint, read_tensor
from ptconvert.checkpoint.section import Section
from ptconvert.errors import CheckpointError
from ptconvert.models.shape import ORDER_DTYPE, ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer
from ptconvert.spec.document import Spec
from ptconvert.spec.terms import ASSIGNMENTS


@dataclass(frozen=True)
class Assignment:
    """The order in which a layer's units go to tracks: the first 1/n to track 0, and so on.

    `kv_heads` come with the query heads that read them. With fewer KV heads than tracks, heads
    are assigned contiguously whatever it says.
    """

    kv_heads: NDArray[np.int32]
    neurons: NDArray[np.int32]


def contiguous(shape: ModelShape) -> Assignment:
    """The dense model's own order."""
    return Assignment(
        np.arange(shape.kv_heads, dtype=np.int32), np.arange(shape.neurons, dtype=np.int32)
    )


@dataclass(frozen=True)
class Calibration:
    """What was computed from a text for a conversion.

    The assignments by layer, the ranks of the guesses by sublayer, and the guesses' tensors: the
    bytes of each, in the model's dtype.
    """

    assignments: Mapping[int, Assignment] = field(default_factory=dict)
    guesses: Mapping[Sublayer, int] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def order_tensors(
    shape: ModelShape, schedule: Schedule
) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    """Layer, field of Assignment, name and shape of each tensor that holds an assignment."""
    for layer in sorted(schedule.track_layers):
        for of, size in (("kv_heads", shape.kv_heads), ("neurons", shape.neurons)):
            yield layer, of, f"model.layers.{layer}.assignment.{of}", (size,)


def order_values(
    shape: ModelShape, schedule: Schedule, spec: Spec, known: Calibration
) -> dict[str, NDArray[np.int32]]:
    """The tensors that hold the assignments; none where all are contiguous."""
    if spec.assignment == ASSIGNMENTS[0]:
        return {}
    return {
        name: getattr(known.assignments.get(layer, contiguous(shape)), of)
        for layer, of, name, _ in order_tensors(shape, schedule)
    }


def read_orders(
    checkpoint: Checkpoint, shape: ModelShape, section: Section
) -> tuple[dict[str, tuple[int, ...]], dict[int, Assignment]]:
    """The shapes of the tensors that hold assignments, and the assignments, by layer.

    Raises CheckpointError where one is missing or is no order.
    """
    if not section.assigned:
        return {}, {}
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[int, dict[str, NDArray[np.int32]]] = {}
    for layer, of, name, size in order_tensors(shape, section.schedule):
        entry = checkpoint.tensors.get(name)
        order = np.zeros(0, np.int32)
        if entry is not None and (entry.shape, entry.dtype) == (size, ORDER_DTYPE):
            order = np.frombuffer(read_tensor(entry), np.int32)
        if not np.array_equal(np.sort(order), np.arange(size[0])):
            raise CheckpointError(
                f"{checkpoint.path}: {name} must hold each number from 0 to {size[0] - 1} once"
            )
        shapes[name] = size
        found.setdefault(layer, {})[of] = order
    return shapes, {layer: Assignment(**orders) for layer, orders in found.items()}
