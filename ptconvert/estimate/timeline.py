"""When each stage computes and each all-reduce transfers.

A blocking ending holds the computation until its all-reduce is done. An overlapped one is launched
and its all-reduce runs beside the stages before its merge; what isn't done by then is waited for.
It takes shares of its own time (`Device.overlap_share` and `bulk_overlap_share`) from the stage
that follows its launch.
All-reduces take the link in launch order, as many at once as the device has them progress: one
after another on NCCL's stream, two side by side on gloo's threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptconvert.estimate.collective import Reduction
from ptconvert.estimate.hardware import Device
from ptconvert.schedule.schedule import Schedule


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
        """The share of the time that isn't computation: waiting for all-reduces, or slowed."""
        return 1 - self.compute / self.seconds if self.seconds else 0.0


def run(
    schedule: Schedule,
    stages: Sequence[float],
    head: float,
    reductions: Sequence[Reduction],
    device: Device,
    outside: float = 0.0,
) -> Timeline:
    """The timeline of a pass whose stages compute for `stages` seconds each, and its head after.

    `reductions` are those that each stage would launch, by the kind of ending; `outside` are
    seconds of collectives before and after the stages.
    """
    now, owed = 0.0, 0.0
    busy = [0.0] * device.reduces_at_once  # until when
    done: dict[int, float] = {}  # when the all-reduce of each bucket is
    spans = []
    for step, alone, reduction in zip(schedule.program, stages, reductions, strict=True):
        end, transfer = now + alone + owed, None
        if step.launches:
            start = max(end, min(busy))
            moved = reduction.overlapped if step.overlapped else reduction.blocking
            transfer = (start, start + moved.seconds)
            busy = [*sorted(busy)[1:], transfer[1]]
            done[step.bucket] = transfer[1]
        owed = 0.0
        if step.launches and not step.waits:
            beside = reduction.overlapped
            owed = device.overlap_share * beside.fixed + device.bulk_overlap_share * beside.moving
        ready = max([end, *(done[bucket] for bucket in step.merges)])
        spans.append(Span((now, end), transfer, ready - end))
        now = ready
    return Timeline(tuple(spans), sum(stages) + head, now + head + outside)
