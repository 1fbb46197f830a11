"""Models in vLLM some of whose layers have linear attention: what vLLM asks of their class.

Such a layer (Gated DeltaNet, arXiv 2412.06464) keeps of each request a state of one size: the last
inputs of its convolution, and a matrix for each value head. A rank keeps those of its own tracks.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from ptconvert.checkpoint.section import source_config
from ptconvert.engines.vllm.model import PTConvertForCausalLM
from ptconvert.modeling.model import section_of
from ptconvert.models.shape import ModelShape


class LinearStates:
    """What vLLM asks of the class of a model with such layers."""

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: Any
    ) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Of the convolution and of the matrices, of the largest state that a layer has on a rank:
        that of a rank's heads where one is held dense, else that of a track's.

        vLLM makes pages of its cache as large as this; each layer says for itself what it keeps.
        """
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        section = section_of(config, vllm_config.model_config.model)
        shape = ModelShape.from_config(source_config(config.to_dict(), section))
        linear = set(filter(shape.is_linear, range(shape.layers)))
        tracked = linear <= section.schedule.track_layers
        parts = section.tracks if tracked else parallel.tensor_parallel_size
        shapes: tuple[tuple[int, int], tuple[int, int, int]]
        shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
            parts,
            shape.linear_key_heads,
            shape.linear_value_heads,
            shape.linear_key_size,
            shape.linear_value_size,
            shape.linear_taps,
        )
        return shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, torch.dtype]:
        """Of the convolution and of the matrices."""
        cache = vllm_config.cache_config
        dtypes: tuple[torch.dtype, torch.dtype]
        dtypes = MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )
        return dtypes

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How each is copied from one block of the cache to another, for prefixes."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


class PTConvertHybridForCausalLM(LinearStates, PTConvertForCausalLM, HasInnerState, IsHybrid):  # type: ignore[misc]
    """A converted causal language model with linear attention and attention over all tokens."""
