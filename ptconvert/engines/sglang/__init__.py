"""Converted checkpoints in SGLang: the plugin, the model, and what counts its collectives.

Everything but this module and the list of families imports SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptconvert.engines import ServingEngine


def register() -> None:
    """Makes SGLang know converted checkpoints; the entry point `sglang.srt.plugins`.

    SGLang calls it in every process that it starts, before it knows which model it runs. So it
    imports no code of SGLang's models: that comes with the first converted one that is looked up.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    import ptconvert

    ptconvert.register()
    for lookup in ("is_arch_supported", "resolve_model_cls"):
        where = f"sglang.srt.models.registry._ModelRegistry.{lookup}"
        HookRegistry.register(where, _register_model, HookType.BEFORE)
    shapes = "sglang.srt.configs.model_config.ModelConfig._derive_model_shapes"
    HookRegistry.register(shapes, _with_latents, HookType.AROUND)


def _register_model(registry: Any, architectures: Any) -> None:
    """Before SGLang looks the model class of an architecture up, or of the first of some."""
    from ptconvert.modeling.model import MODELS

    names = [architectures] if isinstance(architectures, str) else architectures or []
    if not {model.__name__ for model in MODELS.values()}.isdisjoint(names):
        from ptconvert.engines.sglang.model import PTConvertForCausalLM

        registry.models.update(dict.fromkeys(names, PTConvertForCausalLM))


def _with_latents(derive: Callable[[Any], None], model_config: Any) -> None:
    """Derives what a cache holds, which of latents SGLang knows by names of its own models only."""
    from ptconvert.engines.sglang.families import SERVED
    from ptconvert.models.families import MODEL_TYPE_PREFIX

    config = model_config.hf_config
    _, converted, family = config.model_type.partition(MODEL_TYPE_PREFIX)
    named = config.architectures
    if converted and family in SERVED and SERVED[family].latent:
        config.architectures = [SERVED[family].latent]
    derive(model_config)
    config.architectures = named


def _verify(path: Path, settings: Any, eager: bool) -> Any:
    from ptconvert.engines.sglang.verify import verify_in_sglang

    return verify_in_sglang(path, settings, eager)


ENGINE = ServingEngine("sglang", "pip install 'ptconvert[sglang]'", _verify)
