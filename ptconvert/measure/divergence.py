"""How far a converted model's predictions are from its source's, on the user's own text.

The most sensitive measure of a conversion, and it needs no task data. Shapes: N windows, T tokens
in each, B of them at once, P tokens in a piece, V vocabulary, D residual stream width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ptconvert.checkpoint.section import Section
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.head import Head
from ptconvert.measure.progress import Progress
from ptconvert.measure.routing import by_window, rerouted, watched
from ptconvert.measure.statistics import (
    RESAMPLES,
    Difference,
    Estimate,
    Floats,
    compare,
    estimate,
    mean_over,
)
from ptconvert.measure.windows import Windows
from ptconvert.schedule.presets import with_only

# Windows of the measurement by block: it runs the model once per block, and between blocks the
# differences are large.
BLOCK_WINDOWS = 8
_FIRST_BUCKET = 8  # tokens; each further one is as long as all before it
LOGITS_AT_ONCE = 1 << 24  # 64 MiB of fp32 for each of the few copies that KL needs

# Of each token of a piece, each (P): from the source's log-probabilities (P, V), a model's, and the
# tokens that come (P).
Values = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Closeness:
    """Two models on the same tokens. Losses and KL are in nats per token."""

    source_loss: Estimate
    converted_loss: Estimate
    loss: Difference
    kl: Estimate  # KL(source || converted)
    agreement: Estimate  # the share of tokens for which both models' first choice is the same
    # of mixtures of experts: the share of layers and tracks in which a token goes to others
    rerouted: Estimate | None = None


@dataclass(frozen=True)
class Bucket:
    """The positions first..last of a window, counted from 0."""

    first: int
    last: int
    closeness: Closeness


@dataclass(frozen=True)
class Block:
    """One block of the schedule, converted alone: every other sublayer is all-reduced at once."""

    stages: str
    first_layer: int
    last_layer: int
    waited_before: int
    waited_after: int
    closeness: Closeness


@dataclass(frozen=True)
class Divergence:
    """All of it: over the text, by position in the window, and, where asked for, by block of the
    schedule."""

    texts: tuple[str, ...]
    tokens: int
    windows: int
    length: int
    overlapping: bool
    whole: Closeness
    by_position: tuple[Bucket, ...]
    by_block: tuple[Block, ...]
    block_windows: int


@dataclass(frozen=True)
class Tokens:
    """What was measured at each token: arrays (N, T); the last of mixtures of experts only."""

    source_loss: Floats
    converted_loss: Floats
    kl: Floats
    agree: Floats
    rerouted: Floats | None = None

    def closeness(self, seed: int, positions: slice = slice(None)) -> Closeness:
        """Means over the windows' positions, with intervals over windows."""
        windows, routed = len(self.kl), None
        if self.rerouted is not None:
            routed = mean_over(self.rerouted[:, positions].mean(axis=1))
        source, converted, kl, agree = (
            mean_over(values[:, positions].mean(axis=1))
            for values in (self.source_loss, self.converted_loss, self.kl, self.agree)
        )
        return Closeness(
            source_loss=estimate(source, windows, RESAMPLES, seed),
            converted_loss=estimate(converted, windows, RESAMPLES, seed),
            loss=compare(source, converted, windows, RESAMPLES, seed),
            kl=estimate(kl, windows, RESAMPLES, seed),
            agreement=estimate(agree, windows, RESAMPLES, seed),
            rerouted=routed and estimate(routed, windows, RESAMPLES, seed),
        )


@dataclass(frozen=True)
class Reference:
    """The source model's predictions, kept as final hidden states (N, T, D) on the CPU and the
    output head: the source needn't stay in memory beside the converted model.

    `streams` are the residual streams (N, T, D) that enter the layers asked for; `routes`, where
    asked for, the experts that tokens go to, (N, T, K), by layer that is a mixture of them.
    """

    hidden: torch.Tensor
    head: Any
    streams: Mapping[int, torch.Tensor] = field(default_factory=dict)
    routes: Mapping[int, torch.Tensor] = field(default_factory=dict)


