"""What a healing will hold and how long it will take, from the sizes and one layer's first step."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import Section, read_section
from ptconvert.heal.blockwise import STREAM_BYTES, blocks_of
from ptconvert.heal.data import Data
from ptconvert.heal.models import changed_layers, in_layers
from ptconvert.heal.settings import Settings
from ptconvert.measure.divergence import LOGITS_AT_ONCE
from ptconvert.measure.needs import Held, Needs, Phase, Place
from ptconvert.measure.one_layer import Step, head_seconds, in_a_layer, one_layer, step_of
from ptconvert.measure.opening import schedule_of
from ptconvert.models.shape import DTYPE_BYTES, DTYPES, ELEMENT_BYTES, ModelShape
from ptconvert.runtime.load import shape_of
from ptconvert.runtime.memory import PROCESS_BYTES

_TRAINED = 4 + 4 + 8  # bytes of a trained number: it and its gradient in fp32, AdamW's two moments
_LOGITS = 4  # copies in fp32 of LOGITS_AT_ONCE numbers, while a piece is compared
_PROCESS = Held("the process", PROCESS_BYTES, Place.MEMORY)


def heal_needs(student: Checkpoint, teacher: Checkpoint, data: Data, settings: Settings) -> Needs:
    """A healing's phases, as one of the processes that a launcher started has them."""
    pair = _Pair(student, teacher, data, settings)
    phases = [_measuring(pair)]
    if settings.blockwise:
        phases.append(_blockwise(pair))
    if settings.kl:
        phases.append(_end_to_end(pair))
    return Needs(settings.device, tuple(phases))


