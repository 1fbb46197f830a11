"""Layers as the executor calls them: transformers' own decoder layers, dense or cut to tracks."""

from __future__ import annotations

import enum
import functools
import importlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptconvert.modeling.executor import PerTrack, Update
from ptconvert.models.families import (
    COUNTS,
    FAMILIES,
    MODEL_TYPE_PREFIX,
    NEURONS,
    ORDERS,
    Block,
    Family,
    Shared,
    guesses_of,
    share_of,
)
from ptconvert.schedule.stages import BLOCKS, Kind

Context = dict[str, Any]  # the keywords that a model's forward gives its layers


def family_of(config: Any) -> Family:
    """The family of a config, dense or converted."""
    return FAMILIES[config.model_type.removeprefix(MODEL_TYPE_PREFIX)]


def modeling_module(model_type: str) -> str:
    """The module of transformers that has a model's classes."""
    return str(CONFIG_MAPPING[model_type].__module__).replace("configuration_", "modeling_")


def layer_class(config: Any) -> Any:
    """The class of the family's decoder layers, from transformers."""
    family = family_of(config)
    module = importlib.import_module(modeling_module(family.model_type))
    return getattr(module, f"{family.prefix}{family.decoder_layer}")


class TrackConfig:
    """The family's config as one track sees it: its share of heads and neurons.

    A live view, not a copy, so that a change of the model's config (its attention
    implementation, say) reaches the tracks. `together` is `Section.together`.
    """

    def __init__(
        self,
        config: Any,
        track: int,
        tracks: int,
        together: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._config, self._share = config, (track, tracks)
        self._together = dict(together)  # which copies and pickles
        differ = getattr(config, "per_layer_attributes", None) or ()  # from layer to layer
        if "head_dim" not in differ:
            heads = config.num_attention_heads
            self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        for name in COUNTS.values():
            if name not in differ and getattr(config, name, None) is not None:
                own = share_of(getattr(config, name), track, tracks, together.get(name, 1))
                setattr(self, name, len(own))

    @property
    def per_layer_config(self) -> PerLayer:
        """The same of each layer, where they differ."""
        return PerLayer(self._config, self._share, self._together)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)  # so that copying and pickling work
        return getattr(self._config, name)


@dataclass(frozen=True)
class PerLayer:
    """The configs of layers, as one track sees them."""

    config: Any
    share: tuple[int, int]
    together: Mapping[str, int]

    def __getitem__(self, index: int) -> TrackConfig:
        return TrackConfig(self.config.per_layer_config[index], *self.share, self.together)


class Task(enum.Enum):
    """What a layer is called for."""

    RUN = "a sublayer"
    KEEP = "the same, after which tracks go on with their own partials"
    JOIN = "what joins the stream, from the sum of all tracks' partials of a sublayer"


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
def _dense_class(of_family: Any) -> Any:
    """A family's decoder layer whose call is one of its sublayers, not the whole of it.

    Called, because that is where accelerate's hooks, FSDP and gradient checkpointing sit; nothing
    else about the layer differs, so whatever replaces or reads its modules finds what it knows.
    """

    class DenseLayer(of_family):  # type: ignore[misc]
        def forward(
            self, family: Family, kind: Kind, task: Task, x_BSD: torch.Tensor, **context: Any
        ) -> Any:
            after = norm_after(self, family.block_of(kind, self))
            if task is Task.JOIN:
                return joined(self, family, after, x_BSD)
            assert task is Task.RUN, "tracks that go on with their own partials reached it"
            x_BSD = apply_norm(self, family, kind, x_BSD)
            out_BSD = run_normed(self, family, kind, x_BSD, context)
            return (multiplied(self, family, out_BSD) if after is None else out_BSD), None

        @property
        def template(self) -> Any:
            """A layer of the family, for what a model's forward asks its layers."""
            return self

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_dense, (of_family,), self.__dict__  # pickle finds no class in here

    return DenseLayer


def _new_dense(of_family: Any) -> Any:
    dense_class = _dense_class(of_family)
    return dense_class.__new__(dense_class)


