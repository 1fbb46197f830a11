"""Converted models with transformers' other heads: their classes are made from its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from ptconvert.modeling.model import BASE_MODELS, CAUSAL_LMS, WRAPPED, Scheduled

_HEADS: dict[Any, type] = {
    AutoModelForQuestionAnswering: GenericForQuestionAnswering,
    AutoModelForSequenceClassification: GenericForSequenceClassification,
    AutoModelForTokenClassification: GenericForTokenClassification,
}


def _auto_classes() -> Iterator[tuple[Any, Any]]:
    for base in BASE_MODELS.values():
        yield AutoModel, base
    for model in WRAPPED.values():  # without a picture it is a causal language model
        yield AutoModelForImageTextToText, model
        yield AutoModelForCausalLM, model
    for family, model in CAUSAL_LMS.items():
        yield AutoModelForCausalLM, model
        base = BASE_MODELS[family]
        for auto, head in _HEADS.items():
            name = base.__name__.removesuffix("Model") + head.__name__.removeprefix("Generic")
            members = {"config_class": base.config_class, "__module__": __name__}
            theirs = next(c for c in base.__mro__ if c.__name__.endswith("PreTrainedModel"))
            globals()[name] = type(name, (head, Scheduled, theirs), members)  # for pickle
            yield auto, globals()[name]


# Each of transformers' Auto classes with a model class that it opens.
AUTO_CLASSES = tuple(_auto_classes())
