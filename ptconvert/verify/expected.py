"""What a schedule promises about the all-reduces of ranks, and where ranks part from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptconvert.models.shape import ModelShape
from ptconvert.runtime.communicator import Event, stages_of
from ptconvert.runtime.counters import ALL_REDUCE
from ptconvert.runtime.launch import RankFailure, RanksFailed
from ptconvert.schedule.schedule import Schedule

FP32_TOLERANCE = 1e-4
# Linear attention goes over a prompt in chunks and over what follows token by token, which round
# otherwise: a dense model of 6 layers with random weights differs from itself by 8e-4, logits of
# standard deviation 2.8 (tests/test_families.py).
RECURRENT_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Expected:
    """What a schedule promises about the all-reduces of each step."""

    schedule: Schedule
    model: ModelShape
    dtype: torch.dtype
    batch: int
    prompt_tokens: int
    new_tokens: int
    fp32_tolerance: float = FP32_TOLERANCE  # of the largest difference between logits

    @property
    def dtype_name(self) -> str:
        """As the profiler and the flight recorder print it."""
        names = {torch.float32: "float", torch.float16: "half"}
        return names.get(self.dtype, str(self.dtype).removeprefix("torch."))

    def shape(self, step: str, sublayers: int) -> tuple[int, ...]:
        """What an all-reduce of so many sublayers' partials carries in a step: batch, tokens,
        width; before them the sublayers, where each one's sum is normed for itself."""
        tokens = self.prompt_tokens if step == "prefill" else 1
        first = (sublayers,) if self.model.norms_sums else ()
        return *first, self.batch, tokens, self.model.width

    def steps(self) -> list[str]:
        """The names of a pass's steps."""
        return ["prefill", *(f"decode {i}" for i in range(1, self.new_tokens))]

    def all_reduces(self) -> list[tuple[str, bool, int]]:
        """Each all-reduce of a step: its stage as printed, whether it is asynchronous, and of how
        many sublayers it takes partials."""
        return [
            (f"stage {step.index + 1} {stage}", step.overlapped, sublayers)
            for step, stage, sublayers in zip(
                self.schedule.program, self.schedule.stages, self.schedule.carried, strict=True
            )
            if step.launches
        ]

    def departure(self, step: str, seen: Sequence[dict[str, Any]]) -> str | None:
        """The first stage at which collectives seen in a step part from the schedule's.

        The profiler knows the stage of each; the flight recorder only their order, so that a
        missing one shows at the end.
        """
        reduces = [c for c in seen if c["op"] == ALL_REDUCE]
        promised = {stage: (late, number) for stage, late, number in self.all_reduces()}
        if reduces and all(c["stage"] is not None for c in reduces):
            for number, each in enumerate(self.schedule.stages, 1):
                stage = f"stage {number} {each}"
                here = [c for c in reduces if f"stage {c['stage']}" == stage]
                if len(here) != (stage in promised):
                    return f"{step}, {stage}: {len(here)} all-reduces, not {int(stage in promised)}"
                if here and (wrong := self._wrong(here[0], step, *promised[stage])):
                    return f"{step}, {stage}: {wrong}"
            return None
        for (stage, rest), one in zip(promised.items(), reduces, strict=False):
            if wrong := self._wrong(one, step, *rest):
                return f"{step}, {stage}: {wrong}"
        if len(reduces) < len(promised):
            stage = list(promised)[len(reduces)]
            return f"{step}, {stage}: no all-reduce ({len(reduces)} of {len(promised)})"
        if len(reduces) > len(promised):
            return f"{step}: {len(reduces)} all-reduces, the schedule has {len(promised)}"
        return None

    def _wrong(
        self, one: dict[str, Any], step: str, asynchronous: bool, sublayers: int
    ) -> str | None:
        """What is wrong with an all-reduce of a step; what isn't known of it is not compared."""
        dtype_fits = one["dtype"] in ("", self.dtype_name)
        shape = self.shape(step, sublayers)
        if tuple(one["shape"]) != shape or not dtype_fits:
            sent, wanted = ("x".join(map(str, s)) for s in (one["shape"], shape))
            return f"all-reduced {sent} {one['dtype']}, not {wanted} {self.dtype_name}"
        if one["asynchronous"] not in (None, asynchronous):
            return f"the all-reduce was {'blocking' if asynchronous else 'asynchronous'}"
        return None


def with_departures(error: RanksFailed, expected: Expected) -> list[RankFailure]:
    """The failures, with where each rank stood, and first those that left the schedule."""
    found = []
    for failure in error.failures:
        events = error.journals.get(failure.rank, [])
        why = f"{failure.why}; stood at {_stood(events, expected)}"
        found.append(replace(failure, why=why))
    for rank, events in sorted(error.journals.items()):
        if left := _left_schedule(events, expected):
            found.insert(0, RankFailure(rank, f"left the schedule: {left}", "", victim=False))
    return found


def _stood(events: Sequence[Event], expected: Expected) -> str:
    passes = [e.text for e in events if e.kind == "pass"]
    since = list(itertools.takewhile(lambda e: e.kind != "pass", reversed(events)))
    stages = [e.text for e in since if e.kind == "stage"]
    where = passes[-1] if passes else "its start"
    return f"{where}, {_stage(stages[0], where, expected)}" if stages else where


def _stage(index: str, where: str, expected: Expected) -> str:
    return f"stage {int(index) + 1} {_schedule_of(where, expected).stages[int(index)]}"


def _schedule_of(where: str, expected: Expected) -> Schedule:
    """The schedule that a pass of this name ran."""
    if "baseline" in where:
        return expected.model.dense
    return expected.schedule


def _left_schedule(events: Sequence[Event], expected: Expected) -> str | None:
    """The first stage at which a rank's journal parts from the schedule, if it does."""
    stages = list(stages_of(list(events)))
    dtype = str(expected.dtype).removeprefix("torch.")
    for number, (where, index, reduces) in enumerate(stages):
        schedule = _schedule_of(where, expected)
        step = "prefill" if where.endswith("prefill") else "decode"
        carried = schedule.carried[int(index)]
        shape = "x".join(map(str, expected.shape(step, carried)))
        promised = [f"{shape} {dtype}"] * bool(carried)
        unfinished = number == len(stages) - 1 and len(reduces) < len(promised)
        if reduces != promised and not unfinished:
            sent, wanted = ", ".join(reduces) or "nothing", ", ".join(promised) or "nothing"
            stage = _stage(index, where, expected)
            return f"{where}, {stage}: it all-reduced {sent}, the schedule says {wanted}"
    return None
