"""What a schedule does to a model's predictions on the user's text, measured.

The source runs once; the residual stream that enters each of its layers is kept. A schedule whose
first stages are the dense model's then runs from the layer at which it departs from it, on the
kept stream. All layers are held as tracks in one temporary conversion, which can run any schedule.
What a segment costs by itself is told by what it does where it stands (see perturbation.py).
Shapes: N windows, T tokens in each, D residual stream width.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.convert.transform import Plan, execute, plan_conversion
from ptconvert.measure import divergence
from ptconvert.measure.cache import named_by
from ptconvert.measure.divergence import Reference
from ptconvert.measure.opening import open_model
from ptconvert.measure.progress import Progress
from ptconvert.plan.case import Case
from ptconvert.plan.perturbation import Perturbations
from ptconvert.plan.segments import Segment, alone
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import parse_spec

STREAM_BYTES = 4 << 30  # of memory for the kept streams; where it is too little, not all are kept


@dataclass(frozen=True)
class Cost:
    """A schedule on N windows: each window's KL(source || schedule) and rise of the loss, both in
    nats per token, and the share of tokens on which the first choice stays the same."""

    kl_by_window: tuple[float, ...]
    loss_by_window: tuple[float, ...]
    agreement: float

    @property
    def kl(self) -> float:
        """The mean over windows."""
        return sum(self.kl_by_window) / len(self.kl_by_window)

    @property
    def loss(self) -> float:
        """The mean over windows."""
        return sum(self.loss_by_window) / len(self.loss_by_window)


class Store:
    """Costs by schedule, and of segments by themselves, in a file of JSON lines, written as they
    come.

    A line that was cut short, as by a kill, is measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._costs: dict[tuple[str, int], Cost] = {}
        self._alone: dict[tuple[str, int], float] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                what, every, kl, *more = json.loads(line)
                if more:
                    loss, agreement = more
                    self._costs[what, every] = Cost(tuple(kl), tuple(loss), agreement)
                else:
                    self._alone[what, every] = float(kl)
            except (ValueError, TypeError):
                continue

    def get(self, schedule: Schedule, every: int) -> Cost | None:
        """The cost on each `every`-th window, if known."""
        return self._costs.get((str(schedule), every))

    def put(self, schedule: Schedule, every: int, cost: Cost) -> None:
        """Keeps a cost, on disk too."""
        self._costs[str(schedule), every] = cost
        self._write(str(schedule), every, cost.kl_by_window, cost.loss_by_window, cost.agreement)

    def get_alone(self, schedule: Schedule, every: int) -> float | None:
        """The KL, to second order, of a dense schedule with one segment, if known."""
        return self._alone.get((str(schedule), every))

    def put_alone(self, schedule: Schedule, every: int, kl: float) -> None:
        """Keeps such a KL, on disk too."""
        self._alone[str(schedule), every] = kl
        self._write(str(schedule), every, kl)

    def _write(self, *entry: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))  # a line of its own, even after one cut short


def store_file(cache: Path, model_digest: str, case: Case) -> Path:
    """The file of a model's costs: by its content, the text's token ids, and what computes."""
    ids = case.windows.ids
    text = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    kind = case.device.split(":")[0]
    name = named_by([model_digest, text, ids.shape, case.tracks, case.dtype, kind])
    return cache / "plan" / f"{name}.jsonl"


