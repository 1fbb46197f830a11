"""All-reduces in flight, for engines that have none of their own that run beside what follows.
Shape suffixes: T tokens, D stream width."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Begins the sum of one tensor over ranks into another; what it returns waits for that.
Start = Callable[[torch.Tensor, torch.Tensor], Callable[[], object]]


class InFlight(threading.local):
    """What this thread launched and has not waited for, by stage.

    By thread, because an engine may run two halves of a batch in turns on two threads.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.by_stage: dict[int, tuple[torch.Tensor, torch.Tensor, Callable[[], object]]] = {}

    def launch(self, stage: int, local_TD: torch.Tensor, sum_TD: torch.Tensor) -> None:
        """Begins to fill `sum_TD` with the sum of `local_TD` over ranks, which stays as it is;
        nobody may touch either before it is merged."""
        self.by_stage[stage] = local_TD, sum_TD, self.start(local_TD, sum_TD)

    def merge(self, stages: Sequence[int], sums: Sequence[torch.Tensor]) -> None:
        """Waits for the stages, whose `sums` are those that they were launched with, and adds to
        the first one what the others are.

        Raises RuntimeError where one is another tensor: a compiler copied it while it was in
        flight.
        """
        for number, stage in enumerate(stages):
            _, sum_TD, wait = self.by_stage.pop(stage)
            if sum_TD.data_ptr() != sums[number].data_ptr():
                raise RuntimeError(f"the all-reduce of stage {stage} was copied while in flight")
            wait()
            if number:
                sums[0].add_(sum_TD)


def started_by_torch(
    local_TD: torch.Tensor, sum_TD: torch.Tensor, group: Any, ranks: int
) -> Callable[[], object]:
    """The sum over a process group of torch.distributed, which has it in place only, so the tensor
    is copied first. What is returned waits: on CUDA the current stream does, on CPU this thread."""
    sum_TD.copy_(local_TD)
    if ranks == 1:
        return lambda: None
    work = dist.all_reduce(sum_TD, group=group, async_op=True)

    def wait() -> None:
        # On CPU it yields its core until gloo's threads are done, as going to sleep and being woken
        # takes longer than a small all-reduce does.
        while sum_TD.device.type == "cpu" and not work.is_completed():
            os.sched_yield()
        work.wait()

    return wait
