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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ptconvert.calibrate.on_disk import MEMORY_BYTES, mapped
from ptconvert.calibrate.regression import Affine, Fit, Moments, best, fits
from ptconvert.measure.opening import Progress
from ptconvert.modeling.executor import OneProcess, PerTrack, RunSublayer, Streams, Update
from ptconvert.modeling.layers import OUTPUT_PROJECTIONS, apply_norm
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.stages import DEFERRED, Schedule, Sublayer

HELD_OUT = 5  # each such batch judges what is fitted on the others
NEARLY_ALL = 0.95  # of the gain of the largest rank, for which a smaller one is taken
LEAST_GAIN = 0.01  # of the error; below it no guess is kept
BATCH_TOKENS = 4096

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

    def stage(self, sublayers: Sequence[Sublayer]) -> tuple[PerTrack, list[Update]]:
        """What the tracks read, and what sublayers give for it without guesses."""
        view = self._at_hand(self.student).view()
        if self.updates:
            return view, [_moved_update(update, self._to_device) for update in self.updates]
        return view, [self.run(s, view, False) for s in sublayers]

    def keep_stage(self, sublayers: Sequence[Sublayer]) -> None:
        """Runs a stage's sublayers once for all its fits, each of which goes over all windows."""
        _, updates = self.stage(sublayers)
        self.wholes = [self.keep(_whole(update)) for update in updates]
        self.updates = [_moved_update(update, self.keep) for update in updates]

    def pairs(
        self, t: int, track: Any, sublayer: Sublayer, place: int, behind: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a track guesses a kept sublayer from, (P, 2D), and what it should guess, (P, D).

        With `behind` that is also what its stream would lack against the dense model's after the
        stage, if it saw all partials of this stage and all that is in flight, which is merged while
        the guess is seen.
        """
        streams = self._at_hand(_of_track(self.student, t))
        own_BTD = self._to_device(self.updates[place].partials[t])
        y_BTD = self._to_device(self.wholes[place]) - own_BTD
        if behind:
            y_BTD += self._to_device(self.dense.base) - streams.landed()[0]
            for whole_BTD in self.wholes:
                y_BTD -= self._to_device(whole_BTD)
        return _features(track, sublayer, streams.view()[0], own_BTD), y_BTD.flatten(0, 1)

    def end_stage(self, schedule: Schedule, index: int, own: Update, weight: float) -> None:
        """Moves the converted model's streams on past a stage."""
        student = self._at_hand(self.student)
        student.end_stage(schedule, index, own, OneProcess(), weight)
        self.student = _moved(student, self.keep)
        self.updates, self.wholes = [], []

    def run_dense(self, dense: Schedule, count: int) -> None:
        """Moves the dense model's stream on until so many sublayers have run."""
        stream = self._at_hand(self.dense)
        for index in range(self.dense_done, count):
            own = self.run(dense.stages[index].sublayers[0], stream.view(), False)
            stream.end_stage(dense, index, own, OneProcess())
        self.dense, self.dense_done = _moved(stream, self.keep), count

    def _at_hand(self, streams: Streams) -> Streams:
        return _moved(streams, self._to_device)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)


def _of_track(streams: Streams, track: int) -> Streams:
    """What one track reads them from, and no more: the other tracks' may lie on disk."""

    def own(tensors: PerTrack) -> PerTrack:
        return [tensors[track % len(tensors)]]

    waiting = streams.waiting
    if waiting is not None:
        guesses = None if waiting.guesses is None else own(waiting.guesses)
        waiting = Update(own(waiting.partials), waiting.common, guesses)
    flights = [
        flight if flight.seen is None else replace(flight, seen=own(flight.seen))
        for flight in streams.in_flight
    ]
    return Streams(streams.base, waiting, flights)


def _moved_update(update: Update, move: Keep) -> Update:
    """An update whose tensors were moved: output biases apart, which are small."""
    guesses = None if update.guesses is None else [move(guess) for guess in update.guesses]
    return Update([move(partial) for partial in update.partials], update.common, guesses)


