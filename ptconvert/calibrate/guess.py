"""Fitting the tracks' guesses of each other's partials, sublayer after sublayer.

All windows go through the schedule together, one stage at a time, so that each fit sees the streams
that the guesses before it leave, errors included. Shapes: B windows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ptconvert.calibrate.regression import Affine, Fit, Moments, best, fits
from ptconvert.evaluate.models import Progress
from ptconvert.modeling.executor import OneProcess, PerTrack, RunSublayer, Streams, Update
from ptconvert.modeling.layers import OUTPUT_PROJECTIONS, apply_norm
from ptconvert.presets import dense_schedule
from ptconvert.schedule import DEFERRED, Schedule, Sublayer

HELD_OUT = 5  # each such batch judges what is fitted on the others
NEARLY_ALL = 0.95  # of the gain of the largest rank, for which a smaller one is taken
LEAST_GAIN = 0.01  # of the error; below it no guess is kept
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fitted:
    """A sublayer's guesses, one for each track; none where it does without.

    `error` is what tracks go on with on held-out tokens, squared, as a share of what it is without
    guesses; `rank` is 0 where none are kept.
    """

    sublayer: Sublayer
    rank: int
    error: float
    guesses: tuple[Affine, ...] = ()


@dataclass
class _Batch:
    """Windows that run together: the converted model's streams, and the dense model's."""

    run: RunSublayer
    student: Streams
    dense: Streams
    held_out: bool
    dense_done: int = 0  # sublayers that the dense model has run


@torch.inference_mode()
def fit_guesses(decoder: Any, ids_NT: torch.Tensor, rank: int, progress: Progress) -> list[Fitted]:
    """Fits the guesses of a converted model, which has none yet, on windows of token ids.

    A guess is fitted to the other tracks' partials and the output bias, all that its track doesn't
    see until the merge; after a deferred stage also to what the stream lacks already against the
    dense model's, errors of guesses before it included. (After overlapped ones that gained nothing:
    what it would repair is merged while it is in flight.) `rank` is the largest.
    """
    schedule: Schedule = decoder.schedule
    weight = 1 / decoder.track_count if decoder.deferred == "mean" else 1.0
    stages = [i for i in range(len(schedule.stages)) if schedule.keeps_own(i)]
    batches = list(_batches(decoder, ids_NT))
    found = []
    for index in range(stages[-1] + 1):
        progress("fitting guesses", index, stages[-1] + 1)
        sublayers = schedule.stages[index].sublayers
        views = [batch.student.view() for batch in batches]
        updates = [
            [batch.run(s, view, False) for s in sublayers]
            for batch, view in zip(batches, views, strict=True)
        ]
        if index in stages:
            deferred = schedule.stages[index].ending == DEFERRED
            behind = _behind(schedule, index, batches, updates) if deferred else None
            for place, sublayer in enumerate(sublayers):
                own = [update[place] for update in updates]
                lacks = behind if sublayer is sublayers[-1] else None
                found.append(_fit_sublayer(decoder, sublayer, batches, views, own, lacks, rank))
        for batch, update in zip(batches, updates, strict=True):
            total = sum(update[1:], start=update[0])
            batch.student.end_stage(schedule, index, total, OneProcess(), weight)
    return found


def _batches(decoder: Any, ids_NT: torch.Tensor) -> Iterator[_Batch]:
    size = max(1, min(BATCH_TOKENS // ids_NT.shape[1], len(ids_NT) // HELD_OUT))
    for number, ids_BT in enumerate(torch.split(ids_NT, size), 1):
        stream_BTD = decoder.embed_tokens(ids_BT.to(decoder.device))
        run, held_out = decoder.runner(stream_BTD), number % HELD_OUT == 0
        yield _Batch(run, Streams(stream_BTD), Streams(stream_BTD), held_out)


def _behind(
    schedule: Schedule,
    index: int,
    batches: Sequence[_Batch],
    updates: Sequence[Sequence[Update]],
) -> list[PerTrack] | None:
    """What each track's stream would lack against the dense model's after stage `index`, if it saw
    all partials of this stage and all that is in flight, which is merged while the guess is seen;
    None where the dense model never has run just these sublayers."""
    positions = [s.position for stage in schedule.stages[: index + 1] for s in stage.sublayers]
    if max(positions) + 1 != len(positions):
        return None
    dense = dense_schedule(schedule.layers)
    found = []
    for batch, update in zip(batches, updates, strict=True):
        for i in range(batch.dense_done, len(positions)):
            own = batch.run(dense.stages[i].sublayers[0], batch.dense.view(), False)
            batch.dense.end_stage(dense, i, own, OneProcess())
        batch.dense_done = len(positions)
        landed = batch.student.landed()
        whole = sum((_whole(u) for u in update), start=torch.zeros_like(landed[0]))
        found.append([batch.dense.base - whole - stream for stream in landed])
    return found


def _whole(update: Update) -> torch.Tensor:
    """A sublayer's output as if all tracks' partials were merged."""
    partials = sum(update.partials[1:], start=update.partials[0])
    return partials if update.common is None else partials + update.common


def _fit_sublayer(
    decoder: Any,
    sublayer: Sublayer,
    batches: Sequence[_Batch],
    views: Sequence[PerTrack],
    updates: Sequence[Update],
    behind: Sequence[PerTrack] | None,
    rank: int,
) -> Fitted:
    """Fits one sublayer's guesses, and adds them to its updates where they are worth it."""
    tracks = list(decoder.layers[sublayer.layer].tracks.values())
    width = views[0][0].shape[-1]
    inputs: list[list[torch.Tensor]] = [[] for _ in batches]
    candidates: list[list[Fit]] = []
    before = 0.0
    for t, track in enumerate(tracks):
        train, test = (Moments(2 * width, width, decoder.device) for _ in range(2))
        for b, (batch, view, update) in enumerate(zip(batches, views, updates, strict=True)):
            x_BTD = apply_norm(track, sublayer.kind, view[t % len(view)])
            z_PF = torch.cat([x_BTD, update.partials[t]], dim=-1).flatten(0, 1)
            y_BTD = _whole(update) - update.partials[t]
            if behind is not None:
                y_BTD = y_BTD + behind[b][t % len(behind[b])]
            (test if batch.held_out else train).add(z_PF, y_BTD.flatten(0, 1))
            inputs[b].append(z_PF)
        candidates.append(fits(train, test))
        before += test.energy
    if not before > 0:  # a sublayer that writes nothing
        return Fitted(sublayer, 0, 1.0)
    chosen = best(list(zip(*candidates, strict=True)), min(rank, width))
    errors = torch.stack([fit.errors for fit in chosen]).sum(0) / before
    picked = _pick_rank([float(e) for e in errors], min(rank, width))
    if not picked:
        return Fitted(sublayer, 0, 1.0)
    guesses = tuple(fit.affine(picked) for fit in chosen)
    for update, z in zip(updates, inputs, strict=True):
        shape = update.partials[0].shape
        update.guesses = [g(z_PF).view(shape) for g, z_PF in zip(guesses, z, strict=True)]
    return Fitted(sublayer, picked, float(errors[picked]), guesses)


def _pick_rank(errors: Sequence[float], rank: int) -> int:
    """The smallest of rank, rank / 2, rank / 4, ... with nearly all of its gain; 0 for none.

    `errors` are on held-out tokens by rank, as shares of the error without guesses.
    """
    gain = 1 - errors[rank]
    if gain < LEAST_GAIN:
        return 0
    smaller = [rank]
    while smaller[-1] > 1:
        smaller.append(smaller[-1] // 2)
    return min(r for r in smaller if 1 - errors[r] >= NEARLY_ALL * gain)


def guess_tensors(fitted: Sequence[Fitted], width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the tensors of all guesses, as the model's parameters."""
    for f in fitted:
        for t, guess in enumerate(f.guesses):
            block = OUTPUT_PROJECTIONS[f.sublayer.kind][0]
            owner = f"model.layers.{f.sublayer.layer}.tracks.{t}.guess.{block}"
            yield f"{owner}.from_input.weight", guess.down[:, :width]
            yield f"{owner}.from_partial.weight", guess.down[:, width:]
            yield f"{owner}.to_stream.weight", guess.up
            yield f"{owner}.to_stream.bias", guess.bias
