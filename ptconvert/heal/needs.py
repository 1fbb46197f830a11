"""What a healing will hold and how long it will take, from the sizes and one layer's first step."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import Section, read_section
from ptconvert.heal.adapters import lora_config
from ptconvert.heal.answers import answer_bytes
from ptconvert.heal.blockwise import STREAM_BYTES, blocks_of
from ptconvert.heal.data import Data
from ptconvert.heal.models import adaptable, in_layers, is_of_experts, trainable
from ptconvert.heal.settings import Settings
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.divergence import LOGITS_AT_ONCE
from ptconvert.measure.needs import Held, Needs, Phase, Place, shares_memory, spilling
from ptconvert.measure.one_layer import (
    PROCESS,
    Step,
    forward_seconds,
    head_seconds,
    in_a_layer,
    one_layer,
    step_of,
)
from ptconvert.models.quantised import quantization_of
from ptconvert.models.shape import DTYPE_BYTES, DTYPES, ModelShape
from ptconvert.runtime.load import opened, shape_of
from ptconvert.runtime.mtp import head_on_meta
from ptconvert.shorten import counted

T = TypeVar("T")
_TRAINED = 4 + 4 + 8  # bytes of a trained number: it and its gradient in fp32, AdamW's two moments
_STATES = 3  # of the Trainer's: the newest, the best, and one that is being written
_LOGITS = 4  # copies in fp32 of LOGITS_AT_ONCE numbers, while a piece is compared


def heal_needs(student: Checkpoint, teacher: Checkpoint, data: Data, settings: Settings) -> Needs:
    """A healing's phases, as the first of the processes that a launcher started has them.

    What student and teacher hold in common is counted once where it must be: with another teacher
    of the source's shape it is more.
    """
    pair = _Pair(student, teacher, data, settings)
    phases = [_measuring(pair)]
    if settings.blockwise and pair.blocks:
        phases.append(_blockwise(pair))
    if settings.kl and settings.top_k is not None:
        phases.append(_answering(pair))
    if settings.kl:
        phases.append(_end_to_end(pair))
    if settings.mtp:
        phases.append(_headed(pair))
    judged = () if settings.stop_on == "kl" else (f"scoring {settings.stop_on} is not counted",)
    return Needs(settings.device, tuple(phases), judged)


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
        return _numbers(self.student)

    @property
    def taught(self) -> int:
        """The teacher's parameters."""
        return sum(_numbers(self.teacher).values())

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

    @property
    def blocks(self) -> list[range]:
        """The layers of each block that the blockwise stage trains."""
        return [block.layers for block in blocks_of(self.section) if block.changed]

    @property
    def used(self) -> int:
        """How many different windows a stage trains on."""
        return min(self.windows, len(self.data.train))

    def steps(self, lora: int | None) -> Mapping[int, Step]:
        """What one window takes in a layer whose weights are trained, or adapters of this rank, by
        the number of tracks it is held as; 1 is dense."""
        found = {}
        for tracks in {1, self.section.tracks}:
            held = "float32" if lora is None else self.settings.dtype
            layer = one_layer(self.teacher.config, tracks, self.settings.device, held)
            if lora is None:
                layer.layers.requires_grad_(True)
            else:
                adapt(layer, lora)
            found[tracks] = step_of(layer, self.settings.dtype, self.data.length)
        return found

    @cached_property
    def trained(self) -> Mapping[int, Step]:
        return self.steps(None)

    @cached_property
    def judge(self) -> tuple[Held, ...]:
        """What is kept of the teacher to measure by."""
        windows, shape = len(self.data.held_out.ids), self.shape
        return (
            Held("the teacher's head", shape.vocabulary * shape.width * self.size, Place.DEVICE),
            Held("the teacher's last streams", windows * self.stream, Place.MEMORY),
        )

    def of(self, layers: Iterable[int], steps: Mapping[int, T]) -> Iterator[T]:
        """The student's layers, one after the other."""
        tracked = self.section.schedule.track_layers
        return (steps[self.section.tracks if i in tracked else 1] for i in layers)

    @cached_property
    def once(self) -> Mapping[int, float]:
        """Seconds of one window forward in a layer, by the number of tracks it is held as."""
        config, settings = self.teacher.config, self.settings
        return {
            tracks: forward_seconds(
                one_layer(config, tracks, settings.device, settings.dtype),
                settings.dtype,
                self.data.length,
            )
            for tracks in {1, self.section.tracks}
        }

    def forward(self, layers: Iterable[int]) -> float:
        """Seconds of one window through these layers of the student."""
        return sum(self.of(layers, self.once))

    def teaches(self, layers: Collection[int]) -> float:
        """Seconds of one window through these layers of the teacher."""
        return len(layers) * self.once[1]

    @property
    def logits(self) -> int:
        """Bytes of a batch's logits and their gradients."""
        tokens = self.settings.batch_size * self.data.length
        return tokens * self.shape.vocabulary * (8 if self.size == 4 else 12)

    @cached_property
    def head(self) -> float:
        """Seconds in which one window's predictions are made and compared."""
        shape, settings = self.shape, self.settings
        sizes = shape.vocabulary, shape.width
        return head_seconds(*sizes, settings.dtype, settings.device, self.data.length)


