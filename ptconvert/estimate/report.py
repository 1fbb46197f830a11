"""The HTML report of a comparison: figures, a timeline to scale, and what changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import compress

from markupsafe import Markup

from ptconvert.estimate.advice import Advice, Way, advise, verdict
from ptconvert.estimate.compare import (
    BASELINE,
    LIMITS,
    Candidate,
    Row,
    Setting,
    accuracy,
    most_memory,
    one_track_each,
    over_batches,
    over_link_speed,
    over_ranks,
    quantised,
    quantised_by,
    several_tracks,
)
from ptconvert.estimate.hardware import Engine, Hardware
from ptconvert.estimate.model import Estimate, Workload, reduction, vocabulary_seconds
from ptconvert.estimate.roofline import Pass, kernel_seconds, kernels_of, sublayer_parts
from ptconvert.estimate.server import Served
from ptconvert.estimate.sources import numbers, origins
from ptconvert.estimate.timeline import Timeline
from ptconvert.models.shape import TORCH_NAMES, ModelShape
from ptconvert.report.charts import Bar, Lane, LaneGroup, Series, lanes, line_chart
from ptconvert.report.html import render
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import BLOCKS, Kind, Sublayer

_NAMES = {
    Kind.ATTENTION: "attention",
    Kind.MLP: "MLP",
    Kind.SHARED: "shared experts",
    Kind.ROUTED: "routed experts",
}
HEADER = (
    "schedule",
    "all-reduces",
    "waited for",
    "KL",
    "TTFT ms",
    "TPOT ms",
    "tokens/s",
    "speed-up",
    "communication",
)


def to_html(rows: Sequence[Row], setting: Setting, served: Served | None = None) -> str:
    """The report as one self-contained document."""
    s, workload = setting, setting.workload
    subtitle = f"{s.hardware.name}, {served_by(s)}; {accuracy(s)}."
    best = max(range(len(rows)), key=lambda i: rows[i].speed_up)
    shape, advice = s.shape, advise(rows, s)
    header, body = ways_table(rows, advice)
    return render(
        "estimate.html",
        title="What a schedule buys",
        subtitle=subtitle[0].upper() + subtitle[1:],
        facts={
            "model": f"{shape.family.model_type}, {shape.layers} layers of width {shape.width:,}",
            "ranks": s.ranks,
            "batch": workload.batch,
            "tokens per sequence": f"{workload.prompt:,} + {workload.new:,}",
            **({"drafted": drafted(workload)} if drafted(workload) else {}),
            "dtype": dtype(s),
        },
        verdict=verdict(advice),
        header=header,
        rows=body,
        best=[best] if best else [],
        notes=[*notes(rows, s), *left_out(advice, s)],
        served=served,
        timelines={
            "decode step": _timelines(rows, "decode step", lambda e: e.decode),
            "prefill": _timelines(rows, "prefill", lambda e: e.prefill),
        },
        by_hand=_by_hand(s),
        reached=_reached(s),
        what_if=_what_if([row.candidate for row in rows[1:]], s),
        origins=origins(s.hardware, s.hardware.sources),
        numbers=_numbers(s.hardware),
        engine=served_by(s),
        engine_numbers=_engine_numbers(s.engine),
        limits=LIMITS,
        schedules=[(row.candidate.name, row.candidate.schedule) for row in rows[1:]],
    )


def served_by(setting: Setting) -> str:
    """The engine, and the version that its numbers are of."""
    edition = setting.engine.edition
    return f"{setting.engine_name} ({edition})" if edition else setting.engine_name


def drafted(workload: Workload) -> str:
    """What speculative decoding drafts, and how much of it is right; empty without."""
    by = "by one more layer" if workload.speculation.layer else "from the text"
    s = workload.speculation
    return f"{s.drafted} tokens a step {by}, {s.accepted:g} right" if s.drafted else ""


def dtype(setting: Setting) -> str:
    """What the model is served in, as the command line names it."""
    return TORCH_NAMES[setting.shape.dtype or "BF16"]


def cells(row: Row) -> list[str]:
    """A row of the table, as the terminal and the report show it."""
    counts, e = row.candidate.schedule.counts, row.estimate
    return [
        row.candidate.name,
        str(counts.all_reduces),
        str(counts.waited_for),
        "" if row.candidate.kl is None else f"{row.candidate.kl:.4f}",
        f"{e.ttft * 1e3:,.1f}",
        f"{e.tpot * 1e3:,.2f}",
        f"{e.tokens_per_second:,.1f}",
        f"{row.speed_up:.2f}",
        f"{e.decode.communication:.0%}",
    ]


def ways_table(rows: Sequence[Row], advice: Advice) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of all ways to serve a model: rows, then alternatives."""
    schedules, others = advice.ways[: len(rows)], advice.ways[len(rows) :]
    body = [
        *(cells(row) for row in rows),
        *(_alternative(way, rows[0]) for way in others if way.fits),
    ]
    shown = (*schedules, *(way for way in others if way.fits))
    crowd = [f"{way.crowded_rate:,.1f}" if way.crowd_fits else "-" for way in shown]
    header = [*HEADER, f"tokens/s, {advice.crowd} at once"]
    table = [[*line, many] for line, many in zip(body, crowd, strict=True)]
    known = any(way.kl is not None for way in schedules)
    kept = [name != "KL" or known for name in header]  # what a plan has measured, if one has
    return list(compress(header, kept)), [list(compress(line, kept)) for line in table]


