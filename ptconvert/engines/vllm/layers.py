"""What vLLM gives the schedule: its own decoder layers of the model's family, norms, all-reduces.

A layer held dense is built as vLLM builds it for a tensor-parallel rank, a track as all of a model
with a track's heads and neurons. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm import ir
from vllm.distributed import parallel_state, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import WeightsMapper

from ptconvert.engines.vllm.collectives import all_reduce_boundary, finished
from ptconvert.engines.vllm.families import SERVED
from ptconvert.errors import ConfigError
from ptconvert.modeling.layers import TrackConfig
from ptconvert.models.families import TensorRule

_EXPERTS = "layer.mlp.experts."  # which vLLM packs, and checks itself


class VLLMServing:
    """vLLM on one rank, for one of the families SERVED."""

    def __init__(self, vllm_config: Any, family: str) -> None:
        self._vllm_config, self.served = vllm_config, SERVED[family]
        self._causal_lm = ModelRegistry.models[self.served.model].load_model_cls()
        own = getattr(self._causal_lm, "hf_to_vllm_mapper", LlamaModel.hf_to_vllm_mapper)
        # from a checkpoint's names of a layer's tensors to those of vLLM's layer
        self.mapper = WeightsMapper(orig_to_new_substr={f".{self.served.mlp}.": ".mlp."}) | own

    def check(self, index: int, parts: Iterable[nn.Module], rules: Iterable[TensorRule]) -> None:
        """Raises ConfigError where vLLM's layer has other tensors than the checkpoint's: what one
        lacks would be left out without a word."""
        stored = {self.mapper.map_name(f"layer.{r.name}") for r in rules if not r.common}
        stored = {name for name in stored if name and not name.startswith(_EXPERTS)}
        for part in parts:
            own = {f"layer.{name}" for name, _ in part.named_parameters()}
            own = {name for name in own if not name.startswith((_EXPERTS, "layer.guess."))}
            if differ := sorted(stored ^ own):
                held = "the checkpoint" if differ[0] in stored else "vLLM"
                raise ConfigError(
                    f"layer {index}: only {held} has {differ[0].removeprefix('layer.')}, so vLLM's "
                    f"{type(part).__name__} isn't the model's layer; transformers runs it"
                )

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        whole = self._vllm_config.model_config.hf_config
        config = TrackConfig(whole, track or 0, 1 if track is None else count)
        for name, value in self.served.given(whole).items():
            setattr(config, name, value)
        if track is None:
            return self._layer(config, index, f"model.layers.{index}")
        with _alone():  # one number in the name, for vLLM to find
            return self._layer(config, index, f"model.track{track}.layers.{index}")

    def _layer(self, config: Any, index: int, prefix: str) -> nn.Module:
        """The family's decoder layer; families differ in which of these arguments they take."""
        name = self.served.model.removesuffix("ForCausalLM") + "DecoderLayer"
        layer_class = getattr(sys.modules[self._causal_lm.__module__], name)
        vllm_config = copy.copy(self._vllm_config)
        vllm_config.model_config = copy.copy(vllm_config.model_config)
        vllm_config.model_config.hf_config = vllm_config.model_config.hf_text_config = config
        given = {
            "vllm_config": vllm_config,
            "config": config,
            "cache_config": vllm_config.cache_config,
            "quant_config": None,
            "prefix": prefix,
        }
        taken = inspect.signature(layer_class).parameters
        layer: Any = layer_class(**{k: v for k, v in given.items() if k in taken})
        layer.mlp = layer._modules.pop(self.served.mlp)
        if self.served.interleaved:
            layer.self_attn.rotary_emb = get_rope(
                layer.self_attn.head_dim,
                max_position=config.max_position_embeddings,
                rope_parameters=config.rope_parameters,
                is_neox_style=False,
            )
        if self.served.rotated is not None and not getattr(config, self.served.rotated)[index]:
            layer.self_attn.rotary_emb = NoPositions()
        for module in layer.modules():
            if isinstance(module, MoERunner):
                module.moe_config.skip_final_all_reduce = True
        found: nn.Module = layer
        return found

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
        weight_D = norm.weight.data
        if isinstance(norm, GemmaRMSNorm):
            weight_D = 1 + weight_D.float()
        normed_TD: torch.Tensor
        normed_TD, _ = add_norm(own_TD, base_TD, weight_D, norm.variance_epsilon)
        return normed_TD

    def all_reduce(self, local_TD: torch.Tensor) -> torch.Tensor:
        reduced_TD: torch.Tensor = tensor_model_parallel_all_reduce(local_TD)
        return reduced_TD

    def boundary(
        self, local_TD: torch.Tensor, launch: int | None, waits: list[int]
    ) -> torch.Tensor:
        return all_reduce_boundary(local_TD, launch, waits)


class NoPositions(nn.Module):
    """Stands for rotary positions in a layer without any."""

    def forward(
        self,
        positions: torch.Tensor,  # noqa: ARG002
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Lets vLLM build layers as a single rank would, whatever group this process is in."""
    group = parallel_state._TP
    parallel_state._TP = SimpleNamespace(world_size=1, rank_in_group=0)
    try:
        yield
    finally:
        parallel_state._TP = group
