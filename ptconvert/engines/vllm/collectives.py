"""Operations that compilers can't see into: the asynchronous all-reduce at a boundary between
stages, and the end of a partial's making.

One operation launches a boundary's all-reduce first, then waits for those that are due and gives
their sum. Compilers can't move it: what it takes is made by the stage before it, what it gives is
read by the stage after it. (Two operations, start and wait, would let a compiler sink the start to
its wait; functional collectives gave wrong tokens under torch.compile on CPU.)

Nothing is copied: the sum comes into a tensor that is made before the launch, as vLLM's attention
does it, and the operation that waits is given that and what is summed, so that nobody takes their
memory meanwhile. Where pieces of CUDA graphs run around it, the piece after it reads the memory
that it read when it was captured. Where vLLM breaks a capture at attention instead
(VLLM_USE_BREAKABLE_CUDAGRAPH) it is broken here too, as none may end with an all-reduce in flight.

Which all-reduces come here and which block says `engines.base.ServedPass.boundary`.

On CUDA the all-reduces run on a NCCL communicator of their own and a stream of high priority. Else,
and where vLLM's binding of NCCL is switched off, they are torch.distributed's on the process group
that vLLM made for the tensor-parallel ranks, and copied once: on CPU gloo's own threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.utils.torch_utils import direct_register_custom_op

from ptconvert.engines.in_flight import InFlight, started_by_torch
from ptconvert.runtime.counters import BOUNDARY, OWN_ALL_REDUCE

NO_LAUNCH = -1


class OwnCommunicator:
    """All-reduces beside the current stream: a NCCL communicator, and the stream they run on."""

    def __init__(self, communicator: Any, stream: Any) -> None:
        self.communicator, self.stream = communicator, stream

    def start(self, local_TD: torch.Tensor, sum_TD: torch.Tensor) -> Callable[[], object]:
        """Begins the sum once the current stream has come here; the current stream waits for it
        where what is returned is called. By events alone, so that a CUDA graph can capture it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        torch.ops.ptconvert.own_all_reduce(local_TD, sum_TD)
        done = self.stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


_own: OwnCommunicator | None = None


def open_communicator() -> None:
    """Makes the communicator for asynchronous all-reduces of vLLM's tensor-parallel ranks, where
    they have GPUs. Collective; not while a CUDA graph is captured."""
    global _own  # as vLLM has its groups: operations take tensors and numbers
    _own = None
    group = get_tp_group()
    if group.world_size > 1 and group.device.type == "cuda":
        communicator = PyNcclCommunicator(group.cpu_group, group.device)
        if not communicator.disabled:
            stream: Any = torch.cuda.Stream(group.device, priority=-1)  # type: ignore[no-untyped-call]
            _own = OwnCommunicator(communicator, stream)


def _start(local_TD: torch.Tensor, sum_TD: torch.Tensor) -> Callable[[], object]:
    if _own is not None:
        return _own.start(local_TD, sum_TD)
    group = get_tp_group()
    return started_by_torch(local_TD, sum_TD, group.device_group, group.world_size)


_in_flight = InFlight(_start)


def _own_all_reduce(local_TD: torch.Tensor, sum_TD: torch.Tensor) -> None:
    """An operation, so that profilers see it: NCCL is called past torch here."""
    assert _own is not None
    _own.communicator.all_reduce(local_TD, sum_TD, stream=_own.stream)


@eager_break_during_capture  # type: ignore[untyped-decorator]
def _launch_and_merge(
    launch: int, waits: list[int], local_TD: torch.Tensor, *tensors: torch.Tensor
) -> None:
    """`tensors` are not in a list, as a capture refers to arguments only weakly."""
    if launch != NO_LAUNCH:
        _in_flight.launch(launch, local_TD, tensors[0])
    _in_flight.merge(waits, tensors[1:])


def _all_reduce_boundary(
    local_TD: torch.Tensor,
    sums: list[torch.Tensor],
    kept: list[torch.Tensor],
    launch: int,
    waits: list[int],
) -> None:
    """Launches the sum of `local_TD` over ranks into the last of `sums` as stage `launch`'s, unless
    that is NO_LAUNCH; then waits for the stages `waits`, into whose tensors, the first of `sums`,
    their sums come, and adds all to the first. `kept` is what these sum."""
    _launch_and_merge(launch, waits, local_TD, sums[-1], *sums, *kept)


def _no_boundary(
    local_TD: torch.Tensor,
    sums: list[torch.Tensor],
    kept: list[torch.Tensor],
    launch: int,
    waits: list[int],
) -> None:
    """What a compiler is told of it: it returns nothing."""


def _finished(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.clone()


_library: Any = torch.library.Library(BOUNDARY.split("::")[0], "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    BOUNDARY.split("::")[1],
    _all_reduce_boundary,
    # What is summed isn't changed, but a compiler must think so: else it may compute that a second
    # time for whoever waits, and give the memory of the first to others while it is in flight.
    mutates_args=["local_TD", "sums"],
    fake_impl=_no_boundary,
    target_lib=_library,
)
direct_register_custom_op(
    OWN_ALL_REDUCE.split("::")[1], _own_all_reduce, mutates_args=["sum_TD"], target_lib=_library
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
    local_TD: torch.Tensor,
    sums: list[torch.Tensor],
    kept: list[torch.Tensor],
    launch: int | None,
    waits: list[int],
) -> torch.Tensor:
    """As `Serving.boundary`. Collective: every rank of vLLM's tensor-parallel group calls it with
    the same numbers, in the same order."""
    number = NO_LAUNCH if launch is None else launch
    torch.ops.ptconvert.all_reduce_boundary(local_TD, sums, kept, number, waits)
    return finished(sums[0])
