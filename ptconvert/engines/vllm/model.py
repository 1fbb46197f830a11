"""The model in vLLM: one class for all schedules (and in hybrid.py what linear attention adds).

The executor walks the lowered schedule over vLLM's own layers. Shape suffixes: T tokens of all
requests in the batch, D the residual stream's width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ptconvert.checkpoint.reader import read_adapter
from ptconvert.checkpoint.section import source_config
from ptconvert.engines.base import ServedPass, is_for_others, own_weights, renamed, served_layers
from ptconvert.engines.vllm.adapters import add_adapter
from ptconvert.engines.vllm.collectives import open_communicator
from ptconvert.engines.vllm.layers import VLLMServing
from ptconvert.engines.vllm.quantised import check_loaded
from ptconvert.engines.vllm.refusals import replicates_head
from ptconvert.modeling.layers import Placement
from ptconvert.modeling.model import section_of
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.counters import BOUNDARY


# (positions of pictures have three axes, the tokens last)
@support_torch_compile(
    dynamic_arg_dims={
        **{"input_ids": 0, "positions": -1, "inputs_embeds": 0},
        "deepstack_input_embeds": 0,
    }
)
class PTConvertModel(nn.Module):
    """The decoder without lm_head: the layers' parts of this rank, run by the schedule."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        whole, config = vllm_config.model_config.hf_config, vllm_config.model_config.hf_text_config
        section = section_of(whole, vllm_config.model_config.model)
        shape = ModelShape.from_config(source_config(whole.to_dict(), section))
        self.shape = shape
        ranks = get_tensor_model_parallel_world_size()
        self.program = section.schedule.program
        self.waiting_weight, self.has_adapter = section.waiting_weight, section.adapter
        placement = Placement(get_tensor_model_parallel_rank(), ranks)
        self.local_tracks = placement.local_tracks(section.tracks)
        self.tracked = section.schedule.track_layers
        # On every rank whole: sharded, it would cost one more all-reduce per forward pass.
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            prefix=maybe_prefix(prefix, "embed_tokens"),
            disable_tp=True,
        )
        self.renamed = renamed(shape.family)
        self.serving = VLLMServing(vllm_config, shape, section, prefix)
        dtype = vllm_config.model_config.dtype
        self.embeds_scale = self.serving.computed.embeds_scale(config, dtype)
        self.layers = served_layers(self.serving, section, shape, config, self.local_tracks)
        layer: Any
        for index, layer in enumerate(self.layers):
            self.serving.check(index, layer.parts.values(), shape.rules_of(index))
        self.norm = self.serving.final_norm(self.layers[0])
        if any(step.overlapped for step in self.program):
            open_communicator()
            _split_graphs_at_boundaries(vllm_config.compilation_config)

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """(tokens,) ids to (tokens, width)."""
        embedded_TD: torch.Tensor = self.embed_tokens(input_ids)
        return embedded_TD if self.embeds_scale is None else embedded_TD * self.embeds_scale

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        per_layer_inputs: None = None,
        deepstack_input_embeds: Any = None,
    ) -> torch.Tensor:
        """The normed stream after the last stage, (tokens, width), the same on every rank; of
        pipelines, and of what layers are given beside the stream, there is nothing. Qwen3-VL's
        tower has more that joins the stream after the first layers, vLLM's tensors by name."""
        assert intermediate_tensors is per_layer_inputs is None
        seen = deepstack_input_embeds or {}
        base_TD = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        one_pass = ServedPass(self.serving, self.layers, positions)
        joining = [seen[f"deepstack_input_embeds_{layer}"] for layer in range(len(seen))]
        return one_pass.decode(self.program, base_TD, self.norm, self.waiting_weight, joining)


class PTConvertForCausalLM(nn.Module):
    """A converted causal language model; its config decides family and schedule."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        config = vllm_config.model_config.hf_text_config
        self.model = PTConvertModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.quant_config, self._dtype = vllm_config.quant_config, vllm_config.model_config.dtype
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
            disable_tp=replicates_head(vllm_config),
        )
        self.hf_to_vllm_mapper = (
            WeightsMapper(orig_to_new_regex=self.model.renamed) | self.model.serving.mapper
        )
        computed = self.model.serving.computed
        self.logits_processor = LogitsProcessor(
            config.vocab_size,
            scale=computed.logits_scale(config),
            soft_cap=computed.logits_cap(config),
        )

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
        """As vLLM's models."""
        hidden_TD: torch.Tensor
        hidden_TD = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden_TD

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits, gathered from the ranks' shards of lm_head, if it is cut."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Whether a tensor isn't for this rank's model: vLLM doesn't read files of only such."""
        return is_for_others(name, self.model.local_tracks, self.model.shape)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads this rank's tensors; returns the names of the parameters that were filled."""
        model = self.model
        own = own_weights(weights, model.local_tracks, model.shape, model.tracked)
        loader = AutoWeightsLoader(self)
        loaded: set[str] = loader.load_weights(own, mapper=self.hf_to_vllm_mapper)
        check_loaded(self, loaded)
        if model.has_adapter:
            adapter = read_adapter(Path(self.config.ptconvert_adapter))
            mapper = self.hf_to_vllm_mapper
            add_adapter(self, adapter, mapper, model.local_tracks, model.shape, self._dtype)
        return loaded


def _split_graphs_at_boundaries(compilation: Any) -> None:
    """Makes asynchronous boundaries run between piecewise CUDA graphs instead of inside of them.

    A piece ends at each attention and can't end with an all-reduce in flight. (Full CUDA graphs,
    which vLLM takes for decoding where it can, capture boundaries with everything else.)
    """
    operations = compilation.splitting_ops
    if operations and BOUNDARY not in operations:
        operations.append(BOUNDARY)
