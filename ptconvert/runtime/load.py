"""Loading one rank's part of a checkpoint: its own bytes, and no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

import ptconvert
from ptconvert.checkpoint.inventory import overruled, under_own_names, weights_dtype
from ptconvert.checkpoint.quantised import as_dequantised, with_quantised
from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint, read_into
from ptconvert.checkpoint.section import SECTION, read_section, source_config
from ptconvert.errors import CheckpointError
from ptconvert.modeling.executor import Communicator
from ptconvert.modeling.layers import Placement
from ptconvert.modeling.model import MODELS
from ptconvert.models.families import SCORE_CAP, TensorRule
from ptconvert.models.quantised import beginning, in_place_of, quantization_of
from ptconvert.models.shape import HEAD, TORCH_NAMES, ModelShape, rows
from ptconvert.models.wrappers import by_todays_tower, is_around, opened_by
from ptconvert.runtime.dequantise import dequantised

# Of safetensors' names of what is converted.
TORCH_DTYPES: dict[str, torch.dtype] = {s: getattr(torch, t) for s, t in TORCH_NAMES.items()}
# Beside them, of what weights are quantised as.
_QUANTISED_DTYPES = {
    **{"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    "F8_E8M0": torch.float8_e8m0fnu,
}


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a dense checkpoint, or of a converted one's source. Raises ConfigError."""
    where, config = str(checkpoint.path / "config.json"), checkpoint.config
    together: Mapping[str, int] = {}
    if SECTION in config:
        config = source_config(config, section := read_section(config, where))
        together = section.together
    shape = ModelShape.from_config(config, where).stored_as(checkpoint.tensors)
    shape = replace(shape, together=together)
    return with_quantised(shape, _own(checkpoint, shape), *_tracks_of(checkpoint))


def _own(checkpoint: Checkpoint, shape: ModelShape) -> Checkpoint:
    """A checkpoint, its quantised weights under its model's own names, as a converted one has
    them."""
    if SECTION in checkpoint.config or quantization_of(checkpoint.config) is None:
        return checkpoint
    return under_own_names(checkpoint, shape)


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint, dense or converted, as its model is opened where quantised weights are
    dequantised. Raises ConfigError."""
    if quantization_of(checkpoint.config) is None:
        return checkpoint
    shape = shape_of(checkpoint)
    return as_dequantised(shape, _own(checkpoint, shape), *_tracks_of(checkpoint))


def _tracks_of(checkpoint: Checkpoint) -> tuple[int, Set[int]]:
    """Into how many tracks a checkpoint's layers are divided, and which."""
    section = read_section(checkpoint.config, str(checkpoint.path / "config.json"))
    return section.tracks, section.schedule.track_layers


def rank_bytes(checkpoint: Checkpoint, placement: Placement) -> int:
    """Bytes of the tensors that a rank reads."""
    shape, tracks = shape_of(checkpoint), read_section(checkpoint.config).tracks
    rules = _dense_rules(shape)
    others = set(range(tracks)) - set(placement.local_tracks(tracks))
    total = 0
    for name, entry in checkpoint.tensors.items():
        if any(f".tracks.{t}." in name for t in others):
            continue
        size = entry.nbytes
        if rule := rules.get(name):
            own = math.prod(shape.share(rule, placement.rank, placement.ranks))
            size = size * own // entry.count
        total += size
    return total


