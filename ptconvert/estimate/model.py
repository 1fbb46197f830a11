"""From a schedule, a model's shape and a hardware row to seconds and tokens per second.

Everything is a pure function of frozen data. `step` is one forward pass, `estimate` a whole
request: a prefill, then decode steps at a cache that grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ptconvert.estimate.collective import Reduction, Transfer, all_gather, all_reduce
from ptconvert.estimate.hardware import Engine, Hardware
from ptconvert.estimate.roofline import (
    NO_GUESSES,
    Pass,
    head_seconds,
    joining_part,
    kernel_seconds,
    logits_of,
    rank_bytes,
    stage_seconds,
)
from ptconvert.estimate.timeline import Timeline, run
from ptconvert.models.families import Layer
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import BLOCKS, Kind, Sublayer


@dataclass(frozen=True)
class Speculation:
    """Decode steps that verify `drafted` tokens, of which `accepted` are right in the mean, and add
    one of their own (Leviathan et al., arXiv 2211.17192). They come from the text so far, at no
    cost, or from one more `layer` of the model's (an MTP or EAGLE head), one after another."""

    drafted: int
    accepted: float
    layer: bool = False


@dataclass(frozen=True)
class Workload:
    """What is served: `batch` sequences at once, each of `prompt` tokens that grows by `new`."""

    batch: int
    prompt: int
    new: int
    speculation: Speculation = Speculation(0, 0.0)

    @property
    def prefill(self) -> Pass:
        """The pass over the prompts."""
        return Pass(self.batch, self.prompt, 0, self.prompt + self.new)

    @property
    def decode(self) -> Pass:
        """The decode step halfway, whose time is the mean as it grows linearly with the cache, but
        where a window fills on the way."""
        drafted, whole = self.speculation.drafted, self.prompt + self.new
        return Pass(self.batch, 1 + drafted, self.prompt + self.new // 2, whole, drafted)

    @property
    def tokens_per_step(self) -> float:
        """What a decode step adds to each sequence in the mean."""
        return 1 + self.speculation.accepted


@dataclass(frozen=True)
class Estimate:
    """What serving a workload would take; `tokens_per_second` is of the whole batch.

    `ttft` and `tpot` are seconds to the first token and per further token, of which a decode step
    gives one or more; `memory` the bytes of weights and cache on one rank.
    """

    schedule: Schedule
    ttft: float
    tpot: float
    tokens_per_second: float
    prefill: Timeline
    decode: Timeline
    memory: float


def step(
    schedule: Schedule,
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    ranks: int,
    one: Pass,
    *,
    tracks: int = 0,
    guesses: Mapping[Sublayer, int] = NO_GUESSES,
) -> Timeline:
    """The timeline of one forward pass on `ranks` ranks.

    `tracks` is the checkpoint's, where it has more than ranks; `guesses` are the ranks of its
    tracks' guesses, for the sublayers that have one. Raises HardwareError where the
    hardware's links don't join so many ranks.
    """
    hardware.check_ranks(ranks)
    engine = serving(engine, schedule, shape)
    tracked = several_tracked(schedule, ranks, tracks)
    alike = [shape.alike(layer) for layer in range(shape.layers)]
    known: dict[object, float] = {}  # a model has a few kinds of stages, many times over
    stages = []
    for stage in schedule.stages:
        key = tuple(
            (s.kind, alike[s.layer], s.layer in tracked, guesses.get(s) if guesses else None)
            for s in stage.sublayers
        )
        if key not in known:
            known[key] = stage_seconds(
                stage.sublayers,
                *(shape, hardware.device, engine, ranks, one),
                *(tracks, tracked, guesses),
            )
        stages.append(known[key])
    head = head_seconds(shape, hardware.device, engine, ranks, one)
    carried = [shape.payloads(sublayers) for sublayers in schedule.carried]
    of = {n: reduction(shape, hardware, engine, ranks, one, n) for n in set(carried)}
    moved = [of[streams] for streams in carried]
    if any(reduced.fused for reduced in moved):
        saved = kernel_seconds(1.0, hardware.device, engine, one)
        for index in norms_after(schedule, shape):
            less = saved if moved[index].fused else 0.0
            if index + 1 < len(stages):
                stages[index + 1] -= less
            else:
                head -= less
    outside = vocabulary_seconds(shape, hardware, engine, ranks, one)
    return run(schedule, stages, head, moved, hardware.device, outside)


def norms_after(schedule: Schedule, shape: ModelShape) -> list[int]:
    """The stages whose all-reduce is waited for and right after which come an addition to the
    stream and a norm, as vLLM's pass that fuses the three wants it: what follows has one kernel
    less then. In a conversion they don't where other all-reduces are merged there as well, or where
    an output bias is added to the sum; of a model as it is one rank adds it before. The pass knows
    plain RMSNorms only.
    """
    if not shape.family.plain_norms:
        return []
    biased: set[tuple[Kind, Layer]] = set()
    if schedule != shape.dense:
        first = {kind: layer for layer, kind in reversed(list(enumerate(shape.kinds)))}
        biased = {
            (which, kind)
            for kind, layer in first.items()
            for which in Kind
            for rule in shape.rules_of(layer)
            if rule.is_common_bias and shape.runs_in(rule, Sublayer(layer, which))
        }
    adding = {
        step.bucket
        for step in schedule.program
        if any((s.kind, shape.kinds[s.layer]) in biased for s in step.sublayers)
    }
    return [
        step.index
        for step in schedule.program
        if step.merges == (step.index,) and not step.overlapped and step.index not in adding
    ]


def serving(engine: Engine, schedule: Schedule, shape: ModelShape) -> Engine:
    """The engine as it serves a model of that schedule: its own, or a conversion."""
    return engine.serving(schedule != shape.dense)


def several_tracked(schedule: Schedule, ranks: int, tracks: int) -> frozenset[int]:
    """The layers of which a rank runs more than one track."""
    return schedule.track_layers if tracks > ranks else frozenset()


def reduction(
    shape: ModelShape, hardware: Hardware, engine: Engine, ranks: int, one: Pass, streams: int = 1
) -> Reduction:
    """One all-reduce of a pass, of so many streams, in the ways that the engine opens to each kind
    of ending.

    A blocking one is `fused` with the addition and the norm after it, up to the size that the
    innermost link says, among its ranks.
    """
    nbytes, inner = streams * one.total * shape.bytes_per_token, hardware.links[:1]

    def ended(ending: str) -> Transfer:
        return all_reduce(
            nbytes,
            ranks,
            hardware.links,
            one_shot=engine.one_shot in ("all", ending) and nbytes <= engine.shot_mb * 1e6,
            in_switch=engine.in_switch in ("all", ending),
            quantised=engine.quantised in ("all", ending),
        )

    fused = engine.fused_norm == "blocking" and shape.family.plain_norms
    fused &= any(1 < ranks <= link.ranks and nbytes <= link.fused_norm_mb * 1e6 for link in inner)
    return Reduction(ended("blocking"), ended("overlapped"), fused)


def vocabulary_seconds(
    shape: ModelShape, hardware: Hardware, engine: Engine, ranks: int, one: Pass
) -> float:
    """What a vocabulary cut by rank costs a pass: its embeddings all-reduced, its logits gathered.

    A schedule's all-reduces don't count these.
    """
    seconds = 0.0
    if engine.cuts_embedding:
        seconds += reduction(shape, hardware, engine, ranks, one).blocking.seconds
    if engine.cuts_lm_head:
        nbytes = logits_of(engine, one) * shape.vocabulary * shape.bytes_per_token / shape.width
        seconds += all_gather(nbytes, ranks, hardware.links).seconds
    return seconds


def draft_seconds(
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    ranks: int,
    verified: Pass,
    speculation: Speculation,
) -> float:
    """Seconds in which a layer drafts the tokens that a decode step verifies, one after another; 0
    without such a layer.

    It is as the model's last, is cut by rank, and waits for the all-reduces of its own, whatever
    the schedule; its logits are lm_head's. The host has no more to do than for the step.
    """
    if not speculation.layer:
        return 0.0
    last, one = shape.layers - 1, replace(verified, tokens=1, drafted=0, beside=None)
    alone, device = replace(engine, step_us=0.0), hardware.device
    sublayers = [Sublayer(last, kind) for kind in BLOCKS]
    computed = stage_seconds(sublayers, shape, device, alone, ranks, one)
    computed += joining_part(shape, one).seconds(device, alone)
    computed += head_seconds(shape, device, alone, ranks, one)
    moved = reduction(shape, hardware, alone, ranks, one)
    norm = moved.fused * kernel_seconds(1.0, device, alone, one)
    waited = (1 if shape.family.parallel else 2) * (moved.blocking.seconds - norm)
    waited += vocabulary_seconds(shape, hardware, alone, ranks, one)
    return speculation.drafted * (computed + waited)


def estimate(
    schedule: Schedule,
    shape: ModelShape,
    hardware: Hardware,
    engine: Engine,
    ranks: int,
    workload: Workload,
    *,
    tracks: int = 0,
    guesses: Mapping[Sublayer, int] = NO_GUESSES,
) -> Estimate:
    """Times and throughput of a workload under a schedule. Raises HardwareError as `step` does."""
    engine, passes = serving(engine, schedule, shape), (workload.prefill, workload.decode)
    prefill, decode = (
        step(schedule, shape, hardware, engine, ranks, one, tracks=tracks, guesses=guesses)
        for one in passes
    )
    tracked = several_tracked(schedule, ranks, tracks)
    ttft = prefill.seconds + engine.arrival(workload.prompt)
    speculation = workload.speculation
    drafting = draft_seconds(shape, hardware, engine, ranks, workload.decode, speculation)
    tpot = (decode.seconds + drafting) / workload.tokens_per_step
    whole = ttft + (workload.new - 1) * tpot
    return Estimate(
        schedule,
        ttft,
        tpot,
        workload.batch * workload.new / whole,
        prefill,
        decode,
        rank_bytes(
            *(shape, engine, ranks, workload.decode, tracks, tracked, guesses),
            drafting=speculation.layer,
        ),
    )
