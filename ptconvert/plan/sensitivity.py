"""What a schedule does to a model's predictions on the user's text, measured.

The source runs once; the residual stream that enters each of its layers is kept. A schedule whose
first stages are the dense model's then runs from the layer at which it departs from it, on the
kept stream. All layers are held as tracks in one temporary conversion, which can run any schedule.
Where a text will decide an assignment and guesses, it has such as stand for them. Shapes: N
windows, T tokens in each, D residual stream width.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from ptconvert.calibrate import stand_ins
from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.convert.transform import Plan, execute
from ptconvert.errors import EvaluationError
from ptconvert.measure import divergence
from ptconvert.measure.batch import enough_memory
from ptconvert.measure.cache import named_by
from ptconvert.measure.divergence import Reference
from ptconvert.measure.opening import open_model
from ptconvert.measure.progress import Progress
from ptconvert.plan.case import Case
from ptconvert.plan.segments import Segment, alone
from ptconvert.schedule.presets import parallel_track
from ptconvert.schedule.schedule import Schedule

STREAM_BYTES = 4 << 30  # of memory for the kept streams; where it is too little, not all are kept


@dataclass(frozen=True)
class Cost:
    """A schedule on some windows, of each: KL(source || schedule) and the rise of the loss, both in
    nats per token, and the share of tokens on which the first choice stays the same."""

    kl_by_window: tuple[float, ...]
    loss_by_window: tuple[float, ...]
    agreement_by_window: tuple[float, ...]

    @property
    def kl(self) -> float:
        """The mean over windows."""
        return mean(self.kl_by_window)

    @property
    def loss(self) -> float:
        """The mean over windows."""
        return mean(self.loss_by_window)

    @property
    def agreement(self) -> float:
        """The mean over windows."""
        return mean(self.agreement_by_window)


OfWindow = tuple[float, float, float]  # a window's part of the fields of a cost


class Store:
    """Costs by schedule and window, in a file of JSON lines, written as they come.

    A line that was cut short, as by a kill, or is damaged otherwise, is measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._costs: dict[str, dict[int, OfWindow]] = {}
        lines = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in lines.splitlines():
            try:
                schedule, of_windows = json.loads(line)
                for window, *cost in of_windows:
                    kl, loss, agreement = map(float, cost)
                    if isinstance(window, int) and all(map(math.isfinite, (kl, loss, agreement))):
                        self._costs.setdefault(str(schedule), {})[window] = kl, loss, agreement
            except (ValueError, TypeError):
                continue

    def get(self, schedule: Schedule) -> Mapping[int, OfWindow]:
        """By window, as far as is known."""
        return self._costs.get(str(schedule), {})

    def put(self, schedule: Schedule, costs: Mapping[int, OfWindow]) -> None:
        """Keeps the costs on some windows, on disk too."""
        self._costs.setdefault(str(schedule), {}).update(costs)
        entry = str(schedule), [(window, *cost) for window, cost in costs.items()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))  # a line of its own, even after one cut short


def store_file(cache: Path, model_digest: str, case: Case) -> Path:
    """The file of a model's costs: by its content, the text's token ids, and what computes."""
    kind = case.device.split(":")[0]
    told = [model_digest, *_told(case.windows.ids), case.tracks, case.dtype, kind]
    if case.in_place is not None:
        told += [*case.in_place.wanted.items(), *_told(case.in_place.ids)]
    name = named_by(told)
    return cache / "plan" / f"{name}.jsonl"


def _told(ids: torch.Tensor) -> tuple[object, ...]:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest(), ids.shape