def left_out(advice: Advice, setting: Setting) -> list[str]:
    """The alternatives that the table leaves out, and why."""
    held = setting.hardware.device.memory_gb
    return [
        f"{way.name} would need {way.asked.memory / 1e9:,.0f} GB for weights and cache on each "
        f"rank, which has {held:g} GB."
        for way in advice.ways
        if not (way.fits or way.converts or way.name == BASELINE)
    ]


def _alternative(way: Way, baseline: Row) -> list[str]:
    served = way.asked
    return [
        *(way.name, "0", "0", "", f"{served.ttft * 1e3:,.1f}", f"{served.tpot * 1e3:,.2f}"),
        *(f"{way.rate:,.1f}", f"{way.rate / baseline.estimate.tokens_per_second:.2f}", "-"),
    ]


def notes(rows: Sequence[Row], setting: Setting) -> list[str]:
    """What a reader must know before believing the figures."""
    largest, device = most_memory(rows), setting.hardware.device
    needed, held = largest.estimate.memory / 1e9, device.memory_gb
    found = []
    if needed > held:
        found.append(
            f"{largest.candidate.name} needs {needed:.{0 if needed - held > 1 else 2}f} GB for "
            f"weights and cache on each rank, which has {held:g} GB: it can't run."
        )
    if several := several_tracks(rows, setting):
        found.append(_slower(several, setting))
    if (setting.shape.dtype == "F32") != (device.matmul_dtype == "float32"):
        found.append(
            f"The model is served in {dtype(setting)}, but the hardware's rate of matrix products "
            f"is that of {device.matmul_dtype}: prefills will be off."
        )
    if with_lora := [row.candidate.name for row in rows if row.candidate.lora]:
        found.append(
            f"{', '.join(with_lora)}: the LoRA beside the weights (heal --lora) isn't counted; a "
            "linear layer that has one reads two more matrices and takes longer than this."
        )
    return [*found, *_unserved(rows, setting), *_all_reduced(rows, setting)]


def _unserved(rows: Sequence[Row], setting: Setting) -> Iterator[str]:
    """Which rows the engine doesn't run at all, each reason once."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.candidate.unserved:
            names.setdefault(reason, []).append(row.candidate.name)
    for reason, of in names.items():
        which = "any of the schedules" if 1 < len(of) == len(rows) - 1 else ", ".join(of)
        yield f"{setting.engine_name} doesn't serve {which}: {reason}."


def _all_reduced(rows: Sequence[Row], setting: Setting) -> list[str]:
    """By which all-reduces tensor parallelism is estimated, and what fewer bits would change."""
    s = setting
    if s.ranks == 1:
        return []
    dense = s.engine.serving(converted=False)
    ways = {
        what: reduction(s.shape, s.hardware, dense, s.ranks, one).way
        for what, one in _passes(s).items()
    }
    by = "; ".join(f"{way} (a {what})" for what, way in reversed(ways.items()))
    if len(set(ways.values())) == 1:
        by = next(iter(ways.values()))
    found = [f"{BASELINE} all-reduces by {by}."]
    if name := quantised_by(s):
        fewer = quantised(rows, s)
        gains = "; ".join(f"{row.candidate.name} {row.speed_up:.2f}" for row in fewer[1:])
        found.append(
            f"With {name}, which changes what is computed and isn't counted above, {BASELINE} "
            f"would have a TTFT of {fewer[0].estimate.ttft * 1e3:,.1f} ms, and speed-ups would be: "
            f"{gains}."
        )
    return found


def _slower(several: Sequence[Row], setting: Setting) -> str:
    """That these rows' ranks run several tracks of a layer, and what to take instead."""
    names = [row.candidate.name for row in several]
    if setting.ranks == 1:
        return (
            f"One rank runs all tracks of {', '.join(names)} one after another, with kernels of "
            "their own, and has no all-reduce to save: take the dense checkpoint, which needs no "
            "tracks."
        )
    instead = [
        f"{name} {one_track_each(row, setting).speed_up:.2f}, not {row.speed_up:.2f}"
        for name, row in zip(names, several, strict=True)
    ]
    return (
        f"Each of {setting.ranks} ranks runs several tracks one after another, with kernels of "
        f"their own. With {setting.ranks} tracks the speed-up would be: {'; '.join(instead)}."
    )


