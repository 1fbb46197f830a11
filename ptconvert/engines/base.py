"""What a serving engine gives, and the decoder that walks a schedule over it.

An engine brings its own layers, norms and all-reduces (`Serving`); tracks, guesses, output biases,
the order of things and the names of tensors are the same for all and live here. Shape suffixes: T
tokens of all requests in a batch, D the residual stream's width.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

import torch
from torch import nn

from ptconvert.checkpoint.section import Section
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.modeling.executor import PerTrack, Streams, Update, add_per_track, run_program
from ptconvert.modeling.layers import guess_modules, multiplied
from ptconvert.models.families import FAMILIES, FULL, SLIDING, E, Family, common_name, guesses_of
from ptconvert.models.shape import HEAD, ModelShape
from ptconvert.schedule.lower import Step
from ptconvert.schedule.stages import BLOCKS, Kind

WHOLE = "whole"  # the only part of a layer held dense, where others have tracks
LINEAR_ATTENTION = "linear_attn"  # what a layer calls such, in engines as in checkpoints
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")  # what one has by itself
_TRACK = re.compile(r"\.tracks\.(\d+)\.")
# From a checkpoint's names of a layer's tensors to those of `ServedLayer`.
RENAMED = {
    **{
        re.compile(rf"^(model\.layers\.\d+)\.{re.escape(bias)}$"): rf"\1.common.{common_name(bias)}"
        for bias in sorted({r.name for f in FAMILIES.values() for r in f.layer if r.is_common_bias})
    },
    re.compile(r"^(model\.layers\.\d+)\.tracks\."): r"\1.parts.",
    re.compile(
        r"^(model\.layers\.\d+)\.(?!parts\.|common\.|after\.|assignment\.)"
    ): rf"\1.parts.{WHOLE}.",
}


def renamed(family: Family) -> dict[re.Pattern[str], str]:
    """The same for a family, whose norms after sublayers, if it has such, are apart, and what the
    stream is multiplied by after a layer is all tracks'."""
    found = {}
    if after := "|".join(filter(None, (family.block(kind).after for kind in BLOCKS))):
        norms = re.compile(rf"^(model\.layers\.\d+)\.(?:common\.)?({after})\.")
        found[norms] = r"\1.after.\2."
    if family.scalar is not None:
        scalar = re.compile(rf"^(model\.layers\.\d+)\.({family.scalar})$")
        found[scalar] = r"\1.common.\2"
    return found | RENAMED