def dense_layer(
    config: Any, index: int, placement: Placement, together: Mapping[str, int]
) -> nn.Module:
    """The family's decoder layer, or one rank's cut of it.

    An output bias belongs to the partial of rank 0, so that the ranks' sum has it once; and so do
    those of experts. `together` is `Section.together`.
    """
    share = placement.rank, placement.ranks
    own = config if placement.ranks == 1 else TrackConfig(config, *share, together)
    layer: nn.Module = _dense_class(layer_class(config))(own, index)
    if placement.rank > 0:
        for projection, _ in _outputs(layer, family_of(config)):
            projection.register_parameter("bias", None)
        _leave_to_the_first(layer, family_of(config))
    return layer


def _outputs(layer: Any, family: Family) -> Iterator[tuple[Any, str]]:
    """A layer's output projections, and what their biases are called where tracks have them in
    common. (Experts have none that are: see `_leave_to_the_first`.)"""
    for kind in BLOCKS:
        block = family.block_of(kind, layer)
        projection = getattr(getattr(layer, block.name), block.output, None)
        if projection is not None:
            yield projection, block.common_bias


def _leave_to_the_first(layer: Any, family: Family) -> None:
    """Makes zeros of what a layer's modules add that only the first track, or rank, may add.

    They are no parameters, which training would move, and no checkpoint has them: as other buffers
    that are computed, the family's own initialisation makes them, and makes its biases zero.
    """
    for rule in family.layer:
        if rule.once:
            inside, name = rule.name.rsplit(".", 1)
            module = layer.get_submodule(inside)
            zeros = torch.zeros_like(getattr(module, name), requires_grad=False)
            delattr(module, name)
            module.register_buffer(name, zeros, persistent=False)


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
        return no_view(guess_BSD)


def guess_modules(width: int, ranks: Mapping[Kind, int]) -> nn.ModuleDict:
    """A track's guesses in one layer, by block, for the sublayers that have a rank."""
    return nn.ModuleDict({guesses_of(k): Guess(width, r) for k, r in ranks.items()})


def new_guess(track: Any, block: str, width: int, rank: int, like: torch.Tensor) -> Guess:
    """A guess for a track that has none of this block, on the device and in the dtype of another
    tensor; its own are not set yet."""
    if not hasattr(track, "guess"):
        track.guess = nn.ModuleDict()
    guess = Guess(width, rank).to(like.device, like.dtype)
    track.guess[block] = guess
    return guess


class Common(nn.Module):
    """What all tracks of a layer know: output biases, such as `down_proj_bias`, each (width,), and
    the norms of what joins the stream, as their layer calls them."""

    def forward(self, name: str) -> torch.Tensor | None:
        """The bias of this name, where there is one. Called, so that hooks which bring parameters
        from a disk see it; a copy, since FSDP takes parameters away after the call."""
        bias: torch.Tensor | None = getattr(self, name, None)
        return None if bias is None else bias.clone()


class TrackedLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A layer held as tracks: each a small decoder layer of the family, with its own norms.

    `cache_indices` gives the local tracks' places in the KV cache; `tracks` counts all tracks.
    `guesses` are the ranks of the sublayers' guesses, for those that have one; `scales` what the
    norm of a track's own partial is multiplied by, of those whose sums are normed. `assigned`: the
    layer says which units of the dense one went where, for whoever puts it together again.
    `together` is `Section.together`.
    """

    def __init__(
        self,
        config: Any,
        index: int,
        tracks: int,
        cache_indices: Mapping[int, int],
        guesses: Mapping[Kind, int] = MappingProxyType({}),
        scales: Mapping[Kind, float] = MappingProxyType({}),
        assigned: bool = False,
        together: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        # a norm gives all partials one size, and tracks' are about as large and independent
        self.scales = {guesses_of(k): scales.get(k, 1 / math.sqrt(tracks)) for k in Kind}
        family, make = family_of(config), layer_class(config)
        views = {t: TrackConfig(config, t, tracks, together) for t in cache_indices}
        self.tracks = nn.ModuleDict({str(t): make(view, index) for t, view in views.items()})
        self.common = Common()
        for projection, name in _outputs(self.template, family):
            if projection.bias is not None:
                bias = nn.Parameter(torch.zeros(config.hidden_size))
                self.common.register_parameter(name, bias)
        for kind in BLOCKS:
            block = family.block_of(kind, self.template)
            if (after := norm_after(self.template, block)) is not None:
                self.common.add_module(str(block.after), after)
                for own in self.tracks.values():
                    delattr(own, str(block.after))
        if family.scalar is not None:
            self.common.register_buffer(family.scalar, getattr(self.template, family.scalar))
            for own in self.tracks.values():
                delattr(own, family.scalar)
        for t, cache_index in cache_indices.items():
            track: Any = self.tracks[str(t)]
            attention = family.block_of(Kind.ATTENTION, track)
            getattr(track, attention.name).layer_idx = cache_index
            for projection, _ in _outputs(track, family):
                projection.register_parameter("bias", None)
            if t > 0:
                _leave_to_the_first(track, family)
            if guesses:
                track.guess = guess_modules(config.hidden_size, guesses)
        if assigned:
            self.assignment = nn.Module()
            linear = family.block_of(Kind.ATTENTION, self.template) is family.linear
            count = COUNTS["linear_key_heads" if linear else "kv_heads"]
            heads = getattr(config.per_layer_config[index], count)
            with torch.device("meta"):
                whole = make(config, index)
            sizes = {"kv_heads": (heads,), **_neurons(whole, family)}
            for name, size in sizes.items():
                order = torch.arange(size[-1], dtype=torch.int32).expand(size).clone()
                self.assignment.register_buffer(name, order)

    @property
    def template(self) -> Any:
        """A layer of the family, for what a model's forward asks its layers."""
        return next(iter(self.tracks.values()))

    def forward(
        self, family: Family, kind: Kind, task: Task, *view: torch.Tensor, **context: Any
    ) -> Any:
        """Each local track's partial of one sublayer; where tracks keep their own, what each sees
        of it if that is apart, and its guess of the others' if the layer has guesses; last the
        output bias, if any, where it isn't normed with the sum."""
        tracks: list[Any] = list(self.tracks.values())
        block = family.block_of(kind, tracks[0])
        after, bias_D = norm_after(self.common, block), self.common(block.common_bias)
        if task is Task.JOIN:
            (sum_BSD,) = view
            return joined(tracks[0], family, after, sum_BSD if bias_D is None else sum_BSD + bias_D)
        guessed = guesses_of(kind)
        partials, own, guesses = [], [], []
        for t, track in enumerate(tracks):
            x_BSD = apply_norm(track, family, kind, view[t % len(view)])
            partial_BSD = run_normed(track, family, kind, x_BSD, context)
            if after is None:
                partial_BSD = multiplied(track, family, partial_BSD)
            partials.append(partial_BSD)
            if task is not Task.KEEP:
                continue
            kept_BSD = partial_BSD
            if after is not None:
                kept_BSD = self.scales[guessed] * joined(track, family, after, partial_BSD)
                own.append(kept_BSD)
            if guessed in getattr(track, "guess", ()):
                guesses.append(track.guess[guessed](x_BSD, kept_BSD))
        if after is not None:
            bias_D = None  # which the norm takes, with the sum
        elif bias_D is not None:
            bias_D = multiplied(tracks[0], family, bias_D)
        return (*partials, *own, *guesses, bias_D)


