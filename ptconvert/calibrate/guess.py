"""Fitting the tracks' guesses of each other's partials, sublayer after sublayer.

All windows go through the schedule together, one stage at a time, so that each fit sees the streams
that the guesses before it leave, errors included. Shapes: B windows, T tokens, D width, F = 2D.

Memory, beside the model's, for n tracks:

- one track's moments and regression in fp64, at most `regression.MATRICES` F F: 5.9 GB at D 4096;
- each track's low-rank factors for each ridge, R (F + D) fp64: 0.2 GB for 8 tracks at rank 64;
- one batch of at most BATCH_TOKENS tokens (or one window) in one sublayer of all tracks;
- the streams of all windows: at most 2n + 2 (merged; partials and guesses that wait, of each track;
  the dense model's), n + 1 for each sublayer of the stage at hand (its partials, and their sum),
  and n + 1 for each all-reduce in flight. Beyond MEMORY_BYTES they lie on disk, in files that are
  mapped and have no name: 29 GB for 65,536 tokens in fp32, n = 8, D 4096 and one sublayer a stage.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.on_disk import MEMORY_BYTES, mapped
from ptconvert.calibrate.regression import Affine, Fit, Moments, best, fits
from ptconvert.measure.progress import Progress
from ptconvert.modeling.executor import (
    OneProcess,
    PerTrack,
    RunSublayer,
    Streams,
    TorchEngine,
    Update,
)
from ptconvert.modeling.layers import apply_norm
from ptconvert.models.families import Family, guesses_of
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.lower import Step
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Sublayer

HELD_OUT = 5  # each such batch judges what is fitted on the others
NEARLY_ALL = 0.95  # of the gain of the largest rank, for which a smaller one is taken
LEAST_GAIN = 0.01  # of the error; below it no guess is kept
BATCH_TOKENS = 4096

Track = tuple[Any, Family]  # a track's layer, and of which family it is
Keep = Callable[[torch.Tensor], torch.Tensor]


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
    """Windows that run together: the converted model's streams, and the dense model's.

    `keep` takes a tensor to where streams lie between two stages.
    """

    run: RunSublayer
    student: Streams
    dense: Streams
    held_out: bool
    device: torch.device
    keep: Keep
    dense_done: int = 0  # sublayers that the dense model has run
    updates: list[Update] = field(default_factory=list)  # of the stage at hand, if it guesses
    wholes: list[torch.Tensor] = field(default_factory=list)  # their outputs, all tracks merged

    def stage(self, step: Step) -> tuple[PerTrack, list[Update]]:
        """What the tracks read, and what sublayers give for it without guesses."""
        view = self._at_hand(self.student).view(step)
        if self.updates:
            return view, [_moved_update(update, self._to_device) for update in self.updates]
        return view, [self.run(s, view, False) for s in step.sublayers]

    def keep_stage(self, step: Step) -> None:
        """Runs a stage's sublayers once for all its fits, each of which goes over all windows."""
        _, updates = self.stage(step)
        self.wholes = [self.keep(_whole(update)) for update in updates]
        self.updates = [_moved_update(update, self.keep) for update in updates]

    def pairs(
        self, t: int, track: Track, step: Step, place: int, behind: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a track guesses a kept stage's sublayer from, (P, 2D), and what it should guess,
        (P, D); `place` is the sublayer's in the stage.

        With `behind` that is also what its stream would lack against the dense model's after the
        stage, if it saw all partials of this stage and all that is in flight, which is merged while
        the guess is seen.
        """
        streams = self._at_hand(_of_track(self.student, t))
        own_BTD = self._to_device(self.updates[place].partials[t])
        y_BTD = self._to_device(self.wholes[place]) - own_BTD
        if behind:
            y_BTD += self._to_device(self.dense.settled()) - streams.landed()[0]
            for whole_BTD in self.wholes:
                y_BTD -= self._to_device(whole_BTD)
        features_P2D = _features(track, step.sublayers[place], streams.view(step)[0], own_BTD)
        return features_P2D, y_BTD.flatten(0, 1)

    def end(self, step: Step, own: Update, weight: float) -> None:
        """Moves the converted model's streams on past a stage."""
        student = self._at_hand(self.student)
        student.end(step, own, self._engine, weight)
        self.student = _moved(student, self.keep)
        self.updates, self.wholes = [], []

    def run_dense(self, dense: Schedule, count: int) -> None:
        """Moves the dense model's stream on until so many sublayers have run."""
        stream = self._at_hand(self.dense)
        for step in dense.program[self.dense_done : count]:
            stream.end(step, self._engine.run(step, stream), self._engine)
        self.dense, self.dense_done = _moved(stream, self.keep), count

    @property
    def _engine(self) -> TorchEngine:
        return TorchEngine(self.run, OneProcess())

    def _at_hand(self, streams: Streams) -> Streams:
        return _moved(streams, self._to_device)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)


