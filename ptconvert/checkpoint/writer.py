"""Writing safetensors files piece by piece: memory of one block, whatever the checkpoint's size."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptconvert.checkpoint.reader import BLOCK_BYTES, TensorEntry, blocks, read_into
from ptconvert.models.shape import ELEMENT_BYTES

# Places along an axis, in order: all that lie between two (step 1), or one by one; in a tensor of
# experts (an index of its first axis each) these of every one, or a row for each.
Indices = range | NDArray[np.int32]
THREADS = 2
_MAX_ITEM = 64  # bytes of what moves as one column


@dataclass(frozen=True)
class Target:
    """A tensor to be written: its file's name in the new directory, and what its header says."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Move:
    """A part of a source tensor that becomes a part of a target tensor.

    What lies at `take` along the source's axis comes to `put` along the target's, one by one; the
    other axes are taken whole.
    """

    source: str
    target: str
    axis: int
    take: Indices
    put: Indices

    @property
    def groups(self) -> int:
        """Into how many of its first axis' indices the source is divided, each with places of its
        own; 1 where all have the same."""
        return max(
            1 if isinstance(i, range) or i.ndim == 1 else len(i) for i in (self.take, self.put)
        )

    def runs(self, group: int) -> Iterator[tuple[int, int, int]]:
        """(first in source, first in target, how many) of what lies together in both, in a
        group."""
        if isinstance(self.take, range) and isinstance(self.put, range):
            yield self.take.start, self.put.start, len(self.take)
            return
        take, put = (np.asarray(of_group(places, group)) for places in (self.take, self.put))
        breaks = np.flatnonzero((np.diff(take) != 1) | (np.diff(put) != 1)) + 1
        for start, stop in itertools.pairwise([0, *breaks.tolist(), len(take)]):
            yield int(take[start]), int(put[start]), stop - start


def length(places: Indices) -> int:
    """How many places there are along the axis."""
    return len(places) if isinstance(places, range) else places.shape[-1]


def of_group(places: Indices, group: int) -> Indices:
    """Those of one group, such as an expert."""
    return places if isinstance(places, range) or places.ndim == 1 else places[group]


class Digests:
    """SHA-256 of the tensors on one side of some moves, taken as their bytes pass.

    Each is read or written by one move, from its first byte to its last; a tensor that no move has
    is read by `of`.
    """

    def __init__(self, of_sources: bool) -> None:
        self._of_sources = of_sources
        self._hashes: dict[str, Any] = {}

    def update(self, source: str | None, target: str | None, block: memoryview) -> None:
        """Takes in the next bytes of a source, of a target or of both. Threads may call it, each
        for tensors of its own."""
        name = source if self._of_sources else target
        if name is not None:
            self._hashes.setdefault(name, hashlib.sha256()).update(block)

    def of(self, entry: TensorEntry) -> bytes:
        """The digest of a tensor."""
        if entry.name not in self._hashes:
            self._hashes[entry.name] = digest = hashlib.sha256()
            for block in blocks(entry):
                digest.update(block)
        found: bytes = self._hashes[entry.name].digest()
        return found


