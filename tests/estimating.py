"""What tests of the estimator share: a model, schedules, and links to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hypothesis import strategies as st
from test_schedule import schedules

from ptconvert.checkpoint.files import read_config
from ptconvert.estimate.collective import all_reduce
from ptconvert.estimate.hardware import Hardware, Link, Protocol, read_engine, read_hardware
from ptconvert.estimate.roofline import Pass
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import PRESETS, parameters, stages_of
from ptconvert.schedule.schedule import Schedule

ROOT = Path(__file__).parents[1]
LAYERS = 80
SHAPE = ModelShape.from_config(read_config(ROOT / "specs" / "configs" / "llama-3.1-70b.json"))
H100, GPT_FAST, VLLM = read_hardware("h100-sxm"), read_engine("gpt-fast"), read_engine("vllm")
ARGUMENTS = {"depth": 4, "delay": 2, "every": 4}
SCHEDULES = {
    name: Schedule(
        stages_of(
            name,
            *(range(LAYERS), SHAPE.family.parallel, SHAPE.divisible),
            {k: ARGUMENTS[k] for k in parameters(name) if k in ARGUMENTS},
        )
    )
    for name in PRESETS
}
OVERLAPPED = Schedule(PRESETS["parallel_track"](range(LAYERS), depth=4, overlap=1))
ALL_SCHEDULES = st.sampled_from([*SCHEDULES.values(), OVERLAPPED])
PASSES = st.builds(
    Pass,
    sequences=st.integers(1, 64),
    tokens=st.sampled_from([1, 7, 512]),
    past=st.integers(0, 4096),
    allocated=st.just(8192),
)
LINKS = st.builds(
    Link,
    name=st.just("link"),
    ranks=st.just(8),
    base_us=st.floats(0, 100),
    algorithm=st.sampled_from(["ring", "tree", "ring or tree"]),
    one_shot_us=st.floats(0, 100),
    switch_us=st.floats(0, 100),
    switch_gb_s=st.floats(0, 1000),
    protocols=st.lists(
        st.builds(Protocol, step_us=st.floats(0, 50), gb_s=st.floats(0.1, 1000)),
        min_size=1,
        max_size=2,
    ).map(tuple),
)


@dataclass(frozen=True)
class Given:
    """A pass to estimate: any schedule, on one to three levels of links."""

    schedule: Schedule
    shape: ModelShape
    hardware: Hardware
    ranks: int
    tracks: int
    one: Pass


@st.composite
def _settings(draw: st.DrawFn) -> Given:
    schedule = draw(st.one_of(ALL_SCHEDULES, schedules()))
    joined = sorted(draw(st.sets(st.sampled_from([1, 2, 4, 8, 16, 24]), min_size=1, max_size=3)))
    links = tuple(replace(draw(LINKS), ranks=ranks) for ranks in joined)
    device = replace(
        H100.device,
        overlap_share=draw(st.floats(0, 0.9)),
        bulk_overlap_share=draw(st.floats(0, 0.9)),
        reduces_at_once=draw(st.integers(1, 3)),
    )
    hardware = replace(H100, links=links, device=device)
    ranks = draw(st.sampled_from([n for n in (1, 2, 4, 8, 16) if n <= joined[-1]]))
    tracks = ranks * draw(st.sampled_from([1, 2]))
    shape = SHAPE.with_layers(schedule.layers)
    return Given(schedule, shape, hardware, ranks, tracks, draw(PASSES))


SETTINGS = _settings()


def seconds(
    nbytes: float,
    ranks: int,
    links: Sequence[Link],
    *,
    one_shot: bool = False,
    in_switch: bool = True,
) -> float:
    """Of one all-reduce."""
    return all_reduce(nbytes, ranks, links, one_shot=one_shot, in_switch=in_switch).seconds