def _of_track(streams: Streams, track: int) -> Streams:
    """What one track reads them from, and no more: the other tracks' may lie on disk."""

    def own(update: Update | None) -> Update | None:
        if update is None:
            return None
        guesses = None if update.guesses is None else [update.guesses[track % len(update.guesses)]]
        return Update([update.partials[track % len(update.partials)]], update.common, guesses)

    buckets = {i: replace(b, shown=own(b.shown)) for i, b in streams.buckets.items()}
    return Streams(streams.settled(), buckets=buckets)


def _moved_update(update: Update, move: Keep) -> Update:
    """An update whose tensors were moved: output biases apart, which are small."""
    guesses = None if update.guesses is None else [move(guess) for guess in update.guesses]
    return Update([move(partial) for partial in update.partials], update.common, guesses)


def _moved(streams: Streams, move: Keep) -> Streams:
    """Streams whose tensors were moved, as an update's are."""
    buckets = {}
    for index, bucket in streams.buckets.items():
        shown, hidden = (
            None if update is None else _moved_update(update, move)
            for update in (bucket.shown, bucket.hidden)
        )
        wait = None if bucket.wait is None else functools.partial(move, move(bucket.wait()))
        buckets[index] = replace(bucket, shown=shown, hidden=hidden, wait=wait)
    return Streams(move(streams.settled()), buckets=buckets)


@torch.inference_mode()
def fit_guesses(
    decoder: Any,
    ids_NT: torch.Tensor,
    rank: int,
    progress: Progress,
    scratch: Path | None = None,
) -> list[Fitted]:
    """Fits the guesses of a converted model, which has none yet, on windows of token ids.

    A guess is fitted to the other tracks' partials and the output bias, all that its track doesn't
    see until the merge; after a deferred stage also to what the stream lacks already against the
    dense model's, errors of guesses before it included. (After overlapped ones that gained nothing:
    what it would repair is merged while it is in flight.) `rank` is the largest; `scratch` is the
    directory for streams that memory is not to hold. Raises EvaluationError.
    """
    schedule: Schedule = decoder.layers.schedule
    program = schedule.program
    guessing = [step.index for step in program if step.keeps_own]
    batches = list(_batches(decoder, ids_NT, scratch))
    found = []
    for step in program[: guessing[-1] + 1]:
        progress("fitting guesses", step.index, guessing[-1] + 1)
        fitted = list[Fitted]()
        if step.keeps_own:
            behind = not step.launches and _dense_reaches(schedule, step.index, batches)
            for batch in batches:
                batch.keep_stage(step)
            for place in range(len(step.sublayers)):
                lacks = behind and place == len(step.sublayers) - 1
                fitted.append(_fit_sublayer(decoder, step, place, batches, lacks, rank))
        for batch in batches:
            view, updates = batch.stage(step)
            for f, update in zip(fitted, updates, strict=bool(fitted)):
                _add_guesses(decoder, f, view, update)
            total = functools.reduce(operator.add, updates)
            batch.end(step, total, decoder.layers.waiting_weight)
        found += fitted
    return found


