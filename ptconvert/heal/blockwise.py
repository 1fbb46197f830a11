"""Block-to-block distillation: one block of the schedule at a time learns to give what the dense
layers in its place give (SPD, arXiv 2502.20727, does so for one synchronisation point at a time).

A block is a run of stages between two points where nothing is outstanding, `Schedule.blocks()`. Its
input is the student's own stream, with all earlier blocks healed, and its target the teacher's own
stream at its end: so each block repairs what it does itself, and what came in as far as it can, as
guesses do that were fitted so. (Towards the teacher's layers on the student's stream blocks unlearn
that: docs/heal.md has what it costs.) Both streams at a block's beginning are kept for all windows
and moved on block by block, so a device holds one block of one model. Shapes: N windows, B of them
at once, T tokens, D residual stream width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ptconvert
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import Section
from ptconvert.errors import HealError
from ptconvert.heal.data import Data
from ptconvert.heal.models import held_whole, in_layers, put
from ptconvert.heal.settings import Settings
from ptconvert.heal.work import Tensors, load_tensors, save_tensors
from ptconvert.measure.opening import section_of
from ptconvert.modeling.model import MODELS
from ptconvert.models.families import MODEL_TYPE_PREFIX
from ptconvert.models.wrappers import decoder_prefix
from ptconvert.runtime.load import compute_buffers, opened_config, read_for, shape_of
from ptconvert.schedule.presets import with_only
from ptconvert.shorten import without_middle

Report = Callable[..., None]
STREAM_BYTES = 2**32  # of streams kept in memory; beyond it they lie in the work folder
_EPSILON = 1e-6


@dataclass(frozen=True)
class Block:
    """One block: its stages in the student's and in the dense schedule, and the layers in them."""

    stages: range
    dense: range
    layers: range
    changed: bool
    text: str


def blocks_of(section: Section) -> Iterator[Block]:
    """The blocks of a schedule, those that are the dense model's too."""
    schedule, dense = section.schedule, section.dense
    for stages in schedule.blocks(dense):
        sublayers = [s for i in stages for s in schedule.stages[i].sublayers]
        layers = [s.layer for s in sublayers]
        yield Block(
            stages,
            dense.running(sublayers),
            range(min(layers), max(layers) + 1),
            with_only(schedule, stages, dense) != dense,
            " ".join(str(schedule.stages[i]) for i in stages),
        )


@dataclass(frozen=True)
class Set:
    """Windows (N, T, D) at a block: the student's stream at its beginning, the teacher's at its
    end, and how far the teacher's moves meanwhile, by `apart`."""

    stream: torch.Tensor
    target: torch.Tensor
    update: float


@dataclass(frozen=True)
class Loaded:
    """A decoder with the layers in memory that some stages run; `prefix` is what the names of its
    tensors begin with in the checkpoint."""

    model: Any
    prefix: str
    stages: range

    def __call__(self, stream_BTD: torch.Tensor) -> torch.Tensor:
        """The stream after these stages, from that before them."""
        model = self.model
        ended_BTD: torch.Tensor = model.run_stages(model.layers.schedule, self.stages, stream_BTD)
        return ended_BTD


class Pieces:
    """A checkpoint's decoder of which a few layers at a time are in memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        ptconvert.register()
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.shape = shape_of(checkpoint)
        config = opened_config(checkpoint)
        with torch.device("meta"):
            model = MODELS[config.model_type.removeprefix(MODEL_TYPE_PREFIX)](config)
        self.model = model.get_decoder().eval()
        self.prefix = decoder_prefix(config.model_type)
        self.model.requires_grad_(False)
        compute_buffers(self.model, device)

    def load(self, layers: range, stages: range) -> Loaded:
        """The decoder with these layers in memory, and no others, that runs these stages."""
        for index, layer in enumerate(self.model.layers.children()):
            if index not in layers:
                layer.to("meta")
                continue
            absent = [name for name, tensor in layer.state_dict().items() if tensor.is_meta]
            read = {
                name: self.read(f"{self.prefix}layers.{index}.{name}")
                for name in absent
                if not name.startswith("assignment.")  # which nothing runs by
            }
            layer.load_state_dict(read, strict=False, assign=True)
            compute_buffers(self.model, self.device, layer)
        return Loaded(self.model, self.prefix, stages)

    def entered(self, ids_NT: torch.Tensor) -> Iterator[torch.Tensor]:
        """The streams (T, D) with which windows enter the first layer."""
        embedding = self.model.get_input_embeddings()
        embedding.weight = nn.Parameter(self.read(f"{self.prefix}embed_tokens.weight"), False)
        for ids_T in ids_NT:
            stream_BTD, _ = self.model.entry(input_ids=ids_T[None].to(self.device))
            yield stream_BTD[0]
        embedding.weight = nn.Parameter(embedding.weight.to("meta"), False)  # and no buffer

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, on the device."""
        tensor = read_for(self.model, self.checkpoint, self.shape, name, self.dtype)
        return tensor.to(self.device)