def _moved(streams: Streams, move: Keep) -> Streams:
    """Streams whose tensors were moved, as an update's are."""
    waiting = None if streams.waiting is None else _moved_update(streams.waiting, move)
    flights = []
    for flight in streams.in_flight:
        wait = functools.partial(move, move(flight.wait()))
        seen = None if flight.seen is None else [move(tensor) for tensor in flight.seen]
        flights.append(replace(flight, wait=wait, seen=seen))
    return Streams(move(streams.base), waiting, flights)


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
    schedule: Schedule = decoder.schedule
    weight = 1 / decoder.track_count if decoder.deferred == "mean" else 1.0
    stages = [i for i in range(len(schedule.stages)) if schedule.keeps_own(i)]
    batches = list(_batches(decoder, ids_NT, scratch))
    found = []
    for index in range(stages[-1] + 1):
        progress("fitting guesses", index, stages[-1] + 1)
        stage, fitted = schedule.stages[index], list[Fitted]()
        if index in stages:
            behind = stage.ending == DEFERRED and _dense_reaches(schedule, index, batches)
            for batch in batches:
                batch.keep_stage(stage.sublayers)
            for place, sublayer in enumerate(stage.sublayers):
                lacks = behind and place == len(stage.sublayers) - 1
                fitted.append(_fit_sublayer(decoder, sublayer, place, batches, lacks, rank))
        for batch in batches:
            view, updates = batch.stage(stage.sublayers)
            for f, update in zip(fitted, updates, strict=bool(fitted)):
                _add_guesses(decoder, f, view, update)
            total = sum(updates[1:], start=updates[0])
            batch.end_stage(schedule, index, total, weight)
        found += fitted
    return found


def _batches(decoder: Any, ids_NT: torch.Tensor, scratch: Path | None) -> Iterator[_Batch]:
    streams = most_streams(decoder.schedule, decoder.track_count)
    nbytes = streams * ids_NT.numel() * decoder.embed_tokens.weight[0].nbytes
    keep: Keep = _here if nbytes <= MEMORY_BYTES else functools.partial(mapped, scratch)
    size = max(1, min(BATCH_TOKENS // ids_NT.shape[1], len(ids_NT) // HELD_OUT))
    for number, ids_BT in enumerate(torch.split(ids_NT, size), 1):
        stream_BTD = decoder.embed_tokens(ids_BT.to(decoder.device))
        run, held_out = decoder.runner(stream_BTD), number % HELD_OUT == 0
        kept = keep(stream_BTD)
        yield _Batch(run, Streams(kept), Streams(kept), held_out, decoder.device, keep)


def most_streams(schedule: Schedule, tracks: int) -> int:
    """How many streams of all windows there are at most at once, as while a stage is fitted."""
    most = deferred = 0
    flights: list[tuple[int, int]] = []  # streams of each, and the stage that they are merged after
    for index, stage in enumerate(schedule.stages):
        guesses = schedule.keeps_own(index)
        flights = [(streams, after) for streams, after in flights if after >= index]
        kept = (tracks + 1) * len(stage.sublayers) if guesses else 0
        most = max(most, 2 + deferred + kept + sum(streams for streams, _ in flights))
        after = schedule.merged_after(index)
        deferred = 2 * tracks if after is None else 0
        if after is not None:
            flights.append((1 + tracks * guesses, after))
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
    sublayer: Sublayer,
    place: int,
    batches: Sequence[_Batch],
    behind: bool,
    rank: int,
) -> Fitted:
    """Fits the guesses of one of a stage's sublayers, track by track; with `behind` also to what
    the stream lacks after the stage. The batches keep the stage."""
    width = decoder.embed_tokens.embedding_dim
    rank, before = min(rank, width), 0.0
    candidates: list[list[Fit]] = []
    for t, track in enumerate(_tracks(decoder, sublayer)):
        train, test = (Moments(2 * width, width, decoder.device) for _ in range(2))
        for batch in batches:
            pairs = batch.pairs(t, track, sublayer, place, behind)
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
    track: Any, sublayer: Sublayer, view_BTD: torch.Tensor, partial_BTD: torch.Tensor
) -> torch.Tensor:
    """What a track guesses from: a sublayer's normed input and its own partial, (P, 2D)."""
    x_BTD = apply_norm(track, sublayer.kind, view_BTD)
    return torch.cat([x_BTD, partial_BTD], dim=-1).flatten(0, 1)


def _tracks(decoder: Any, sublayer: Sublayer) -> list[Any]:
    return list(decoder.layers[sublayer.layer].tracks.values())


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
