"""A checkpoint's own head for further tokens (MTP), which its model opens without.

A head is one more layer of the family's (DeepSeek-V3, arXiv 2412.19437, section 2.2; Qwen3-Next's
and GLM-4.5's are alike): it reads the last hidden state of a token beside the embedding of the next
one, and what it gives says, through the model's own lm_head, the token after that one. Of a source
transformers drafts by GLM-4.5's and DeepSeek-V3's, too (`generate(use_mtp=True)`).

Shapes: B texts, S tokens, D residual stream width.
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
from ptconvert.models.quantised import quantization_of
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import language_config
from ptconvert.runtime.load import compute_buffers, read_for, shape_of, split_named

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class _Layout:
    """What a head's parts are called after the beginning of their names. vLLM zeroes the embedding
    at the first place where it is `blank`."""

    eh_proj: str
    enorm: str
    hnorm: str
    norm: str
    layer: str
    blank: bool


_QWENS = _Layout("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.", False)
_AFTER_THE_LAST = _Layout("eh_proj", "enorm", "hnorm", "shared_head.norm", "", True)
_LAYOUTS: Mapping[str, _Layout] = MappingProxyType({"mtp.": _QWENS})  # by how names begin
_LAYER = "decoder.layers.0."  # of MTPHead


class MTPHead(nn.Module):
    """A head: a decoder of one layer behind what joins its inputs."""

    def __init__(self, decoder: Any, blank: bool) -> None:
        super().__init__()
        self.decoder, self._blank = decoder, blank
        width = decoder.config.hidden_size
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.enorm, self.hnorm = (copy.deepcopy(decoder.norm) for _ in range(2))

    def forward(self, hidden_BSD: torch.Tensor, next_BSD: torch.Tensor) -> torch.Tensor:
        """The last hidden states for the token after the next, (B, S, D), of texts from their
        beginning: from those for the next token, after the model's own last norm, and that token's
        embedding."""
        if self._blank:
            next_BSD = torch.cat([torch.zeros_like(next_BSD[:, :1]), next_BSD[:, 1:]], dim=1)
        both = torch.cat([self.enorm(next_BSD), self.hnorm(hidden_BSD)], dim=-1)
        given = self.decoder(inputs_embeds=self.eh_proj(both), use_cache=False)
        out_BSD: torch.Tensor = given.last_hidden_state
        return out_BSD

    def get_decoder(self) -> Any:
        """Its layer, and the norm of what comes out."""
        return self.decoder


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint has its head, as shapes know it: under the names of `alike`, the layer of
    the model that the head's is such as, the last one with ordinary attention."""

    shape: ModelShape
    layout: _Layout
    alike: int
    names: Mapping[str, str]  # how those in the checkpoint begin, and how MTPHead's or a layer's do

    def own(self, stored: str) -> str | None:
        """A tensor's name here, by that in the checkpoint; None where it isn't the head's."""
        before = next((b for b in self.names if stored.startswith(b)), None)
        return before and self.names[before] + stored.removeprefix(before)

    def stored(self, name: str, tensor: torch.Tensor) -> Iterator[Named]:
        """What a checkpoint holds of one of MTPHead's tensors, by name."""
        for own, part in split_named(self.shape, self.as_of_layer(name), tensor):
            before, after = next((b, a) for b, a in self.names.items() if own.startswith(a))
            yield before + own.removeprefix(after), part

    def as_of_layer(self, name: str) -> str:
        """What one of MTPHead's tensors would be called as the layer's that is alike."""
        return name.replace(_LAYER, self.shape.layer(self.alike))


def _place(checkpoint: Checkpoint) -> _Place:
    shape = shape_of(checkpoint)
    begins = next((b for b in shape.mtp if any(n.startswith(b) for n in checkpoint.tensors)), None)
    if begins is None:
        raise CheckpointError(f"{checkpoint.path}: it has no head for further tokens (MTP)")
    layout = _LAYOUTS.get(begins, _AFTER_THE_LAST)
    alike = max(index for index in range(shape.layers) if not shape.is_linear(index))
    names = {
        f"{begins}{layout.eh_proj}.": "eh_proj.",
        f"{begins}{layout.enorm}.": "enorm.",
        f"{begins}{layout.hnorm}.": "hnorm.",
        f"{begins}{layout.norm}.": "decoder.norm.",
        f"{begins}{layout.layer}": shape.layer(alike),  # the last, as others may begin with it
    }
    place = _Place(shape, layout, alike, names)
    own = filter(None, map(place.own, checkpoint.tensors))
    return replace(place, shape=shape.stored_as(own))


def head_on_meta(checkpoint: Checkpoint) -> MTPHead:
    """A checkpoint's head without memory. Raises CheckpointError where it has none, or where not
    all of it is there."""
    return _built(checkpoint)[0]


def _built(checkpoint: Checkpoint) -> tuple[MTPHead, Any, _Place]:
    """The same, the model that it was made with, and where it is."""
    place, config = _place(checkpoint), checkpoint.config
    if SECTION in config:
        config = source_config(config, read_section(config))
    own = dict(language_config(config))
    given = AutoConfig.for_model(own.pop("model_type"), **own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
        decoder = model.get_decoder()
        decoder.layers, decoder.embed_tokens = nn.ModuleList([decoder.layers[place.alike]]), None
        head = MTPHead(decoder, place.layout.blank)
    given.num_hidden_layers = 1
    if getattr(given, "layer_types", None) is not None:
        given.layer_types = [FULL]
    if quantization_of(checkpoint.config) is None:  # else it is found when it is read
        for name, tensor in head.state_dict().items():
            for stored, part in place.stored(name, tensor):
                entry = checkpoint.tensors.get(stored)
                if entry is None:
                    raise CheckpointError(f"{checkpoint.path}: {stored} is missing")
                if entry.shape != tuple(part.shape):
                    raise CheckpointError(
                        f"{checkpoint.path}: {stored} has shape {list(entry.shape)}, not "
                        f"{list(part.shape)}"
                    )
    return head, model, place


def open_head(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> MTPHead:
    """The head of a checkpoint, dense or converted, in which it comes along as it was; in
    evaluation mode. Raises CheckpointError."""
    head, model, place = _built(checkpoint)
    entries = ((place.own(name), entry) for name, entry in checkpoint.tensors.items())
    tensors = {own: entry for own, entry in entries if own is not None}
    found = replace(checkpoint, tensors=tensors, adapter=None)
    read = {
        name: read_for(model, found, place.shape, place.as_of_layer(name), dtype)
        for name in head.state_dict()
    }
    head.load_state_dict(read, assign=True)
    compute_buffers(model, "cpu")
    return head.to(device).eval().requires_grad_(False)


def stored_head(
    checkpoint: Checkpoint, head: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, list[Named]]]:
    """A head's parameters, some or all: of each its name, and what a checkpoint holds of it, by the
    names there."""
    place = _place(checkpoint)
    for name, tensor in head.items():
        yield name, list(place.stored(name, tensor))