def _measuring(pair: _Pair) -> Phase:
    shape, settings, layers = pair.shape, pair.settings, range(pair.shape.layers)
    windows = len(pair.data.held_out.ids)
    batch = min(windows, BatchSize(None, settings.device).size)
    layer = in_a_layer(shape, pair.section.tracks, pair.data.length, pair.size)
    times = 1 + settings.blockwise + settings.kl
    return Phase(
        "measuring on held-out text",
        (
            Held("weights", sum(pair.numbers.values()) * pair.size, Place.DEVICE),
            Held(f"a layer's streams, {counted(batch, 'window')}", batch * layer, Place.DEVICE),
            *pair.judge,
            _logits(),
            PROCESS,
        ),
        windows * (pair.teaches(layers) + times * (pair.forward(layers) + pair.head)),
    )


def _blockwise(pair: _Pair) -> Phase:
    shape, settings, batch = pair.shape, pair.settings, pair.settings.batch_size
    # torch's AdamW; elsewhere than on a CPU it steps all weights at once, and holds what by
    each = _TRAINED if settings.device == "cpu" else _TRAINED + 4

    def kept(layers: range) -> int:
        return sum(batch * step.kept + step.fixed for step in pair.of(layers, pair.trained))

    def seconds(layers: range) -> float:
        both = sum(step.both for step in pair.of(layers, pair.trained))
        return pair.windows * both + 2 * held_out * pair.forward(layers)

    largest = max(pair.blocks, key=lambda block: each * pair.in_layers(block) + kept(block))
    trained = sum(map(pair.in_layers, pair.blocks))
    held_out = len(pair.data.held_out.ids)
    used, layers = pair.used, range(shape.layers)
    streams = [
        spilling(
            f"{whose} streams, {counted(windows, 'window')}", windows * pair.stream, STREAM_BYTES
        )
        for whose in ("its", "the teacher's")
        for windows in (used, held_out)
    ]
    return Phase(
        "block by block",
        (
            Held(
                f"layers {largest.start}-{largest.stop - 1}, with AdamW's state",
                each * pair.in_layers(largest),
                Place.DEVICE,
            ),
            Held(f"activations, {counted(batch, 'window')}", kept(largest), Place.DEVICE),
            *streams,
            *pair.judge,
            PROCESS,
            Held("blocks, each and all, in fp32", 3 * 4 * trained, Place.DISK),
        ),
        sum(map(seconds, pair.blocks))
        + (used + held_out) * (pair.forward(layers) + pair.teaches(layers)),
    )


def _answering(pair: _Pair) -> Phase:
    """The teacher's one run, where nothing of it is kept yet."""
    shape, settings, windows = pair.shape, pair.settings, pair.used
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = min(windows, BatchSize(None, settings.device).size)
    layer = in_a_layer(shape, 1, pair.data.length, pair.size)
    answers = answer_bytes(settings.top_k or 0, shape.vocabulary) * pair.data.length
    return Phase(
        "the teacher's answers",
        (
            Held("the teacher's weights", pair.taught * pair.size, Place.DEVICE),
            Held(f"a layer's streams, {counted(batch, 'window')}", batch * layer, Place.DEVICE),
            _logits(),
            PROCESS,
            Held(f"answers, {counted(windows, 'window')}", windows * answers, Place.DISK),
        ),
        windows / ranks * (pair.teaches(range(shape.layers)) + pair.head),
    )