def heal_blocks(
    student: Checkpoint,
    teacher: Checkpoint,
    data: Data,
    settings: Settings,
    work: Path,
    progress: Report,
    say: Callable[[str], None],
) -> Tensors:
    """The healed parameters of all changed blocks, in fp32.

    Finished blocks are kept in `work` and not trained again. A block whose error on the held-out
    windows didn't fall keeps its own weights. Raises HealError.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    pieces = Pieces(student, dtype, settings.device)
    dense = Pieces(teacher, dtype, settings.device)
    order = data.order(settings.tokens, settings.seed)
    used, order = torch.unique(order, return_inverse=True)  # streams of no other windows are kept
    progress("embedding the windows", 0, None)
    texts = ("train", data.train[used]), ("held-out", data.held_out.ids)
    streams, targets = (
        [_first_streams(one, ids_NS[:, :-1], work / f"stream-{whose}-{n}") for n, ids_NS in texts]
        for whose, one in (("student", pieces), ("teacher", dense))
    )
    blocks = list(blocks_of(section_of(student)))
    changed = [block for block in blocks if block.changed]
    healed: Tensors = {}
    for block in blocks:
        teaching = dense.load(block.layers, block.dense)
        step = f"the teacher's streams past layers {block.layers.start}-{block.layers.stop - 1}"
        updates = [
            _advance(teaching, t_NTD, settings.batch_size, step, progress) for t_NTD in targets
        ]
        dense.load(range(0), range(0))
        if block.changed:
            file = work / f"block-{block.stages.start}.safetensors"
            step = f"block {changed.index(block) + 1} of {len(changed)}"
            if not file.is_file():
                model = _loaded(pieces, block, healed)
                sets = [Set(*of) for of in zip(streams, targets, updates, strict=True)]
                moved = _heal(pieces, model, block, sets, order, settings, step, progress, say)
                save_tensors(file, moved)
                pieces.load(range(0), range(0))
            healed |= load_tensors(file)
            if block == changed[-1]:
                break
        loaded = _loaded(pieces, block, healed)
        step = f"streams past layers {block.layers.start}-{block.layers.stop - 1}"
        for stream_NTD in streams:
            _advance(loaded, stream_NTD, settings.batch_size, step, progress)
    for path in work.glob("stream-*"):
        path.unlink()
    return healed


def _loaded(pieces: Pieces, block: Block, healed: Tensors) -> Loaded:
    """The student's decoder with a block in memory, as far as it is healed."""
    loaded = pieces.load(block.layers, block.stages)
    own = {n: t for n, t in healed.items() if in_layers(n, block.layers)}
    put(loaded.model, ((name.removeprefix(pieces.prefix), tensor) for name, tensor in own.items()))
    return loaded


@torch.no_grad()
def _first_streams(pieces: Pieces, ids_NT: torch.Tensor, file: Path) -> torch.Tensor:
    """The embedded tokens of all windows (N, T, D), in memory or, where they are many, on disk."""
    shape, dtype = (*ids_NT.shape, pieces.model.config.hidden_size), pieces.dtype
    if math.prod(shape) * dtype.itemsize > STREAM_BYTES:
        file.unlink(missing_ok=True)
        stream_NTD = torch.from_file(str(file), True, math.prod(shape), dtype=dtype).view(shape)
    else:
        stream_NTD = torch.empty(shape, dtype=dtype)
    for entered_TD, stream_TD in zip(pieces.entered(ids_NT), stream_NTD, strict=True):
        stream_TD[:] = entered_TD
    return stream_NTD


