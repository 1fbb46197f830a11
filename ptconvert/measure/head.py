"""A model's output head by itself: from final hidden states to logits, as the family has it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class Head:
    """What a causal language model of transformers does after its last hidden state: lm_head, and
    scaling or capping of logits where the family has it. The rest of the model isn't kept."""

    def __init__(self, model: Any) -> None:
        self._lm_head = model.get_output_embeddings()
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: _Given()}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) to logits (..., vocabulary)."""
        logits: torch.Tensor = self._model(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]))[0]
        return logits.view(*hidden.shape[:-1], -1)

    @property
    def weight(self) -> torch.Tensor:
        """lm_head's, (vocabulary, D)."""
        weight: torch.Tensor = self._lm_head.weight
        return weight


class _Given(nn.Module):
    """A base model that was run already. What else one may give or hold, beside pictures, is not
    there: None."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return _Ended(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        return self.__dict__.get(name)


class _Ended(BaseModelOutputWithPast):  # type: ignore[misc]
    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
