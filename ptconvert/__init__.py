"""ptconvert: dense transformer checkpoints into Parallel Track and Ladder architectures.

Importing it makes transformers' Auto classes open converted checkpoints. It imports neither
transformers nor torch for that, so the command line starts fast and the transform needs neither.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX, own_name
from ptconvert.models.wrappers import WRAPPERS

__version__ = "0.1.0"

_CLASSES = {name: f.classes for name, f in FAMILIES.items()}
_CLASSES |= {name: w.classes for name, w in WRAPPERS.items()}
_CONFIG_NAMES = {
    MODEL_TYPE_PREFIX + name: own_name(classes["AutoConfig"]) for name, classes in _CLASSES.items()
}


def register() -> None:
    """Registers the config, tokenizer and model classes with transformers' Auto classes.

    Opening a converted checkpoint does this by itself; `AutoModelForCausalLM.from_config` with a
    config made by hand needs it called.
    """
    from transformers import AutoConfig

    from ptconvert.modeling.config import register_layouts, register_tokenizers
    from ptconvert.modeling.tasks import AUTO_CLASSES

    register_layouts()
    register_tokenizers()
    for auto, model in AUTO_CLASSES:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        auto.register(model.config_class, model, exist_ok=True)


def _deferred(model_type: str, name: str) -> type:
    """A stand-in for a config class, which takes its place the first time it is used.

    The class itself can't be imported while transformers is: its modules import each other in
    circles, and which comes first depends on what the user imports.
    """

    def real() -> Any:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        register()
        return CONFIG_MAPPING[model_type]

    methods = {
        "__new__": lambda _, *args, **kwargs: real()(*args, **kwargs),
        "from_dict": classmethod(lambda _, *args, **kwargs: real().from_dict(*args, **kwargs)),
        "from_pretrained": classmethod(
            lambda _, *args, **kwargs: real().from_pretrained(*args, **kwargs)
        ),
        "model_type": model_type,
        "__module__": __name__,
    }
    return type(name, (), methods)


def _announce(auto: ModuleType) -> None:
    for model_type, name in _CONFIG_NAMES.items():
        auto.CONFIG_MAPPING.register(model_type, _deferred(model_type, name), exist_ok=True)


def _announce_to_peft(constants: ModuleType) -> None:
    """Gives converted models the source family's rows in peft's tables of modules to adapt."""
    for table in vars(constants).values():
        for model_type in _CONFIG_NAMES if isinstance(table, dict) else ():
            family = model_type.removeprefix(MODEL_TYPE_PREFIX)
            if family in table:
                table[model_type] = table[family]


wrapt.register_post_import_hook(_announce_to_peft, "peft.utils.constants")
wrapt.register_post_import_hook(_announce, "transformers.models.auto.configuration_auto")
