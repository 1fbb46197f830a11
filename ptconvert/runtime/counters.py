"""What torch itself saw of the collectives: its flight recorder, and its profiler.

Two means that share no code with the executor, nor with each other.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ALL_REDUCE = "all_reduce"
_BYTES = {"float": 4, "half": 2, "bfloat16": 2, "double": 8}


@dataclass(frozen=True)
class Collective:
    """One collective that a rank took part in; `asynchronous` is None where it isn't known."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    asynchronous: bool | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 0) if self.shape else 0


class FlightRecorder:
    """torch.distributed's ring of recent collectives, read in differences by record id."""

    def __init__(self, backend: str) -> None:
        c10d: Any = torch._C._distributed_c10d
        self._dump = c10d._dump_nccl_trace_json if backend == "nccl" else c10d._dump_fr_trace_json

    def _entries(self) -> list[dict[str, Any]]:
        return list(json.loads(self._dump()).get("entries", []))

    def mark(self) -> int:
        """The id of the last record so far, -1 where there is none."""
        return max((e["record_id"] for e in self._entries()), default=-1)

    def since(self, mark: int) -> list[Collective]:
        """The collectives recorded after a mark, in order."""
        return [
            Collective(
                op=e["profiling_name"].split(":")[-1],
                shape=tuple(e["input_sizes"][0]) if e["input_sizes"] else (),
                dtype=e["input_dtypes"][0].lower() if e["input_dtypes"] else "",
                asynchronous=None,
            )
            for e in sorted(self._entries(), key=lambda e: e["record_id"])
            if e["record_id"] > mark
        ]


@dataclass(frozen=True)
class Transfer:
    """An asynchronous all-reduce of a profiled pass, in microseconds of the trace's clock."""

    stage: str
    start: float
    end: float
    hidden: float

    @property
    def share(self) -> float:
        """The part of the transfer that ran under computation, 0 to 1."""
        return self.hidden / (self.end - self.start) if self.end > self.start else 1.0


class Profile:
    """A Chrome trace of one rank, as torch.profiler writes it.

    The pass must have run under `record_function("step NAME")` and `record_function("stage …")`.
    """

    def __init__(self, trace: Path) -> None:
        events = json.loads(trace.read_text())["traceEvents"]
        self._events = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
        self._launches = self._named("c10d::allreduce_")

    def _named(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self._events if e["name"] == name]

    def _inside(self, event: dict[str, Any], kind: str) -> str:
        """The name of the last step or stage that began before an event."""
        begun = [
            e["name"]
            for e in self._events
            if e["name"].startswith(kind + " ") and e["ts"] <= event["ts"]
        ]
        return begun[-1].removeprefix(kind + " ") if begun else ""

    def collectives(self) -> dict[str, list[Collective]]:
        """The all-reduces launched in each step, and the other collectives by their c10d name."""
        found: dict[str, list[Collective]] = {}
        for event in self._events:
            name = event["name"]
            if not name.startswith("c10d::") or event.get("cat") != "cpu_op":
                continue
            arguments = event["args"]
            reduce = name == "c10d::allreduce_"
            shape: list[Any] = arguments["Input Dims"][0] if reduce else []
            found.setdefault(self._inside(event, "step"), []).append(
                Collective(
                    op=ALL_REDUCE if reduce else name.removeprefix("c10d::").rstrip("_"),
                    shape=tuple(shape[0]) if shape else (),
                    dtype=_tensor_list_dtype(self._transfer_of(event)) if reduce else "",
                    asynchronous=arguments["Concrete Inputs"][4] == "True" if reduce else None,
                )
            )
        return found

    def _transfers(self) -> list[dict[str, Any]]:
        """The all-reduces themselves: gloo's on a thread, NCCL's as kernels, in launch order."""
        kernels = [
            e
            for e in self._events
            if e.get("cat") == "kernel" and "nccl" in e["name"] and "AllReduce" in e["name"]
        ]
        return kernels or self._named("gloo:all_reduce")

    def _transfer_of(self, launch: dict[str, Any]) -> dict[str, Any]:
        transfers = self._transfers()
        index = next(i for i, e in enumerate(self._launches) if e is launch)
        return transfers[index] if index < len(transfers) else {}

    def transfers(self) -> list[Transfer]:
        """Each asynchronous all-reduce with the part of it that ran under computation."""
        transfers = self._transfers()
        if len(transfers) != len(self._launches):
            return []
        found = []
        for launch, transfer in zip(self._launches, transfers, strict=True):
            if launch["args"]["Concrete Inputs"][4] != "True":
                continue
            start, end = transfer["ts"], transfer["ts"] + transfer["dur"]
            hidden = _covered(start, end, self._computing(transfer, launch))
            found.append(Transfer(self._inside(launch, "stage"), start, end, hidden))
        return found

    def _computing(
        self, transfer: dict[str, Any], launch: dict[str, Any]
    ) -> list[tuple[float, float]]:
        """When this rank computed: kernels of other streams, else operators of the main thread."""
        if transfer.get("cat") == "kernel":
            chosen = [
                e
                for e in self._events
                if e.get("cat") == "kernel" and e.get("tid") != transfer.get("tid")
            ]
        else:
            chosen = [
                e
                for e in self._events
                if e.get("tid") == launch["tid"] and e["name"].startswith("aten::")
            ]
        return [(e["ts"], e["ts"] + e["dur"]) for e in chosen]


def _tensor_list_dtype(transfer: dict[str, Any]) -> str:
    """The dtype of a transfer; c10d's own event says only that it got a list of tensors."""
    names = {"c10::bfloat16": "bfloat16", "c10::half": "half"}
    types = transfer.get("args", {}).get("Input type") or [""]
    return names.get(str(types[0]).lower(), str(types[0]).lower())


def _covered(start: float, end: float, intervals: list[tuple[float, float]]) -> float:
    """The length of [start, end] that the intervals cover together."""
    total, reached = 0.0, start
    for a, b in sorted(intervals):
        a, b = max(a, reached), min(b, end)
        if b > a:
            total += b - a
            reached = b
    return total
