"""A schedule lowered into the program that everything walks: what happens around each stage.

Executor, ranks, serving engines, expected collectives, timelines and diagrams all read the same
steps, so what an ending means is settled here once, and models walk a tuple of plain data: nothing
asks a schedule anything while tokens are waited for, and compilers see straight code.

Partials that one all-reduce takes are a bucket, named by the stage that launches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptconvert.schedule.stages import Stage, Sublayer


@dataclass(frozen=True)
class Step:
    """A stage, what its tracks read, and the boundary after it.

    `reads`: buckets of which each track sees its own part, beside the merged stream.
    `bucket`: the one that takes the stage's partials. It is launched here if it is the stage's own.
    `overlapped`: whether an all-reduce launched here runs beside what follows.
    `keeps_own`: whether tracks go on from here with their own partials, and not the others'.
    `merges`: buckets whose sums, and whose sublayers' output biases, join the stream here.
    `completes`: layers of which all sublayers have run now.
    """

    index: int
    sublayers: tuple[Sublayer, ...]
    reads: tuple[int, ...]
    bucket: int
    overlapped: bool
    keeps_own: bool
    merges: tuple[int, ...]
    completes: tuple[int, ...]

    def __str__(self) -> str:
        """As the goldens have it: `2 m1 -> 5, reads 0 5, keeps its own, merges 0`; `=> 2` launches
        bucket 2 and waits, `~> 2` launches it to run beside what follows."""
        arrow = "~>" if self.overlapped else "=>" if self.launches else "->"
        parts = [f"{self.index} {'|'.join(map(str, self.sublayers))} {arrow} {self.bucket}"]
        parts += [f"reads {' '.join(map(str, self.reads))}"] * bool(self.reads)
        parts += ["keeps its own"] * self.keeps_own
        parts += [f"merges {' '.join(map(str, self.merges))}"] * bool(self.merges)
        return ", ".join(parts)

    @property
    def last_layer(self) -> int:
        """The last layer of which the stage runs a sublayer."""
        return max(sublayer.layer for sublayer in self.sublayers)

    @property
    def launches(self) -> bool:
        """Whether an all-reduce is launched after the stage."""
        return self.bucket == self.index

    @property
    def waits(self) -> bool:
        """Whether the all-reduce launched here is needed at once: nothing runs beside it."""
        return self.index in self.merges

    @property
    def diverged(self) -> bool:
        """Whether tracks differ around the stage: they read different streams, or will."""
        return bool(self.reads) or self.keeps_own


def lower(stages: Sequence[Stage]) -> tuple[Step, ...]:
    """The program of a schedule's stages, the last of which must launch; one step for each."""
    return tuple(_steps(stages))


def _steps(stages: Sequence[Stage]) -> Iterator[Step]:
    last, bucket = len(stages) - 1, -1
    until: dict[int, int] = {}  # of each bucket in flight, after which stage it is merged
    seen: set[int] = set()  # outstanding buckets with a part that its own track sees
    left = Counter(sublayer.layer for stage in stages for sublayer in stage.sublayers)
    for index, stage in enumerate(stages):
        if bucket < index:
            bucket = next(i for i in range(index, last + 1) if stages[i].ending.kind.launches)
        kind, reads = stage.ending.kind, tuple(sorted(seen))
        if bucket == index:
            until[index] = min(index + stage.ending.lag, last)
        merges = tuple(launched for launched, after in until.items() if after == index)
        keeps_own = kind.own_seen and index not in merges
        if keeps_own:
            seen.add(bucket)
        elif bucket == index:
            seen.discard(bucket)  # what was pending in it is hidden from here on
        seen.difference_update(merges)
        for launched in merges:
            del until[launched]
        overlapped = bucket == index and kind.lagged
        layers = sorted(sublayer.layer for sublayer in stage.sublayers)
        left.subtract(layers)
        yield Step(
            *(index, stage.sublayers, reads, bucket, overlapped, keeps_own, merges),
            tuple(layer for layer in dict.fromkeys(layers) if not left[layer]),
        )
