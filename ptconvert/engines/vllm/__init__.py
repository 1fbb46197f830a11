"""Converted checkpoints in vLLM: the plugin, the model, and what counts its collectives.

Everything but this module and the list of families imports vLLM, which is an extra:
`ptconvert[vllm]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptconvert.engines import ServingEngine

_MODEL = "ptconvert.engines.vllm.model:PTConvertForCausalLM"


def register() -> None:
    """Makes vLLM know converted checkpoints; the entry point `vllm.general_plugins`.

    vLLM calls it in every process that it starts, some of them more than once. It touches no
    device and imports no code of vLLM's models: vLLM imports the model class by its name when it
    needs it.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import ptconvert
    from ptconvert.engines.vllm.refusals import ServingConfig
    from ptconvert.modeling.model import MODELS

    ptconvert.register()
    for model in MODELS.values():
        ModelRegistry.register_model(model.__name__, _MODEL)
        MODELS_CONFIG_MAP[model.__name__] = ServingConfig


def _verify(path: Path, settings: Any, eager: bool) -> Any:
    from ptconvert.engines.vllm.verify import verify_in_vllm

    return verify_in_vllm(path, settings, eager)


ENGINE = ServingEngine("vllm", "pip install 'ptconvert[vllm]'", _verify)
