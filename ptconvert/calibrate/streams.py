"""Windows that go through a converted model together, one stage at a time, for what is fitted on
the streams there: each fit sees what those before it leave.

Shapes: B windows, T tokens, D width.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ptconvert.calibrate.on_disk import MEMORY_BYTES, mapped
from ptconvert.errors import EvaluationError
from ptconvert.measure.progress import Progress
from ptconvert.modeling.executor import (
    OneProcess,
    PerTrack,
    RunSublayer,
    Scalar,
    Streams,
    TorchEngine,
    Update,
)
from ptconvert.schedule.lower import Step
from ptconvert.schedule.schedule import Schedule

HELD_OUT = 5  # each such batch judges what is fitted on the others
BATCH_TOKENS = 4096

Keep = Callable[[torch.Tensor], torch.Tensor]
T = TypeVar("T")


@dataclass
class Batch:
    """Windows that run together, and their streams in the converted model.

    `keep` takes a tensor to where streams lie between two stages.
    """

    run: RunSublayer
    streams: Streams
    held_out: bool
    device: torch.device
    keep: Keep
    scalar: Scalar  # the model's
    updates: list[Update] = field(default_factory=list)  # of the stage at hand, if it is kept
    wholes: list[torch.Tensor] = field(default_factory=list)  # their outputs, all tracks merged

    def stage(self, step: Step) -> tuple[PerTrack, list[Update]]:
        """What the tracks read, and what sublayers give for it without guesses."""
        view = self._at_hand(self.streams).view(step)
        if self.updates:
            return view, [_moved_update(update, self.to_device) for update in self.updates]
        return view, [self.run(s, view, step.keeps_own) for s in step.sublayers]

    def keep_stage(self, step: Step) -> None:
        """Runs a stage's sublayers once for all its fits, each of which goes over all windows."""
        _, updates = self.stage(step)
        for sublayer, update in zip(step.sublayers, updates, strict=True):
            check_finite(sublayer.layer, *update.partials)
        self.wholes = [self.keep(_whole(update)) for update in updates]
        self.updates = [_moved_update(update, self.keep) for update in updates]

    def of_track(self, track: int) -> Streams:
        """The converted model's streams as one track reads them, at hand, and no more: the other
        tracks' may lie on disk."""

        def own(update: Update | None) -> Update | None:
            if update is None:
                return None
            guesses = update.guesses
            if guesses is not None:
                guesses = [guesses[track % len(guesses)]]
            return Update([update.kept[track % len(update.kept)]], update.common, guesses)

        buckets = {i: replace(b, shown=own(b.shown)) for i, b in self.streams.buckets.items()}
        return self._at_hand(Streams(self.streams.settled(), buckets=buckets))

    def end(self, step: Step, own: Update, weight: float) -> None:
        """Moves the converted model's streams on past a stage."""
        streams = self._at_hand(self.streams)
        streams.end(step, own, self._engine, weight)
        streams.complete(step, self.scalar)
        self.streams = _moved(streams, self.keep)
        self.updates, self.wholes = [], []

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is kept, to compute with."""
        return tensor.to(self.device)

    @property
    def _engine(self) -> TorchEngine:
        return TorchEngine(self.run, OneProcess())

    def _at_hand(self, streams: Streams) -> Streams:
        return _moved(streams, self.to_device)


def fitted_by_stage(
    decoder: Any,
    ids_NT: torch.Tensor,
    what: str,
    progress: Progress,
    scratch: Path | None,
    fit: Callable[[Step, Sequence[Batch]], list[T]],
    use: Callable[[T, PerTrack, Update], None],
    program: Sequence[Step] | None = None,
) -> list[T]:
    """What is fitted on windows of token ids after each stage from which tracks go on with their
    own partials, one thing for each of its sublayers, in order.

    `fit` is given batches that keep the stage; `use` puts what was fitted, of what tracks read,
    into a sublayer's update, for the stages that follow. `scratch` is as for `batches`. The stages
    are the schedule's, or a `program` of others. Raises EvaluationError where what is fitted to
    isn't finite.
    """
    given, found = list(batches(decoder, ids_NT, scratch, program)), list[T]()
    program = decoder.layers.schedule.program if program is None else program
    last = max(step.index for step in program if step.keeps_own)
    for step in program[: last + 1]:
        progress(f"fitting {what}", step.index, last + 1)
        fitted = list[T]()
        if step.keeps_own:
            for batch in given:
                batch.keep_stage(step)
            fitted = fit(step, given)
        for batch in given:
            view, updates = batch.stage(step)
            for one, update in zip(fitted, updates, strict=bool(fitted)):
                use(one, view, update)
            total = functools.reduce(operator.add, updates)
            batch.end(step, total, decoder.layers.waiting_weight)
        found += fitted
    return found


def batches(
    decoder: Any,
    ids_NT: torch.Tensor,
    scratch: Path | None,
    program: Sequence[Step] | None = None,
) -> Iterator[Batch]:
    """Windows of token ids in batches, each at the first stage of a converted model, which is to
    run its schedule or another `program`. `scratch` is the directory for streams that memory is not
    to hold."""
    layers = decoder.layers
    count = most_streams(layers.schedule, layers.track_count, layers.norms_sums, program)
    nbytes = count * ids_NT.numel() * decoder.get_input_embeddings().weight[0].nbytes
    keep: Keep = _here if nbytes <= MEMORY_BYTES else functools.partial(mapped, scratch)
    size = max(1, min(BATCH_TOKENS // ids_NT.shape[1], len(ids_NT) // HELD_OUT))
    for number, ids_BT in enumerate(torch.split(ids_NT, size), 1):
        stream_BTD, run = decoder.entry(input_ids=ids_BT.to(decoder.device))
        held_out = number % HELD_OUT == 0
        streams = Streams(keep(stream_BTD))
        yield Batch(run, streams, held_out, decoder.device, keep, layers.scalar)


def most_streams(
    schedule: Schedule,
    tracks: int,
    norms_sums: bool = False,
    program: Sequence[Step] | None = None,
) -> int:
    """How many streams of all windows there are at most at once, as while a stage is fitted: of a
    schedule, or of another `program` with the same stages. Where sums are normed, each sublayer's
    is apart from what tracks see of it."""
    most = 0
    pending: dict[int, int] = {}  # streams of each bucket
    for step in schedule.program if program is None else program:
        kept = (tracks + 1 + norms_sums) * len(step.sublayers) if step.keeps_own else 0
        most = max(most, 1 + kept + sum(pending.values()))
        # of those that wait partials and guesses, of those in flight the sum and what is seen
        sums = schedule.carried[step.bucket] if norms_sums else 0
        waiting, flying = 2 * tracks + sums, max(sums, 1) + tracks * step.keeps_own
        pending[step.bucket] = flying if step.launches else waiting
        for merged in step.merges:
            del pending[merged]
    return most


def check_finite(layer: int, *tensors: torch.Tensor) -> None:
    """Raises EvaluationError where what a layer computes is no number."""
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise EvaluationError(
                f"layer {layer}: what it computes from the text isn't all finite, so nothing can "
                "be fitted to it; try --dtype float32, or look at the weights"
            )


def _whole(update: Update) -> torch.Tensor:
    """What joins the stream of one sublayer as if all tracks' partials were merged."""
    partials = sum(update.partials[1:], start=update.partials[0])
    if update.normed:
        return update.normed[0](partials[0])
    return partials if update.common is None else partials + update.common


def _moved_update(update: Update, move: Keep) -> Update:
    """An update whose tensors were moved: output biases apart, which are small."""
    guesses, own = (
        None if given is None else [move(tensor) for tensor in given]
        for given in (update.guesses, update.own)
    )
    partials = [move(partial) for partial in update.partials]
    return replace(update, partials=partials, guesses=guesses, own=own)


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


def _here(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
