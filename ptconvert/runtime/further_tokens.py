"""A checkpoint's own head for further tokens (MTP), which transformers' models leave out.

A head is one more layer of the family's (DeepSeek-V3, arXiv 2412.19437, section 2.2; Qwen3-Next's
and GLM-4.5's are alike): it reads the last hidden state of a token beside the embedding of the next
one, and what it gives says, through the model's own lm_head, the token after that one. Shapes: B
texts, S tokens, D residual stream width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import SECTION, read_section, source_config
from ptconvert.errors import CheckpointError
from ptconvert.models.families import FULL
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import language_config
from ptconvert.runtime.load import compute_buffers, read_for, shape_of, split_named


@dataclass(frozen=True)
class _Layout:
    """What a head's parts are called after the beginning of their names: the matrix that joins both
    of its inputs, each one's norm, the norm of what comes out, and its layer. Serving engines give
    the layer nothing of the first token's own place where it is `blank` there."""

    join: str
    of_embedding: str
    of_hidden: str
    norm: str
    layer: str
    blank: bool


_APART = _Layout("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.", False)
_AFTER_THE_LAST = _Layout("eh_proj", "enorm", "hnorm", "shared_head.norm", "", True)
_LAYOUTS: Mapping[str, _Layout] = MappingProxyType({"mtp.": _APART})  # by how names begin
_LAYER = "decoder.layers.0."
Named = tuple[str, torch.Tensor]


class FurtherTokens(nn.Module):
    """A head: a decoder of one layer behind what joins its inputs."""

    def __init__(self, decoder: Any, blank: bool) -> None:
        super().__init__()
        self.decoder, self._blank = decoder, blank
        width = decoder.config.hidden_size
        self.join = nn.Linear(2 * width, width, bias=False)
        self.of_embedding, self.of_hidden = (copy.deepcopy(decoder.norm) for _ in range(2))

    def forward(self, hidden_BSD: torch.Tensor, next_BSD: torch.Tensor) -> torch.Tensor:
        """The last hidden states for the token after the next, (B, S, D), of texts from their
        beginning: from those for the next token, after the model's own last norm, and that token's
        embedding."""
        if self._blank:
            next_BSD = torch.cat([torch.zeros_like(next_BSD[:, :1]), next_BSD[:, 1:]], dim=1)
        both = torch.cat([self.of_embedding(next_BSD), self.of_hidden(hidden_BSD)], dim=-1)
        given = self.decoder(inputs_embeds=self.join(both), use_cache=False)
        out_BSD: torch.Tensor = given.last_hidden_state
        return out_BSD

    def get_decoder(self) -> Any:
        """Its layer, and the norm of what comes out."""
        return self.decoder


def check_head(checkpoint: Checkpoint) -> tuple[ModelShape, str]:
    """A checkpoint's shape, and how the names of its head's tensors begin. Raises CheckpointError
    where it has no head."""
    shape = shape_of(checkpoint)
    begins = next((b for b in shape.mtp if any(n.startswith(b) for n in checkpoint.tensors)), None)
    if begins is None:
        raise CheckpointError(f"{checkpoint.path}: it has no head for further tokens (MTP)")
    return shape, begins


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint has its head: under which names, and `alike`, the layer of the model that
    the head's is such as, the last one with ordinary attention; by its name shapes know the head's
    tensors (`own`)."""

    shape: ModelShape
    layout: _Layout
    alike: int
    names: Mapping[str, str]  # how those in the checkpoint begin, and how own ones do

    def own(self, stored: str) -> str | None:
        """A tensor's name here, by that in the checkpoint; None where it isn't the head's."""
        before = next((b for b in self.names if stored.startswith(b)), None)
        return before and self.names[before] + stored.removeprefix(before)

    def stored(self, own: str) -> str:
        """The other way round."""
        before, after = next((b, a) for b, a in self.names.items() if own.startswith(a))
        return before + own.removeprefix(after)


def _place(checkpoint: Checkpoint) -> _Place:
    shape, begins = check_head(checkpoint)
    layout = _LAYOUTS.get(begins, _AFTER_THE_LAST)
    alike = max(index for index in range(shape.layers) if not shape.is_linear(index))
    names = {
        f"{begins}{layout.join}.": "join.",
        f"{begins}{layout.of_embedding}.": "of_embedding.",
        f"{begins}{layout.of_hidden}.": "of_hidden.",
        f"{begins}{layout.norm}.": "decoder.norm.",
        f"{begins}{layout.layer}": shape.layer(alike),  # the last, as it may begin all others
    }
    place = _Place(shape, layout, alike, names)
    own = filter(None, map(place.own, checkpoint.tensors))
    return replace(place, shape=shape.stored_as(own))


def stored_head(checkpoint: Checkpoint, head: Mapping[str, torch.Tensor]) -> Iterator[Named]:
    """A head's parameters, some or all, as a checkpoint holds them."""
    place = _place(checkpoint)
    for name, tensor in head.items():
        own = name.replace(_LAYER, place.shape.layer(place.alike))
        for part, one in split_named(place.shape, own, tensor):
            yield place.stored(part), one


def open_head(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> FurtherTokens:
    """The head of a checkpoint, dense or converted, in which it comes along as it was; in
    evaluation mode. Raises CheckpointError."""
    place = _place(checkpoint)
    whole = source_config(checkpoint.config, read_section(checkpoint.config))
    own = dict(language_config(whole if SECTION in checkpoint.config else checkpoint.config))
    config = AutoConfig.for_model(own.pop("model_type"), **own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        decoder = model.get_decoder()
        decoder.layers, decoder.embed_tokens = nn.ModuleList([decoder.layers[place.alike]]), None
        head = FurtherTokens(decoder, place.layout.blank)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [FULL]
    entries = ((place.own(name), entry) for name, entry in checkpoint.tensors.items())
    tensors = {own: entry for own, entry in entries if own is not None}
    found, layer = (
        replace(checkpoint, tensors=tensors, adapter=None),
        place.shape.layer(place.alike),
    )
    read = {
        name: read_for(model, found, place.shape, name.replace(_LAYER, layer), dtype)
        for name in head.state_dict()
    }
    head.load_state_dict(read, assign=True)
    compute_buffers(model, "cpu")
    return head.to(device).eval().requires_grad_(False)
