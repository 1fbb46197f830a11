"""The orders in which units went to tracks, as the tensors that a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Iterator

from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule


def order_tensors(
    shape: ModelShape, schedule: Schedule
) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    """Layer, field of Assignment, name and shape of each tensor that holds an assignment: of single
    heads and neurons, those that quantised weights keep together one after the other."""
    for layer in sorted(schedule.track_layers):
        for of, size in shape.unquantised.orders_of(layer).items():
            yield layer, of, f"{shape.layer(layer)}assignment.{of}", size
