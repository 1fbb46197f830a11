"""Fitting the tracks' guesses of each other's partials, sublayer after sublayer.

All windows go through the schedule together, one stage at a time, so that each fit sees the streams
that the guesses before it leave, errors included. An error counts by what its track's sublayers
make of it before the merge: in each token as a share of the stream, which norms divide by, so that
the few tokens with huge activations (arXiv 2402.17762) don't outweigh all the others, and in each
direction as their input projections read it. Shapes: B windows, T tokens, D width, F = 2D.

Memory, beside the model's, for n tracks:

- one track's moments and regression in fp64, at most `regression.MATRICES` (F + D) (F + D): 6.0 GB
  at D 4096;
- each track's low-rank factors for each ridge, R (F + D) fp64: 0.2 GB for 8 tracks at rank 64;
- one batch of at most BATCH_TOKENS tokens (or one window) in one sublayer of all tracks;
- the streams of all windows: at most 2n + 1 (merged; partials and guesses that wait, of each
  track), n + 1 for each sublayer of the stage at hand (its partials, and their sum), and n + 1 for
  each all-reduce in flight. Beyond MEMORY_BYTES they lie on disk, in files that are mapped and have
  no name: 28 GB for 65,536 tokens in fp32, n = 8, D 4096 and one sublayer a stage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.reading import epsilon, readers_metric
from ptconvert.calibrate.regression import Affine, Fit, Moments, best, fits
from ptconvert.calibrate.streams import Batch, fitted_by_stage
from ptconvert.measure.progress import Progress
from ptconvert.modeling.executor import PerTrack, Streams, Update
from ptconvert.modeling.layers import apply_norm, new_guess
from ptconvert.models.families import Family, guesses_of
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.lower import Step
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer

NEARLY_ALL = 0.95  # of the gain of the largest rank, for which a smaller one is taken
LEAST_GAIN = 0.01  # of the error; below it no guess is kept

Track = tuple[Any, Family]  # a track's layer, and of which family it is


@dataclass(frozen=True)
class Fitted:
    """A sublayer's guesses, one for each track; none where it does without.

    `error` is what tracks go on with on held-out tokens, as it counts, as a share of what it is
    without guesses; `rank` is 0 where none are kept.
    """

    sublayer: Sublayer
    rank: int
    error: float
    guesses: tuple[Affine, ...] = ()


@torch.inference_mode()
def fit_guesses(
    decoder: Any,
    shape: ModelShape,
    ids_NT: torch.Tensor,
    rank: int,
    progress: Progress,
    scratch: Path | None = None,
) -> list[Fitted]:
    """Fits the guesses of a converted model, which has none yet, on windows of token ids.

    A guess is fitted to the other tracks' partials and the output bias, all that its track doesn't
    see until the merge. `rank` is the largest; `scratch` is the directory for streams that memory
    is not to hold. Raises EvaluationError.
    """

    def fit(step: Step, given: Sequence[Batch]) -> list[Fitted]:
        return [
            _fit_sublayer(decoder, shape, step, place, given, rank)
            for place in range(len(step.sublayers))
        ]

    use = functools.partial(_add_guesses, decoder)
    return fitted_by_stage(decoder, ids_NT, "guesses", progress, scratch, fit, use)


@torch.inference_mode()
def guess_alone(
    decoder: Any,
    shape: ModelShape,
    schedule: Schedule,
    ids_NT: torch.Tensor,
    rank: int,
    progress: Progress,
    scratch: Path | None = None,
) -> list[Fitted]:
    """Fits guesses after all stages of the dense model but the last, each as if there were no
    other: on the dense model's own streams, and from the sublayer's input only, which is half of
    the features. The model, which holds all layers as tracks and has no guesses yet, gets them; not
    what is returned, so that they are held once.

    Errors count by what reads them in `schedule`, which has the dense model's stages. Raises
    EvaluationError.
    """
    decoder.layers.schedule = schedule
    stages = alone(decoder.layers.dense)

    def fit(step: Step, given: Sequence[Batch]) -> list[Fitted]:
        found = list[Fitted]()
        for place in range(len(step.sublayers)):
            one = _fit_sublayer(decoder, shape, step, place, given, rank, from_partial=False)
            _give(decoder, one)
            found.append(replace(one, guesses=()))
        return found

    if not stages:
        return []
    given = (decoder, ids_NT, "guesses", progress, scratch, fit, lambda *_: None, stages)
    return fitted_by_stage(*given)


def alone(dense: Schedule) -> list[Step]:
    """The dense model's stages but the last, after which each track's own partial is known, and
    merged before the next one all the same."""
    return [replace(step, keeps_own=True) for step in dense.program[:-1]]


def _give(decoder: Any, fitted: Fitted) -> None:
    width, block = decoder.config.hidden_size, guesses_of(fitted.sublayer.kind)
    like = decoder.get_input_embeddings().weight
    for (track, _), guess in zip(_tracks(decoder, fitted.sublayer), fitted.guesses, strict=False):
        made = new_guess(track, block, width, fitted.rank, like)
        made.load_state_dict(dict(_tensors(guess, width)))


def put_guesses(decoder: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives guesses to a model that has none, of tensors as its state has them."""
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".from_input.")
        if last == "weight":
            track, _, block = owner.rsplit(".", 2)
            like = decoder.get_input_embeddings().weight
            new_guess(decoder.get_submodule(track), block, tensor.shape[1], len(tensor), like)
    decoder.load_state_dict(tensors, strict=False)


