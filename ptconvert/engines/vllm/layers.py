"""Layers as the model calls them: vLLM's own decoder layers of the model's family.

A layer held dense is built as vLLM builds it for a tensor-parallel rank, a track as such a rank's
shard would be. Only two things are taken out of them, because the schedule decides about them: the
all-reduce after an output projection, and its bias. Shape suffixes: T tokens, D stream width.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from vllm import ir
from vllm.distributed import parallel_state
from vllm.model_executor.models import ModelRegistry

from ptconvert.engines.vllm.collectives import finished
from ptconvert.errors import ConfigError
from ptconvert.modeling.executor import PerTrack
from ptconvert.modeling.layers import OUTPUT_PROJECTIONS, guess_modules
from ptconvert.modeling.model import layer_types
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.stages import Kind

WHOLE = "whole"  # the only part of a layer held dense, where others have tracks
_NORMS = {Kind.ATTENTION: "input_layernorm", Kind.MLP: "post_attention_layernorm"}


class ServedLayer(nn.Module):
    """One layer as a rank holds it: its tracks, or its shard of a layer held dense.

    `tracks` are the rank's own (global numbers), None for a layer held dense; `count` are all.
    `guesses` are the ranks of the tracks' guesses, for the sublayers that have one.
    """

    def __init__(
        self,
        vllm_config: Any,
        shape: ModelShape,
        index: int,
        tracks: range | None,
        count: int,
        guesses: Mapping[Kind, int],
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.parts = nn.ModuleDict()
        if tracks is None:
            self.parts[WHOLE] = _decoder_layer(vllm_config, shape, f"model.layers.{index}")
        for track in tracks or ():
            with _as_shard_of(count):
                prefix = f"model.track{track}.layers.{index}"  # one number, for vLLM to find
                part: Any = _decoder_layer(vllm_config, shape, prefix)
            if guesses:
                part.guess = guess_modules(shape.width, guesses)
            self.parts[str(track)] = part
        biased = {rule.name for rule in shape.rules}
        self.common = nn.ParameterDict()  # output biases, which all ranks know
        for block, projection in OUTPUT_PROJECTIONS.values():
            for part in self.parts.values():
                linear = getattr(getattr(part, block), projection)
                linear.reduce_results = False
                linear.register_parameter("bias", None)
            if f"{block}.{projection}.bias" in biased:
                bias = nn.Parameter(torch.zeros(shape.width), requires_grad=False)
                self.common[f"{projection}_bias"] = bias
        self._check_window(config, index)

    def _check_window(self, config: Any, index: int) -> None:
        """vLLM's class for the family must attend as far as transformers' does."""
        windowed = layer_types(config)[index] == "sliding_attention"
        wanted = config.sliding_window if windowed else None
        for part in self.parts.values():
            attention: Any = part.self_attn
            if attention.attn.sliding_window != wanted:
                raise ConfigError(
                    f"layer {index} attends to {wanted or 'all'} tokens, but vLLM's "
                    f"{type(part).__name__} would to {attention.attn.sliding_window or 'all'}"
                )

    def norms(self, kind: Kind) -> list[Any]:
        """The norm before the attention or the MLP, for each part."""
        return [getattr(part, _NORMS[kind]) for part in self.parts.values()]

    def run(self, kind: Kind, normed: Sequence[torch.Tensor], positions_T: Any) -> PerTrack:
        """Each part's partial of the attention or the MLP, from its own normed input."""
        parts: Any = list(self.parts.values())
        if kind is Kind.MLP:
            return [finished(part.mlp(x_TD)) for part, x_TD in zip(parts, normed, strict=True)]
        return [
            finished(part.self_attn(positions=positions_T, hidden_states=x_TD))
            for part, x_TD in zip(parts, normed, strict=True)
        ]

    def guess(
        self, kind: Kind, normed: Sequence[torch.Tensor], partials: PerTrack
    ) -> PerTrack | None:
        """Each track's guess of all others' partials, where the layer has guesses of this kind."""
        block = OUTPUT_PROJECTIONS[kind][0]
        parts: list[Any] = list(self.parts.values())
        if block not in getattr(parts[0], "guess", ()):
            return None
        return [
            part.guess[block](x_TD, partial_TD)
            for part, x_TD, partial_TD in zip(parts, normed, partials, strict=True)
        ]

    def common_bias(self, kind: Kind) -> torch.Tensor | None:
        """The output bias of the attention or the MLP, (width,)."""
        bias: torch.Tensor | None = self.common.get(f"{OUTPUT_PROJECTIONS[kind][1]}_bias", None)
        return bias


def read_stream(
    norms: Sequence[Any],
    base_TD: torch.Tensor,
    merged_TD: torch.Tensor | None,
    own: PerTrack | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each part's sublayer reads, normed, and the stream with `merged_TD` added.

    `own` is what each track adds to the stream for itself only. Sums happen inside the fused
    add-and-norm, as in vLLM's models. Both tensors given to it are overwritten, except where a
    track's own view of the stream is normed: others still need the stream then.
    """
    if own is None:
        if merged_TD is None:
            return [norm(base_TD) for norm in norms], base_TD
        first_TD, base_TD = norms[0](merged_TD, base_TD)
        return [first_TD, *(norm(base_TD) for norm in norms[1:])], base_TD
    if merged_TD is not None:
        base_TD = base_TD + merged_TD
    return [_norm_of_sum(n, own[t % len(own)], base_TD) for t, n in enumerate(norms)], base_TD


def _norm_of_sum(norm: Any, own_TD: torch.Tensor, base_TD: torch.Tensor) -> torch.Tensor:
    add_norm = ir.ops.fused_add_rms_norm  # the functional form: it overwrites nothing
    normed_TD: torch.Tensor
    normed_TD, _ = add_norm(own_TD, base_TD, norm.weight.data, norm.variance_epsilon)
    return normed_TD


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


def _decoder_layer(vllm_config: Any, shape: ModelShape, prefix: str) -> nn.Module:
    """The family's decoder layer; families differ in which of these arguments they take."""
    causal_lm = ModelRegistry.models[shape.family.causal_lm].load_model_cls()
    name = shape.family.causal_lm.removesuffix("ForCausalLM") + "DecoderLayer"
    layer_class = getattr(sys.modules[causal_lm.__module__], name)
    given = {
        "vllm_config": vllm_config,
        "config": vllm_config.model_config.hf_config,
        "cache_config": vllm_config.cache_config,
        "quant_config": None,
        "prefix": prefix,
    }
    taken = inspect.signature(layer_class).parameters
    layer: nn.Module = layer_class(**{k: v for k, v in given.items() if k in taken})
    return layer