@torch.inference_mode()
def reference(
    model: Any,
    windows: Windows,
    batch: BatchSize,
    progress: Progress,
    layers: Sequence[int] = (),
    routes: bool = False,
) -> Reference:
    """Runs the source model over the windows once; keeps the streams that enter `layers`, and with
    `routes` the experts that tokens go to."""
    hidden: list[torch.Tensor] = []
    streams: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    found: list[Mapping[int, torch.Tensor]] = []
    run = functools.partial(model.get_decoder(), output_hidden_states=bool(layers))
    step = "divergence: source"
    with watched(model.get_decoder(), routes) as chosen:
        for _, given in outputs(run, model.device, windows.ids, batch, progress, step):
            hidden.append(given.last_hidden_state.cpu())
            found.append(by_window(chosen, len(hidden[-1])))
            for layer in layers:
                streams[layer].append(given.hidden_states[layer].cpu())
    # each list is let go when it is joined, so that one stream at a time is there twice
    joined = {layer: torch.cat(streams.pop(layer)) for layer in layers}
    routed = {layer: torch.cat([one[layer] for one in found]) for layer in found[0]}
    return Reference(torch.cat(hidden), Head(model), joined, routed)


@torch.inference_mode()
def measure(
    model: Any,
    source: Reference,
    windows: Windows,
    batch: BatchSize,
    progress: Progress,
    step: str = "converted",
    some: slice | list[int] = slice(None),
    stream: torch.Tensor | None = None,
) -> Tokens:
    """Runs a model over the windows, or `some` of them, and compares it with the source, per token.

    `stream` (N, T, D) takes the place of the embedded tokens, for a model that is to begin at a
    later stage (its `first_stage`). Logits are compared in fp32; the vocabularies are the same.
    """
    ids, kept = windows.ids[some], source.hidden[some]
    routes = {layer: ids_NTK[some] for layer, ids_NTK in source.routes.items()}
    head = Head(model)
    results: list[Floats] = []
    others: list[Floats] = []
    stream = None if stream is None else stream[some]
    decoder, device = model.get_decoder(), model.device
    step = f"divergence: {step}"
    with watched(decoder, bool(routes)) as chosen:
        for rows, given in outputs(decoder, device, ids, batch, progress, step, stream):
            hidden_BTD, target_BT = given.last_hidden_state, ids[rows, 1:].to(model.device)
            found = by_token(_compared, source.head, kept[rows], head, hidden_BTD, target_BT)
            results.append(torch.stack(found).cpu().double().numpy())
            if routes:
                of_rows = {layer: ids_NTK[rows] for layer, ids_NTK in routes.items()}
                others.append(rerouted(of_rows, chosen).double().numpy())
    found_NT = Tokens(*np.concatenate(results, axis=1))
    return replace(found_NT, rerouted=np.concatenate(others)) if others else found_NT


def outputs(
    decoder: Callable[..., Any],
    device: torch.device,
    ids: torch.Tensor,
    batch: BatchSize,
    progress: Progress,
    step: str,
    stream: torch.Tensor | None = None,
) -> Iterator[tuple[slice, Any]]:
    """Windows (N, T + 1) that fit in memory at once, and what a model's decoder gives for them.

    `stream` (N, T, D) takes the place of the embedded tokens.
    """
    done = 0
    while done < len(ids):
        progress(step, done, len(ids))

        def run(size: int, first: int = done) -> tuple[slice, Any]:
            rows = slice(first, first + size)
            inputs = {"input_ids": ids[rows, :-1].to(device)}
            if stream is not None:
                inputs = {"inputs_embeds": stream[rows].to(device)}
            return rows, decoder(**inputs, use_cache=False, return_dict=True)

        rows, given = batch.fitting(run)
        yield rows, given
        done += len(given.last_hidden_state)
    progress(step, done, len(ids))


