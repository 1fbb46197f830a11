"""The model in vLLM: one class for all families and schedules.

It walks the lowered schedule over vLLM's own layers. Shape suffixes: T tokens of all requests in
the batch, D the residual stream's width.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ptconvert.checkpoint.section import read_section, source_config
from ptconvert.engines.vllm.collectives import NO_LAUNCH, all_reduce_boundary
from ptconvert.engines.vllm.layers import WHOLE, ServedLayer, read_stream
from ptconvert.modeling.executor import PerTrack, add_partials, add_per_track
from ptconvert.modeling.layers import Placement
from ptconvert.models.shape import EMBEDDING, HEAD, ModelShape
from ptconvert.runtime.counters import BOUNDARY
from ptconvert.schedule.lower import Step, lower
from ptconvert.schedule.stages import Merge

# From a checkpoint's names to this model's; q, k, v and gate, up are stacked as in vLLM's Llama.
_NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.layers\.\d+)\.self_attn\.o_proj\.bias$"): r"\1.common.o_proj_bias",
        re.compile(r"^(model\.layers\.\d+)\.mlp\.down_proj\.bias$"): r"\1.common.down_proj_bias",
        re.compile(r"^(model\.layers\.\d+)\.tracks\."): r"\1.parts.",
        re.compile(
            r"^(model\.layers\.\d+)\.(?=self_attn|mlp|input_layernorm|post_attention_layernorm)"
        ): rf"\1.parts.{WHOLE}.",
    }
)
_TRACK = re.compile(r"\.tracks\.(\d+)\.")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class PTConvertModel(nn.Module):
    """The decoder without lm_head: the layers' parts of this rank, run by the schedule."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        section = read_section(vars(config), vllm_config.model_config.model)
        shape = ModelShape.from_config(source_config(config.to_dict(), section))
        ranks = get_tensor_model_parallel_world_size()
        self.program = lower(section.schedule)
        self.waiting_weight = 1 / section.tracks if section.deferred == "mean" else 1.0
        placement = Placement(get_tensor_model_parallel_rank(), ranks)
        self.local_tracks = placement.local_tracks(section.tracks)
        # On every rank whole: sharded, it would cost one more all-reduce per forward pass.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            prefix=maybe_prefix(prefix, "embed_tokens"),
            disable_tp=True,
        )
        tracked = section.schedule.track_layers
        self.layers = nn.ModuleList(
            ServedLayer(
                vllm_config,
                shape,
                index,
                self.local_tracks if index in tracked else None,
                section.tracks,
                {s.kind: rank for s, rank in section.guesses.items() if s.layer == index},
            )
            for index in range(shape.layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        _split_graphs_at_boundaries(self.program, vllm_config.compilation_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) ids to (tokens, width)."""
        embedded_TD: torch.Tensor = self.embed_tokens(input_ids)
        return embedded_TD

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The normed stream after the last stage, (tokens, width), the same on every rank."""
        base_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        merged_TD: torch.Tensor | None = None  # all-reduced; the next norm adds it to base_TD
        waiting: PerTrack | None = None  # deferred partials
        guessed: PerTrack | None = None  # of the others' deferred partials
        seen: dict[int, PerTrack] = {}  # partials in flight that their own tracks see, and guesses
        for step in self.program:
            own = waiting if guessed is None else add_per_track(waiting, guessed)
            for stage in step.sees:
                own = add_per_track(own, seen[stage])
            partials: PerTrack | None = None
            for sublayer in step.sublayers:
                layer: Any = self.layers[sublayer.layer]
                norms = layer.norms(sublayer.kind)
                normed, base_TD = read_stream(norms, base_TD, merged_TD, own)
                merged_TD = None
                outputs = layer.run(sublayer.kind, normed, positions)
                partials = add_partials(partials, outputs)
                guess = layer.guess(sublayer.kind, normed, outputs) if step.keeps_own else None
                if guess is not None:
                    guessed = add_per_track(guessed, guess)
            assert partials is not None
            pending = add_partials(waiting, partials)
            if step.ending is Merge.DEFERRED:
                local_TD, waiting = partials[-1], pending
            else:
                local_TD, waiting = self._local_sum(waiting, partials), None
            if step.ending is Merge.OWN_SEEN:
                seen[step.index] = pending if guessed is None else add_per_track(pending, guessed)
            if step.ending is not Merge.DEFERRED:
                guessed = None
            merged_TD = self._cross(step, local_TD)
            seen = {stage: parts for stage, parts in seen.items() if stage not in step.merged}
        return read_stream([self.norm], base_TD, merged_TD, None)[0][0]

    def _local_sum(self, waiting: PerTrack | None, partials: PerTrack) -> torch.Tensor:
        """What this rank gives to an all-reduce: its tracks' partials, and those that waited."""
        if waiting is not None and self.waiting_weight != 1.0:
            waiting = [p_TD * self.waiting_weight for p_TD in waiting]
        return functools.reduce(operator.add, add_partials(waiting, partials))

    def _cross(self, step: Step, local_TD: torch.Tensor) -> torch.Tensor | None:
        """The boundary after a stage: all-reduces, and the sum of what is merged here."""
        merged_TD: torch.Tensor | None = None
        if step.boundary:
            launch = step.index if step.ending.overlapped else NO_LAUNCH
            merged_TD = all_reduce_boundary(local_TD, launch, list(step.merged))
        if step.ending is Merge.BLOCKING:
            reduced_TD = tensor_model_parallel_all_reduce(local_TD)
            merged_TD = reduced_TD if merged_TD is None else merged_TD + reduced_TD
        for sublayer in step.counted:
            layer: Any = self.layers[sublayer.layer]
            bias_D = layer.common_bias(sublayer.kind)
            if bias_D is not None:
                assert merged_TD is not None
                merged_TD = merged_TD + bias_D
        return merged_TD


class PTConvertForCausalLM(nn.Module):
    """A converted causal language model; its config decides family and schedule."""

    hf_to_vllm_mapper = _NAMES | LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = PTConvertModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) ids to (tokens, width)."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's models; `intermediate_tensors`, of pipeline parallelism, are never given."""
        assert intermediate_tensors is None
        hidden_TD: torch.Tensor = self.model(input_ids, positions, inputs_embeds)
        return hidden_TD

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits, gathered from the ranks' shards of lm_head."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Whether a tensor isn't for this rank's model: vLLM doesn't read files of only such.

        Other ranks' tracks are not, nor what an assignment says about where units came from.
        """
        track = _TRACK.search(name)
        others = track is not None and int(track[1]) not in self.model.local_tracks
        return others or ".assignment." in name

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads this rank's tensors; returns the names of the parameters that were filled."""
        loader = AutoWeightsLoader(self)
        loaded: set[str] = loader.load_weights(self._own(weights), mapper=self.hf_to_vllm_mapper)
        return loaded

    def _own(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's tensors. A tied lm_head is a shard of the embedding, which is whole here,
        and so is loaded beside it; one that is stored is itself, whatever the config says."""
        tied = self.config.tie_word_embeddings
        for name, tensor in weights:
            if self.is_unused_checkpoint_weight(name):
                continue
            tied = tied and name != HEAD
            yield name, tensor
            if tied and name == EMBEDDING:
                yield HEAD, tensor


def _split_graphs_at_boundaries(program: tuple[Step, ...], compilation: Any) -> None:
    """Makes asynchronous boundaries run between piecewise CUDA graphs instead of inside of them.

    A piece ends at each attention and can't end with an all-reduce in flight. (Full CUDA graphs,
    which vLLM takes for decoding where it can, capture boundaries with everything else.)
    """
    operations = compilation.splitting_ops
    if operations and BOUNDARY not in operations and any(step.boundary for step in program):
        operations.append(BOUNDARY)