@torch.no_grad()
def _advance(
    loaded: Loaded, stream_NTD: torch.Tensor, batch: int, step: str, progress: Report
) -> float:
    """Moves streams past the block that the model holds, in place; how far, by `apart`."""
    moved = 0.0
    for start in range(0, len(stream_NTD), batch):
        progress(step, start, len(stream_NTD))
        rows = slice(start, start + batch)
        ended_BTD = _run(loaded, stream_NTD[rows]).to("cpu", stream_NTD.dtype)
        moved += float(apart(stream_NTD[rows], ended_BTD)) * len(ended_BTD)
        stream_NTD[rows] = ended_BTD
    return moved / len(stream_NTD)


def _run(loaded: Loaded, stream_BTD: torch.Tensor) -> torch.Tensor:
    """A block's output stream, by autocast where it has 16 bits: what is trained is fp32."""
    parameters, dtype = loaded.model.layers.parameters(), stream_BTD.dtype
    device = next(p.device for p in parameters if not p.is_meta)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return loaded(stream_BTD.to(device))


def apart(stream_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of how far a stream is from a target, squared, over the target's mean
    square, by which norms divide: so the few tokens with huge activations that trained models have
    (arXiv 2402.17762) don't outweigh all the others."""
    target_BTD = target_BTD.float()
    error_BT = (stream_BTD.float() - target_BTD).square().mean(-1)
    return (error_BT / (target_BTD.square().mean(-1) + _EPSILON)).mean()


def _heal(
    pieces: Pieces,
    model: Loaded,
    block: Block,
    sets: list[Set],
    order: torch.Tensor,
    settings: Settings,
    step: str,
    progress: Report,
    say: Callable[[str], None],
) -> Tensors:
    """Trains one block; returns its new parameters by their names in the checkpoint, or none."""
    torch.manual_seed(settings.seed)
    train, held_out = sets
    named = dict(model.model.named_parameters())
    names = held_whole((model.prefix + n for n in named), pieces.checkpoint, pieces.shape)
    inside = (n.removeprefix(model.prefix) for n in names if in_layers(n, block.layers))
    own = {name: named[name] for name in inside}
    for parameter in own.values():
        parameter.data, parameter.requires_grad = parameter.data.float(), True
    together = settings.batch_size * settings.accumulation
    rows = [r for r in torch.split(order, together) if len(r) == together]
    optimizer = torch.optim.AdamW(own.values(), lr=settings.block_learning_rate, weight_decay=0.0)
    warm = math.ceil(settings.warmup * len(rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, warm, len(rows)))
    progress(step, 0, len(rows))
    stages = without_middle(block.text, 31)
    before = _error(model, held_out, settings.batch_size)
    if not math.isfinite(before):
        raise HealError(f"{stages}: its stream isn't finite; try --dtype float32")
    for number, chosen in enumerate(rows):
        for part in torch.split(chosen, settings.batch_size):
            out_BTD = _run(model, train.stream[part].to(settings.device))
            loss = apart(out_BTD, train.target[part].to(out_BTD.device)) / train.update
            torch.autograd.backward(loss * len(part) / len(chosen))
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, number + 1, len(rows), f"error {loss.detach():.4f}")
    moved = {n: p for n, p in own.items() if p in optimizer.state}
    for parameter in own.values():
        parameter.requires_grad = False
    after = _error(model, held_out, settings.batch_size)
    say(f"{step} ({stages}): held-out error {before:.4f} → {after:.4f}")
    if not after < before:
        return {}
    return {model.prefix + n: p.detach().cpu() for n, p in moved.items()}


def _rate(step: int, warm: int, steps: int) -> float:
    """The share of the learning rate at a step: linear warm-up, then a half cosine to nothing."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def _error(model: Loaded, of: Set, batch: int) -> float:
    """How far the block's ends are from the teacher's, as a share of the teacher's update."""
    total = 0.0
    pieces = (torch.split(whole_NTD, batch) for whole_NTD in (of.stream, of.target))
    for piece_BTD, target_BTD in zip(*pieces, strict=True):
        out_BTD = _run(model, piece_BTD)
        total += float(apart(out_BTD, target_BTD.to(out_BTD.device))) * len(piece_BTD)
    return total / len(of.stream) / of.update
