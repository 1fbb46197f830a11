"""The model in SGLang: one class for all families and schedules.

The executor walks the lowered schedule over SGLang's own layers. Shape suffixes: T tokens of all
requests in the batch, D the residual stream's width.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import attention_backends, get_parallel, get_spec
from sglang.srt.utils import is_cpu
from torch import nn
from torch.profiler import record_function

from ptconvert.checkpoint.section import read_section, source_config
from ptconvert.engines.base import ServedPass, own_weights, renamed, served_layers, window_of
from ptconvert.engines.sglang.families import EXPERTS_PARTS
from ptconvert.engines.sglang.formats import MXFP4, MXFP4_BLOCK
from ptconvert.engines.sglang.layers import SGLangServing, load_own_neurons
from ptconvert.engines.sglang.refusals import check, unpadded
from ptconvert.models.shape import ModelShape

# What SGLang makes itself where a checkpoint says nothing: scales of the cache, 1; orders of groups
# that lie in order; scales as its kernels read them.
_MADE = (".k_scale", ".v_scale", "g_idx", "g_idx_sort_indices", "_blockscale_swizzled")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)")  # of one's projection
_EXPERTS = re.compile(r".*\.experts\.(w13|w2)_(\w+)")  # of all of them in one


class PTConvertModel(nn.Module):
    """The decoder without lm_head: this rank's track and shards, run by the schedule."""

    def __init__(self, config: Any, quantization: Any) -> None:
        super().__init__()
        own = unpadded(config.to_dict())
        section = read_section(own)
        shape = ModelShape.from_config(source_config(own, section))
        parallel = get_parallel()
        check(
            *(own, shape, section, parallel.tp_size),
            on_cpu=is_cpu(),
            quantization=None if quantization is None else quantization.get_name(),
            groups={
                "--pp-size": parallel.pp_size,
                "--enable-dp-attention": parallel.attn_dp_size,
                "--attn-cp-size": parallel.attn_cp_size,
                "--dcp-size": parallel.attn_dcp_size,
                "--ep-size": parallel.moe_ep_size,
                "--moe-dp-size": parallel.moe_dp_size,
            },
            dense_ranks=parallel.moe_dense_tp_size,
            backends=attention_backends(),
            drafts=get_spec().speculative_algorithm,
        )
        self.shape = shape
        self.program = section.schedule.program
        self.waiting_weight = section.waiting_weight
        self.local_tracks = range(parallel.tp_rank, parallel.tp_rank + 1)
        self.tracked = section.schedule.track_layers
        # On every rank whole: sharded, it would cost one more all-reduce per forward pass.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, enable_tp=False
        )
        self.serving = SGLangServing(config, shape, quantization)
        self.layers = served_layers(self.serving, section, shape, config, self.local_tracks)
        self.norm = self.serving.final_norm()
        dtype = torch.get_default_dtype()
        self.embeds_scale = self.serving.computed.embeds_scale(config, dtype)
        tensors = self.serving.served.tensors
        self.renamed = {
            **renamed(shape.family),
            **{re.compile(re.escape(own)): theirs for own, theirs in tensors.items()},
            **{
                re.compile(rf"\.self_attn\.{name}\."): rf".self_attn.rotary_emb.{name}."
                for name in self.serving.served.qk_norms or ()
            },
        }

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Any, base_TD: Any
    ) -> torch.Tensor:
        """The normed stream after the last stage, (tokens, width), the same on every rank."""
        if base_TD is None:
            base_TD = self.embed_tokens(input_ids)
            base_TD = base_TD if self.embeds_scale is None else base_TD * self.embeds_scale
        one_pass = ServedPass(self.serving, self.layers, (positions, batch))
        return one_pass.decode(self.program, base_TD, self.norm, self.waiting_weight)


class PTConvertForCausalLM(nn.Module):
    """A converted causal language model; its config decides family and schedule."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:  # noqa: ARG002
        super().__init__()
        self.config = config
        self.model = PTConvertModel(config, quant_config)
        alone = quant_config is not None and quant_config.get_name() == MXFP4
        self.lm_head = ParallelLMHead(
            *(config.vocab_size, config.hidden_size),
            quant_config=None if alone else quant_config,
            prefix="lm_head",
        )
        computed = self.model.serving.computed
        self.logits_processor = LogitsProcessor(config, logit_scale=computed.logits_scale(config))
        # It would cap logits wherever a config has this key, also one that the family doesn't read.
        self.logits_processor.final_logit_softcapping = computed.logits_cap(config)
        self.passes = 0  # profiled ones

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """As SGLang's models: what its LogitsProcessor gives."""
        self.passes = self.passes + 1 if torch._C._autograd._profiler_enabled() else 0
        with record_function(f"step {self.passes} of {len(positions)} tokens"):
            hidden_TD = self.model(input_ids, positions, forward_batch, input_embeds)
            return self.logits_processor(input_ids, hidden_TD, self.lm_head, forward_batch)

    def get_attention_sliding_window_size(self) -> int | None:
        """How many tokens before its own a token sees in layers with a window, as SGLang asks."""
        windows = (window_of(self.config, index) for index in range(len(self.model.layers)))
        return next((window - 1 for window in windows if window is not None), None)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads this rank's tensors. Raises ValueError where one has no place."""
        parameters = dict(self.named_parameters())
        missing = {name for name in parameters if not name.endswith(_MADE)}
        places = parameters | dict(self.named_buffers())
        model = self.model
        own = own_weights(weights, model.local_tracks, model.shape, model.tracked)
        own = _with_values(own, model.serving.computed.keys_as_values(self.config))
        own = _parted(own, model.shape, model.serving.served.parted)
        for given, tensor in itertools.chain(own, _of_others(model)):
            name = given
            for pattern, replacement in self.model.renamed.items():
                name = re.sub(pattern, replacement, name)
            if (expert := _EXPERT.fullmatch(name)) is not None:
                missing.discard(_load_expert(given, expert, tensor, parameters))
                continue
            if (experts := _EXPERTS.fullmatch(name)) is not None and name in parameters:
                neurons = None if ".tracks." in given else model.shape.neurons
                _load_experts(given, experts, tensor, parameters[name], neurons)
                missing.discard(name)
                continue
            target = name
            if name not in places:
                target = model.serving.joined.try_load(name, tensor, parameters) or name
            if target not in places:  # which SGLang's mapping passes over
                if given.startswith("lm_head."):
                    raise ValueError(f"{given}: SGLang takes no lm_head that is kept so")
                raise ValueError(f"{given} has no place in SGLang's model ({target})")
            if target == name:
                load = getattr(places[name], "weight_loader", default_weight_loader)
                if ".tracks." in given and tensor.dim() > 1:  # no norm, and the shard is all of it
                    load = default_weight_loader
                load(places[name], tensor)
            missing.discard(target)
        if missing:
            raise ValueError(f"{min(missing)} is not in the checkpoint")
        model.serving.loaded(model.layers)