class Meter:
    """Measures schedules of a dense checkpoint over n tracks.

    No model is opened until a cost is asked for that isn't in the store.
    """

    def __init__(self, case: Case, store: Store, progress: Progress) -> None:
        self.source, self.tracks, self.windows = case.source, case.tracks, case.windows
        self.dtype, self.device, self.batch = case.dtype, case.device, case.batch
        self.store, self.progress = store, progress
        self.layers, self.dense = case.shape.layers, case.shape.dense
        self.parallel = case.shape.family.parallel
        self._perturbed: dict[int, Perturbations] = {}
        self._layers_run = 0

    def costs(self, schedules: Iterable[Schedule], step: str, every: int = 1) -> list[Cost]:
        """The cost of each schedule, on each `every`-th window. Raises EvaluationError."""
        return list(self.each(schedules, step, every))

    def each(self, schedules: Iterable[Schedule], step: str, every: int = 1) -> Iterator[Cost]:
        """The same, one after the other, each measured when it is asked for."""
        asked = list(schedules)
        for done, schedule in enumerate(asked):
            cost = self.store.get(schedule, every)
            if cost is None:
                self.progress(step, done, len(asked))
                cost = self._measure(schedule, every)
                self.store.put(schedule, every, cost)
            yield cost

    def alone(self, segments: Iterable[Segment], step: str, every: int = 1) -> list[float]:
        """The KL of each segment by itself, all else as in the dense model, to second order, on
        each `every`-th window; nats per token. Raises EvaluationError."""
        found, asked = [], list(segments)
        for done, segment in enumerate(asked):
            schedule = alone(segment, self.layers)  # of several segments the same
            kl = self.store.get_alone(schedule, every)
            if kl is None:
                self.progress(step, done, len(asked))
                kl = self._perturbations(every).kl(segment)
                self.store.put_alone(schedule, every, kl)
            found.append(kl)
        return found

    @property
    def passes(self) -> float:
        """What was computed, in forward passes of the dense model over all windows."""
        if "_opened" not in vars(self):
            return 0.0
        more = sum(p.layers_run for p in self._perturbed.values())
        return 1 + (self._layers_run + more) / (self.layers * len(self.windows.ids))

    def _perturbations(self, every: int) -> Perturbations:
        if every not in self._perturbed:
            reference, model = self._opened
            streams = {layer: stream[::every] for layer, stream in reference.streams.items()}
            spacing = gradient_spacing(self.layers, streams[0].nbytes)
            self._perturbed[every] = Perturbations(
                model, self.dense, streams, spacing, self.batch, self.progress
            )
        return self._perturbed[every]

    def _measure(self, schedule: Schedule, every: int) -> Cost:
        reference, model = self._opened
        layer = self._departs(schedule)
        self._layers_run += (self.layers - layer) * len(self.windows.ids[::every])
        layers = model.get_decoder().layers
        layers.schedule, layers.first_stage = schedule, self.dense.ran.index(2 * layer)
        tokens = divergence.measure(
            model,
            reference,
            self.windows,
            self.batch,
            _quiet,
            every=every,
            stream=reference.streams[layer],
        )
        loss_N = (tokens.converted_loss - tokens.source_loss).mean(axis=1)
        return Cost(
            tuple(map(float, tokens.kl.mean(axis=1).clip(min=0))),  # below it by rounding only
            tuple(map(float, loss_N)),
            float(tokens.agree.mean()),
        )

    def _departs(self, schedule: Schedule) -> int:
        """The last kept layer before which the schedule is the dense one's."""
        pairs = zip(schedule.stages, self.dense.stages, strict=False)
        last = len(self.dense.stages) - 1
        same = self.dense.ran[next((i for i, (a, b) in enumerate(pairs) if a != b), last)]
        return max(layer for layer in self._kept if 2 * layer <= same)

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
        del model
        self.progress("cutting all layers into tracks", 0, None)
        return reference, self._all_tracks()

    def _all_tracks(self) -> Any:
        """The model with every layer held as tracks; its files are gone when it is open."""
        plan = all_as_tracks(self.source, self.tracks)
        self.store.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tracks-", dir=self.store.path.parent) as directory:
            converted = Path(directory) / "model"
            execute(plan, converted)
            model = open_model(open_checkpoint(converted), self.dtype, self.device)
            return model.requires_grad_(False)


def all_as_tracks(source: Checkpoint, tracks: int) -> Plan:
    """The conversion that holds every layer as tracks. Raises PTConvertError."""
    layers = int(str(source.language["num_hidden_layers"]))
    spec = parse_spec(
        f"format: 1\ntracks: {tracks}\nschedule:\n  - layers: 0-{layers - 1}\n"
        f"    use: parallel_track\n    depth: {layers}\n",
        "all layers as tracks",
    )
    return plan_conversion(source, spec, source_name=source.path.name)


def kept_layers(layers: int, stream_bytes: int) -> range:
    """The layers whose streams are kept: all, or every so many where memory is short."""
    return range(0, layers, math.ceil(layers * stream_bytes / STREAM_BYTES))


def gradient_spacing(layers: int, stream_bytes: int) -> int:
    """Before each how many layers there is a gradient, which is as long as a stream."""
    return math.ceil(2 * stream_bytes * (layers + 1) / STREAM_BYTES)


def _quiet(*_: object) -> None:
    """No progress within a schedule."""
