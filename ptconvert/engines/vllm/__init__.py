"""Converted checkpoints in vLLM: the plugin, the model, and what counts its collectives.

Everything but this module, what isn't served of checkpoints, and the lists of families and of
formats imports vLLM, which is an extra: `ptconvert[vllm]`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ptconvert.engines import ServingEngine
from ptconvert.engines.vllm.checkpoints import unserved

VERSIONS = ("0.32", "0.33")  # that the plugin was run with
_MODEL = "ptconvert.engines.vllm.model:PTConvertForCausalLM"
_SEEING = "ptconvert.engines.vllm.wrappers:{}"
_HYBRID = "ptconvert.engines.vllm.hybrid:PTConvertHybridForCausalLM"


def register() -> None:
    """Makes vLLM know converted checkpoints; the entry point `vllm.general_plugins`.

    vLLM calls it in every process that it starts, some of them more than once. It touches no
    device and imports no code of vLLM's models: vLLM imports the model class by its name when it
    needs it.
    """
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS as CONVERTORS,
    )

    import ptconvert
    from ptconvert.engines.vllm import drafts
    from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SEE_EACH_OTHER, SERVED
    from ptconvert.engines.vllm.refusals import LatentConfig, PictureConfig, ServingConfig
    from ptconvert.modeling.model import MODELS
    from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX

    if said := unknown(vllm.__version__):
        logging.getLogger(__name__).warning(said)
    ptconvert.register()
    for name, model in MODELS.items():
        hybrid = name in FAMILIES and FAMILIES[name].linear is not None
        place = _SEEING.format(model.__name__) if name in LANGUAGE_MODELS else _MODEL
        ModelRegistry.register_model(model.__name__, _HYBRID if hybrid else place)
        MODELS_CONFIG_MAP[model.__name__] = ServingConfig
    for family, served in SERVED.items():
        if served.latent:
            CONVERTORS[f"{MODEL_TYPE_PREFIX}{family}"] = LatentConfig
    for wrapper in SEE_EACH_OTHER:
        CONVERTORS[f"{MODEL_TYPE_PREFIX}{wrapper}"] = CONVERTORS.get(wrapper, PictureConfig)
    drafts.install()


def unknown(version: str) -> str | None:
    """What there is to say of a vLLM that the plugin wasn't run with; None of the others."""
    if ".".join(version.split(".")[:2]) in VERSIONS:
        return None
    return (
        f"ptconvert was run with vLLM {' and '.join(VERSIONS)}, and this is {version}: "
        "`ptconvert verify --runtime vllm` says whether it works"
    )


def _verify(path: Path, settings: Any, eager: bool) -> Any:
    from ptconvert.engines.vllm.verify import verify_in_vllm

    return verify_in_vllm(path, settings, eager)


def _own_all_reduce(device: Any, group: Any) -> Any:
    from ptconvert.engines.vllm.kernels import own_all_reduce

    return own_all_reduce(device, group)


ENGINE = ServingEngine("vllm", "pip install 'ptconvert[vllm]'", _verify, _own_all_reduce, unserved)
