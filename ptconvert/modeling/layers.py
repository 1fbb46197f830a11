"""Layers as the executor calls them: transformers' own decoder layers, dense or cut to tracks."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ptconvert.modeling.executor import PerTrack, Update
from ptconvert.schedule.stages import Kind


def output_projection(kind: Kind) -> tuple[str, str]:
    """The block of a layer that a sublayer is, and the output projection in it.

    Code that runs in a layer's forward asks here, not OUTPUT_PROJECTIONS: torch 2.13's dynamo
    keeps no guard on an Enum that is looked up in a dict, and a layer compiled for its attention
    would run that where its MLP is asked for.
    """
    return ("mlp", "down_proj") if kind is Kind.MLP else ("self_attn", "o_proj")


OUTPUT_PROJECTIONS = {kind: output_projection(kind) for kind in Kind}
# What a sublayer's input goes through first.
NORMS = {Kind.ATTENTION: "input_layernorm", Kind.MLP: "post_attention_layernorm"}


def family_class(config: Any, suffix: str) -> Any:
    """The class `suffix` (such as DecoderLayer) of the config's family, from transformers."""
    for base in type(config).__mro__:
        module = base.__module__
        if module.startswith("transformers.models."):
            prefix = base.__name__.removesuffix("Config")
            modeling = importlib.import_module(module.replace(".configuration_", ".modeling_"))
            return getattr(modeling, prefix + suffix)
    raise AssertionError(f"{type(config).__name__} derives from no config of transformers")