def _end_to_end(pair: _Pair) -> Phase:
    shape, settings, layers = pair.shape, pair.settings, range(pair.shape.layers)
    batch, ranks = settings.batch_size, int(os.environ.get("WORLD_SIZE", "1"))
    cut = ranks if settings.fsdp else 1
    moves = trainable(pair.numbers, pair.student, settings.train)
    trained, still = sum(pair.numbers[name] for name in moves), sum(pair.numbers.values())
    saved, apart = trained, 0  # of what stays, as the teacher hasn't it (see models.share)
    if settings.lora is None:
        steps = pair.trained
        still -= trained
    else:
        steps = pair.steps(settings.lora)
        if pair.section.assigned or pair.section.trained or settings.blockwise:
            apart = trained
        # experts and their routers are no linear layers of torch's, which peft adapts
        weights, adapted = opened(pair.student).tensors, moves
        if quantised := quantization_of(pair.student.config) is not None:
            adapted = [f"{m}.weight" for m in adaptable(pair.student, settings.train)]
        sizes = [weights[name].shape for name in adapted if not is_of_experts(name, shape)]
        beside = sum(settings.lora * sum(size) for size in sizes if len(size) == 2)
        trained = beside + trained * quantised  # what isn't quantised is, too
        saved += beside * quantised
    kept_answers = settings.top_k is not None
    frozen = still if settings.fsdp or kept_answers else apart
    both = sum(step.both for step in pair.of(layers, steps))
    kept = sum(batch * step.kept + step.fixed for step in pair.of(layers, steps))
    if settings.gradient_checkpointing:  # what each sublayer reads, and one layer's activations
        apart_for = {reader for _, reader in pair.section.schedule.own_read()}
        sublayers = 2 * shape.layers + len(pair.section.schedule.divided)
        views = sublayers + (pair.section.tracks - 1) * len(apart_for)
        kept = batch * views * pair.stream
        kept += max(batch * step.kept + step.fixed for step in steps.values())
        both *= 4 / 3
    inside = sum(n for name, n in _numbers(pair.teacher).items() if ".layers." in name)
    taught = pair.taught - inside + inside // cut
    if settings.fsdp:  # a layer of both models is gathered at a time
        taught += 2 * inside // shape.layers
    if kept_answers:
        taught = settings.fsdp * inside // shape.layers
    each = _TRAINED + 4 * (ranks > 1 and not settings.fsdp)  # the buckets that gradients go in
    steps_taken = pair.windows // (batch * settings.accumulation * ranks)
    judged = min(settings.evaluations, steps_taken) * len(pair.data.held_out.ids) / ranks
    teaches = 0.0 if kept_answers else pair.teaches(layers)
    state = still * pair.size + (4 + 8) * trained
    held = [
        Held("the teacher's weights", taught * pair.size, Place.DEVICE),
        Held("the student's frozen ones", frozen * pair.size // cut, Place.DEVICE),
        Held(f"{_millions(trained)} trained, and AdamW's", each * trained // cut, Place.DEVICE),
        Held(f"activations, {counted(batch, 'window')}", kept, Place.DEVICE),
        Held("logits and their gradients", pair.logits, Place.DEVICE),
        _logits(),
        *pair.judge,
        PROCESS,
        Held("states to go on from", _STATES * state, Place.DISK),
        Held("what was trained, in fp32", 4 * saved, Place.DISK),
    ]
    if not shares_memory(settings.device):
        # where they are opened; what is read in the dtype that it is stored in is only mapped
        held.append(Held("weights to train, in fp32", 4 * trained, Place.MEMORY))
        held.append(Held("the state, gathered", still * pair.size + 4 * trained, Place.MEMORY))
    return Phase(
        "end to end",
        tuple(held),
        pair.windows / ranks * (both + teaches + 3 * pair.head)
        + judged * (pair.forward(layers) + teaches + pair.head),
    )


def _headed(pair: _Pair) -> Phase:
    """The head for further tokens, behind the whole model."""
    settings, layers, batch = pair.settings, range(pair.shape.layers), pair.settings.batch_size
    head = sum(parameter.numel() for parameter in head_on_meta(pair.student).parameters())
    step, held_out = pair.trained[1], len(pair.data.held_out.ids)
    judged = min(settings.evaluations, pair.windows // (batch * settings.accumulation)) + 2
    model = pair.forward(layers) + pair.head
    return Phase(
        "its head for further tokens",
        (
            Held("weights", sum(pair.numbers.values()) * pair.size, Place.DEVICE),
            Held(f"{_millions(head)} trained, and AdamW's", _TRAINED * head, Place.DEVICE),
            Held(
                f"activations, {counted(batch, 'window')}",
                batch * step.kept + step.fixed,
                Place.DEVICE,
            ),
            Held("logits and their gradients", pair.logits, Place.DEVICE),
            _logits(),
            PROCESS,
            Held("states to go on from", _STATES * (4 + 8) * head, Place.DISK),
        ),
        pair.windows * (model + step.both + 2 * pair.head)
        + judged * held_out * (model + pair.once[1]),
    )


def adapt(layer: Any, rank: int) -> None:
    """Puts adapters on all linear layers, as they are trained with --lora."""
    from peft import inject_adapter_in_model

    linear = [n for n, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    inject_adapter_in_model(lora_config(linear, rank), layer)
    for name, weight in layer.layers.named_parameters():
        weight.requires_grad_("lora_" in name)
        if "lora_" in name:
            weight.data = weight.data.float()


def _numbers(checkpoint: Checkpoint) -> dict[str, int]:
    """A checkpoint's parameters, by name."""
    return {name: entry.count for name, entry in opened(checkpoint).tensors.items()}


def _logits() -> Held:
    return Held("logits, a piece", _LOGITS * 4 * LOGITS_AT_ONCE, Place.DEVICE)


def _millions(count: float) -> str:
    """Of weights, with three digits or all."""
    millions = count / 1e6
    return f"{millions:,.0f} M" if millions >= 100 else f"{millions:.3g} M"