def lay_out(directory: Path, targets: Iterable[Target]) -> dict[str, TensorEntry]:
    """Creates the files with their headers, at full size; returns where each tensor goes."""
    by_file: dict[str, list[Target]] = {}
    for target in targets:
        by_file.setdefault(target.file, []).append(target)
    placed: dict[str, TensorEntry] = {}
    for file, members in by_file.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for t in members:
            offsets = [offset, offset + t.nbytes]
            header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
            offset += t.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = directory / file
        with path.open("xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        start = 8 + len(text)
        for t in members:
            placed[t.name] = TensorEntry(t.name, path, t.dtype, t.shape, start, t.nbytes)
            start += t.nbytes
    return placed


def copy_moves(
    sources: Mapping[str, TensorEntry],
    targets: Mapping[str, TensorEntry],
    moves: Sequence[Move],
    progress: Callable[[int], object],
    digests: Digests,
) -> None:
    """Carries out all moves and flushes the target files to disk.

    `progress` is called from several threads, with the bytes written since its last call.
    `digests` are told all bytes of the tensors on their side.
    Raises CheckpointError when a source file ends early, OSError when the disk is full or fails.
    """
    stop = threading.Event()
    with ExitStack() as stack:
        read = {s.file: os.O_RDONLY for s in sources.values()}
        write = {t.file: os.O_RDWR for t in targets.values()}
        handles: dict[Path, int] = {}
        _allow_open_files(len(read | write))
        for path, flags in (read | write).items():
            handles[path] = os.open(path, flags)
            stack.callback(os.close, handles[path])

        copier = _Copier(sources, targets, handles, digests)

        def carry_out(group: list[Move]) -> None:
            axis, source = group[0].axis, sources[group[0].source]
            by_rows = axis == 0 or source.nbytes > _MAX_ITEM * math.prod(source.shape[: axis + 1])
            rows = (nbytes for move in group for nbytes in copier.rows(move))
            for nbytes in rows if by_rows else copier.columns(group):
                progress(nbytes)
                if stop.is_set():
                    return

        with ThreadPoolExecutor(THREADS) as pool:
            try:
                list(pool.map(carry_out, _groups(moves)))
                list(pool.map(os.fsync, [handles[path] for path in write]))
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise


def _allow_open_files(count: int) -> None:
    """Raises this process's own limit of open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 128
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def _groups(moves: Sequence[Move]) -> list[list[Move]]:
    """Moves by columns that share their wide tensor go together, the others one by one.

    So each block of a wide tensor is read, or written, once.
    """
    uses = Counter(move.source for move in moves)
    groups: dict[object, list[Move]] = {}
    for index, move in enumerate(moves):
        wide = move.source if uses[move.source] > 1 else move.target
        groups.setdefault(wide if move.axis else index, []).append(move)
    return list(groups.values())


@dataclass(frozen=True)
class _Copier:
    """Carries out moves between open files; its methods yield bytes as they are written."""

    sources: Mapping[str, TensorEntry]
    targets: Mapping[str, TensorEntry]
    handles: Mapping[Path, int]
    digests: Digests

    def rows(self, move: Move) -> Iterator[int]:
        """The rows of one move: what lies together at an index of its axis; of each of the axes
        before it."""
        source, target = self.sources[move.source], self.targets[move.target]
        before, own = source.shape[: move.axis], (source.shape[move.axis :] or (1,))[0]
        outer = math.prod(before)
        row = source.nbytes // (outer * own)
        buffer = memoryview(bytearray(min(BLOCK_BYTES, length(move.take) * row)))
        read, written, each = source.nbytes // outer, target.nbytes // outer, outer // move.groups
        runs = ((n, run) for n in range(outer) for run in move.runs(n // each))
        for number, (first, into, size) in runs:
            begin = number * read + first * row
            end = begin + size * row
            shift = target.offset + number * written + into * row - begin
            for start in range(begin, end, BLOCK_BYTES):
                block = buffer[: min(BLOCK_BYTES, end - start)]
                read_into(self.handles[source.file], block, source, start)
                self.digests.update(source.name, target.name, block)
                _write(self.handles[target.file], block, start + shift)
                yield len(block)

    def columns(self, group: list[Move]) -> Iterator[int]:
        """Columns between one wide tensor and its narrow parts, a block of rows at a time; the rows
        of a block are in one group. A column has what lies behind its axis, of a row."""
        axis = group[0].axis
        read = {m.source: self.sources[m.source] for m in group}
        write = {m.target: self.targets[m.target] for m in group}
        widths = {e.name: e.shape[axis] for e in (*read.values(), *write.values())}
        widest, one = max(widths.values()), next(iter(read.values()))
        rows = math.prod(one.shape[:axis]) // (groups := max(m.groups for m in group))
        itemsize = one.nbytes // math.prod(one.shape[: axis + 1])
        kind = f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}"
        step = min(rows, max(1, BLOCK_BYTES // (widest * itemsize)))
        buffers = {name: np.empty((step, width), kind) for name, width in widths.items()}
        for number, start in itertools.product(range(groups), range(0, rows, step)):
            count, first = min(step, rows - start), number * rows + start
            for name, source in read.items():
                block = buffers[name][:count]
                offset = first * block.shape[1] * itemsize
                read_into(self.handles[source.file], _bytes(block), source, offset)
                self.digests.update(name, None, _bytes(block))
            for move in group:
                take, put = (_selector(of_group(i, number)) for i in (move.take, move.put))
                buffers[move.target][:count, put] = buffers[move.source][:count, take]
            for name, target in write.items():
                block = buffers[name][:count]
                offset = target.offset + first * block.shape[1] * itemsize
                self.digests.update(None, name, _bytes(block))
                _write(self.handles[target.file], _bytes(block), offset)
                yield block.nbytes


def _bytes(block: NDArray[Any]) -> memoryview:
    """An array's own bytes, whatever its elements."""
    return block.view(np.uint8).data.cast("B")


def _selector(indices: Indices) -> slice | NDArray[np.int32]:
    """What numpy selects by; a slice where it can be, which is faster."""
    return slice(indices.start, indices.stop) if isinstance(indices, range) else indices


def write_arrays(
    targets: Mapping[str, TensorEntry],
    arrays: Mapping[str, NDArray[Any]],
    progress: Callable[[int], object],
) -> None:
    """Fills targets with arrays of as many bytes."""
    with ExitStack() as stack:
        files = dict.fromkeys(targets[name].file for name in arrays)
        handles = {path: stack.enter_context(path.open("r+b")).fileno() for path in files}
        for name, array in arrays.items():
            block = np.ascontiguousarray(array).data.cast("B")
            assert len(block) == targets[name].nbytes, f"{name} is not of its target's size"
            _write(handles[targets[name].file], block, targets[name].offset)
            progress(len(block))


def _write(handle: int, block: memoryview, offset: int) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(handle, block[done:], offset + done)
