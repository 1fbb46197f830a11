"""Operations that compilers can't see into: the asynchronous all-reduce at a boundary between
stages, and the end of a partial's making.

One operation launches a boundary's all-reduce first, then waits for those that are due and gives
their sum. Compilers can't move it: what it takes is made by the stage before it, what it gives is
read by the stage after it. (Two operations, start and wait, would let a compiler sink the start to
its wait; functional collectives gave wrong tokens under torch.compile on CPU.) It writes into a
tensor made before it, as vLLM's attention does: where pieces of CUDA graphs run around it, the
piece after it reads the memory that it read when it was captured.

Which all-reduces come here and which block says `engines.base.ServedPass.boundary`.

The all-reduces are torch.distributed's, on the process group that vLLM made for the tensor-parallel
ranks: gloo's own threads on CPU; on CUDA a NCCL communicator and stream other than those of vLLM's
blocking all-reduces, which the current stream waits for by an event.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import direct_register_custom_op

from ptconvert.runtime.counters import BOUNDARY

NO_LAUNCH = -1


class _InFlight(threading.local):
    """What this thread launched and has not waited for: buffers and work handles by stage.

    By thread, because vLLM may run two halves of a batch in turns on two threads.
    """

    def __init__(self) -> None:
        self.by_stage: dict[int, tuple[torch.Tensor, Any]] = {}


_in_flight = _InFlight()


def _wait(work: Any, buffer_TD: torch.Tensor) -> None:
    """Waits for an all-reduce: on CUDA the current stream does, on CPU this thread.

    On CPU it yields its core until gloo's threads are done, as going to sleep and being woken takes
    longer than a small all-reduce does.
    """
    while buffer_TD.device.type == "cpu" and not work.is_completed():
        os.sched_yield()
    work.wait()


def _all_reduce_boundary(
    after_TD: torch.Tensor, merged_TD: torch.Tensor, launch: int, wait: list[int]
) -> None:
    """Launches the sum of `after_TD` over ranks as stage `launch`'s, unless that is NO_LAUNCH; then
    fills `merged_TD` with the sum of the stages `wait`, zeros where there is none."""
    if launch != NO_LAUNCH:
        buffer_TD = after_TD.clone()  # the compiler may give after_TD's memory to another tensor
        group = get_tp_group()
        work = None
        if group.world_size > 1:
            work = dist.all_reduce(buffer_TD, group=group.device_group, async_op=True)
        _in_flight.by_stage[launch] = buffer_TD, work
    if not wait:
        merged_TD.zero_()
    for number, stage in enumerate(wait):
        buffer_TD, work = _in_flight.by_stage.pop(stage)
        if work is not None:
            _wait(work, buffer_TD)
        if number:
            merged_TD.add_(buffer_TD)
        else:
            merged_TD.copy_(buffer_TD)


def _no_boundary(
    after_TD: torch.Tensor, merged_TD: torch.Tensor, launch: int, wait: list[int]
) -> None:
    """What a compiler is told of it: it returns nothing."""


def _finished(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.clone()


_library: Any = torch.library.Library(BOUNDARY.split("::")[0], "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    BOUNDARY.split("::")[1],
    _all_reduce_boundary,
    mutates_args=["merged_TD"],
    fake_impl=_no_boundary,
    target_lib=_library,
)
direct_register_custom_op("finished", _finished, fake_impl=torch.empty_like, target_lib=_library)


def finished(x_TD: torch.Tensor) -> torch.Tensor:
    """The same numbers, for compiled code on CPU to read only once they are there.

    vLLM's matrix products on CPU write into a tensor made before them, and torch 2.13's Inductor
    loses sight of that where it fuses sums of several of them: it reads them before they are
    written. It keeps the order of operations that it can't see into.
    """
    if x_TD.device.type != "cpu" or not torch.compiler.is_compiling():
        return x_TD
    out_TD: torch.Tensor = torch.ops.ptconvert.finished(x_TD)
    return out_TD


def all_reduce_boundary(
    after_TD: torch.Tensor, launch: int | None, wait: list[int]
) -> torch.Tensor:
    """Launches the all-reduce of a stage and returns what is merged after it, (tokens, width).

    `after_TD` is the stage's partial, reduced only where `launch` is the stage's index; `wait` are
    the stages whose asynchronous all-reduces are merged here. Collective: every rank of vLLM's
    tensor-parallel group calls it with the same numbers, in the same order.
    """
    merged_TD = torch.empty_like(after_TD)
    number = NO_LAUNCH if launch is None else launch
    torch.ops.ptconvert.all_reduce_boundary(after_TD, merged_TD, number, wait)
    return finished(merged_TD)
