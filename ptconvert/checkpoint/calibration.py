"""What a converted checkpoint holds that comes from no tensor of its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.reader import Checkpoint, read_tensor
from ptconvert.checkpoint.section import Section
from ptconvert.errors import CheckpointError
from ptconvert.models.orders import order_tensors
from ptconvert.models.shape import ORDER_DTYPE, ModelShape
from ptconvert.schedule.schedule import Schedule


@dataclass(frozen=True)
class Assignment:
    """The order in which a layer's units go to tracks: the first 1/n to track 0, and so on.

    `kv_heads` come with the query heads that read them; of linear attention they are its key heads,
    with their value heads. With fewer KV heads than tracks, heads are assigned contiguously
    whatever it says. Of a mixture `neurons` are each expert's own (experts, neurons), and
    `shared_neurons` those of the experts that all tokens go to, taken as one.
    """

    kv_heads: NDArray[np.int32]
    neurons: NDArray[np.int32]
    shared_neurons: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))


def in_order(size: tuple[int, ...]) -> NDArray[np.int32]:
    """The dense model's own order of units; of each expert's (experts, neurons)."""
    return np.broadcast_to(np.arange(size[-1], dtype=np.int32), size)


def contiguous(shape: ModelShape, layer: int) -> Assignment:
    """The dense model's own order."""
    return Assignment(**{of: in_order(size) for of, size in shape.orders_of(layer).items()})


@dataclass(frozen=True)
class Calibration:
    """What was computed from a text for a conversion.

    The assignments by layer, by which the source's tensors are cut; what a text decided of each
    compensation's value, by key; and the tensors that are added for them: the bytes of each, in the
    model's dtype.
    """

    assignments: Mapping[int, Assignment] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def order_values(
    shape: ModelShape, schedule: Schedule, known: Calibration
) -> dict[str, NDArray[np.int32]]:
    """The tensors that hold the assignments, contiguous where a layer has none."""
    found = dict[str, NDArray[np.int32]]()
    for layer, of, name, size in order_tensors(shape, schedule):
        order = getattr(known.assignments.get(layer, contiguous(shape, layer)), of)
        found[name] = _of_each(order, size[-1] // order.shape[-1])
    return found


def _of_each(order: NDArray[np.int32], together: int) -> NDArray[np.int32]:
    """The order of what so many of are one unit, from that of the units."""
    each = order[..., None] * together + np.arange(together)
    return each.reshape(*order.shape[:-1], -1).astype(np.int32)


def read_orders(
    checkpoint: Checkpoint, shape: ModelShape, section: Section
) -> dict[int, Assignment]:
    """The assignments that a checkpoint holds, by layer.

    Raises CheckpointError where one is missing or is no order.
    """
    if not section.assigned:
        return {}
    found: dict[int, dict[str, NDArray[np.int32]]] = {}
    for layer, of, name, size in order_tensors(shape, section.schedule):
        entry = checkpoint.tensors.get(name)
        order = np.zeros(0, np.int32)
        if entry is not None and (entry.shape, entry.dtype) == (size, ORDER_DTYPE):
            order = np.frombuffer(read_tensor(entry), np.int32).reshape(size)
        if not np.array_equal(np.sort(order), in_order(size)):
            each = " for each expert" if len(size) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.path}: {name} must hold each number from 0 to {size[-1] - 1} once"
                f"{each}"
            )
        together = size[-1] // shape.orders_of(layer)[of][-1]
        units = order[..., ::together] // together
        if not np.array_equal(_of_each(units, together), order):
            raise CheckpointError(
                f"{checkpoint.path}: {name} must keep {together} numbers together, as the "
                "quantised weights do"
            )
        found.setdefault(layer, {})[of] = units
    return {layer: Assignment(**orders) for layer, orders in found.items()}