def _timelines(rows: Sequence[Row], what: str, of: Callable[[Estimate], Timeline]) -> Markup:
    window = layer_group(rows[-1].candidate.schedule)
    groups = [lane_group(row.candidate, of(row.estimate), window) for row in rows]
    caption = (
        f"Layers {window[0]} to {window[-1]} of one {what}, to scale. An all-reduce that nothing "
        "hides keeps the next stage waiting."
    )
    return lanes(groups, "microseconds", caption=caption)


def layer_group(schedule: Schedule) -> range:
    """Two or more layers of a schedule's middle, from one all-reduce after an MLP to another."""
    inner = {
        1 + max(s.layer for s in stage.sublayers)
        for stage in schedule.stages
        if stage.ending.kind.launches
        and any(s.kind in (Kind.MLP, Kind.ROUTED) for s in stage.sublayers)
    }
    ends = sorted({0, *inner, schedule.layers})
    first = min(ends[:-1], key=lambda layer: abs(layer - schedule.layers // 2))
    last = next((end for end in ends if end >= first + 2), ends[-1])
    return range(first, last)


def lane_group(candidate: Candidate, timeline: Timeline, layers: range) -> LaneGroup:
    """What computes and what transfers while the stages of some layers run, in microseconds."""
    stages = candidate.schedule.stages
    inside = [
        span
        for stage, span in zip(stages, timeline.spans, strict=True)
        if any(s.layer in layers for s in stage.sublayers)
    ]
    begin, end = inside[0].compute[0], inside[-1].compute[1] + inside[-1].waited
    waits = [(s.compute[1], s.compute[1] + s.waited) for s in timeline.spans if s.waited > 0]

    def bar(start: float, stop: float, kind: str, label: str = "") -> list[Bar]:
        start, stop = max(start, begin), min(stop, end)
        bars = [Bar((start - begin) * 1e6, (stop - begin) * 1e6, kind, label)]
        return bars if stop > start else []

    compute: list[Bar] = []
    transfers: list[Bar] = []
    for stage, span in zip(stages, timeline.spans, strict=True):
        label = "|".join(map(str, stage.sublayers))
        kinds = dict.fromkeys(_NAMES[s.kind] for s in stage.sublayers)
        compute += bar(*span.compute, " and ".join(kinds), label)
        if span.reduce is not None:
            start, stop = span.reduce
            waited = [(max(a, start), min(b, stop)) for a, b in waits if a < stop and b > start]
            exposed = waited[0][0] if waited else stop  # all that is left of it is waited for
            transfers += bar(start, exposed, "all-reduce, hidden", label)
            transfers += bar(exposed, stop, "all-reduce, waited for", label)
    title = f"{candidate.name}: {(end - begin) * 1e6:,.0f} us"
    return LaneGroup(title, (Lane("compute", compute), Lane("all-reduce", transfers)))


def _passes(setting: Setting) -> dict[str, Pass]:
    return {"prefill": setting.workload.prefill, "decode step": setting.workload.decode}


def _by_hand(setting: Setting) -> list[list[str]]:
    return [
        _stage_by_hand(what, name, sublayer, one, setting)
        for what, one in _passes(setting).items()
        for name, sublayer in _each_once(setting.shape).items()
    ]


def _each_once(shape: ModelShape) -> dict[str, Sublayer]:
    """One sublayer of each sort that the model has, by its name."""
    found: dict[str, Sublayer] = {}
    for layer in range(shape.layers):
        for kind in BLOCKS:
            name = which = _NAMES[kind]
            if kind is Kind.ATTENTION and shape.is_linear(layer):
                which = f"linear {name}"
            elif kind is Kind.ATTENTION and (window := shape.window_of(layer)):
                which = f"{name}, window {window:,}"
            elif kind is Kind.MLP and shape.is_mixture(layer):
                which = "experts"
            found.setdefault(which, Sublayer(layer, kind))
    return found


def _numbers(hardware: Hardware) -> list[list[str]]:
    """The hardware's numbers, each with its kind and its source."""
    return [
        [number.path, f"{number.value:g}", *hardware.sources.of(number.path)]
        for number in numbers(hardware)
        if not number.is_default
    ]


def _engine_numbers(engine: Engine) -> list[list[str]]:
    """What the engine's row says a source for, numbers and words."""
    given = {f.name: getattr(engine, f.name) for f in fields(engine)}
    sources = {name: engine.sources.of(name) for name in given}
    return [
        [name, f"{value:g}" if isinstance(value, float | int) else value, *sources[name]]
        for name, value in given.items()
        if sources[name][1]
    ]


def _reached(setting: Setting) -> str:
    """What the rooflines are of, and what no row of them has."""
    s, device = setting, setting.hardware.device
    products, attention = (s.engine.reach(device, attends) for attends in (False, True))
    reached = (
        f"Reached are {device.matmul_tflops * products:,.0f} of "
        f"{device.matmul_tflops:,.0f} TFLOP/s ({device.matmul_tflops * attention:,.0f} of them in "
        "attention) and "
        f"{device.memory_gb_s * device.memory_reach:,.0f} of {device.memory_gb_s:,.0f} GB/s."
    )
    return reached + _exchanged(setting)


def _exchanged(s: Setting) -> str:
    """What ranks tell each other of a vocabulary that they share, whatever the schedule."""
    dense, converted = (s.engine.serving(which) for which in (False, True))
    told = []
    for whose, engine in {"tensor parallelism": dense, "conversions": converted}.items():
        parts = {
            "all-reduces the embeddings": engine.cuts_embedding,
            "gathers the logits": engine.cuts_lm_head,
        }
        each = [
            vocabulary_seconds(s.shape, s.hardware, engine, s.ranks, one) * 1e6
            for one in _passes(s).values()
        ]
        if any(each):
            done = " and ".join(part for part, cut in parts.items() if cut)
            taking = f"{each[0]:,.1f} us of a prefill and {each[1]:,.1f} us of a decode step"
            told.append(f"{whose} {done}, {taking}")
    return f" The vocabulary is cut by rank: {'; '.join(told)}." if told else ""


def _stage_by_hand(
    what: str, name: str, sublayer: Sublayer, one: Pass, setting: Setting
) -> list[str]:
    s, device = setting, setting.hardware.device
    parts = sublayer_parts(sublayer, s.shape, s.engine, s.ranks, one)
    roofline = sum(part.seconds(device, s.engine) for part in parts)
    moved = reduction(s.shape, s.hardware, s.engine, s.ranks, one)
    kernels = kernels_of(sublayer.kind, s.engine, one) - moved.fused  # its norm is the all-reduce's
    fixed = kernel_seconds(kernels, device, s.engine, one)
    return [
        what,
        name,
        f"{sum(p.flops for p in parts) / 1e9:,.2f}",
        f"{sum(p.nbytes for p in parts) / 1e6:,.1f}",
        f"{roofline * 1e6:,.1f}",
        f"{fixed * 1e6:,.1f}",
        f"{moved.blocking.seconds * 1e6:,.1f}",
        f"{moved.overlapped.seconds * 1e6:,.1f}",
    ]


def _what_if(candidates: Sequence[Candidate], setting: Setting) -> dict[str, Markup]:
    charts: list[tuple[str, str, str, Mapping[float, list[Row]]]] = [
        (
            "link speed",
            "link speed, times this hardware's",
            "Bandwidths multiplied and latencies divided alike.",
            over_link_speed(candidates, setting),
        ),
        (
            "batch",
            "sequences in a batch",
            "As far as weights and cache fit the device.",
            {float(n): r for n, r in over_batches(candidates, setting).items()},
        ),
        (
            "ranks",
            "ranks",
            "Numbers that divide the model and all tracks.",
            {float(n): r for n, r in over_ranks(candidates, setting).items()},
        ),
    ]
    return {
        what: _chart(label, caption, points)
        for what, label, caption, points in charts
        if len(points) > 1 and candidates
    }


def _chart(label: str, caption: str, points: Mapping[float, list[Row]]) -> Markup:
    names = [row.candidate.name for row in next(iter(points.values()))]
    series = [
        Series(name, [(x, rows[index].speed_up) for x, rows in points.items()])
        for index, name in enumerate(names)
        if index
    ]
    what = "speed-up in tokens/s over tensor parallel"
    return line_chart(series, label, what, log_x=True, reference=1.0, caption=caption)
