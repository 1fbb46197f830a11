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

from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import direct_register_custom_op

from ptconvert.engines.in_flight import InFlight
from ptconvert.runtime.counters import BOUNDARY

NO_LAUNCH = -1


_in_flight = InFlight()


def _all_reduce_boundary(
    after_TD: torch.Tensor, merged_TD: torch.Tensor, launch: int, wait: list[int]
) -> None:
    """Launches the sum of `after_TD` over ranks as stage `launch`'s, unless that is NO_LAUNCH; then
    fills `merged_TD` with the sum of the stages `wait`, zeros where there is none."""
    if launch != NO_LAUNCH:  # copied, as the compiler may give after_TD's memory to another tensor
        group = get_tp_group()
        _in_flight.launch(launch, after_TD, group.device_group, group.world_size)
    _in_flight.merge(wait, merged_TD)


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
