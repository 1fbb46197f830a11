"""What vLLM gives the schedule: its own decoder layers of the model's family, norms, all-reduces.

A layer held dense is built as vLLM builds it for a tensor-parallel rank, a track as such a rank's
shard would be. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm import ir
from vllm.distributed import parallel_state, tensor_model_parallel_all_reduce
from vllm.model_executor.models import ModelRegistry

from ptconvert.engines.vllm.collectives import all_reduce_boundary, finished


class VLLMServing:
    """vLLM on one rank, for a family by the name of its causal language model in transformers."""

    def __init__(self, vllm_config: Any, causal_lm: str) -> None:
        self._vllm_config, self._causal_lm = vllm_config, causal_lm

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        if track is None:
            return self._layer(f"model.layers.{index}")
        with _as_shard_of(count):  # one number in the name, for vLLM to find
            return self._layer(f"model.track{track}.layers.{index}")

    def _layer(self, prefix: str) -> nn.Module:
        """The family's decoder layer; families differ in which of these arguments they take."""
        causal_lm = ModelRegistry.models[self._causal_lm].load_model_cls()
        name = self._causal_lm.removesuffix("ForCausalLM") + "DecoderLayer"
        layer_class = getattr(sys.modules[causal_lm.__module__], name)
        given = {
            "vllm_config": self._vllm_config,
            "config": self._vllm_config.model_config.hf_config,
            "cache_config": self._vllm_config.cache_config,
            "quant_config": None,
            "prefix": prefix,
        }
        taken = inspect.signature(layer_class).parameters
        layer: nn.Module = layer_class(**{k: v for k, v in given.items() if k in taken})
        return layer

    def window(self, part: Any) -> int | None:
        window: int | None = part.self_attn.attn.sliding_window
        return window

    def attention(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        return finished(part.self_attn(positions=context, hidden_states=x_TD))

    def mlp(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:  # noqa: ARG002
        return finished(part.mlp(x_TD))

    def add_norm(
        self, norm: Any, delta_TD: torch.Tensor, base_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TD, sum_TD = norm(delta_TD, base_TD)
        return normed_TD, sum_TD

    def norm_of_sum(self, norm: Any, own_TD: torch.Tensor, base_TD: torch.Tensor) -> torch.Tensor:
        add_norm = ir.ops.fused_add_rms_norm  # the functional form: it overwrites nothing
        normed_TD: torch.Tensor
        normed_TD, _ = add_norm(own_TD, base_TD, norm.weight.data, norm.variance_epsilon)
        return normed_TD

    def all_reduce(self, local_TD: torch.Tensor) -> torch.Tensor:
        reduced_TD: torch.Tensor = tensor_model_parallel_all_reduce(local_TD)
        return reduced_TD

    def boundary(
        self, local_TD: torch.Tensor, launch: int | None, waits: list[int]
    ) -> torch.Tensor:
        return all_reduce_boundary(local_TD, launch, waits)


@contextlib.contextmanager
def _as_shard_of(ranks: int) -> Iterator[None]:
    """Lets vLLM build layers as rank 0 of so many would, whatever group this process is in.

    Rank 0, because its shard begins at 0: what is loaded into it is a track's tensor, which is
    that shard already.
    """
    group = parallel_state._TP
    parallel_state._TP = SimpleNamespace(world_size=ranks, rank_in_group=0)
    try:
        yield
    finally:
        parallel_state._TP = group
