"""What vLLM gives the schedule: its own decoder layers of the model's family, norms, all-reduces.

A layer held dense is built as vLLM builds it for a tensor-parallel rank, a track as all of a model
with a track's heads and neurons. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm import ir
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    parallel_state,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers import layernorm
from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.glm4_moe import Glm4MoeModel
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.nemotron import NemotronLayerNorm1P
from vllm.model_executor.models.utils import WeightsMapper

from ptconvert.checkpoint.section import Section
from ptconvert.engines.base import (
    LINEAR_ATTENTION,
    NoPositions,
    NormedPositions,
    load_own_decays,
)
from ptconvert.engines.families import computed
from ptconvert.engines.quantised import by_names, fused_modules
from ptconvert.engines.vllm.collectives import all_reduce_boundary, finished
from ptconvert.engines.vllm.families import SERVED
from ptconvert.engines.vllm.quantised import method_of_family
from ptconvert.errors import ConfigError
from ptconvert.modeling.layers import TrackConfig
from ptconvert.models.families import HEAD, KV_HEAD, TensorRule
from ptconvert.models.quantised import weight_of
from ptconvert.models.shape import ModelShape

_EXPERTS = "layer.mlp.experts."  # which vLLM packs, and checks itself
_CACHE = "layer.self_attn.attn."  # whose scales a checkpoint may have, or not
_NORMS = (RMSNorm, GemmaRMSNorm, LayerNorm, NemotronLayerNorm1P)  # between sublayers


class LayerConfig(TrackConfig):
    """A track's config, of the class that the model's has, which vLLM's layers ask for."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._config)


