"""The communicator over a torch.distributed process group, and the journal that it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Event:
    """One line of a journal: `kind` is pass, stage or reduce; `text` its name or what is sent."""

    kind: str
    text: str


class Journal:
    """What a rank is about to do, written before it does it, so that it survives the rank.

    It serves diagnosis only: the counts come from torch (see counters.py).
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, kind: str, text: object) -> None:
        os.write(self._handle, f"{kind} {text}\n".encode())

    @staticmethod
    def read(path: Path) -> list[Event]:
        """The events of a journal; empty where the rank never began one."""
        lines = path.read_text().splitlines() if path.exists() else []
        return [Event(*line.split(" ", 1)) for line in lines if " " in line]


class ProcessGroupCommunicator:
    """Sums over the ranks of a process group.

    NCCL runs an asynchronous all-reduce on a stream of its own, gloo on a thread; either way
    waiting happens only when the function returned is called.
    """

    def __init__(self, group: dist.ProcessGroup | None, journal: Journal) -> None:
        self._group = group
        self._journal = journal

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        reduced_BSD = self._journaled(partial_BSD)
        dist.all_reduce(reduced_BSD, group=self._group)
        return reduced_BSD

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        reduced_BSD = self._journaled(partial_BSD)
        work = dist.all_reduce(reduced_BSD, group=self._group, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return reduced_BSD

        return wait

    def _journaled(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        """A copy to reduce in place: tracks may still read the partial itself."""
        dtype = str(partial_BSD.dtype).removeprefix("torch.")
        self._journal.write("reduce", f"{'x'.join(map(str, partial_BSD.shape))} {dtype}")
        return partial_BSD.clone(memory_format=torch.contiguous_format)


def stages_of(events: list[Event]) -> Iterator[tuple[str, str, list[str]]]:
    """(pass, stage, all-reduces) for each stage that a journal's rank entered, in order."""
    where, stage, reduces = "", "", []
    for event in events:
        if event.kind == "reduce":
            reduces.append(event.text)
            continue
        if stage:
            yield where, stage, reduces
        where, stage = (event.text, "") if event.kind == "pass" else (where, event.text)
        reduces = []
    if stage:
        yield where, stage, reduces
