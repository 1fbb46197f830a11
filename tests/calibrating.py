"""Random assignments and guesses, for whatever must hold for any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from reference import Guesses

from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.models.guesses import guess_tensors
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer

TOP = "assignment: affinity\nguess: {rank: 5}\n"


def random_assignments(shape: ModelShape, schedule: Schedule) -> dict[int, Assignment]:
    """An order of its own for each layer of tracks."""
    draw = np.random.default_rng(0)
    return {
        layer: Assignment(
            **{
                of: draw.permuted(
                    np.broadcast_to(np.arange(size[-1], dtype=np.int32), size), axis=-1
                )
                for of, size in shape.orders_of(layer).items()
            }
        )
        for layer in schedule.track_layers
    }


def random_calibration(source: Path, schedule: Schedule, tracks: int) -> Calibration:
    """Random assignments, and guesses of ranks 5 and 3 in two thirds of the sublayers, in fp32."""
    shape = ModelShape.from_config(json.loads((source / "config.json").read_text()))
    places = [s for i, s in enumerate(schedule.own_kept(tracks)) if i % 3 < 2]
    ranks = {s: (5, 3)[i % 2] for i, s in enumerate(places)}
    torch.manual_seed(3)
    tensors: dict[str, NDArray[np.uint8]] = {
        name: (0.3 * torch.randn(size)).view(torch.uint8).numpy()
        for _, name, size in guess_tensors(shape, ranks, tracks)
    }
    return Calibration(random_assignments(shape, schedule), {"guess": ranks}, tensors)


def for_reference(calibration: Calibration, tracks: int) -> Guesses:
    """The guesses as the literal reference takes them."""

    def tensor(sublayer: Sublayer, track: int, name: str) -> torch.Tensor:
        blocks = {"a": "self_attn", "m": "mlp", "s": "mlp_shared", "r": "mlp_routed"}
        block = blocks[str(sublayer)[0]]
        owner = f"model.layers.{sublayer.layer}.tracks.{track}.guess.{block}"
        flat = torch.from_numpy(calibration.tensors[f"{owner}.{name}"].copy()).view(torch.float32)
        rank = calibration.values["guess"][sublayer]
        if name.endswith("bias"):
            return flat.view(-1)
        return flat.view(-1, rank) if name.startswith("to_") else flat.view(rank, -1)

    names = ("from_input.weight", "from_partial.weight", "to_stream.weight", "to_stream.bias")
    return {
        str(s): [
            (tensor(s, t, names[0]), tensor(s, t, names[1]), tensor(s, t, names[2]),
             tensor(s, t, names[3]))
            for t in range(tracks)
        ]
        for s in calibration.values["guess"]
    }  # fmt: skip


def permuted(calibration: Calibration, model: object) -> None:
    """Puts a dense model's units into the order in which they are assigned: the same function."""
    layers = model.model.layers  # type: ignore[attr-defined]
    for i, assignment in calibration.assignments.items():
        attention, mlp = layers[i].self_attn, layers[i].mlp
        heads = attention.o_proj.in_features // attention.head_dim
        kv_heads = len(assignment.kv_heads)
        channels = torch.arange(heads * attention.head_dim).view(kv_heads, -1)
        order = torch.from_numpy(assignment.kv_heads).long()
        queries = channels[order].flatten()
        keys = torch.arange(kv_heads * attention.head_dim).view(kv_heads, -1)[order].flatten()
        neurons = torch.from_numpy(assignment.neurons).long()
        for linear, rows in (
            (attention.q_proj, queries),
            (attention.k_proj, keys),
            (attention.v_proj, keys),
            (mlp.gate_proj, neurons),
            (mlp.up_proj, neurons),
        ):
            linear.weight.data = linear.weight.data[rows]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[rows]
        for norm, rows in (("q_norm", queries), ("k_norm", keys)):
            weight = getattr(getattr(attention, norm, None), "weight", None)
            if weight is not None and weight.ndim == 2:  # of each head its own
                weight.data = weight.data.flatten()[rows].view_as(weight)
        for linear, columns in ((attention.o_proj, queries), (mlp.down_proj, neurons)):
            linear.weight.data = linear.weight.data[:, columns]
