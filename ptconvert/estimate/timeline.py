"""When each stage computes and each all-reduce transfers: one compute lane, one link.

A blocking ending holds the computation until its all-reduce is done. An overlapped one is launched
and its all-reduce runs beside the stages before its merge; what isn't done by then is waited for.
All-reduces take the link one after another, in launch order, as they do on one NCCL stream or one
gloo thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptconvert.estimate.hardware import Device
from ptconvert.schedule import Schedule


@dataclass(frozen=True)
class Span:
    """One stage of a pass: when it computes, and when its all-reduce (if any) transfers. Seconds.

    `reduce` is None for a deferred ending; `waited` is how long the next stage stood still for
    all-reduces merged after this one.
    """

    compute: tuple[float, float]
    reduce: tuple[float, float] | None
    waited: float


@dataclass(frozen=True)
class Timeline:
    """A pass: its stages' spans, the pure computation in them, and the whole time. Seconds.

    `seconds` includes embeddings and lm_head, which come after the last stage here.
    """

    spans: tuple[Span, ...]
    compute: float
    seconds: float

    @property
    def communication(self) -> float:
        """The share of the time that isn't computation: waiting for all-reduces, or slowed by them."""
        return 1 - self.compute / self.seconds if self.seconds else 0.0


def run(
    schedule: Schedule,
    stages: Sequence[float],
    head: float,
    reduce_seconds: float,
    device: Device,
) -> Timeline:
    """The timeline of a pass whose stages compute for `stages` seconds each, and its head after.

    `reduce_seconds` is one all-reduce.
    """
    now = free = 0.0
    due: dict[int, float] = {}
    spans = []
    for index, alone in enumerate(stages):
        end = now + _beside(alone, max(0.0, free - now), device.overlap_share)
        merged, transfer = schedule.merged_after(index), None
        if merged is not None:
            transfer = (max(end, free), max(end, free) + reduce_seconds)
            free = transfer[1]
            due[merged] = free
        ready = max(end, due.pop(index, end))
        spans.append(Span((now, end), transfer, ready - end))
        now = ready
    return Timeline(tuple(spans), sum(stages) + head, now + head)


def _beside(alone: float, transferring: float, share: float) -> float:
    """Seconds for `alone` seconds of computation, the first `transferring` beside a transfer."""
    slowed = alone / (1 - share)
    return slowed if slowed <= transferring else alone + share * transferring