def _fit_sublayer(
    decoder: Any,
    shape: ModelShape,
    step: Step,
    place: int,
    given: Sequence[Batch],
    rank: int,
    from_partial: bool = True,
) -> Fitted:
    """Fits the guesses of one of a stage's sublayers, track by track. The batches keep the
    stage."""
    width, sublayer = decoder.config.hidden_size, step.sublayers[place]
    rank, before, added = min(rank, width), 0.0, epsilon(decoder.norm)
    features = 2 * width if from_partial else width
    candidates: list[list[Fit]] = []
    for t, track in enumerate(_tracks(decoder, sublayer)):
        train, test = (Moments(features, width, decoder.device) for _ in range(2))
        for batch in given:
            pairs = _pairs(batch, t, track, step, place, added, from_partial)
            (test if batch.held_out else train).add(*pairs)
        metric_DD = readers_metric(decoder, shape, step, t)
        candidates.append(fits(train, test, rank, metric_DD))
        before += test.energy(metric_DD)
    if not before > 0:  # a sublayer that writes nothing
        return Fitted(sublayer, 0, 1.0)
    chosen = best(list(zip(*candidates, strict=True)), rank)
    errors = torch.stack([fit.errors for fit in chosen]).sum(0) / before
    picked = _pick_rank([float(e) for e in errors], rank)
    if not picked:
        return Fitted(sublayer, 0, 1.0)
    return Fitted(
        sublayer, picked, float(errors[picked]), tuple(fit.affine(picked) for fit in chosen)
    )


def _pairs(
    batch: Batch,
    t: int,
    track: Track,
    step: Step,
    place: int,
    added: float,
    from_partial: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a track guesses a kept stage's sublayer from, (P, F), what it should guess, (P, D), and
    what its errors weigh there, (P,): one over the stream's mean square and what norms have `added`
    to it. `place` is the sublayer's in the stage."""
    streams = batch.of_track(t)
    weight_P = _weights(batch, streams, added)  # first: what it takes is gone before the rest
    own_BTD = batch.to_device(batch.updates[place].kept[t])
    y_BTD = batch.to_device(batch.wholes[place]) - own_BTD
    kept_BTD = own_BTD if from_partial else None
    features_PF = _features(track, step.sublayers[place], streams.view(step)[0], kept_BTD)
    return features_PF, y_BTD.flatten(0, 1), weight_P


def _weights(batch: Batch, streams: Streams, added: float) -> torch.Tensor:
    """What errors in a track's streams weigh after a kept stage, if it saw all partials."""
    stream_BTD = streams.landed()[0].clone()
    for whole_BTD in batch.wholes:
        stream_BTD += batch.to_device(whole_BTD)
    return 1 / (stream_BTD.float().square().mean(-1).flatten() + added)


def _add_guesses(decoder: Any, fitted: Fitted, view: PerTrack, update: Update) -> None:
    """Adds a sublayer's guesses, if it has any, to what it gave."""
    if fitted.guesses:
        update.guesses = [
            guess(_features(track, fitted.sublayer, view[t % len(view)], kept)).view_as(kept)
            for t, (guess, track, kept) in enumerate(
                zip(fitted.guesses, _tracks(decoder, fitted.sublayer), update.kept, strict=True)
            )
        ]


def _features(
    track: Track, sublayer: Sublayer, view_BTD: torch.Tensor, kept_BTD: torch.Tensor | None
) -> torch.Tensor:
    """What a track guesses from: a sublayer's normed input, and what it sees of its own partial
    where that is given, (P, F)."""
    x_BTD = apply_norm(*track, sublayer.kind, view_BTD)
    both = x_BTD if kept_BTD is None else torch.cat([x_BTD, kept_BTD], dim=-1)
    return both.flatten(0, 1)


def _tracks(decoder: Any, sublayer: Sublayer) -> list[Track]:
    return [(t, decoder.layers.family) for t in decoder.layers[sublayer.layer].tracks.values()]


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


def fitted_tensors(
    fitted: Sequence[Fitted], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the tensors of all guesses, as the model's parameters."""
    for f in fitted:
        for t, guess in enumerate(f.guesses):
            block = guesses_of(f.sublayer.kind)
            owner = f"{shape.layer(f.sublayer.layer)}tracks.{t}.guess.{block}"
            for name, tensor in _tensors(guess, shape.width):
                yield f"{owner}.{name}", tensor


def _tensors(guess: Affine, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of one guess's tensors, as `Guess` has them; it makes nothing of a partial
    that it wasn't fitted from."""
    from_input, from_partial = guess.down[:, :width], guess.down[:, width:]
    yield "from_input.weight", from_input
    yield "from_partial.weight", from_partial if from_partial.numel() else 0 * from_input
    yield "to_stream.weight", guess.up
    yield "to_stream.bias", guess.bias
