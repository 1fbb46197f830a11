"""States of linear attention in SGLang, which has them in a pool beside the cache of keys and
values: it asks the config for their sizes, and knows by classes of configs whose model has some.

Such a layer (Gated DeltaNet, arXiv 2412.06464) keeps of each request a state of one size: the last
inputs of its convolution, and a matrix for each value head. A rank keeps those of its own track, or
of its heads of a layer held dense, which are as many.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.linear_attn_model_registry import (
    LinearAttnModelSpec,
    register_linear_attn_model,
)
from sglang.srt.configs.mamba_utils import (
    Mamba2CacheParams,
    Mamba2StateShape,
    mamba2_state_dtype,
)
from sglang.srt.runtime_context import linear_attn_tp_size

from ptconvert.models.families import FULL, LINEAR

BACKEND = "sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend"


def tell(config_class: Any) -> None:
    """Makes SGLang know such a model by the class of its config, and ask that as its own ones."""
    if hasattr(config_class, "mamba2_cache_params"):
        return
    config_class.full_attention_layer_ids = property(lambda config: _layers(config, FULL))
    config_class.mamba2_cache_params = property(_params)
    spec = LinearAttnModelSpec(
        config_class=config_class,
        backend_class_name=BACKEND,
        support_mamba_cache_extra_buffer=True,  # as its own models with this backend
    )
    register_linear_attn_model(spec)


def _layers(config: Any, kind: str) -> list[int]:
    return [index for index, of in enumerate(config.layer_types) if of == kind]


def _params(config: Any) -> Any:
    """What a rank keeps of each request, as SGLang's own configs say it."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    shape = Mamba2StateShape.create(
        tp_world_size=linear_attn_tp_size(),
        intermediate_size=values,
        n_groups=config.linear_num_key_heads,
        num_heads=config.linear_num_value_heads,
        head_dim=config.linear_value_head_dim,
        state_size=config.linear_key_head_dim,
        conv_kernel=config.linear_conv_kernel_dim,
        conv_shard_groups=[keys, keys, values],
    )
    # of the convolution in what the model is served in, where SGLang has bfloat16 if not told
    dtype = replace(mamba2_state_dtype(config), conv=config.dtype)
    return Mamba2CacheParams(shape=shape, layers=_layers(config, LINEAR), dtype=dtype)
