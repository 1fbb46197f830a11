"""What SGLang gives the schedule: its own decoder layers of the model's family, norms, all-reduces.

Tracks are ranks, so a track is just this rank's shard of a layer, whose tensors the checkpoint has
sharded already. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers import layernorm
from sglang.srt.layers.activation import XIELU
from sglang.srt.layers.layer_boundary.factories import layer_stack
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_loader.auto_loader import LLAMA_STACKED_MAPPING, StackedParamsDispatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import is_cpu
from torch import nn
from torch.nn import functional
from torch.profiler import record_function

from ptconvert.engines.base import (
    LINEAR_ATTENTION,
    NoPositions,
    NormedPositions,
    layer_type,
    load_own_decays,
    window_of,
)
from ptconvert.engines.families import computed
from ptconvert.engines.in_flight import InFlight, started_by_torch
from ptconvert.engines.quantised import by_names, fused_modules
from ptconvert.engines.sglang.families import BIASED_MLP, SERVED
from ptconvert.engines.sglang.windows import own_places
from ptconvert.models.families import EXPERTS, D
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.counters import BOUNDARY

_BY_EXPERT = "awq", "modelopt"  # whose methods compare experts' names with a single expert's
Context = tuple[torch.Tensor, Any]  # positions, and what SGLang calls a ForwardBatch


class LayerNorm1P(nn.LayerNorm):
    """Nemotron's, whose weight is by one less than what it multiplies by."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of what has the stream's width as its last axis."""
        given = input, self.normalized_shape, self.weight + 1, self.bias, self.eps
        return functional.layer_norm(*given)


_TORCHS = {"LayerNorm": nn.LayerNorm, "LayerNorm1P": LayerNorm1P}  # norms that join no sum


class SGLangServing:
    """SGLang on one rank, for one of the families SERVED."""

    def __init__(self, config: Any, shape: ModelShape, quant_config: Any) -> None:
        """`quant_config` is SGLang's of a quantised checkpoint, by the checkpoint's names."""
        self._config, self._shape = config, shape
        self.served, self.computed = SERVED[shape.model_type], computed(shape.model_type)
        joined = ((whole, part, shard) for part, (whole, shard) in self.served.joined.items())
        self.joined = StackedParamsDispatch((*LLAMA_STACKED_MAPPING.mappings, *joined))
        stacked = {part: whole for whole, part, _ in self.joined.mappings}
        weights = {f".{rule.name}" for rules in shape.rules.values() for rule in rules}
        # Its methods ask by the names of what it has in one, which only some of them take apart.
        self._first_of = {
            whole: parts[0] for whole, parts in fused_modules(stacked, weights).items()
        }
        if quant_config is not None and quant_config.get_name().startswith(_BY_EXPERT):
            apart = (name for rule in shape.family.layer for name in rule.apart)
            first = next(apart, "").partition("{}.")[2].removesuffix(".weight")
            self._first_of["experts"] = f"experts.0.{first}"
        self._quant_config = by_names(quant_config, self._name_in_checkpoint)
        self._latents: Any = None  # what is done beside calling attention to them, where it is
        if self.served.latent:
            self._latents = importlib.import_module("ptconvert.engines.sglang.latents")
        self._in_flight = InFlight(_start)
        self.first = get_parallel().tp_rank == 0

    def _name_in_checkpoint(self, module: str) -> str:
        where, _, last = module.rpartition(".")
        module = f"{where}.{self._first_of.get(last, last)}."
        for own, theirs in self.served.tensors.items():
            module = module.replace(theirs, own)
        return module.removesuffix(".")

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        config = self._config_of(index)
        named = f"model.layers.{index}" + ("" if track is None else f".tracks.{track}")
        rules = self._shape.rules_of(index)
        names = {rule.name for rule in rules}
        mlp = self.served.mlp or (BIASED_MLP if "mlp.gate_proj.bias" in names else None)
        if EXPERTS in self._shape.kinds[index]:
            mlp = self.served.experts  # or those that the layer has by itself
        whole = copy.copy(config)
        if mlp is not None:
            whole.hidden_act = "silu"  # of the layer's own, which may know no other
        with layer_stack():  # whose boundaries between sublayers nobody calls
            layer = self._layer(index, whole, named)
        if mlp is not None:
            layer.mlp = self._made(mlp, index, config, f"{named}.mlp")
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():
                delattr(layer, name)
        for rule in rules:
            name, _, part = rule.name.rpartition(".")
            if rule.axes == (D,) and "." not in name and part == "weight":
                setattr(layer, name, self._norm(self._shape.width, f"{name}.bias" in names))
        if (multiplier := self._shape.family.multiplier) is not None:
            setattr(layer, multiplier, getattr(config, multiplier))
        if not hasattr(layer, LINEAR_ATTENTION):
            self._set_attention(layer.self_attn, index, config, f"{named}.self_attn")
        for module in layer.modules():
            if isinstance(module, XIELU):  # which has bfloat16 whatever the model has
                module.to(torch.get_default_dtype())
            elif isinstance(module, TopK) and is_cpu():  # else it asks for a kernel of GPUs
                module.topk_config.torch_native = True
            elif isinstance(module, FusedMoE):  # a guess reads what it has read, which others don't
                module.moe_runner_config.inplace = False
        if track is not None:
            _load_whole(layer, count)
        made: nn.Module = layer
        return made

    def _layer(self, index: int, config: Any, named: str) -> Any:
        """A decoder layer of SGLang's; where some have linear attention, a module with the layer's
        attention alone, which full attention's decoder layer is there itself."""
        if self.served.attends is None:
            return self._made(self.served.layer, index, config, named)
        config.num_experts = get_parallel().tp_size  # of a mixture that isn't kept
        linear = self._shape.is_linear(index)
        name = LINEAR_ATTENTION if linear else "self_attn"
        made = str(self.served.linear) if linear else self.served.layer
        attention = self._made(made, index, config, f"{named}.{name}")
        for other in ("mlp", "input_layernorm", "post_attention_layernorm"):
            attention._modules.pop(other, None)
        layer: Any = nn.Module()
        setattr(layer, name, attention)
        return layer

    def _config_of(self, index: int) -> Any:
        """The model's config as SGLang's layers read one: what transformers' classes add by
        themselves is written out, and positions are those of the layer."""
        config = copy.copy(self._config)
        rope = dict(config.rope_parameters)
        rope = dict(rope.get(layer_type(self._config, index), rope))
        own = {
            "head_dim": self._shape.head_size,
            "num_key_value_heads": self._shape.kv_heads,
            "rms_norm_eps": getattr(config, self.served.eps),
            "rope_parameters": rope,
            "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
            "dtype": torch.get_default_dtype(),
            "rope_is_neox_style": not self.computed.interleaved,
            **self.served.given(self._config),
        }
        for name, value in own.items():
            setattr(config, name, value)
        return config

    def _made(self, name: str, index: int, config: Any, named: str) -> Any:
        """A module of SGLang's models, of a class in one of their files, which a checkpoint calls
        `named`; they differ in which of these arguments they take."""
        file, _, name = name.partition(".")
        made = getattr(importlib.import_module(f"sglang.srt.models.{file}"), name)
        given = {
            "config": config,
            "layer_id": index,
            "quant_config": self._quant_config,
            "prefix": named,
            "stage_boundaries": False,
            "build_stages": False,
            "hidden_size": self._shape.width,
            "intermediate_size": self._shape.neurons,
            "num_experts": self._shape.experts,
            "top_k": self._shape.active_experts,
            "hidden_act": getattr(config, "hidden_act", None),
            "hidden_activation": self.served.activations[0],
            "bias": True,
            "reduce_results": False,
        }
        taken = inspect.signature(made).parameters
        return made(**{k: v for k, v in given.items() if k in taken})

    def _norm(self, size: int, bias: bool = False) -> nn.Module:
        eps = getattr(self._config, self.served.eps)
        if self.served.norm in _TORCHS:
            return _TORCHS[self.served.norm](size, eps=eps, bias=bias)
        made: nn.Module = getattr(layernorm, self.served.norm)(size, eps=eps)
        return made

    def final_norm(self) -> nn.Module:
        """The norm of the stream after the last layer, such as those in a layer."""
        return self._norm(self._shape.width, len(self._shape.family.final_norm) > 1)

    def _set_attention(self, attention: Any, index: int, config: Any, named: str) -> None:
        """Makes an attention of SGLang's what transformers' is in this layer; a checkpoint calls it
        `named`."""
        if self._latents is not None:
            self._latents.prepare(attention, config, self._quant_config, named)
            return
        window = window_of(self._config, index)
        attention.attn.sliding_window_size = -1 if window is None else window - 1  # earlier ones
        if self.served.scale is not None:
            attention.scaling = attention.attn.scaling = self.served.scale(config)
        if self.served.score_cap is not None:
            attention.attn.logit_cap = getattr(config, self.served.score_cap, None) or 0.0
        if self.served.sinks:
            attention.sinks = _sinks(len(attention.sinks), attention.sinks.dtype)
        if not self.computed.rotated(config, index):
            attention.rotary_emb = NoPositions()
        if self.served.qk_norms is not None:
            norms = {name: self._norm(self._shape.head_size) for name in self.served.qk_norms}
            attention.rotary_emb = NormedPositions(
                attention.rotary_emb, norms, self.served.normed_after
            )

    def loaded(self, layers: Iterable[Any]) -> None:
        """Makes of the tensors of layers that are loaded what SGLang's own loaders do."""
        if self._latents is not None:
            parts = (part for layer in layers for part in layer.parts.values())
            self._latents.absorb(self._config, parts)

    def window(self, part: Any) -> int | None:
        if hasattr(part, LINEAR_ATTENTION):
            return None
        attention = next(m for m in part.self_attn.modules() if isinstance(m, RadixAttention))
        earlier: int = attention.sliding_window_size
        return earlier + 1 if earlier >= 0 else None

    def attention(self, part: Any, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        positions, batch = context
        out_TD: torch.Tensor
        if self._latents is not None:
            out_TD = self._latents.attend(part.self_attn, x_TD, positions, batch)
            return out_TD
        if hasattr(part, LINEAR_ATTENTION):
            out_TD = part.linear_attn(x_TD, batch)
            return out_TD
        attend = getattr(part.self_attn, self.served.attends or "__call__")
        with contextlib.nullcontext() if self.window(part) is None else own_places():
            out_TD = attend(positions=positions, hidden_states=x_TD, forward_batch=batch)
        return out_TD

    def mlp(self, part: Any, x_TD: torch.Tensor, context: Context) -> torch.Tensor:  # noqa: ARG002
        out_TD: torch.Tensor = part.mlp(x_TD)
        return out_TD

    def add_norm(
        self, norm: Any, delta_TD: torch.Tensor, base_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(norm, nn.LayerNorm):
            sum_TD = delta_TD + base_TD
            return norm(sum_TD), sum_TD
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


def _sinks(heads: int, dtype: torch.dtype) -> nn.Parameter:
    """A rank's sinks, which SGLang has in bfloat16 also where the model is in float32, and has cut
    for layers held dense."""
    if torch.get_default_dtype() == torch.float32:
        dtype = torch.float32
    sinks = nn.Parameter(torch.empty(heads, dtype=dtype), requires_grad=False)

    def load(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        first = 0 if len(tensor) == heads else get_parallel().tp_rank * heads
        parameter.data.copy_(tensor[first : first + heads])

    sinks.weight_loader = load  # type: ignore[attr-defined]
    return sinks


def _load_whole(layer: nn.Module, count: int) -> None:
    """Makes one of `count` ranks' shard of a layer load what is that shard already."""
    # As rank 0, because its shard begins at 0. (SGLang's own `use_presharded_weights` isn't minded
    # by linear layers on CPUs.)
    first = SimpleNamespace(rank_in_group=0, world_size=count)
    for module in layer.modules():
        if isinstance(module, FusedMoE):
            load_own_neurons(module)
        for name in ("tp_group", "kv_tp_group"):
            if getattr(module, name, None) is not None:
                setattr(module, name, first)
    load_own_decays(layer)


def load_own_neurons(experts: Any) -> None:
    """Makes experts load what are this rank's neurons already, which begin at 0, too."""
    experts.use_presharded_weights, experts.moe_tp_rank = True, 0


def _start(local_TD: torch.Tensor, sum_TD: torch.Tensor) -> Callable[[], object]:
    parallel = get_parallel()
    return started_by_torch(local_TD, sum_TD, parallel.tp_group.device_group, parallel.tp_size)
