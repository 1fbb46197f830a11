"""What Gemma 4's config.json says of its layers, in keys of its own."""

from __future__ import annotations

from collections.abc import Mapping

from ptconvert.errors import ConfigError

FULL_EVERY = 6  # by default; the last is full whatever the config says
_BY_LAYER = "per_layer_config"
# Of layers with full attention; the others have the sizes that all families have.
_KV_HEADS = "num_global_key_value_heads"
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": _KV_HEADS}
_DEFAULT_HEAD_SIZE = 512


def gemma4_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """A config with the sizes of full attention under the keys that published ones have; saved by
    transformers, it says them layer by layer. Raises ConfigError where these differ otherwise."""
    if _BY_LAYER not in config:
        own = config.get(_KV_HEADS) if config.get("attention_k_eq_v") else None
        own = config.get("num_key_value_heads") if own is None else own
        return _with({"global_head_dim": _DEFAULT_HEAD_SIZE, **config}, _KV_HEADS, own)
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
        fits = fits and (not of or of == dict.fromkeys(_full(config), found[under]))
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


def _full(config: Mapping[str, object]) -> list[int]:
    """The layers with full attention."""
    layers, kinds = config.get("num_hidden_layers"), config.get("layer_types")
    count = layers if type(layers) is int else 0
    if isinstance(kinds, list):
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    else:
        full = [*range(FULL_EVERY - 1, count, FULL_EVERY)]
    return sorted({*full, count - 1}) if count else full
