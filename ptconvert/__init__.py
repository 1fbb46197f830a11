"""ptconvert: dense transformer checkpoints into Parallel Track and Ladder architectures.

Importing it makes transformers' Auto classes open converted checkpoints. That takes no time until
transformers itself is imported.
"""

from __future__ import annotations

from typing import Any

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto.configuration_auto")  # type: ignore[untyped-decorator]
def _register_configs(auto: Any) -> None:
    from ptconvert.modeling.config import CONFIGS

    for config in CONFIGS:
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.modeling_auto")  # type: ignore[untyped-decorator]
def _register_models(auto: Any) -> None:
    from ptconvert.modeling.model import CAUSAL_LMS

    for model in CAUSAL_LMS:
        auto.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