def _batches(decoder: Any, ids_NT: torch.Tensor, scratch: Path | None) -> Iterator[_Batch]:
    streams = most_streams(decoder.layers.schedule, decoder.layers.track_count)
    nbytes = streams * ids_NT.numel() * decoder.get_input_embeddings().weight[0].nbytes
    keep: Keep = _here if nbytes <= MEMORY_BYTES else functools.partial(mapped, scratch)
    size = max(1, min(BATCH_TOKENS // ids_NT.shape[1], len(ids_NT) // HELD_OUT))
    for number, ids_BT in enumerate(torch.split(ids_NT, size), 1):
        stream_BTD, run = decoder.entry(input_ids=ids_BT.to(decoder.device))
        held_out = number % HELD_OUT == 0
        kept = keep(stream_BTD)
        yield _Batch(run, Streams(kept), Streams(kept), held_out, decoder.device, keep)


def most_streams(schedule: Schedule, tracks: int) -> int:
    """How many streams of all windows there are at most at once, as while a stage is fitted."""
    most = 0
    pending: dict[int, int] = {}  # streams of each bucket
    for step in schedule.program:
        kept = (tracks + 1) * len(step.sublayers) if step.keeps_own else 0
        most = max(most, 2 + kept + sum(pending.values()))
        # of those that wait partials and guesses, of those in flight the sum and what is seen
        waiting, flying = 2 * tracks, 1 + tracks * step.keeps_own
        pending[step.bucket] = flying if step.launches else waiting
        for merged in step.merges:
            del pending[merged]
    return most


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _dense_reaches(schedule: Schedule, index: int, batches: Sequence[_Batch]) -> bool:
    """Runs the dense model up to the sublayers that stage `index` ends with; False where it never
    has run just these."""
    positions = [s.position for stage in schedule.stages[: index + 1] for s in stage.sublayers]
    if max(positions) + 1 != len(positions):
        return False
    dense = dense_schedule(schedule.layers)
    for batch in batches:
        batch.run_dense(dense, len(positions))
    return True


def _whole(update: Update) -> torch.Tensor:
    """A sublayer's output as if all tracks' partials were merged."""
    partials = sum(update.partials[1:], start=update.partials[0])
    return partials if update.common is None else partials + update.common


def _fit_sublayer(
    decoder: Any,
    step: Step,
    place: int,
    batches: Sequence[_Batch],
    behind: bool,
    rank: int,
) -> Fitted:
    """Fits the guesses of one of a stage's sublayers, track by track; with `behind` also to what
    the stream lacks after the stage. The batches keep the stage."""
    width, sublayer = decoder.config.hidden_size, step.sublayers[place]
    rank, before = min(rank, width), 0.0
    candidates: list[list[Fit]] = []
    for t, track in enumerate(_tracks(decoder, sublayer)):
        train, test = (Moments(2 * width, width, decoder.device) for _ in range(2))
        for batch in batches:
            pairs = batch.pairs(t, track, step, place, behind)
            (test if batch.held_out else train).add(*pairs)
        candidates.append(fits(train, test, rank))
        before += test.energy
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


def _add_guesses(decoder: Any, fitted: Fitted, view: PerTrack, update: Update) -> None:
    """Adds a sublayer's guesses, if it has any, to what it gave."""
    if fitted.guesses:
        update.guesses = [
            guess(_features(track, fitted.sublayer, view[t % len(view)], partial)).view_as(partial)
            for t, (guess, track, partial) in enumerate(
                zip(fitted.guesses, _tracks(decoder, fitted.sublayer), update.partials, strict=True)
            )
        ]


def _features(
    track: Track, sublayer: Sublayer, view_BTD: torch.Tensor, partial_BTD: torch.Tensor
) -> torch.Tensor:
    """What a track guesses from: a sublayer's normed input and its own partial, (P, 2D)."""
    x_BTD = apply_norm(*track, sublayer.kind, view_BTD)
    return torch.cat([x_BTD, partial_BTD], dim=-1).flatten(0, 1)


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
            yield f"{owner}.from_input.weight", guess.down[:, : shape.width]
            yield f"{owner}.from_partial.weight", guess.down[:, shape.width :]
            yield f"{owner}.to_stream.weight", guess.up
            yield f"{owner}.to_stream.bias", guess.bias
