"""What Gemma 4's config.json says of its layers, in keys of its own."""

from __future__ import annotations

from collections.abc import Mapping

# Of layers with full attention; the others have the sizes that all families have.
_HEAD_SIZE, _KV_HEADS = "global_head_dim", "num_global_key_value_heads"
_DEFAULT_HEAD_SIZE = 512


def gemma4_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """A config with the sizes of full attention under the keys that published ones have; saved by
    transformers, it says them layer by layer."""
    by_layer = config.get("per_layer_config")
    if isinstance(by_layer, Mapping):
        layers = [own for own in by_layer.values() if isinstance(own, Mapping)]
        head_sizes, kv_heads = (
            [own.get(key, config.get(key)) for own in layers or [config]]
            for key in ("head_dim", "num_key_value_heads")
        )
        # transformers writes the same of each; where they differ there is no such size
        found = {_HEAD_SIZE: head_sizes, _KV_HEADS: kv_heads}
        return {**config, **{k: v[0] if v == v[:1] * len(v) else v for k, v in found.items()}}
    own = config.get(_KV_HEADS) if config.get("attention_k_eq_v") else None
    return {
        _HEAD_SIZE: _DEFAULT_HEAD_SIZE,
        **config,
        _KV_HEADS: config.get("num_key_value_heads") if own is None else own,
    }
