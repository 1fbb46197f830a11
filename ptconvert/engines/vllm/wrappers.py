"""Models with pictures in vLLM: its own class of each, with a converted language model inside.

Towers, projectors, processors and the places of pictures in a prompt are vLLM's. A tower is whole
on every rank, as the embedding is: cut, it would cost two all-reduces for each of its layers.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

from ptconvert.engines.vllm.families import LANGUAGE_MODELS, OLDER_NAMES
from ptconvert.engines.vllm.hybrid import LinearStates, PTConvertHybridForCausalLM
from ptconvert.engines.vllm.layers import alone, among
from ptconvert.engines.vllm.model import PTConvertForCausalLM
from ptconvert.engines.vllm.quantised import check_loaded
from ptconvert.modeling.model import MODELS
from ptconvert.models.families import FAMILIES
from ptconvert.models.wrappers import WRAPPERS, by_older_name, decoder_prefix, is_around

# What vLLM's classes ask their language model for: of pipelines, and of experts that lie on some of
# the ranks, both of which are refused.
_COUNTS = (
    *("num_moe_layers", "num_logical_experts", "num_physical_experts", "num_routed_experts"),
    *("num_local_physical_experts", "num_expert_groups", "num_shared_experts"),
    "num_redundant_experts",
)
_ASKED_FOR: Mapping[str, Any] = MappingProxyType(
    {
        **{"make_empty_intermediate_tensors": None, "set_eplb_state": None, "moe_layers": ()},
        **dict.fromkeys(_COUNTS, 0),
    }
)


class SeeingModel:
    """What a model with pictures has beside vLLM's own class of it, which comes after this one."""

    module: ModuleType  # of vLLM's class
    makes: str  # what that makes its language model by, there
    older: Mapping[str, str]  # names of what is around it, where vLLM knows only these
    language: type[PTConvertForCausalLM]
    language_model: PTConvertForCausalLM
    config: Any
    _ranks: Any  # that the language model is cut for

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """Whatever vLLM makes around the language model is whole."""
        self._ranks = get_tp_group()
        theirs: Any = super()
        with alone():
            theirs.__init__(vllm_config=vllm_config, prefix=prefix)

    @contextlib.contextmanager
    def _mark_language_model(self, vllm_config: Any, **more: Any) -> Iterator[None]:
        """vLLM makes the language model within: here the converted one."""

        def make(*, prefix: str, **_: Any) -> Any:
            setattr(module, self.makes, makes)  # whose layers ours may have
            made: Any = self.language(vllm_config=vllm_config, prefix=prefix)
            for name, value in _ASKED_FOR.items():
                setattr(made, name, value)
            return made

        theirs: Any = super()
        module, makes = self.module, getattr(self.module, self.makes)
        with theirs._mark_language_model(vllm_config, **more), among(self._ranks):
            setattr(module, self.makes, make)
            try:
                yield
            finally:
                setattr(module, self.makes, makes)
        assert isinstance(self.language_model, self.language), "vLLM made its own"

    def set_moe_parameters(self) -> None:
        """vLLM's balancing of experts over ranks, which each have a share of every one."""

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """As of the language model alone."""
        return self.language_model.is_unused_checkpoint_weight(name)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads this rank's tensors; returns the names of the parameters that were filled."""
        model_type, around = self.config.model_type, []

        def inside() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if is_around(name, model_type):
                    around.append((name, tensor))
                else:
                    yield name.replace(decoder_prefix(model_type), "model.", 1), tensor

        loaded = self.language_model.load_weights(inside())
        theirs: Any = super()
        own = theirs.load_weights(self._by_towers(around))
        loaded = {f"language_model.{name}" for name in loaded} | set(own)
        if self.language_model.quant_config is not None:  # else its tower's are vLLM's to check
            check_loaded(cast(nn.Module, self), loaded)
        return loaded

    def _by_towers(
        self, around: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Tensors around the language model, as vLLM's class calls them where it doesn't know
        transformers' names of today; with the level in them that its tower may have."""
        if self.older:
            return ((by_older_name(name, self.older), tensor) for name, tensor in around)
        if not hasattr(getattr(self, "vision_tower", None), "vision_model"):
            return around
        level = re.compile(r"^(model\.vision_tower\.)(?!vision_model\.)")
        found: Iterable[tuple[str, torch.Tensor]]
        found = WeightsMapper(orig_to_new_regex={level: r"\1vision_model."}).apply(around)
        return found


@functools.cache
def _class(name: str) -> Any:
    """A class of this module, by its name, which a config has as its architecture."""
    (model_type,) = (m for m in LANGUAGE_MODELS if MODELS[m].__name__ == name)
    wrapper = WRAPPERS[model_type]
    theirs = ModelRegistry.models[wrapper.whole].load_model_cls()
    linear = FAMILIES[wrapper.text].linear is not None
    members = {
        "__doc__": f"vLLM's {theirs.__name__} with a converted language model inside.",
        "__module__": __name__,
        "module": sys.modules[theirs.__module__],
        "makes": LANGUAGE_MODELS[model_type],
        "older": wrapper.older if model_type in OLDER_NAMES else {},
        "language": PTConvertHybridForCausalLM if linear else PTConvertForCausalLM,
    }
    bases = (SeeingModel, LinearStates, theirs) if linear else (SeeingModel, theirs)
    return type(name, bases, members)


def __getattr__(name: str) -> Any:
    """vLLM imports a class by its name: so only the one that a model needs is made."""
    if name in {MODELS[model_type].__name__ for model_type in LANGUAGE_MODELS}:
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