def _with_values(
    weights: Iterable[tuple[str, torch.Tensor]], layers: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """With what makes keys of these layers once more as what makes their values."""
    begins = tuple(f"model.layers.{index}." for index in layers)
    for name, tensor in weights:
        yield name, tensor
        if ".k_proj." in name and name.startswith(begins):
            yield name.replace(".k_proj.", ".v_proj."), tensor


def _parted(
    weights: Iterable[tuple[str, torch.Tensor]],
    shape: ModelShape,
    parted: Mapping[str, tuple[str, ...]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """With linear attention's queries, keys and values each by itself, of a track or of all: what
    SGLang does with them in one tensor goes by sizes of all tracks together."""
    keys = shape.linear_key_heads * shape.linear_key_size
    sizes = keys, keys, shape.linear_value_heads * shape.linear_value_size
    for name, tensor in weights:
        whole = next((whole for whole in parted if whole in name), None)
        if whole is None:
            yield name, tensor
            continue
        own = [len(tensor) * size // sum(sizes) for size in sizes]
        for part, of_part in zip(parted[whole], torch.split(tensor, own), strict=True):
            yield name.replace(whole, part), of_part


def _of_others(model: PTConvertModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Zeros for what is added once, by the first track, in others."""
    for index in sorted(model.tracked):
        for rule in (rule for rule in model.shape.rules_of(index) if rule.once):
            for track in (track for track in model.local_tracks if track > 0):
                name = f"{model.shape.layer(index)}tracks.{track}.{rule.name}"
                yield name, torch.zeros(model.shape.size(rule))


def _load_expert(
    name: str, found: re.Match[str], tensor: torch.Tensor, parameters: Mapping[str, Any]
) -> str:
    """Loads one of an expert's projections into that of all; returns the parameter's name."""
    part = EXPERTS_PARTS.get(found[3], found[3])
    target = f"{found[1]}.{'w2' if part == 'w2' else 'w13'}_{found[4]}"
    if target not in parameters:
        raise ValueError(f"{name} has no place in SGLang's model ({target})")
    given = parameters[target], tensor, target
    parameters[target].weight_loader(*given, shard_id=part, expert_id=int(found[2]))
    return target


def _load_experts(
    name: str, found: re.Match[str], tensor: torch.Tensor, parameter: Any, neurons: int | None
) -> None:
    """Loads all experts' tensor of a projection, which is a track's, or has all of so many neurons,
    of which it takes this rank's: weights (experts, inputs, outputs), a bias (experts, outputs), or
    MXFP4's blocks (experts, outputs, blocks of inputs, bytes) and their scales."""
    projection, kept = found.groups()
    is_bias, experts = kept.endswith("bias"), parameter.weight_loader.__self__
    load_own_neurons(experts)
    is_quantised = experts.quant_config is not None
    if tensor.dim() > 2:
        tensor = tensor.flatten(2) if is_quantised else tensor.mT
    axis = 1 if projection == "w13" else tensor.dim() - 1
    parallel = get_parallel()
    if neurons is not None and is_bias and projection == "w2":  # which is added once
        tensor = tensor if parallel.tp_rank == 0 else torch.zeros_like(tensor)
    elif neurons is not None:
        block = MXFP4_BLOCK if is_quantised else 1
        own = math.ceil(neurons / block / parallel.tp_size) * block
        start, stop = (
            min(rank * own, neurons) for rank in (parallel.tp_rank, parallel.tp_rank + 1)
        )
        size = tensor.shape[axis]
        start, stop = size * start // neurons, size * stop // neurons
        tensor = tensor.narrow(axis, start, stop - start)
    if is_quantised:
        if tensor.shape[axis] > (room := parameter.shape[axis]):
            raise ValueError(
                f"{name} has {tensor.shape[axis]} of what SGLang's kernel has room for {room}: "
                "shares are unequal; take another --moe-runner-backend"
            )
        parameter.weight_loader(parameter, tensor, found[0], shard_id=None, expert_id=None)
        return
    if not is_bias and experts.use_triton_kernels:  # which have them as transformers does
        tensor = tensor.mT
    parameter.weight_loader(parameter, tensor, found[0], shard_id=projection)
