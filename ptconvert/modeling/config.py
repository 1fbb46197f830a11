"""Config classes: transformers' own with one more field, the `ptconvert` section."""

from __future__ import annotations

from typing import Any

from transformers import conversion_mapping
from transformers.models.auto import tokenization_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX, own_name
from ptconvert.models.wrappers import WRAPPERS


def _config_class(model_type: str) -> Any:
    base = CONFIG_MAPPING[model_type]

    def from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # a source's too, which says a schedule by a key of others: its tensors' layout goes by this
        own = {**config_dict, "model_type": cls.model_type}
        return base.from_dict.__func__(cls, own, **kwargs)

    members = {
        "__doc__": f"{base.__name__} with a schedule.",
        "__module__": __name__,
        "__annotations__": {"ptconvert": dict[str, Any] | None},
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "ptconvert": None,
        "from_dict": classmethod(from_dict),
        "base_model_tp_plan": None,  # `Placement` says which rank holds what
    }
    return type(own_name(base.__name__), (base,), members)


CONFIGS = {model_type: _config_class(model_type) for model_type in (*FAMILIES, *WRAPPERS)}
# by name, for pickle and for a checkpoint's auto_map
globals().update({config_class.__name__: config_class for config_class in CONFIGS.values()})


def register_layouts() -> None:
    """Makes transformers open converted checkpoints that hold experts apart, which it has fused in
    memory, as it opens their sources; and save them so."""
    for name, config_class in CONFIGS.items():
        if name in FAMILIES and not FAMILIES[name].experts:
            continue
        text = name if name in FAMILIES else "qwen3_moe"  # whose names all that are wrapped have
        of_source = conversion_mapping.get_checkpoint_conversion_mapping(text) or ()
        # but what finds a language model in the checkpoint of a whole one
        mapping = [m for m in of_source if type(m).__name__ != "PrefixChange"]
        conversion_mapping.register_checkpoint_conversion_mapping(
            config_class.model_type, mapping, overwrite=True
        )


def register_tokenizers() -> None:
    """Makes AutoTokenizer choose the class for a converted checkpoint that it chooses for the
    source: it goes by the config's class and model_type, of which ours are given the same rows."""
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    # whose tokenizer_config.json transformers overrules
    overruled: set[str] = getattr(
        tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set()
    )
    mapping = tokenization_auto.TOKENIZER_MAPPING
    for config_class in CONFIGS.values():
        source = config_class.__base__
        if source.model_type in names:
            names[config_class.model_type] = names[source.model_type]
        if source.model_type in overruled:
            overruled.add(config_class.model_type)
        if (tokenizer_class := mapping.get(source, None)) is not None:
            mapping.register(config_class, tokenizer_class, exist_ok=True)
