"""What SGLang gives the schedule: its own decoder layers of the model's family, norms, all-reduces.

Tracks are ranks, so a track is just this rank's shard of a layer, whose tensors the checkpoint has
sharded already. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.layer_boundary.factories import layer_stack
from sglang.srt.runtime_context import get_parallel
from torch import nn
from torch.profiler import record_function

from ptconvert.engines.in_flight import InFlight, started_by_torch
from ptconvert.engines.sglang.families import SERVED
from ptconvert.runtime.counters import BOUNDARY

Context = tuple[torch.Tensor, Any]  # positions, and what SGLang calls a ForwardBatch


class SGLangServing:
    """SGLang on one rank, for one of the families SERVED."""

    def __init__(self, config: Any, family: str) -> None:
        self._config = config
        module, name = SERVED[family]
        self._layer_class = getattr(importlib.import_module(f"sglang.srt.models.{module}"), name)
        self._in_flight = InFlight(_start)
        self.first = get_parallel().tp_rank == 0

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        given = {
            "config": self._config,
            "layer_id": index,
            "quant_config": None,
            "prefix": f"model.layers.{index}",
            "stage_boundaries": False,
        }
        taken = inspect.signature(self._layer_class).parameters
        with layer_stack():  # whose boundaries between sublayers nobody calls
            layer: nn.Module = self._layer_class(**{k: v for k, v in given.items() if k in taken})
        if track is not None:
            # Rank 0, because its shard begins at 0: what is loaded is that shard already. (SGLang's
            # own `use_presharded_weights` isn't minded on CPUs.)
            first = SimpleNamespace(rank_in_group=0, world_size=count)
            for module in layer.modules():
                for name in ("tp_group", "kv_tp_group"):
                    if getattr(module, name, None) is not None:
                        setattr(module, name, first)
        return layer

    def window(self, part: Any) -> int | None:
        window: int = getattr(part.self_attn.attn, "sliding_window_size", -1)
        return window if window > 0 else None

    def attention(self, part: Any, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        positions, batch = context
        out_TD: torch.Tensor = part.self_attn(
            positions=positions, hidden_states=x_TD, forward_batch=batch
        )
        return out_TD

    def mlp(self, part: Any, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        out_TD: torch.Tensor = part.mlp(x_TD, forward_batch=context[1])
        return out_TD

    def add_norm(
        self, norm: Any, delta_TD: torch.Tensor, base_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TD, sum_TD = norm(delta_TD, base_TD)
        return normed_TD, sum_TD

    def norm_of_sum(self, norm: Any, own_TD: torch.Tensor, base_TD: torch.Tensor) -> torch.Tensor:
        normed_TD: torch.Tensor = norm(own_TD + base_TD)
        return normed_TD

    def all_reduce(self, local_TD: torch.Tensor) -> torch.Tensor:
        reduced_TD: torch.Tensor = tensor_model_parallel_all_reduce(local_TD)
        return reduced_TD

    def boundary(
        self,
        local_TD: torch.Tensor,
        sums: list[torch.Tensor],
        kept: list[torch.Tensor],  # noqa: ARG002
        launch: int | None,
        waits: list[int],
    ) -> torch.Tensor:
        with record_function(BOUNDARY):  # which counters tell overlapped all-reduces by
            if launch is not None:
                self._in_flight.launch(launch, local_TD, sums[-1])
            self._in_flight.merge(waits, sums)
        return sums[0]


def _start(local_TD: torch.Tensor, sum_TD: torch.Tensor) -> Callable[[], object]:
    parallel = get_parallel()
    return started_by_torch(local_TD, sum_TD, parallel.tp_group.device_group, parallel.tp_size)