@dataclass(frozen=True)
class _Pair:
    """Student and teacher, and what one window takes in layers of theirs."""

    student: Checkpoint
    teacher: Checkpoint
    data: Data
    settings: Settings

    @cached_property
    def shape(self) -> ModelShape:
        return shape_of(self.student)

    @cached_property
    def section(self) -> Section:
        return read_section(self.student.config)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The student's parameters, by name."""
        return {n: e.nbytes // ELEMENT_BYTES[e.dtype] for n, e in self.student.tensors.items()}

    @property
    def taught(self) -> int:
        """The teacher's parameters."""
        return sum(e.nbytes // ELEMENT_BYTES[e.dtype] for e in self.teacher.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of a number as it is computed with."""
        return DTYPE_BYTES[DTYPES[self.settings.dtype]]

    @property
    def stream(self) -> int:
        """Bytes of one window's residual stream."""
        return self.data.length * self.shape.width * self.size

    @property
    def windows(self) -> int:
        """How many windows a stage trains on, repeated ones counted."""
        return len(self.data.order(self.settings.tokens, self.settings.seed))

    def in_layers(self, layers: Collection[int]) -> int:
        """Parameters of these layers of the student."""
        return sum(count for name, count in self.numbers.items() if in_layers(name, layers))

    def steps(self, trains: bool) -> Mapping[int, Step]:
        """What one window takes in a layer, by the number of tracks it is held as; 1 is dense."""
        return {
            tracks: step_of(
                one_layer(self.teacher.config, tracks, self.settings.device),
                *(self.settings.dtype, 1, self.data.length, trains),
            )
            for tracks in {1, self.section.tracks}
        }

    @cached_property
    def trained(self) -> Mapping[int, Step]:
        return self.steps(trains=True)

    def of(self, layers: Iterable[int], steps: Mapping[int, Step]) -> Iterator[Step]:
        """The student's layers, one after the other."""
        tracked = self.section.schedule.track_layers
        return (steps[self.section.tracks if i in tracked else 1] for i in layers)

    def forward(self, layers: Iterable[int]) -> float:
        """Seconds of one window through these layers of the student."""
        return sum(step.forward for step in self.of(layers, self.trained))

    def teaches(self, layers: Collection[int]) -> float:
        """Seconds of one window through these layers of the teacher."""
        return len(layers) * self.trained[1].forward

    @cached_property
    def head(self) -> float:
        """Seconds in which one window's predictions are made and compared."""
        shape, settings = self.shape, self.settings
        sizes = shape.vocabulary, shape.width
        return head_seconds(*sizes, settings.dtype, settings.device, self.data.length)


def _measuring(pair: _Pair) -> Phase:
    shape, settings, layers = pair.shape, pair.settings, range(pair.shape.layers)
    windows, batch = len(pair.data.held_out.ids), settings.batch_size
    layer = in_a_layer(shape, pair.section.tracks, pair.data.length, pair.size)
    times = 1 + settings.blockwise + settings.kl
    return Phase(
        "measuring on held-out text",
        (
            Held("weights", sum(pair.numbers.values()) * pair.size, Place.DEVICE),
            Held("the teacher's head", shape.vocabulary * shape.width * pair.size, Place.DEVICE),
            Held(f"a layer's streams, {batch} windows", batch * layer, Place.DEVICE),
            Held("the teacher's last streams", windows * pair.stream, Place.MEMORY),
            _logits(),
            _PROCESS,
        ),
        windows * (pair.teaches(layers) + times * (pair.forward(layers) + pair.head)),
    )


def _blockwise(pair: _Pair) -> Phase:
    shape, batch = pair.shape, pair.settings.batch_size
    blocks = [block.layers for block in blocks_of(schedule_of(pair.student)) if block.changed]

    def kept(layers: range) -> int:
        return batch * sum(step.kept for step in pair.of(layers, pair.trained))

    def seconds(layers: range) -> float:
        both = sum(step.both for step in pair.of(layers, pair.trained)) + pair.teaches(layers)
        return pair.windows * both + 2 * held_out * (pair.forward(layers) + pair.teaches(layers))

    largest = max(blocks, key=lambda b: _TRAINED * pair.in_layers(b) + kept(b))
    held_out = len(pair.data.held_out.ids)
    used = min(pair.windows, len(pair.data.train)) + held_out
    streams = used * pair.stream
    layer = sum(math.prod(shape.size(rule)) for rule in shape.rules)
    return Phase(
        "block by block",
        (
            Held(
                f"layers {largest.start}-{largest.stop - 1}, with AdamW's state",
                _TRAINED * pair.in_layers(largest),
                Place.DEVICE,
            ),
            Held("the teacher's", len(largest) * layer * pair.size, Place.DEVICE),
            Held(f"activations, {batch} windows", kept(largest), Place.DEVICE),
            Held(
                "streams of all windows",
                streams,
                Place.MEMORY if streams <= STREAM_BYTES else Place.DISK,
            ),
            _PROCESS,
        ),
        sum(map(seconds, blocks)) + used * pair.forward(range(shape.layers)),
    )


def _end_to_end(pair: _Pair) -> Phase:
    shape, settings, layers = pair.shape, pair.settings, range(pair.shape.layers)
    batch, ranks = settings.batch_size, int(os.environ.get("WORLD_SIZE", "1"))
    cut = ranks if settings.fsdp else 1
    changed = changed_layers(pair.section.schedule)
    moves = [n for n in pair.numbers if settings.train == "all" or in_layers(n, changed)]
    trained = sum(pair.numbers[name] for name in moves)
    still = sum(pair.numbers.values()) - trained
    steps, own = pair.trained, 0  # of what stays, as the teacher hasn't it (see models.share)
    if settings.lora is not None:
        steps = pair.steps(trains=False)
        if pair.section.assigned:
            own = sum(pair.numbers[name] for name in moves if ".tracks." in name)
        entries = [pair.student.tensors[name].shape for name in moves]
        trained = sum(settings.lora * sum(size) for size in entries if len(size) == 2)
        still = sum(pair.numbers.values())
    frozen = still if settings.fsdp else own
    kept = batch * sum(step.kept for step in pair.of(layers, steps))
    again = 1.0
    if settings.gradient_checkpointing:  # a layer's inputs, and one layer's activations
        streams = shape.layers * (pair.section.tracks + 1) * pair.stream
        kept = batch * (streams + max(step.kept for step in steps.values()))
        again = 4 / 3
    both = sum(step.both for step in pair.of(layers, steps)) + pair.teaches(layers) + 3 * pair.head
    judged = settings.evaluations * len(pair.data.held_out.ids)
    logits = 2 * batch * pair.data.length * shape.vocabulary * pair.size
    return Phase(
        "end to end",
        (
            Held("the teacher's weights", pair.taught * pair.size // cut, Place.DEVICE),
            Held("the student's frozen ones", frozen * pair.size // cut, Place.DEVICE),
            Held(
                f"{trained:,} trained, gradients, moments", _TRAINED * trained // cut, Place.DEVICE
            ),
            Held(f"activations, {batch} windows", kept, Place.DEVICE),
            Held("logits and their gradients", logits, Place.DEVICE),
            _logits(),
            _PROCESS,
        ),
        pair.windows / ranks * both * again
        + judged / ranks * (pair.forward(layers) + pair.teaches(layers) + pair.head),
    )


def _logits() -> Held:
    return Held("logits, a piece", _LOGITS * 4 * LOGITS_AT_ONCE, Place.DEVICE)
