"""What torch itself saw of the collectives: its flight recorder, and its profiler.

Two means that share no code with the executor, nor with each other.
"""

from __future__ import annotations

import bisect
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ALL_REDUCE = "all_reduce"
BOUNDARY = "ptconvert::all_reduce_boundary"  # ours, in vLLM
OWN_ALL_REDUCE = "ptconvert::own_all_reduce"  # in it, on GPUs, by vLLM's binding of NCCL
# All-reduces in vLLM that don't pass through c10d, and which argument is the tensor: over shared
# memory on CPU, and on GPUs whichever of its kernels vLLM picks, or compiled one with the norm
# after it (at -O2 on Hopper and Blackwell).
_VLLM_ALL_REDUCES = {
    "_C::shm_allreduce": 1,
    "vllm::all_reduce": 0,
    "vllm::flashinfer_trtllm_fused_allreduce_norm": 0,
    OWN_ALL_REDUCE: 0,
}
# c10d's own names of collectives in the form that gathers into, or scatters from, one tensor: vLLM
# takes these on CPU where its ranks can't share memory.
_ONE_TENSOR_FORMS = {"_allgather_base": "all_gather", "_reduce_scatter_base": "reduce_scatter"}


@dataclass(frozen=True)
class Collective:
    """One collective that a rank took part in.

    `asynchronous` and `stage`, as printed in the schedule, are None where they aren't known;
    `dtype` is empty then.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    asynchronous: bool | None
    stage: str | None = None

    @property
    def nbytes(self) -> int:
        size: int = getattr(getattr(torch, self.dtype, None), "itemsize", 0)
        return math.prod(self.shape) * size if self.shape else 0


class FlightRecorder:
    """torch.distributed's ring of recent collectives, of which only those since a mark are new."""

    def __init__(self, backend: str) -> None:
        c10d: Any = torch._C._distributed_c10d
        self._dump = c10d._dump_nccl_trace if backend == "nccl" else c10d._dump_fr_trace
        self._last = max((e["record_id"] for e in self._entries()), default=-1)

    def _entries(self) -> list[dict[str, Any]]:
        # A pickle of this process's own, as torch makes it; without stack traces, which take most
        # of the time.
        found: dict[str, Any] = pickle.loads(self._dump(True, False, False))
        return list(found.get("entries", []))

    def new(self) -> list[Collective]:
        """The collectives since the last call, or since this was made, in order."""
        entries = [e for e in self._entries() if e["record_id"] > self._last]
        entries.sort(key=lambda e: int(e["record_id"]))
        self._last = entries[-1]["record_id"] if entries else self._last
        return [
            Collective(
                op=e["profiling_name"].split(":")[-1],
                shape=tuple(e["input_sizes"][0]) if e["input_sizes"] else (),
                dtype=e["input_dtypes"][0].lower() if e["input_dtypes"] else "",
                asynchronous=None,
            )
            for e in entries
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
        # A GPU's kernels are under the same names once more, later than what launched them.
        events = [
            e
            for e in events
            if e.get("ph") == "X" and str(e.get("cat")).lower() != "gpu_user_annotation"
        ]
        events.sort(key=lambda e: float(e["ts"]))
        self._calls = [
            e
            for e in events
            if e.get("cat") == "cpu_op"
            and (e["name"] in _VLLM_ALL_REDUCES or e["name"].startswith(("c10d::", "_C::shm_")))
        ]
        self._boundaries = [e for e in events if e["name"] == BOUNDARY]
        self._launches = [e for e in self._calls if e["name"] == "c10d::allreduce_"]
        kernels = [e for e in events if e.get("cat") == "kernel"]
        reduces = [e for e in kernels if "nccl" in e["name"] and "AllReduce" in e["name"]]
        # The all-reduces themselves, in launch order: NCCL's as kernels, gloo's on a thread. On one
        # rank NCCL has no kernel for what is reduced in place, only what the host did.
        self._transfers = reduces or [
            e for e in events if e["name"] in ("gloo:all_reduce", "nccl:all_reduce")
        ]
        streams = {e.get("tid") for e in reduces}
        main_thread = {e.get("tid") for e in self._launches}
        self._computing = _merged(
            [e for e in kernels if e.get("tid") not in streams]
            if kernels
            else [e for e in events if e.get("tid") in main_thread and e["name"][:6] == "aten::"]
        )
        self._marks = {
            kind: [e for e in events if e["name"].startswith(f"{kind} ")]
            for kind in ("step", "stage")
        }

    def _inside(self, event: dict[str, Any], kind: str) -> str:
        """The name of the last step or stage that began before an event."""
        marks = self._marks[kind]
        index = bisect.bisect_right(marks, event["ts"], key=lambda e: float(e["ts"])) - 1
        return str(marks[index]["name"]).removeprefix(f"{kind} ") if index >= 0 else ""

    def _is_overlapped(self, event: dict[str, Any]) -> bool:
        """Whether an all-reduce was launched to run beside what follows. In vLLM that is what the
        boundary launches; compiled, its blocking ones are asynchronous too, and waited for."""
        if event["args"]["Concrete Inputs"][4] != "True":
            return False
        began, here = float(event["ts"]), event.get("tid")
        return bool(self._marks["stage"]) or any(
            float(e["ts"]) <= began <= float(e["ts"]) + float(e["dur"])
            for e in self._boundaries
            if e.get("tid") == here
        )

    def collectives(self) -> dict[str, list[Collective]]:
        """The all-reduces launched in each step, and the other collectives by their c10d name."""
        transfers = iter(self._transfers)
        found: dict[str, list[Collective]] = {}
        until: dict[Any, float] = {}  # the end of the last call, by thread
        for event in sorted(self._calls, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            arguments, thread = event["args"], event.get("tid")
            if event["name"] == "c10d::allreduce_":
                shapes = arguments["Input Dims"][0]
                collective = Collective(
                    op=ALL_REDUCE,
                    shape=tuple(shapes[0]) if shapes else (),
                    dtype=_dtype(next(transfers, {})),
                    asynchronous=self._is_overlapped(event),
                    stage=self._inside(event, "stage"),
                )
            elif (at := _VLLM_ALL_REDUCES.get(event["name"])) is not None:
                shape, dtype = arguments["Input Dims"][at], arguments["Input type"][at]
                asynchronous = event["name"] == OWN_ALL_REDUCE
                collective = Collective(ALL_REDUCE, tuple(shape), _short(dtype), asynchronous)
            else:
                name = event["name"].split("::")[1].removeprefix("shm_").rstrip("_")
                name = _ONE_TENSOR_FORMS.get(name, name)
                collective = Collective(name, (), "", None)
            if float(event["ts"]) < until.get(thread, 0.0):
                continue  # what vLLM's own operation does it with is no collective of its own
            until[thread] = float(event["ts"]) + float(event["dur"])
            found.setdefault(self._inside(event, "step"), []).append(collective)
        return found

    def transfers(self) -> list[Transfer]:
        """Each asynchronous all-reduce with the part of it that ran under computation."""
        if len(self._transfers) != len(self._launches):
            return []
        found = []
        for launch, transfer in zip(self._launches, self._transfers, strict=True):
            if launch["args"]["Concrete Inputs"][4] == "True":
                start, end = transfer["ts"], transfer["ts"] + transfer["dur"]
                hidden = _covered(start, end, self._computing)
                found.append(Transfer(self._inside(launch, "stage"), start, end, hidden))
        return found


def _merged(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The times that events, sorted by their beginning, cover together: disjoint, in order."""
    merged: list[tuple[float, float]] = []
    for event in events:
        start, end = event["ts"], event["ts"] + event["dur"]
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def _covered(start: float, end: float, intervals: list[tuple[float, float]]) -> float:
    """The length of [start, end] that disjoint intervals, in order, cover."""
    total = 0.0
    for a, b in intervals[max(bisect.bisect(intervals, (start,)) - 1, 0) :]:
        if a >= end:
            break
        total += max(0.0, min(b, end) - max(a, start))
    return total


def _dtype(transfer: dict[str, Any]) -> str:
    """The dtype of a transfer; c10d's own event says only that it got a list of tensors."""
    arguments = transfer.get("args", {})
    types = arguments.get("Input type") or [arguments.get("dtype", "")]
    return _short(str(types[0]))


def _short(dtype: str) -> str:
    return dtype.lower().removeprefix("c10::")