def by_token(
    values: Values,
    source_head: Any,
    source_BTD: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    own_BTX: torch.Tensor,
    target_BT: torch.Tensor,
) -> list[torch.Tensor]:
    """`values` of each token, each (B, T), from the source's final hidden states and its output
    head, a model's own (or its logits, for a head that leaves them), and the tokens that come.

    Piece by piece, and computed again in the backward pass where there is one, so that no set of
    logits is in memory that didn't come in. Nothing is differentiated by the source.
    """

    def piece(
        source_PD: torch.Tensor, own_PX: torch.Tensor, target_P: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            logp_PV = source_head(source_PD.to(own_PX.device)).float().log_softmax(-1)
        return values(logp_PV, head(own_PX).float().log_softmax(-1), target_P)

    return in_pieces(piece, source_head.weight.shape[0], source_BTD, own_BTX, target_BT)


def in_pieces(
    piece: Callable[..., tuple[torch.Tensor, ...]], vocabulary: int, *given: torch.Tensor
) -> list[torch.Tensor]:
    """What `piece` gives for each token, (B, T) each, from tensors (B, T, ...) that it gets a piece
    of, (P, ...); computed again in the backward pass where there is one."""
    at_once = tokens_at_once(vocabulary)
    pieces = zip(*(torch.split(t.flatten(0, 1), at_once) for t in given), strict=True)
    found = [
        checkpoint(piece, *each, use_reentrant=False) if torch.is_grad_enabled() else piece(*each)
        for each in pieces
    ]
    return [torch.cat(each).view(given[0].shape[:2]) for each in zip(*found, strict=True)]


def tokens_at_once(vocabulary: int) -> int:
    """The tokens of a piece."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def loss_and_kl(
    logp_PV: torch.Tensor, logq_PV: torch.Tensor, target_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a model that predicts q, and KL(p || q), each (P) and in nats."""
    kl_PV = functional.kl_div(logq_PV, logp_PV, reduction="none", log_target=True)
    return functional.nll_loss(logq_PV, target_P, reduction="none"), kl_PV.sum(-1)


def _compared(
    logp_PV: torch.Tensor, logq_PV: torch.Tensor, target_P: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The fields of Tokens, each (P)."""
    source_P = functional.nll_loss(logp_PV, target_P, reduction="none")
    same_P = (logp_PV.argmax(-1) == logq_PV.argmax(-1)).float()
    return source_P, *loss_and_kl(logp_PV, logq_PV, target_P), same_P


def by_position(tokens: Tokens, seed: int) -> Iterator[Bucket]:
    """Closeness by position in the window, in buckets that double: 0-7, 8-15, 16-31, ..."""
    length = tokens.kl.shape[1]
    first, last = 0, min(_FIRST_BUCKET, length)
    while first < length:
        yield Bucket(first, last - 1, tokens.closeness(seed, slice(first, last)))
        first, last = last, min(2 * last, length)


def by_block(
    model: Any,
    section: Section,
    source: Reference,
    windows: Windows,
    batch: BatchSize,
    progress: Progress,
    seed: int,
) -> tuple[tuple[Block, ...], int]:
    """What each block of the schedule costs by itself, all else run as the dense model does.

    Returns the blocks that aren't dense, and on how many windows they were measured.
    """
    some = slice(None, None, _block_step(windows))
    converted, schedule = converted_blocks(section), section.schedule
    each = block_windows(windows)
    blocks = []
    for number, block in enumerate(converted):
        stages = schedule.stages[block.start : block.stop]
        sublayers = [s for stage in stages for s in stage.sublayers]
        model.get_decoder().layers.schedule = with_only(schedule, block, section.dense)
        try:
            step = f"windows of {len(converted)} blocks, each alone"
            within = _part(progress, number * each, len(converted) * each)
            tokens = measure(model, source, windows, batch, within, step, some)
        finally:
            model.get_decoder().layers.schedule = schedule
        blocks.append(
            Block(
                stages=" ".join(map(str, stages)),
                first_layer=min(s.layer for s in sublayers),
                last_layer=max(s.layer for s in sublayers),
                waited_before=len(section.dense.running(sublayers)),
                waited_after=sum(schedule.program[i].waits for i in block),
                closeness=tokens.closeness(seed),
            )
        )
    return tuple(blocks), each


def _part(progress: Progress, before: int, total: int) -> Progress:
    """Progress in a part of something, of which so much was done before."""
    return lambda step, done, _: progress(step, before + done, total)


def converted_blocks(section: Section) -> list[range]:
    """The stages of each block that isn't dense."""
    schedule, dense = section.schedule, section.dense
    return [b for b in schedule.blocks(dense) if with_only(schedule, b, dense) != dense]


def block_windows(windows: Windows) -> int:
    """On how many of the windows each block is measured: BLOCK_WINDOWS at most."""
    return len(range(0, len(windows.ids), _block_step(windows)))


def _block_step(windows: Windows) -> int:
    return math.ceil(len(windows.ids) / BLOCK_WINDOWS)
