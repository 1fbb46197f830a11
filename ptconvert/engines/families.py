"""What families compute that no tensor of theirs shows, the same in every engine: by which numbers
embeddings and logits are multiplied, and which channels positions turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ptconvert.models.families import FULL, SLIDING


@dataclass(frozen=True)
class Computed:
    """Of one family, each by its config as transformers reads it.

    Embeddings are multiplied by what `embeds` says, `rounded` to the model's dtype or not, and
    logits by `logits`; their soft cap has the name `soft_cap` in the config. Rotary positions turn
    neighbouring channels where they are `interleaved`, else those of both halves of a head, and
    only in layers that are `rotated`. Keys are values too in the layers `keys_as_values`.
    """

    embeds: Callable[[Any], float] | None = None
    rounded: bool = False
    logits: Callable[[Any], float] | None = None
    soft_cap: str | None = None
    interleaved: bool = False
    rotated: Callable[[Any, int], bool] = lambda config, index: True  # noqa: ARG005
    keys_as_values: Callable[[Any], Sequence[int]] = lambda config: ()  # noqa: ARG005

    def embeds_scale(self, config: Any, dtype: torch.dtype) -> float | None:
        """What embeddings are multiplied by in a model of this dtype, if by anything."""
        if self.embeds is None:
            return None
        if not self.rounded:
            return self.embeds(config)
        return float(torch.tensor(self.embeds(config), dtype=dtype))

    def logits_scale(self, config: Any) -> float:
        """What logits are multiplied by."""
        return 1.0 if self.logits is None else self.logits(config)

    def logits_cap(self, config: Any) -> float | None:
        """Where logits are softly capped, if anywhere."""
        cap: float | None = getattr(config, self.soft_cap) if self.soft_cap else None
        return cap


def _gemma(**more: Any) -> Computed:
    return Computed(embeds=lambda config: float(config.hidden_size**0.5), rounded=True, **more)


def _full_layers(config: Any) -> Sequence[int]:
    kinds = config.layer_types if config.attention_k_eq_v else ()
    return [index for index, kind in enumerate(kinds) if kind == FULL]


def _has_window(config: Any, index: int) -> bool:
    return config.sliding_window is not None and config.layer_types[index] == SLIDING


_CAPPED_GEMMA = _gemma(soft_cap="final_logit_softcapping")
_GEMMA4 = replace(_CAPPED_GEMMA, keys_as_values=_full_layers)
_INTERLEAVED = Computed(interleaved=True)
_COHERE = Computed(interleaved=True, logits=lambda config: config.logit_scale)
_PLAIN = Computed()
_COMPUTED: Mapping[str, Computed] = MappingProxyType(
    {
        "smollm3": Computed(rotated=lambda config, index: bool(config.no_rope_layers[index])),
        "ernie4_5": _INTERLEAVED,
        "glm": _INTERLEAVED,
        "glm4": _INTERLEAVED,
        "exaone4": Computed(
            rotated=lambda config, index: (
                config.sliding_window is None or _has_window(config, index)
            )
        ),
        "granite": Computed(
            embeds=lambda config: config.embedding_multiplier,
            logits=lambda config: 1 / config.logits_scaling,
        ),
        "hyperclovax": Computed(
            embeds=lambda config: config.embedding_multiplier,
            logits=lambda config: config.logits_scaling,
        ),
        "gemma": _gemma(),
        **dict.fromkeys(("gemma2", "gemma3_text"), _CAPPED_GEMMA),
        **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
        "cohere": _COHERE,
        "cohere2": Computed(interleaved=True, logits=_COHERE.logits, rotated=_has_window),
    }
)


def computed(model_type: str) -> Computed:
    """The same of any family; of most that is what Llama does."""
    return _COMPUTED.get(model_type, _PLAIN)