class Meter:
    """Measures schedules of a dense checkpoint over n tracks.

    No model is opened until a cost is asked for that isn't in the store.
    """

    def __init__(self, case: Case, store: Store, progress: Progress) -> None:
        self.case = case
        self.source, self.tracks, self.windows = case.source, case.tracks, case.windows
        self.dtype, self.device, self.batch = case.dtype, case.device, case.batch
        self.store, self.progress = store, progress
        self.layers, self.dense = case.shape.layers, case.shape.dense
        self.parallel = case.shape.family.parallel
        self._layers_run = 0
        self.fitting_seconds = 0.0  # what is in place took

    def costs(
        self, schedules: Iterable[Schedule], step: str, windows: Sequence[int] | None = None
    ) -> list[Cost]:
        """The cost of each schedule on some windows, or on all. Raises EvaluationError."""
        return list(self.each(schedules, step, windows))

    def each(
        self, schedules: Iterable[Schedule], step: str, windows: Sequence[int] | None = None
    ) -> Iterator[Cost]:
        """The same, one after the other, each measured when it is asked for, on those of the
        windows on which it wasn't before."""
        asked = list(schedules)
        wanted = range(len(self.windows.ids)) if windows is None else windows
        for done, schedule in enumerate(asked):
            known = self.store.get(schedule)
            if unknown := [w for w in wanted if w not in known]:
                self.progress(step, done, len(asked))
                self.store.put(schedule, self._measure(schedule, unknown))
                known = self.store.get(schedule)
            yield Cost(*zip(*(known[w] for w in wanted), strict=True))

    def alone(
        self, segments: Iterable[Segment], step: str, windows: Sequence[int] | None = None
    ) -> list[float]:
        """The KL of each segment by itself, all else as in the dense model, on some windows, or on
        all; nats per token. Raises EvaluationError."""
        schedules = [alone(segment, self.layers) for segment in segments]
        return [cost.kl for cost in self.costs(schedules, step, windows)]

    @property
    def passes(self) -> float:
        """What was computed, in forward passes of the dense model over all windows, beside what is
        fitted."""
        if "_opened" not in vars(self):
            return 0.0
        return 1 + self._layers_run / (self.layers * len(self.windows.ids))

    def _measure(self, schedule: Schedule, windows: list[int]) -> dict[int, OfWindow]:
        reference, model = self._opened
        layer = self._departs(schedule)
        self._layers_run += (self.layers - layer) * len(windows)
        layers = model.get_decoder().layers
        layers.schedule, layers.first_stage = schedule, self.dense.ran.index(2 * layer)
        tokens = divergence.measure(
            model,
            reference,
            self.windows,
            self.batch,
            _quiet,
            some=windows,
            stream=reference.streams[layer],
        )
        kl_N = tokens.kl.mean(axis=1).clip(min=0)  # below it by rounding only
        loss_N = (tokens.converted_loss - tokens.source_loss).mean(axis=1)
        of_window = kl_N, loss_N, tokens.agree.mean(axis=1)
        whose = "its" if not np.isfinite(tokens.source_loss).all() else "a converted model's"
        self._check_finite(torch.from_numpy(kl_N), whose)
        by_window = zip(*(values_N.tolist() for values_N in of_window), strict=True)
        return dict(zip(windows, by_window, strict=True))

    def _departs(self, schedule: Schedule) -> int:
        """The last kept layer before which the schedule is the dense one's."""
        pairs = zip(schedule.stages, self.dense.stages, strict=False)
        last = len(self.dense.stages) - 1
        same = self.dense.ran[next((i for i, (a, b) in enumerate(pairs) if a != b), last)]
        return last_kept(self._kept, same // 2)

    @cached_property
    def _kept(self) -> range:
        """The layers whose streams are kept."""
        width = int(str(self.source.language["hidden_size"]))
        return kept_layers(self.layers, self.windows.ids[:, 1:].numel() * width * 4)

    @cached_property
    def _opened(self) -> tuple[Reference, Any]:
        """The source's predictions and streams, and the model that runs any schedule."""
        self.progress("opening the source", 0, None)
        model = open_model(self.source, self.dtype, self.device)
        reference = divergence.reference(
            model, self.windows, self.batch, self.progress, tuple(self._kept)
        )
        self._check_finite(reference.hidden, "its")
        self.store.path.parent.mkdir(parents=True, exist_ok=True)
        orders: Mapping[int, Assignment] = {}
        if (in_place := self.case.in_place) is not None:
            # beside the costs, which are with no other
            kept, shape = self.store.path.with_suffix(".safetensors"), self.case.shape
            with self._fitting():
                orders = in_place.orders(model, shape, self.tracks, kept, self.progress)
        del model
        self.progress("cutting all layers into tracks", 0, None)
        model = self._all_tracks(orders)
        if in_place is not None:
            with self._fitting():
                in_place.complete(model.get_decoder(), shape, orders, kept, self.progress)
        return reference, model

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Counts the seconds. Raises EvaluationError where memory runs out."""
        started = time.monotonic()
        with enough_memory(
            f"{self.device}: out of memory while what the spec will want is fitted; --dry-run says "
            "what that takes"
        ):
            yield
        self.fitting_seconds += time.monotonic() - started

    def _check_finite(self, values: torch.Tensor, whose: str) -> None:
        """Raises EvaluationError where a model's outputs are no numbers."""
        if not values.isfinite().all():
            raise EvaluationError(
                f"{self.source.path}: {whose} outputs are not all finite in {self.dtype}, and "
                "can't be compared" + ("" if self.dtype == "float32" else "; try --dtype float32")
            )

    def _all_tracks(self, orders: Mapping[int, Assignment]) -> Any:
        """The model with every layer held as tracks; its files are gone when it is open."""
        plan = all_as_tracks(self.source, self.tracks, stand_ins.known(orders))
        with tempfile.TemporaryDirectory(prefix="tracks-", dir=self.store.path.parent) as directory:
            converted = Path(directory) / "model"
            execute(plan, converted)
            return open_model(open_checkpoint(converted), self.dtype, self.device)


def all_as_tracks(source: Checkpoint, tracks: int, known: Calibration | None = None) -> Plan:
    """The conversion that holds every layer as tracks, assigned as is known. Raises
    PTConvertError."""
    layers = int(str(source.language["num_hidden_layers"]))
    wanted = {} if known is None else known.values
    use = f"{parallel_track.__name__}, depth: {layers}"
    return stand_ins.all_by(source, tracks, use, wanted, known)


def kept_layers(layers: int, stream_bytes: int) -> range:
    """The layers whose streams are kept: all, or every so many where memory is short."""
    return range(0, layers, math.ceil(layers * stream_bytes / STREAM_BYTES))


def last_kept(kept: range, layer: int) -> int:
    """The last of the kept layers that isn't after this one."""
    return layer - layer % kept.step


def _quiet(*_: object) -> None:
    """No progress within a schedule."""