def _neurons(layer: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """How many neurons a dense layer has, by what an assignment calls their order: of experts
    (experts, neurons)."""
    found: dict[str, tuple[int, ...]] = {}
    tensors = dict(layer.named_parameters())
    for rule in family.layer:
        cut = rule.segments(rule.axis)[0].cut if rule.axes else None
        if cut in NEURONS and rule.name in tensors:
            segments = rule.segments(rule.axis)
            if any(segment.unit is not None for segment in segments):
                continue  # counts more than neurons; another counts them
            size = tensors[rule.name].shape
            neurons = size[rule.axis] // len(segments)
            found[ORDERS[cut]] = (*size[:1], neurons) if rule.is_of_experts else (neurons,)
    return found


def run_layer(
    layer: Any,
    tracks: int,
    family: Family,
    kind: Kind,
    view: PerTrack,
    keep: bool,
    context: Context,
) -> Update:
    """One sublayer on what each track reads, in the `context` that the model's forward gave the
    layer.

    `tracks` are the local ones, 1 for a layer held dense, which runs once, on the stream that all
    tracks agree on. With `keep` they go on with their own partials, and guesses of the others'.
    """
    assert len(view) in (1, tracks), "tracks that differ reached a layer held dense"
    task = Task.KEEP if keep else Task.RUN
    *found, common = layer(family, kind, task, *view, **context)
    partials, others = found[:tracks], found[tracks:]
    if norm_after(getattr(layer, "common", layer), family.block_of(kind, layer.template)) is None:
        return Update(partials, common, others or None)
    sum_1BSD = functools.reduce(operator.add, partials)[None]
    join = functools.partial(layer, family, kind, Task.JOIN)
    return Update([sum_1BSD], None, others[tracks:] or None, others[:tracks] or None, (join,))


def norm_after(held: Any, block: Block) -> Any:
    """The norm of what a sublayer gives before it joins the stream; None where there is none.

    `held` has it: a layer, or what a layer's tracks have in common.
    """
    found = None if block.after is None else getattr(held, block.after, None)
    return None if isinstance(found, nn.Identity) else found


def joined(layer: Any, family: Family, after: Any, out_BSD: torch.Tensor) -> torch.Tensor:
    """What joins the stream of what a sublayer gives, by the norm after it."""
    return multiplied(layer, family, after(out_BSD))


def apply_norm(layer: Any, family: Family, kind: Kind, x_BSD: torch.Tensor) -> torch.Tensor:
    """What the attention or the MLP of one decoder layer is given for its residual stream."""
    norm = family.block_of(kind, layer).norm
    normed_BSD: torch.Tensor = x_BSD if norm is None else getattr(layer, norm)(x_BSD)
    return normed_BSD


def run_normed(
    layer: Any, family: Family, kind: Kind, x_BSD: torch.Tensor, context: Context
) -> torch.Tensor:
    """The attention or MLP of one decoder layer, of what its norm gave."""
    block = family.block_of(kind, layer)
    module = getattr(layer, block.name)
    if kind.is_part:
        assert family.shared is not None, "a mixture without shared experts reached it"
        return no_view(mixture_part(module, family.shared, kind, x_BSD))
    if kind is Kind.MLP:
        found = module(x_BSD)
    else:
        given = {block.renamed.get(k, k): v for k, v in context.items() if k not in block.without}
        found = module(hidden_states=x_BSD, **given)
    out_BSD: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return no_view(out_BSD)


def no_view(out_BSD: torch.Tensor) -> torch.Tensor:
    """The same numbers, not copied, in what autograd takes for no view of another tensor.

    Linear layers with a bias and some experts give views, and FSDP warns of gradients that would be
    wrong if a layer's output were changed in place. (A product without a bias is made so in torch.)
    """
    if not torch.is_grad_enabled():
        return out_BSD
    found_BSD: torch.Tensor = torch.ops.aten._unsafe_view(out_BSD, out_BSD.shape)
    return found_BSD


def mixture_part(module: Any, shared: Shared, kind: Kind, x_BSD: torch.Tensor) -> torch.Tensor:
    """One of the two parts whose sum a mixture of experts gives."""
    x_PD = x_BSD.reshape(-1, x_BSD.shape[-1])
    if kind is Kind.ROUTED:
        _, weights_PK, chosen_PK = getattr(module, shared.router)(x_PD)
        out_PD = getattr(module, shared.routed)(x_PD, chosen_PK, weights_PK)
    else:
        out_PD = getattr(module, shared.experts)(x_PD)
        if shared.weighed_by is not None:
            out_PD = getattr(module, shared.weighed_by)(x_PD).sigmoid() * out_PD
    part_BSD: torch.Tensor = out_PD.reshape(x_BSD.shape)
    return part_BSD


def multiplied(layer: Any, family: Family, out: torch.Tensor) -> torch.Tensor:
    """A sublayer's output as it is added to the stream."""
    if family.multiplier is None:
        return out
    return out * float(getattr(layer, family.multiplier))
