"""What Gemma 4's config.json says of its layers, in keys of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptconvert.errors import ConfigError

_BY_LAYER = "per_layer_config"
# Of layers with full attention; the others have the sizes that all families have.
_GLOBAL_KV_HEADS = "num_global_key_value_heads"
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": _GLOBAL_KV_HEADS}
_DEFAULT_HEAD_SIZE = 512


def gemma4_config(config: Mapping[str, object], full: Sequence[int]) -> Mapping[str, object]:
    """A config with the sizes of full attention under the keys that published ones have; saved by
    transformers, it says them layer by layer. `full` are the layers with full attention. Raises
    ConfigError where sizes differ otherwise."""
    if _BY_LAYER not in config:
        own = config.get(_GLOBAL_KV_HEADS) if config.get("attention_k_eq_v") else None
        own = config.get("num_key_value_heads") if own is None else own
        return _with({"global_head_dim": _DEFAULT_HEAD_SIZE, **config}, _GLOBAL_KV_HEADS, own)
    given = {} if config[_BY_LAYER] is None else config[_BY_LAYER]
    by_layer = dict[int, Mapping[str, object]]()
    fits = isinstance(given, Mapping)
    for layer, own in given.items() if isinstance(given, Mapping) else ():
        if str(layer).isdecimal() and isinstance(own, Mapping) and own.keys() <= _GLOBAL.keys():
            by_layer[int(layer)] = own
        else:
            fits = False
    found: dict[str, object] = {}
    for key, under in _GLOBAL.items():
        whole = config.get(key)
        of = {
            layer: size for layer, own in by_layer.items() if (size := own.get(key, whole)) != whole
        }
        found[under] = next(iter(of.values()), whole)
        fits = fits and (not of or of == dict.fromkeys(full, found[under]))
    if not fits:
        raise ConfigError(
            f"{_BY_LAYER} must give all layers with full attention the same head_dim and "
            "num_key_value_heads, and no others anything else than the rest of the config"
        )
    for under, size in found.items():
        config = _with(config, under, size)
    return config


def _with(config: Mapping[str, object], key: str, size: object) -> Mapping[str, object]:
    """A config with a size, or without where none is given: then its default is that of all."""
    others = {name: value for name, value in config.items() if name != key}
    return others if size is None else {**others, key: size}