class TrackConfig:
    """The family's config as one track sees it: its share of heads and neurons.

    A live view, not a copy, so that a change of the model's config (its attention
    implementation, say) reaches the tracks.
    """

    def __init__(self, config: Any, tracks: int) -> None:
        heads = config.num_attention_heads
        self._config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.num_attention_heads = heads // tracks
        self.num_key_value_heads = max(config.num_key_value_heads // tracks, 1)
        self.intermediate_size = config.intermediate_size // tracks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)  # so that copying and pickling work
        return getattr(self._config, name)


@dataclass(frozen=True)
class Placement:
    """The part of a model that a process holds: its share of the tracks, as rank of `ranks`.

    Layers held dense are cut among ranks as tensor parallelism cuts them.
    """

    rank: int = 0
    ranks: int = 1

    def local_tracks(self, tracks: int) -> range:
        """The tracks of this rank; `ranks` must divide `tracks`."""
        share = tracks // self.ranks
        return range(self.rank * share, (self.rank + 1) * share)


@functools.cache
def _dense_class(layer_class: Any) -> Any:
    """A family's decoder layer whose call is one of its sublayers, not the whole of it.

    Called, because that is where accelerate's hooks, FSDP and gradient checkpointing sit; nothing
    else about the layer differs, so whatever replaces or reads its modules finds what it knows.
    """

    class DenseLayer(layer_class):  # type: ignore[misc]
        def forward(
            self, kind: Kind, guess: bool, attention: dict[str, Any], x_BSD: torch.Tensor
        ) -> tuple[torch.Tensor, None]:
            assert not guess, "tracks that go on with their own partials reached a dense layer"
            return run_block(self, kind, x_BSD, attention), None

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_dense, (layer_class,), self.__dict__  # pickle finds no class in here

    return DenseLayer


def _new_dense(layer_class: Any) -> Any:
    dense_class = _dense_class(layer_class)
    return dense_class.__new__(dense_class)


def dense_layer(config: Any, index: int, placement: Placement) -> nn.Module:
    """The family's decoder layer, or one rank's cut of it.

    An output bias belongs to the partial of rank 0, so that the ranks' sum has it once.
    """
    own = config if placement.ranks == 1 else TrackConfig(config, placement.ranks)
    layer: nn.Module = _dense_class(family_class(config, "DecoderLayer"))(own, index)
    if placement.rank > 0:
        for block, projection in OUTPUT_PROJECTIONS.values():
            getattr(getattr(layer, block), projection).register_parameter("bias", None)
    return layer


class Guess(nn.Module):
    """A track's low-rank affine guess of the partials of all other tracks, from what it knows.

    V (A x + B p) + b, of the sublayer's normed input x and the track's own partial p. (p is as
    good as the hidden activations that it comes from wherever these are fewer than D.)
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(width, rank, bias=False)
        self.from_partial = nn.Linear(width, rank, bias=False)
        self.to_stream = nn.Linear(rank, width)

    def forward(self, x_BSD: torch.Tensor, partial_BSD: torch.Tensor) -> torch.Tensor:
        guess_BSD: torch.Tensor = self.to_stream(
            self.from_input(x_BSD) + self.from_partial(partial_BSD)
        )
        return guess_BSD


def guess_modules(width: int, ranks: Mapping[Kind, int]) -> nn.ModuleDict:
    """A track's guesses in one layer, by block, for the sublayers that have a rank."""
    return nn.ModuleDict({OUTPUT_PROJECTIONS[k][0]: Guess(width, r) for k, r in ranks.items()})


class CommonBiases(nn.Module):
    """The output biases of a layer of tracks, `o_proj_bias` and `down_proj_bias`, each (width,)."""

    def forward(self, kind: Kind) -> torch.Tensor | None:
        """That of the attention or the MLP, where it has one. Called, so that hooks which bring
        parameters from a disk see it; a copy, since FSDP takes parameters away after the call."""
        bias: torch.Tensor | None = getattr(self, f"{output_projection(kind)[1]}_bias", None)
        return None if bias is None else bias.clone()


class TrackedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A layer held as tracks: each a small decoder layer of the family, with its own norms.

    `cache_indices` gives the local tracks' places in the KV cache; `tracks` counts all tracks.
    `guesses` are the ranks of the sublayers' guesses, for those that have one. `assigned`: the
    layer says which units of the dense one went where, for whoever puts it together again.
    """

    def __init__(
        self,
        config: Any,
        index: int,
        tracks: int,
        cache_indices: Mapping[int, int],
        guesses: Mapping[Kind, int] = MappingProxyType({}),
        assigned: bool = False,
    ) -> None:
        super().__init__()
        view = TrackConfig(config, tracks)
        layer_class = family_class(config, "DecoderLayer")
        self.tracks = nn.ModuleDict({str(t): layer_class(view, index) for t in cache_indices})
        self.common = CommonBiases()  # which all tracks know
        first = next(iter(self.tracks.values()))
        for block, projection in OUTPUT_PROJECTIONS.values():
            if getattr(getattr(first, block), projection).bias is not None:
                bias = nn.Parameter(torch.zeros(config.hidden_size))
                self.common.register_parameter(f"{projection}_bias", bias)
        for t, cache_index in cache_indices.items():
            track: Any = self.tracks[str(t)]
            track.self_attn.layer_idx = cache_index
            for block, projection in OUTPUT_PROJECTIONS.values():
                getattr(getattr(track, block), projection).register_parameter("bias", None)
            if guesses:
                track.guess = guess_modules(config.hidden_size, guesses)
        if assigned:
            self.assignment = nn.Module()
            sizes = {"kv_heads": config.num_key_value_heads, "neurons": config.intermediate_size}
            for name, size in sizes.items():
                self.assignment.register_buffer(name, torch.arange(size, dtype=torch.int32))

    def forward(
        self, kind: Kind, guess: bool, attention: dict[str, Any], *view: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Each local track's partial of one sublayer; then, with `guess` and where the layer has
        guesses of it, each track's guess of the others' partials; last the output bias, if any."""
        block, _ = output_projection(kind)
        tracks: list[Any] = list(self.tracks.values())
        partials, guesses = [], []
        for t, track in enumerate(tracks):
            x_BSD = apply_norm(track, kind, view[t % len(view)])
            partials.append(run_normed(track, kind, x_BSD, attention))
            if guess and block in getattr(track, "guess", ()):
                guesses.append(track.guess[block](x_BSD, partials[-1]))
        return (*partials, *guesses, self.common(kind))


def run_layer(
    layer: Any, tracks: int, kind: Kind, view: PerTrack, guess: bool, attention: dict[str, Any]
) -> Update:
    """One sublayer on what each track reads; `attention` are the keywords of self_attn.

    `tracks` are the local ones, 1 for a layer held dense, which runs once, on the stream that all
    tracks agree on. With `guess` come the guesses, where the layer has them.
    """
    assert len(view) in (1, tracks), "tracks that differ reached a layer held dense"
    *found, common = layer(kind, guess, attention, *view)
    return Update(found[:tracks], common, found[tracks:] or None)


def apply_norm(layer: Any, kind: Kind, x_BSD: torch.Tensor) -> torch.Tensor:
    """What the attention or the MLP of one decoder layer is given for its residual stream."""
    norm = layer.post_attention_layernorm if kind is Kind.MLP else layer.input_layernorm
    normed_BSD: torch.Tensor = norm(x_BSD)
    return normed_BSD


def run_block(
    layer: Any, kind: Kind, x_BSD: torch.Tensor, attention: dict[str, Any]
) -> torch.Tensor:
    """The norm and the attention or MLP of one decoder layer, without the residual connection."""
    return run_normed(layer, kind, apply_norm(layer, kind, x_BSD), attention)


def run_normed(
    layer: Any, kind: Kind, x_BSD: torch.Tensor, attention: dict[str, Any]
) -> torch.Tensor:
    """The same, of what the norm gave."""
    if kind is Kind.MLP:
        out_BSD: torch.Tensor = layer.mlp(x_BSD)
    else:
        out_BSD, _ = layer.self_attn(hidden_states=x_BSD, **attention)
    return out_BSD
