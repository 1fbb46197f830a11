"""Converted checkpoints in SGLang: the plugin, the model, and what counts its collectives.

Everything but this module, what isn't served, and the lists of families and of formats imports
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ptconvert.engines import ServingEngine
from ptconvert.engines.sglang.refusals import unserved

if TYPE_CHECKING:
    from ptconvert.engines.sglang.families import Served


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
    opened = "sglang.srt.utils.hf_transformers.config.get_hf_text_config"
    HookRegistry.register(opened, _as_read, HookType.BEFORE)
    for derives in ("_derive_model_shapes", "_derive_hybrid_model"):
        where = f"sglang.srt.configs.model_config.ModelConfig.{derives}"
        HookRegistry.register(where, _as_known, HookType.AROUND)


def _register_model(registry: Any, architectures: Any) -> None:
    """Before SGLang looks the model class of an architecture up, or of the first of some."""
    from ptconvert.modeling.model import MODELS

    names = [architectures] if isinstance(architectures, str) else architectures or []
    if not {model.__name__ for model in MODELS.values()}.isdisjoint(names):
        from ptconvert.engines.sglang.model import PTConvertForCausalLM

        registry.models.update(dict.fromkeys(names, PTConvertForCausalLM))


def _served(config: Any) -> Served | None:
    """How SGLang serves the family of a converted checkpoint; None of others."""
    from ptconvert.engines.sglang.families import SERVED
    from ptconvert.models.families import MODEL_TYPE_PREFIX

    model_type = getattr(config, "model_type", None) or ""  # of any model that SGLang opens
    _, converted, family = model_type.partition(MODEL_TYPE_PREFIX)
    return SERVED.get(family) if converted else None


def _as_read(config: Any) -> None:
    """Before SGLang reads a config, at first: sizes of both kinds of layers as it has Gemma 4's,
    and states as it has those of models with linear attention."""
    served = _served(config)
    if served is not None and served.by_kind and not hasattr(config, "swa_num_key_value_heads"):
        from sglang.srt.utils.hf_transformers.config import _apply_gemma4_attention_overrides

        _apply_gemma4_attention_overrides(SimpleNamespace(text_config=config))
    if served is not None and served.linear is not None:
        from ptconvert.engines.sglang.states import tell

        tell(type(config))


def _as_known(derive: Callable[[Any], None], model_config: Any) -> None:
    """Derives what a cache holds, which SGLang knows by names of its own models where that is not
    as many heads in all layers. States are of the dtype that the model is served in."""
    config = model_config.hf_config
    served, named = _served(config), config.architectures
    if served is not None and served.linear is not None:
        config.dtype = model_config.dtype
    if served is not None and served.known_as is not None:
        config.architectures = [served.known_as]
    try:
        derive(model_config)
    finally:
        config.architectures = named


def _verify(path: Path, settings: Any, eager: bool) -> Any:
    from ptconvert.engines.sglang.verify import verify_in_sglang

    return verify_in_sglang(path, settings, eager)


ENGINE = ServingEngine("sglang", "pip install 'ptconvert[sglang]'", _verify, unserved=unserved)
