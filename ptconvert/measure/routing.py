"""Which experts tokens go to, and how often those of a converted model go to others than its
source's: its tracks route by what they read themselves.

Shapes: P tokens, K experts of each, N windows, T tokens in each, B of them at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX

# By layer that is a mixture, the experts of each token: of each track, or one tensor.
Chosen = dict[int, list[torch.Tensor]]


@contextlib.contextmanager
def watched(decoder: Any, wanted: bool) -> Iterator[Chosen]:
    """What each mixture of experts of a decoder chooses while it runs, (P, K) for each track; of
    what runs several times the last. Nothing where it isn't wanted."""
    found: Chosen = {}
    hooks = []
    family = FAMILIES.get(decoder.config.model_type.removeprefix(MODEL_TYPE_PREFIX))
    mixed = wanted and family is not None and family.experts
    block = family.mlp.name if family else ""
    for index, layer in enumerate(decoder.layers.children() if mixed else ()):
        held = layer.tracks.values() if hasattr(layer, "tracks") else [layer]
        mixtures = [getattr(getattr(own, block), "experts", None) for own in held]
        for track, experts in enumerate(mixtures):
            if experts is None:
                continue
            found[index] = [torch.empty(0)] * len(mixtures)

            def chosen(_: Any, given: tuple[Any, ...], index: int = index, t: int = track) -> None:
                found[index][t] = given[1].sort(-1).values  # beside the tokens and their weights

            hooks.append(experts.register_forward_pre_hook(chosen))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def by_window(chosen: Chosen, windows: int) -> Mapping[int, torch.Tensor]:
    """What a model that has no tracks chose, (B, T, K) by layer, on the CPU."""
    return {
        layer: ids_PK.view(windows, -1, ids_PK.shape[-1]).to(torch.int16).cpu()
        for layer, (ids_PK,) in chosen.items()
    }


def rerouted(source: Mapping[int, torch.Tensor], chosen: Chosen) -> torch.Tensor:
    """In what share of layers and tracks each token goes to other experts than in the source,
    (B, T)."""
    found = []
    for layer, theirs_BTK in source.items():
        for ours_PK in chosen[layer]:
            ours_BTK = ours_PK.view(theirs_BTK.shape).to("cpu", theirs_BTK.dtype)
            found.append((ours_BTK != theirs_BTK).any(-1).float())
    return torch.stack(found).mean(0)
