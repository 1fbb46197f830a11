"""All-reduces in flight on torch.distributed's process groups, for engines that have none of their
own that run beside what follows. Shape suffixes: T tokens, D stream width."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class InFlight(threading.local):
    """What this thread launched and has not waited for: buffers and work handles by stage.

    By thread, because an engine may run two halves of a batch in turns on two threads.
    """

    def __init__(self) -> None:
        self.by_stage: dict[int, tuple[torch.Tensor, Any]] = {}

    def launch(self, stage: int, local_TD: torch.Tensor, group: Any, ranks: int) -> None:
        """Begins the sum of `local_TD` over the group's ranks, which stays as it is."""
        buffer_TD = local_TD.clone()
        work = dist.all_reduce(buffer_TD, group=group, async_op=True) if ranks > 1 else None
        self.by_stage[stage] = buffer_TD, work

    def merge(self, stages: Sequence[int], merged_TD: torch.Tensor) -> None:
        """Waits for the stages' sums, and fills `merged_TD` with theirs; zeros where there is no
        stage."""
        if not stages:
            merged_TD.zero_()
        for number, stage in enumerate(stages):
            buffer_TD, work = self.by_stage.pop(stage)
            if work is not None:
                _wait(work, buffer_TD)
            if number:
                merged_TD.add_(buffer_TD)
            else:
                merged_TD.copy_(buffer_TD)


def _wait(work: Any, buffer_TD: torch.Tensor) -> None:
    """Waits for an all-reduce: on CUDA the current stream does, on CPU this thread.

    On CPU it yields its core until gloo's threads are done, as going to sleep and being woken takes
    longer than a small all-reduce does.
    """
    while buffer_TD.device.type == "cpu" and not work.is_completed():
        os.sched_yield()
    work.wait()
