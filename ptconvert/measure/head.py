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
    """A base model that was run already."""

    rope_deltas = None  # of pictures, of which there are none

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return _Ended(last_hidden_state=inputs_embeds)


class _Ended(BaseModelOutputWithPast):  # type: ignore[misc]
    """What some heads pass on besides, of experts, of pictures, of shared keys, isn't there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