def load_rank(
    path: Path,
    placement: Placement,
    communicator: Communicator,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The model of one rank, in eval mode, each tensor read once from where it lies.

    Each becomes `dtype`, by default that in which transformers opens the checkpoint. Raises
    PTConvertError for a checkpoint that doesn't hold together.
    """
    ptconvert.register()
    checkpoint = open_checkpoint(path)
    shape = shape_of(checkpoint)
    dtype = dtype or TORCH_DTYPES[weights_dtype(checkpoint, shape)]
    rules = _dense_rules(shape)
    config = opened_config(checkpoint)
    with torch.device("meta"):
        model = MODELS[shape.model_type](config, placement, communicator)

    def part(entry: TensorEntry) -> torch.Tensor:
        rule = rules.get(entry.name)
        if rule is None or not rule.is_cut:
            return read_whole(entry)
        if rule.told is not None:
            return torch.tensor(shape.told(rule, placement.rank, placement.ranks))
        spans = shape.spans(rule, placement.rank, placement.ranks)
        return torch.cat([read_part(entry, rule.axis, *span) for span in spans], rule.axis)

    weights = _dense_rules(shape.unquantised) if checkpoint.adapter else {}

    def cut(name: str, whole: torch.Tensor) -> torch.Tensor:
        rule = weights.get(name)
        if rule is None or not rule.is_cut:
            return whole
        spans = shape.spans(rule, placement.rank, placement.ranks)
        return torch.cat([whole.narrow(rule.axis, a, b - a) for a, b in spans], rule.axis)

    return filled(model, checkpoint, shape, dtype, part, cut=cut).to(device).eval()


def open_dequantised(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """A checkpoint's model in eval mode on the CPU, its quantised weights as ordinary ones.

    `dtype` is as for `load_rank`. Raises CheckpointError.
    """
    shape = shape_of(checkpoint)
    own = _own(checkpoint, shape)
    dtype = dtype or TORCH_DTYPES[weights_dtype(own, shape)]
    return filled(on_meta(checkpoint, dtype), own, shape, dtype).eval()


def on_meta(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A checkpoint's model without memory, by the class that transformers opens it with. What it
    computes beside its weights, such as the embeddings' factor, is in `dtype`, too."""
    opened = getattr(transformers, opened_by(checkpoint.config["model_type"]))
    with torch.device("meta"):
        return opened.from_config(opened_config(checkpoint), dtype=dtype)


def opened_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of a checkpoint, with an attention that computes all of what it says."""
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    if (attention := attention_of(checkpoint.config)) is not None:
        config._attn_implementation = attention
    return config


def attention_of(config: Mapping[str, object]) -> str | None:
    """Which of transformers' attentions computes what a config.json says; None where all do. Its
    `sdpa` leaves out the cap on Gemma 2's scores, and is what it chooses by itself, up to 5.19."""
    return "eager" if config.get(SCORE_CAP) is not None else None


def filled(
    model: Any,
    checkpoint: Checkpoint,
    shape: ModelShape,
    dtype: torch.dtype,
    read: Callable[[TensorEntry], torch.Tensor] = lambda entry: read_whole(entry),
    without: Container[str] = (),
    cut: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, whole: whole,
) -> Any:
    """A model that was made on the meta device, with its tensors on the CPU, but those it is to be
    `without`: what `read`, and `cut`, give of each (`read_named`). Quantised weights are
    dequantised. Raises CheckpointError."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name in without:
            continue
        if not parameter.is_floating_point():  # of an assignment: only `--to-dense` reads it
            tensors[name] = torch.zeros_like(parameter, device="cpu")
            continue
        if name == HEAD and name not in checkpoint.tensors and model.config.tie_word_embeddings:
            continue
        tensor = read_for(model, checkpoint, shape, name, dtype, read, cut)
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{checkpoint.path}: {name} has shape {list(tensor.shape)}")
        tensors[name] = tensor
    model.load_state_dict(tensors, strict=False, assign=True)
    compute_buffers(model, "cpu")
    if model.config.tie_word_embeddings and not overruled(checkpoint):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _dense_rules(shape: ModelShape) -> dict[str, TensorRule]:
    """The tensors of layers held dense, which are cut among ranks."""
    return {
        shape.layer(i) + rule.name: rule for i in range(shape.layers) for rule in shape.stored_of(i)
    }


def compute_buffers(model: Any, device: torch.device | str, part: Any = None) -> None:
    """Fills what is computed, not stored, such as the tables of rotary embeddings, in a model that
    was made on the meta device, or in a part of it."""
    for own, module in _by_model(model, model if part is None else part):
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if module._non_persistent_buffers_set:
            for parameter in module.parameters():  # its children's, too
                parameter._is_hf_initialized = True  # transformers leaves such alone
            own._init_weights(module)


def _by_model(own: Any, module: Any) -> Iterator[tuple[Any, Any]]:
    """All modules, each after the innermost of transformers' models that it is a part of."""
    own = module if isinstance(module, PreTrainedModel) else own
    yield own, module
    for child in module.children():
        yield from _by_model(own, child)


def kept_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is computed in where the model is in `dtype`: transformers keeps some in fp32,
    such as the biases by which DeepSeek's routers choose."""
    own = model._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(part in name for part in own) else dtype


def read_for(
    model: Any,
    checkpoint: Checkpoint,
    shape: ModelShape,
    name: str,
    dtype: torch.dtype,
    read: Callable[[TensorEntry], torch.Tensor] = lambda entry: read_whole(entry),
    cut: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, whole: whole,
) -> torch.Tensor:
    """What `read_named` gives, in what it is computed in where the model is in `dtype`."""
    return read_named(checkpoint, shape, name, read, cut).to(kept_dtype(model, name, dtype))


def read_named(
    checkpoint: Checkpoint,
    shape: ModelShape,
    name: str,
    read: Callable[[TensorEntry], torch.Tensor] = lambda entry: read_whole(entry),
    cut: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, whole: whole,
) -> torch.Tensor:
    """A tensor as the model has it, by what `read` gives of each that the checkpoint holds: experts
    that are stored apart are put together, quantised weights are dequantised, and what an adapter
    adds to one is added, of which `cut` gives the part that `read` gives. Raises CheckpointError
    where one is missing."""

    if is_around(name, shape.model_type) and name not in checkpoint.tensors:
        name = _older(checkpoint, shape).get(name, name)

    def found(stored: str) -> torch.Tensor:
        if kept := in_place_of(stored, checkpoint.tensors):
            before = beginning(stored, checkpoint.tensors)
            tensors = {end: read(checkpoint.tensors[before + end]) for end in kept}
            return dequantised(tensors, quantization_of(checkpoint.config) or {})
        if stored not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: {stored} is missing")
        return read(checkpoint.tensors[stored])

    parts = shape.parts_of(name)
    if parts is None:
        whole = found(name)
        added = _added(checkpoint, name)
        return whole if added is None else whole.float() + cut(name, added)
    if len(parts) == 1 and len(parts[0]) == 1:
        return found(parts[0][0])
    return torch.stack([torch.cat([found(one) for one in expert]) for expert in parts])


def _added(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """What an adapter adds to a weight (O, I), in float32; None where it has nothing for it."""
    factors = checkpoint.adapter and checkpoint.adapter.factors.get(name.removesuffix(".weight"))
    if not factors or checkpoint.adapter is None:
        return None
    a_RI, b_OR = (read_whole(entry).float() for entry in factors)
    added_OI: torch.Tensor = checkpoint.adapter.scale * (b_OR @ a_RI)
    return added_OI


def _older(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, str]:
    """The tensors around a model that have older names, by today's."""
    around = (name for name in checkpoint.tensors if is_around(name, shape.model_type))
    return {by_todays_tower(name): name for name in around}


def split_named(
    shape: ModelShape, name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The other way round: what a checkpoint holds of a tensor of the model, by name."""
    parts = shape.parts_of(name)
    if parts is None:
        yield name, tensor
    elif len(parts) == 1 and len(parts[0]) == 1:
        yield parts[0][0], tensor
    else:
        for names, expert in zip(parts, tensor, strict=True):
            yield from zip(names, expert.chunk(len(names)), strict=True)


def read_whole(entry: TensorEntry) -> torch.Tensor:
    """A stored tensor."""
    whole = replace(entry, shape=(rows(entry.shape), *entry.shape[1:]))
    return read_part(whole, 0, 0, whole.shape[0]).view(entry.shape)


def read_part(entry: TensorEntry, axis: int, start: int, stop: int) -> torch.Tensor:
    """[start, stop) of one axis of a stored tensor, reading no byte outside of it."""
    pieces = math.prod(entry.shape[:axis])
    row = entry.nbytes // pieces
    item = row // entry.shape[axis]
    first, size = start * item, (stop - start) * item
    buffer = bytearray(pieces * size)
    view = memoryview(buffer)
    with entry.file.open("rb") as stream:
        for piece in range(pieces):
            block = view[piece * size : (piece + 1) * size]
            read_into(stream.fileno(), block, entry, first + piece * row)
    shape = [stop - start if a == axis else s for a, s in enumerate(entry.shape)]
    dtype = TORCH_DTYPES.get(entry.dtype) or _QUANTISED_DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{entry.file}: {entry.name} is {entry.dtype}, which isn't read here")
    return torch.frombuffer(buffer, dtype=dtype).view(shape)