class VLLMServing:
    """vLLM on one rank, for a converted model of one of the families SERVED."""

    def __init__(self, vllm_config: Any, shape: ModelShape, section: Section, prefix: str) -> None:
        """`prefix` is what the decoder is called in vLLM, of whose names a quantisation config's
        are: those of the checkpoint where nothing lies around it."""
        self._vllm_config, self.served = vllm_config, SERVED[shape.family.model_type]
        self.computed = computed(shape.family.model_type)
        self._shape, self._prefix, self._together = shape, prefix, section.together
        self.first = get_tensor_model_parallel_rank() == 0
        try:
            causal_lm = ModelRegistry.models[self.served.model].load_model_cls()
        except ImportError as error:
            raise ConfigError(f"vLLM's {self.served.model} can't be imported: {error}") from error
        self._module = sys.modules[causal_lm.__module__]
        self._named = self.served.model.removesuffix("ForCausalLM")
        # From a checkpoint's names of a layer's tensors to those of vLLM's layer: which of them are
        # one there, vLLM's classes say, and where none does, that is as in most.
        classes = causal_lm, getattr(self._module, f"{self._named}Model", None), Glm4MoeModel
        mappers = filter(None, (getattr(c, "hf_to_vllm_mapper", None) for c in classes))
        stacked = next(m.orig_to_new_stacked for m in mappers if m.orig_to_new_stacked)
        renamed = {f".{self.served.mlp}.": ".mlp.", **self.served.tensors}
        for name in self.served.normed_after or ():
            renamed[f".{name}."] = f".rotary_emb.{name}."
        layers = self.computed.keys_as_values(vllm_config.model_config.hf_text_config)
        either = "|".join(map(str, layers)) or "none"
        self.mapper = WeightsMapper(
            orig_to_new_regex={
                re.compile(rf"^(model\.layers\.(?:{either})\..*)\.k_proj\."): r"\1.kv_proj."
            },
            orig_to_new_substr=renamed,
            orig_to_new_stacked={
                **stacked,
                ".kv_proj.": (".qkv_proj.", ["k", "v"]),
                **(self.served.latent if vllm_config.model_config.use_mla else {}),
            },
        )
        rules = shape.family.layer
        self._by_head = {r.name for r in rules if r.axes and r.axes[0] in (HEAD, KV_HEAD)}
        self._quant_config = method_of_family(vllm_config.quant_config, self.served.methods)
        if self._quant_config is not None:
            weights = {f".{rule.name}" for rules in shape.rules.values() for rule in rules}
            stacked = {p: whole for p, (whole, _) in self.mapper.orig_to_new_stacked.items()}
            self._quant_config.packed_modules_mapping = fused_modules(stacked, weights)

    def check(self, index: int, parts: Iterable[nn.Module], rules: Iterable[TensorRule]) -> None:
        """Raises ConfigError where vLLM's layer has other tensors than the checkpoint's: what one
        lacks would be left out without a word."""
        stored = {self.mapper.map_name(f"layer.{r.name}") for r in rules if not r.common}
        stored = {name for name in stored if name and not name.startswith(_EXPERTS)}
        for part in parts:
            own = {f"layer.{name}" for name, _ in part.named_parameters()}
            own |= stored & {f"layer.{name}" for name, _ in part.named_buffers()}
            apart = (_EXPERTS, _CACHE, "layer.guess.")
            own = {weight_of(name) for name in own if not name.startswith(apart)}
            if differ := sorted(stored ^ own):
                held = "the checkpoint" if differ[0] in stored else "vLLM"
                raise ConfigError(
                    f"layer {index}: only {held} has {differ[0].removeprefix('layer.')}, so vLLM's "
                    f"{type(part).__name__} isn't the model's layer; transformers runs it"
                )

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        whole = self._vllm_config.model_config.hf_text_config
        config = LayerConfig(whole, track or 0, 1 if track is None else count, self._together)
        for name, value in self.served.given(whole).items():
            setattr(config, name, value)
        named = f"{self._prefix}.layers.{index}."
        layer: nn.Module
        if track is None:
            layer = self._layer(config, index, f"model.layers.{index}", named)
            return layer
        with alone():  # one number in the name, for vLLM to find
            prefix = f"model.track{track}.layers.{index}"
            layer = self._layer(config, index, prefix, f"{named}tracks.{track}.")
        load_own_decays(layer)
        return layer

    def _layer(self, config: Any, index: int, prefix: str, named: str) -> Any:
        """The family's decoder layer, whose modules the checkpoint calls `named` and more; families
        differ in which of these arguments they take."""
        layer_class = getattr(self._module, self.served.layer or f"{self._named}DecoderLayer")
        vllm_config = copy.copy(self._vllm_config)
        vllm_config.model_config = copy.copy(vllm_config.model_config)
        vllm_config.model_config.hf_config = vllm_config.model_config.hf_text_config = config
        vllm_config.quant_config = by_names(
            self._quant_config, lambda module: named + module.removeprefix(f"{prefix}.")
        )
        given = {
            "vllm_config": vllm_config,
            "config": config,
            "layer_type": (getattr(config, "layer_types", None) or {index: None})[index],
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
        }
        taken = inspect.signature(layer_class).parameters
        layer: Any = layer_class(**{k: v for k, v in given.items() if k in taken})
        if not hasattr(layer, LINEAR_ATTENTION):
            layer.self_attn = layer._modules.pop(self.served.attention)
        layer.mlp = layer._modules.pop(self.served.mlp)
        if self.served.norm is not None:
            for name, norm in list(layer.named_children()):
                if hasattr(norm, "weight"):
                    made = getattr(layernorm, self.served.norm)
                    setattr(layer, name, norm_as(made, norm, config.hidden_size))
        if self.computed.interleaved and layer.self_attn.rotary_emb.is_neox_style:
            layer.self_attn.rotary_emb = get_rope(
                layer.self_attn.head_dim,
                max_position=config.max_position_embeddings,
                rope_parameters=config.rope_parameters,
                is_neox_style=False,
            )
        if not self.computed.rotated(config, index):
            layer.self_attn.rotary_emb = NoPositions()
        if self.served.normed_after is not None:
            norms = {
                name: RMSNorm(layer.self_attn.head_dim, eps=config.rms_norm_eps)
                for name in self.served.normed_after
            }
            positions = NormedPositions(layer.self_attn.rotary_emb, norms, after=True)
            layer.self_attn.rotary_emb = positions
        for parameter, tensor in layer.named_parameters():
            if parameter in self._by_head:
                tensor.weight_loader = _load_own_heads
        for module in layer.modules():
            if isinstance(module, MoERunner):
                module.moe_config.skip_final_all_reduce = True
            elif isinstance(module, GptOssRoutedExperts):
                module.load_weights = functools.partial(_load_experts, module)
            elif isinstance(module, XIELU):  # which has bfloat16 whatever the model has
                module.to(torch.get_default_dtype())
        return layer

    def final_norm(self, layer: nn.Module) -> nn.Module:
        """The norm of the stream after the last layer, such as those in a layer."""
        norm = next(module for module in layer.modules() if isinstance(module, _NORMS))
        width = self._vllm_config.model_config.hf_text_config.hidden_size
        return norm_as(type(norm), norm, width)

    def window(self, part: Any) -> int | None:
        if hasattr(part, LINEAR_ATTENTION):
            return None
        attends = (Attention, MLAAttention)
        attention = next(m for m in part.self_attn.modules() if isinstance(m, attends))
        window: int | None = attention.sliding_window
        return window

    def attention(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        if hasattr(part, LINEAR_ATTENTION):
            return finished(part.linear_attn(hidden_states=x_TD))
        more = self.served.passed
        return finished(part.self_attn(positions=context, hidden_states=x_TD, **more))

    def mlp(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:  # noqa: ARG002
        return finished(part.mlp(x_TD))

    def add_norm(
        self, norm: Any, delta_TD: torch.Tensor, base_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(norm, LayerNorm):
            sum_TD = delta_TD + base_TD
            return norm(sum_TD), sum_TD
        normed_TD, sum_TD = norm(delta_TD, base_TD)
        return normed_TD, sum_TD

    def norm_of_sum(self, norm: Any, own_TD: torch.Tensor, base_TD: torch.Tensor) -> torch.Tensor:
        normed_TD: torch.Tensor
        if not isinstance(norm, RMSNorm | GemmaRMSNorm):
            normed_TD = norm(own_TD + base_TD)
            return normed_TD
        add_norm = ir.ops.fused_add_rms_norm  # the functional form: it overwrites nothing
        weight_D = norm.weight.data
        if isinstance(norm, GemmaRMSNorm):
            weight_D = 1 + weight_D.float()
        normed_TD, _ = add_norm(own_TD, base_TD, weight_D, norm.variance_epsilon)
        return normed_TD

    def all_reduce(self, local_TD: torch.Tensor) -> torch.Tensor:
        reduced_TD: torch.Tensor = tensor_model_parallel_all_reduce(local_TD)
        return reduced_TD

    def boundary(
        self,
        local_TD: torch.Tensor,
        sums: list[torch.Tensor],
        kept: list[torch.Tensor],
        launch: int | None,
        waits: list[int],
    ) -> torch.Tensor:
        return all_reduce_boundary(local_TD, sums, kept, launch, waits)


def norm_as(made: type[nn.Module], norm: Any, width: int) -> nn.Module:
    """A norm of a class and a width, with another's epsilon, and a bias if that has one."""
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    if made is LayerNorm:
        return LayerNorm(width, epsilon, bias=getattr(norm, "bias", None) is not None)
    return made(width, epsilon)


def _load_experts(experts: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """Loads gpt-oss' experts, each tensor of all of them, by vLLM's loader of one."""
    for name, tensor in weights:
        for expert, one in enumerate(tensor):
            experts.weight_loader(
                *(getattr(experts, name), one, name, f"gpt_oss_{name.split('_')[0]}", expert, False)
            )
        yield name


def _load_own_heads(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Loads what has a row for each head: a track's own, or this rank's of a layer held dense."""
    own, heads = len(parameter), len(tensor)
    if own < heads:
        first = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
        tensor = tensor[first : first + own]
    parameter.data.copy_(tensor)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lets vLLM build layers as a single rank would, whatever group this process is in."""
    with among(SimpleNamespace(world_size=1, rank_in_group=0)):
        yield


@contextlib.contextmanager
def among(group: Any) -> Iterator[None]:
    """Lets vLLM build layers as a rank of a group would."""
    before = parallel_state._TP
    parallel_state._TP = group
    try:
        yield
    finally:
        parallel_state._TP = before
