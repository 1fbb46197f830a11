"""Reading a checkpoint directory: where each tensor's bytes lie, without reading them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ptconvert.checkpoint.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    adapter_alone,
    read_config,
    refuse_dangling,
    refuse_pointer,
)
from ptconvert.checkpoint.section import ADAPTER_FOLDER, SECTION
from ptconvert.errors import CheckpointError
from ptconvert.models.shape import ELEMENT_BYTES
from ptconvert.models.wrappers import language_config
from ptconvert.shorten import clipped

PEFT_PREFIX = "base_model.model."  # of a model's modules, in peft's names
# What makes an adapter another sum than the scaled product of its factors.
_NOT_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")
_MAX_INDEX_BYTES = 64 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024  # that are read or written at once


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; `offset` counts bytes from the file's beginning."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a scalar is one."""
        return self.nbytes // (self.shape[0] if self.shape else 1)

    def of_rows(self, first: int, count: int) -> TensorEntry:
        """Some of its rows, as a tensor."""
        row = self.row_bytes
        size = (count, *self.shape[1:])
        return replace(self, shape=size, offset=self.offset + first * row, nbytes=count * row)


@dataclass(frozen=True)
class Adapter:
    """A LoRA beside weights that it can't be merged into: of each module its factors, A (R, I) and
    B (O, R), whose product B A is scaled by `scale` and added to the weight (O, I)."""

    scale: float
    factors: Mapping[str, tuple[TensorEntry, TensorEntry]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory as found: its config.json and its tensors, none of them read."""

    path: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]
    adapter: Adapter | None = None

    @property
    def language(self) -> Mapping[str, object]:
        """What config.json says of the language model, whatever is around it."""
        return language_config(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads config.json, the index and the safetensors headers of a directory.

    Raises ConfigError or CheckpointError, each one line, for anything that doesn't hold together.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory with a checkpoint")
    config = read_config(path)
    for file in (path / SINGLE, path / INDEX):
        refuse_dangling(file)
    if (path / SINGLE).is_file():
        files = [SINGLE]
    elif (path / INDEX).is_file():
        files = _indexed_files(path / INDEX)
    else:
        raise CheckpointError(_no_weights(path))
    if (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} has an adapter ({ADAPTER}) beside its weights, and transformers loads both: "
            "merge it into them (merge_and_unload of peft, then save_pretrained), or take its "
            "files away to have the weights alone"
        )
    tensors = _all_tensors(path, files)
    if not tensors:
        raise CheckpointError(f"{path}: the safetensors files hold no tensors")
    return Checkpoint(path, config, tensors, _adapter(path, config, tensors))


def _adapter(path: Path, config: Mapping[str, object], weights: Iterable[str]) -> Adapter | None:
    """The adapter beside a checkpoint's weights. Raises CheckpointError."""
    section = config.get(SECTION)
    if not isinstance(section, Mapping) or not section.get("adapter"):
        return None
    adapter = read_adapter(path / ADAPTER_FOLDER)
    modules = {name.rpartition(".")[0] for name in weights}
    if away := sorted(adapter.factors.keys() - modules):
        raise CheckpointError(
            f"{path / ADAPTER_FOLDER} has factors of {away[0]}, which the model hasn't"
        )
    return adapter


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder of a checkpoint, as peft writes it. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing; config.json says that an adapter is there")
    own, tensors = read_config(folder / ADAPTER), read_header(folder / ADAPTER_WEIGHTS)
    rank, alpha = own.get("r"), own.get("lora_alpha")
    if given := [key for key in _NOT_PLAIN if own.get(key)]:
        raise CheckpointError(f"{folder / ADAPTER}: {given[0]} is set; only plain LoRA is added")
    ends = (".lora_A.weight", ".lora_B.weight")
    names = {name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)}
    pairs = [[tensors.get(name + end) for end in ends] for name in names]
    fit = all(a and b and (len(a.shape), a.shape[:1]) == (2, b.shape[1:]) for a, b in pairs)
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not (pairs and fit):
        raise CheckpointError(f"{folder} is no LoRA as peft writes it, of factors A and B")
    return Adapter(
        float(str(alpha)) / rank,
        {
            name.removeprefix(PEFT_PREFIX): (tensors[name + ends[0]], tensors[name + ends[1]])
            for name in names
        },
    )