class Serving(Protocol):
    """What an engine gives on one rank. `part` is a decoder layer that it made."""

    def decoder_layer(self, index: int, track: int | None, count: int) -> nn.Module:
        """The family's decoder layer as the engine has it: one that takes a track's tensors whole,
        of `count` tracks, this rank's shard of a layer held dense (`track` None). All-reduces and
        biases of its output projections are taken out by whoever asks; experts have none."""

    def window(self, part: Any) -> int | None:
        """How many tokens the layer attends to; None for all."""

    def attention(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        """The part's attention without its all-reduce; `context` is what the engine's forward
        passes on: positions, and whatever else it needs."""

    def mlp(self, part: Any, x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        """The part's MLP without its all-reduce."""

    def add_norm(
        self, norm: Any, delta_TD: torch.Tensor, base_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum, and the sum; it may overwrite both tensors."""

    def norm_of_sum(self, norm: Any, own_TD: torch.Tensor, base_TD: torch.Tensor) -> torch.Tensor:
        """The norm of the sum, which overwrites neither tensor."""

    @property
    def first(self) -> bool:
        """Whether this is the first rank."""

    def all_reduce(self, local_TD: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, waited for; it may overwrite what it is given."""

    def boundary(
        self,
        local_TD: torch.Tensor,
        sums: list[torch.Tensor],
        kept: list[torch.Tensor],
        launch: int | None,
        waits: list[int],
    ) -> torch.Tensor:
        """Launches the sum over ranks of `local_TD`, which it must not overwrite, into the last of
        `sums` as stage `launch`'s (unless that is None). Then waits for those of the stages
        `waits`, which fill the first of `sums`, one each in that order, and returns the first, to
        which it has added the others'. `kept` are what else is being summed, (T, D) each, for a
        compiler to leave its memory alone until then."""


class ServedLayer(nn.Module):
    """One layer as a rank holds it: its tracks, or its shard of a layer held dense.

    `tracks` are the rank's own (global numbers), None for a layer held dense; `count` are all.
    `guesses` are the ranks of the tracks' guesses, for the sublayers that have one; `scales` are
    what tracks multiply the norm of their own partial by where sums are normed, if not 1/sqrt(n).
    """

    def __init__(
        self,
        serving: Serving,
        shape: ModelShape,
        index: int,
        tracks: range | None,
        count: int,
        guesses: Mapping[Kind, int],
        scales: Mapping[Kind, float],
    ) -> None:
        super().__init__()
        self.scales = {guesses_of(k): scales.get(k, 1 / math.sqrt(count)) for k in BLOCKS}
        self.parts = nn.ModuleDict()
        if tracks is None:
            self.parts[WHOLE] = serving.decoder_layer(index, None, count)
        for track in tracks or ():
            part: Any = serving.decoder_layer(index, track, count)
            if guesses:
                part.guess = guess_modules(shape.width, guesses)
            self.parts[str(track)] = part
        self.family = shape.family
        self.after = nn.ModuleDict()  # norms of what sublayers give, which all tracks know
        for kind in BLOCKS:
            for part in self.parts.values():
                block = self.family.block_of(kind, part)
                if block.after is not None and hasattr(part, block.after):
                    self.after[block.after] = part._modules.pop(block.after)
                for module in getattr(part, block.name).modules():
                    if hasattr(module, "reduce_results"):  # an output projection
                        module.reduce_results = False
                        module.register_parameter("bias", None)
        self.common = nn.ParameterDict()  # output biases, which all ranks know
        for name in (common_name(r.name) for r in shape.rules_of(index) if r.is_common_bias):
            self.common[name] = nn.Parameter(torch.zeros(shape.width), requires_grad=False)
        if self.family.scalar is not None:
            self.common[self.family.scalar] = nn.Parameter(torch.ones(1), requires_grad=False)

    @property
    def scalar(self) -> torch.Tensor | None:
        """What the stream is multiplied by after the layer, if it is."""
        name = self.family.scalar
        return None if name is None else self.common[name]

    def norms(self, kind: Kind) -> list[Any]:
        """The norm before the attention or the MLP, for each part; None where there is none."""
        norm = self.family.block(kind).norm
        return [None if norm is None else getattr(part, norm) for part in self.parts.values()]

    def run(
        self,
        serving: Serving,
        kind: Kind,
        normed: Sequence[torch.Tensor],
        guess: bool,
        context: Any,
    ) -> Update:
        """The attention or the MLP of each part, from its own normed input; with `guess` come the
        tracks' guesses of all others' partials, where the layer has them."""
        assert not kind.is_part, "engines serve no mixture that runs in two parts"
        call = serving.mlp if kind is Kind.MLP else serving.attention
        parts: list[Any] = list(self.parts.values())
        partials = [call(part, x_TD, context) for part, x_TD in zip(parts, normed, strict=True)]
        block, guessed = self.family.block_of(kind, parts[0]), guesses_of(kind)
        bias_D: torch.Tensor | None = self.common.get(block.common_bias, None)
        after: Any = getattr(self.after, str(block.after), None)

        def joined(out_TD: torch.Tensor) -> torch.Tensor:
            normed_TD: torch.Tensor = out_TD if after is None else after(out_TD)
            return multiplied(parts[0], self.family, normed_TD)

        own: PerTrack | None = None
        if after is None:
            partials = kept = [joined(partial_TD) for partial_TD in partials]
        elif guess:
            own = kept = [self.scales[guessed] * joined(partial_TD) for partial_TD in partials]
        guesses: PerTrack | None = None
        if guess and guessed in getattr(parts[0], "guess", ()):
            guesses = [
                part.guess[guessed](x_TD, kept_TD)
                for part, x_TD, kept_TD in zip(parts, normed, kept, strict=True)
            ]
        if after is None:
            return Update(partials, None if bias_D is None else joined(bias_D), guesses)

        def join(sum_TD: torch.Tensor) -> torch.Tensor:
            return joined(sum_TD if bias_D is None else sum_TD + bias_D)

        sum_1TD = functools.reduce(operator.add, partials)[None]
        return Update([sum_1TD], None, guesses, own, (join,))


class NormedPositions(nn.Module):
    """Rotary positions, and norms of queries and keys head by head before or `after` them, for an
    engine's attention that has none; `norms` are those of queries and of keys, by name."""

    def __init__(self, rotary: nn.Module, norms: Mapping[str, nn.Module], after: bool) -> None:
        super().__init__()
        self.rotary, self._names, self._after = rotary, tuple(norms), after
        for name, norm in norms.items():
            self.add_module(name, norm)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Of all heads' channels of each token, (T, heads * head size) each, and so given back."""
        if self._after:
            return self._normed(self.rotary(positions, query, key))
        turned: tuple[torch.Tensor, ...] = self.rotary(positions, *self._normed((query, key)))
        return turned

    def _normed(self, both: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        norms: list[Any] = [getattr(self, name) for name in self._names]
        return tuple(
            norm(x_TQ.reshape(-1, len(norm.weight))).view(x_TQ.shape)
            for norm, x_TQ in zip(norms, both, strict=True)
        )


class NoPositions(nn.Module):
    """Stands for rotary positions in a layer without any."""

    def forward(
        self,
        positions: torch.Tensor,  # noqa: ARG002
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


def served_layers(
    serving: Serving, section: Section, shape: ModelShape, config: Any, local_tracks: range
) -> nn.ModuleList:
    """The layers that a rank holds. Raises ConfigError where the engine's layers attend further, or
    less far, than transformers'."""
    tracked = section.schedule.track_layers
    layers = nn.ModuleList()
    for index in range(shape.layers):
        guesses = {s.kind: rank for s, rank in section.guesses.items() if s.layer == index}
        scales = {s.kind: scale for s, scale in section.scales.items() if s.layer == index}
        tracks = local_tracks if index in tracked else None
        layer = ServedLayer(serving, shape, index, tracks, section.tracks, guesses, scales)
        wanted = window_of(config, index)
        for part in layer.parts.values():
            if serving.window(part) != wanted:
                raise ConfigError(
                    f"layer {index} attends to {wanted or 'all'} tokens, but the engine's "
                    f"{type(part).__name__} would to {serving.window(part) or 'all'}"
                )
        layers.append(layer)
    return layers


def layer_type(config: Any, index: int) -> str:
    """What a layer attends to: full_attention or sliding_attention, or its linear attention."""
    # Only what the family's config class has counts: any key of a config.json becomes an attribute.
    family = type(config)
    if hasattr(family, "layer_types"):
        return str(config.layer_types[index])
    windowed = hasattr(family, "sliding_window") and config.sliding_window is not None
    return SLIDING if windowed else FULL


def window_of(config: Any, index: int) -> int | None:
    """How many tokens a layer attends to, by its model's config; None for all."""
    window: int | None = config.sliding_window if layer_type(config, index) == SLIDING else None
    return window


class ServedPass:
    """One forward pass of served layers, as the executor walks it."""

    def __init__(self, serving: Serving, layers: nn.ModuleList, context: Any) -> None:
        self.serving, self.layers, self.context = serving, layers, context
        # of all-reduces in flight, by stage: what is summed, and the tensor that the sum comes into
        self.in_flight: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def decode(
        self,
        program: Sequence[Step],
        base_TD: torch.Tensor,
        norm: Any,
        waiting_weight: float,
        seen: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The normed stream after the last step, (T, D), the same on every rank. What is `seen`
        beside the tokens, (T, D) each, joins it after the first layers, one after another: before
        the first stage that a later layer's sublayer is in."""
        streams, joining = Streams(base_TD), list(enumerate(seen))

        def join(layer: int) -> None:
            while joining and joining[0][0] < layer:
                streams.base = streams.settled() + joining.pop(0)[1]

        def entered(index: int) -> None:
            join(program[index].last_layer)

        run_program(program, streams, self, waiting_weight, entered, self._scalar)
        join(len(self.layers))
        return self._read([norm], streams, None)[0]

    def _scalar(self, index: int) -> torch.Tensor | None:
        layer: Any = self.layers[index]
        scalar: torch.Tensor | None = layer.scalar
        return scalar

    def run(self, step: Step, streams: Streams) -> Update:
        own = streams.own(step)
        updates: list[Update] = []  # not list[Update](), which dynamo can't trace
        for sublayer in step.sublayers:
            layer: Any = self.layers[sublayer.layer]
            normed = self._read(layer.norms(sublayer.kind), streams, own)
            updates.append(
                layer.run(self.serving, sublayer.kind, normed, step.keeps_own, self.context)
            )
        return functools.reduce(operator.add, updates)

    def boundary(
        self,
        step: Step,
        streams: Streams,  # all-reduces in flight are the engine's here
        local_BSD: torch.Tensor,
    ) -> torch.Tensor | None:
        # Earlier ones first: they are ready soonest, and a blocking one beside them would only
        # share the link. (A stage that blocks launches nothing beside itself.)
        waits = [bucket for bucket in step.merges if step.overlapped or bucket != step.index]
        if streams.buckets[step.bucket].normed or any(streams.buckets[b].normed for b in waits):
            return self._boundary_of_norms(step, streams, local_BSD, waits)
        merged_TD: torch.Tensor | None = None
        if step.overlapped or waits:
            merged_TD = self._overlapped(step, local_BSD, waits)
            for index in waits:
                merged_TD = streams.buckets[index].joins(merged_TD)  # of several: output biases
        if step.launches and not step.overlapped:
            # Nothing comes between this sum and the norm after it, as engines fuse these two: what
            # was in flight joins the stream before it, and biases one rank's partial.
            if merged_TD is not None:
                streams.base = streams.settled() + merged_TD
            common_D = streams.buckets[step.index].common
            if common_D is not None and self.serving.first:
                local_BSD = local_BSD + common_D
            merged_TD = self.serving.all_reduce(local_BSD)
        return merged_TD

    def _overlapped(
        self, step: Step, local_TD: torch.Tensor, waits: Sequence[int], launches: bool = True
    ) -> torch.Tensor:
        """The sum of those waited for, beside which the stage's is launched, if that overlaps
        (and `launches`).

        Zeros too, where nothing is waited for: a compiler drops an operation whose result nobody
        reads, and with it the launch.
        """
        launch = step.index if launches and step.overlapped else None
        if launch is not None:
            self.in_flight[launch] = local_TD, torch.empty_like(local_TD)
        waited = [self.in_flight.pop(index) for index in waits]
        sums = [sum_TD for _, sum_TD in waited] or [torch.zeros_like(local_TD)]
        kept = [summed_TD for summed_TD, _ in waited if summed_TD is not local_TD]
        if launch in self.in_flight:
            sums.append(self.in_flight[launch][1])
        return self.serving.boundary(local_TD, sums, kept, launch, list(waits))

    def _boundary_of_norms(
        self, step: Step, streams: Streams, local_kTD: torch.Tensor, waits: Iterable[int]
    ) -> torch.Tensor | None:
        """The same where sums are normed: those of several sublayers lie one after another, as many
        in each all-reduce as it takes, so each is waited for by itself."""
        joining: list[torch.Tensor] = []
        if step.overlapped:
            joining.append(self._overlapped(step, local_kTD, [])[0])
        for index in waits:
            sum_kTD = self._overlapped(step, local_kTD, [index], launches=False)
            joining.append(streams.buckets[index].joins(sum_kTD))
        if step.launches and not step.overlapped:
            reduced_kTD = self.serving.all_reduce(local_kTD)
            joining.append(streams.buckets[step.index].joins(reduced_kTD))
        return functools.reduce(operator.add, joining) if joining else None

    def _read(
        self, norms: Sequence[Any], streams: Streams, own: PerTrack | None
    ) -> list[torch.Tensor]:
        """What each part's sublayer reads, normed; `own` is what each track adds to the stream for
        itself only. What was merged is added to the stream on the way, inside the fused
        add-and-norm where nothing else needs the stream as it was."""
        if norms[0] is None:
            base_TD = streams.settled()
            return [base_TD] * len(norms) if own is None else add_per_track([base_TD], own)
        if own is not None:
            base_TD = streams.settled()
            return [
                self.serving.norm_of_sum(norm, own[t % len(own)], base_TD)
                for t, norm in enumerate(norms)
            ]
        if streams.merged is None:
            return [norm(streams.base) for norm in norms]
        first_TD, streams.base = self.serving.add_norm(norms[0], streams.merged, streams.base)
        streams.merged = None
        return [first_TD, *(norm(streams.base) for norm in norms[1:])]


def load_own_decays(layer: Any) -> None:
    """Makes linear attention, if a track's layer has it, load decays that are its shard already:
    an engine's loader would take a rank's share of them."""
    if hasattr(layer, LINEAR_ATTENTION):
        for name in ("A_log", "dt_bias"):
            del getattr(layer.linear_attn, name).weight_loader


def is_for_others(name: str, local_tracks: range, shape: ModelShape) -> bool:
    """Whether a checkpoint's tensor isn't for this rank's model: other ranks' tracks are not, nor
    is what an assignment says about where units came from, or a head for further tokens, which an
    engine has a model of its own for."""
    track = _TRACK.search(name)
    others = track is not None and int(track[1]) not in local_tracks
    return others or ".assignment." in name or name.startswith(shape.mtp)


def own_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    local_tracks: range,
    shape: ModelShape,
    tracked: Container[int],
) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's tensors of a checkpoint, of which the layers `tracked` are in tracks. A tied
    lm_head is a shard of the embedding, which is whole here, and so comes beside it; one that is
    stored is itself, whatever the config says.

    Raises CheckpointError at their end where a linear or one of an expert's tensors is missing:
    engines have several of them in one, and are content with any.
    """
    tied, seen = shape.tied, set[str]()
    for name, tensor in weights:
        if is_for_others(name, local_tracks, shape):
            continue
        seen.add(name)
        tied = tied and name != HEAD
        yield name, tensor
        if tied and name.endswith(".embed_tokens.weight"):
            yield HEAD, tensor
    _check_complete(seen, local_tracks, shape, tracked)


def _check_complete(
    names: Set[str], local_tracks: range, shape: ModelShape, tracked: Container[int]
) -> None:
    # a weight may be kept in several tensors, and under other names than its own
    kept = {module for module, _, last in (n.rpartition(".") for n in names) if last != "bias"}
    for index in range(shape.layers):
        parts = [f"tracks.{t}." for t in local_tracks] if index in tracked else [""]
        rules = (rule for rule in shape.rules_of(index) if E not in rule.segments(0))
        linear = (rule for rule in rules if rule.is_cut or len(rule.axes) > 1)
        for name in (rule.name.removesuffix(".weight") for rule in linear):
            for where in (f"model.layers.{index}.{part}{name}" for part in parts):
                if where not in names and where not in kept:
                    raise CheckpointError(f"{where} is missing")
    experts = dict[str, set[tuple[int, str]]]()
    for one in filter(None, map(_EXPERT.fullmatch, names)):
        experts.setdefault(one[1], set()).add((int(one[2]), one[3]))
    for where, found in experts.items():
        ends = sorted({of for _, of in found})
        whole = ((index, of) for index in range(shape.experts) for of in ends)
        if (lacks := next((one for one in whole if one not in found), None)) is not None:
            raise CheckpointError(f"{where}.{lacks[0]}.{lacks[1]} is missing")
