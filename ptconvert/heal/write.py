"""Writing what was healed: the checkpoint as it was, file by file, with other numbers in it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ptconvert.checkpoint.atomic import new_directory
from ptconvert.checkpoint.config import as_json
from ptconvert.checkpoint.files import INDEX, small_files
from ptconvert.checkpoint.reader import Checkpoint
from ptconvert.checkpoint.section import (
    ADAPTER_FOLDER,
    MODELING_FILE,
    SPEC_FILE,
    trained_config,
)
from ptconvert.checkpoint.writer import write_arrays
from ptconvert.errors import CheckpointError
from ptconvert.heal.adapters import apart, write_adapter
from ptconvert.heal.work import Tensors
from ptconvert.models.shape import HEAD, is_tied
from ptconvert.models.wrappers import embedding_name
from ptconvert.runtime.load import TORCH_DTYPES, shape_of, split_named
from ptconvert.runtime.mtp import stored_head


def rounded(checkpoint: Checkpoint, healed: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in the dtype in which the checkpoint holds them, one at a time: what was healed lies
    in mapped files, and all of it needn't fit in memory."""
    shape = shape_of(checkpoint)
    for name, tensor in healed.items():
        parts = shape.parts_of(name)
        stored = checkpoint.tensors[name if parts is None else parts[0][0]]
        yield name, tensor.to(TORCH_DTYPES[stored.dtype])


def rounded_head(checkpoint: Checkpoint, head: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The same of a head for further tokens."""
    for name, ((stored, _), *_others) in stored_head(checkpoint, head):
        yield name, head[name].to(TORCH_DTYPES[checkpoint.tensors[stored].dtype])


def write(
    checkpoint: Checkpoint,
    healed: Tensors,
    head: Tensors,
    card: str,
    destination: Path,
    overwrite: bool,
) -> None:
    """Writes a copy of a checkpoint in which these tensors are replaced, and the model card; `head`
    are those of its head for further tokens, as `stored_head` takes them.

    Every tensor keeps its file, place, shape and dtype; spec, tokenizer and modelling file come
    along, and the config, which says that the weights were trained if any were; adapters go into a
    folder of their own. `destination` appears whole or not at all. Raises CheckpointError.
    """
    source = checkpoint.path
    own = (source / name for name in (INDEX, SPEC_FILE, MODELING_FILE))
    small = {*small_files(source), *(path for path in own if path.is_file())}
    weights = {entry.file for entry in checkpoint.tensors.values()}
    try:
        with new_directory(destination, overwrite) as directory:
            for path in sorted(small | weights):
                target = directory / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            if is_tied(checkpoint.config) and HEAD in checkpoint.tensors:
                # a copy that some tied checkpoints carry
                embedding = embedding_name(checkpoint.config["model_type"])
                healed = healed | {HEAD: healed[embedding]} if embedding in healed else healed
            shape = shape_of(checkpoint)
            of_model, adapters = apart(healed)
            parts = (p for name, t in of_model.items() for p in split_named(shape, name, t))
            of_head = (p for _, own in stored_head(checkpoint, head) for p in own) if head else ()
            for stored, part in itertools.chain(parts, of_head):
                entry = checkpoint.tensors[stored]
                assert tuple(part.shape) == entry.shape, stored
                copied = replace(entry, file=directory / entry.file.name)
                kept = part.to(TORCH_DTYPES[entry.dtype])
                data = kept.contiguous().flatten().view(torch.uint8).numpy()
                write_arrays({stored: copied}, {stored: data}, lambda _: None)
            if healed or head:
                config = as_json(trained_config(checkpoint.config, bool(adapters)))
                (directory / "config.json").write_text(config, encoding="utf-8")
            if adapters:
                write_adapter(directory / ADAPTER_FOLDER, adapters)
            (directory / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{error.filename or destination}: {error.strerror}") from None