def _no_weights(path: Path) -> str:
    if (path / ADAPTER).is_file():
        return adapter_alone(path / ADAPTER)
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        return (
            f"{path} has pickle weights ({pickles[0]}), which can run code when read; rewrite them "
            'as safetensors: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('SRC', dtype='auto').save_pretrained('OUT')\""
        )
    return f"{path} has neither {SINGLE} nor {INDEX}"


def _indexed_files(path: Path) -> list[str]:
    """The files that an index names, all of its own directory."""
    refuse_pointer(path)
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_INDEX_BYTES} bytes")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    files = set()
    for name, file in weight_map.items():
        file = file.removeprefix("./") if isinstance(file, str) else file
        plain = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
        if not plain or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{path}: {name} is in {clipped(str(file), 80)!r}; it must be the name of a "
                ".safetensors file beside the index"
            )
        files.add(file)
    return sorted(files)


def _all_tensors(path: Path, files: list[str]) -> dict[str, TensorEntry]:
    """The tensors of all files: what transformers reads, whatever else an index says of them."""
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        if not (path / file).is_file():
            raise CheckpointError(f"{path / file} is missing; {INDEX} names it")
        for name, entry in read_header(path / file).items():
            earlier = tensors.setdefault(name, entry)
            if earlier is not entry and not _same(earlier, entry):
                raise CheckpointError(
                    f"{path}: {name} lies in {earlier.file.name} and in {file}, and the two differ;"
                    " keep the one that is the model's"
                )
    return tensors


def _same(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and same_bytes(a, b)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order in which they lie.

    The safetensors library checks the file (header, offsets without gaps or overlaps, total size);
    its Python API doesn't give offsets, so they are read from the header it accepted.
    Raises CheckpointError.
    """
    refuse_pointer(file)
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise CheckpointError(f"{file} is not a readable safetensors file: {what}") from None
    header.pop("__metadata__", None)
    entries = [
        TensorEntry(
            name=name,
            file=file,
            dtype=info["dtype"],
            shape=tuple(info["shape"]),
            offset=8 + length + info["data_offsets"][0],
            nbytes=info["data_offsets"][1] - info["data_offsets"][0],
        )
        for name, info in header.items()
    ]
    for entry in entries:
        size = ELEMENT_BYTES.get(entry.dtype)
        if size is not None and entry.nbytes != math.prod(entry.shape) * size:
            raise CheckpointError(f"{file}: {entry.name}'s size doesn't match its shape")
    return {e.name: e for e in sorted(entries, key=lambda e: e.offset)}


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the header has the same name twice")
    return result


def read_tensor(entry: TensorEntry) -> bytes:
    """All bytes of a tensor. Raises CheckpointError."""
    return b"".join(blocks(entry))


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors hold the same bytes. Raises CheckpointError."""
    # as bytearrays: memoryviews are compared an element at a time
    pairs = zip(blocks(a), blocks(b), strict=True)
    return a.nbytes == b.nbytes and all(one.obj == other.obj for one, other in pairs)


def blocks(entry: TensorEntry) -> Iterator[memoryview]:
    """A tensor's bytes, a block at a time. Raises CheckpointError where the file ends."""
    with entry.file.open("rb") as stream:
        for start in range(0, entry.nbytes, BLOCK_BYTES):
            block = memoryview(bytearray(min(BLOCK_BYTES, entry.nbytes - start)))
            read_into(stream.fileno(), block, entry, start)
            yield block


def read_into(handle: int, block: memoryview, source: TensorEntry, start: int) -> None:
    """Fills a block from `start` bytes into a tensor; CheckpointError where the file ends."""
    done = 0
    while done < len(block):
        count = os.preadv(handle, [block[done:]], source.offset + start + done)
        if count == 0:
            raise CheckpointError(f"{source.file} became shorter while {source.name} was read")
        done += count
