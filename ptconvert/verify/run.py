"""verify: what a converted model does on real ranks, against what its schedule promises."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.checkpoint.section import SECTION, SPEC_FILE, Section, read_section
from ptconvert.errors import CheckpointError
from ptconvert.modeling.executor import Communicator
from ptconvert.modeling.layers import Placement
from ptconvert.models.families import sees_later
from ptconvert.models.shape import TORCH_NAMES, ModelShape
from ptconvert.runtime.by_layer import by_layer_bytes
from ptconvert.runtime.counters import ALL_REDUCE
from ptconvert.runtime.launch import RankFailure, RanksFailed, join, launch, under_torchrun
from ptconvert.runtime.load import opened, rank_bytes, shape_of
from ptconvert.runtime.memory import PROCESS_BYTES, available_bytes
from ptconvert.shorten import counted
from ptconvert.spec.document import read_spec
from ptconvert.spec.terms import wrong_ranks
from ptconvert.verify.expected import (
    FP32_TOLERANCE,
    RECURRENT_TOLERANCE,
    Expected,
    with_departures,
)
from ptconvert.verify.session import Job, run_rank

NOISE_FACTOR = 4.0  # of the single-process model's largest difference to itself in fp32
EXPOSED_BELOW = 0.5  # an asynchronous all-reduce of which less ran under computation is exposed


@dataclass(frozen=True)
class Settings:
    """What the command line takes; `dtype` and `backend` None mean the checkpoint's, the best."""

    ranks: int
    device: str = "cpu"
    backend: str | None = None
    dtype: str | None = None
    prompt_tokens: int = 16
    new_tokens: int = 8
    batch: int = 1
    timeout: float = 300.0
    seed: int = 0
    repeats: int = 5
    trace: Path | None = None


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    name: str
    ok: bool
    seen: str


@dataclass(frozen=True)
class Report:
    """The outcome: checks, figures for people and machines, and ranks that failed."""

    checks: tuple[Check, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    failures: tuple[RankFailure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The report as `--json` writes it."""
        return {
            "ok": self.ok,
            "checks": [vars(check) for check in self.checks],
            "failures": [vars(failure) for failure in self.failures],
            "notes": list(self.notes),
            **self.figures,
        }


def verify(
    path: Path,
    settings: Settings,
    wrap: Callable[[Communicator, int], Communicator] | None = None,
) -> Report | None:
    """Runs a converted checkpoint on ranks and checks it; None on ranks of torchrun but the first.

    `wrap` puts a communicator around each rank's own; tests inject faults with it.
    Raises PTConvertError for input that is wrong.
    """
    checkpoint, section, shape = open_converted(path)
    unchanged = as_converted(path, section)
    backend, notes = _backend(settings)
    if not unchanged:
        notes = (*notes, f"no {SPEC_FILE} here to compare the schedule with")
    dtype = torch_dtype(settings, shape)
    check_ranks(checkpoint, settings, dtype)
    job = Job(
        path,
        dtype,
        settings.prompt_tokens,
        settings.new_tokens,
        settings.batch,
        settings.seed,
        settings.repeats,
        settings.trace,
        wrap,
    )
    expected = Expected(
        section.schedule,
        shape,
        dtype,
        settings.batch,
        settings.prompt_tokens,
        settings.new_tokens,
        RECURRENT_TOLERANCE if any(map(shape.is_linear, range(shape.layers))) else FP32_TOLERANCE,
    )
    device, timeout = settings.device, settings.timeout
    try:
        if under_torchrun():
            results = join(run_rank, job, backend, device, timeout)
        else:
            results = launch(run_rank, job, settings.ranks, backend, device, timeout)
    except RanksFailed as error:
        if error.wrong_input is not None:
            raise CheckpointError(error.wrong_input) from None
        failures = tuple(with_departures(error, expected))
        return Report(unchanged, failures=failures, notes=notes)
    if not results:
        return None
    checks = (*unchanged, *_checks(results, expected))
    return Report(checks, _figures(results, expected, backend), notes=notes)


def open_converted(path: Path) -> tuple[Checkpoint, Section, ModelShape]:
    """A converted checkpoint, what it says of its conversion, and its source's shape.

    Raises PTConvertError for one that isn't converted or doesn't hold together.
    """
    checkpoint = open_checkpoint(path)
    if SECTION not in checkpoint.config:
        raise CheckpointError(f"{path} is not converted; `ptconvert transform` makes checkpoints")
    section = read_section(checkpoint.config, str(path / "config.json"))
    for said in sees_later(checkpoint.language):
        raise CheckpointError(
            f"{path}: {said}: tokens see later ones, too, so there is no one answer that is "
            "generated to verify; open it in transformers"
        )
    return checkpoint, section, shape_of(checkpoint)


def as_converted(path: Path, section: Section) -> tuple[Check, ...]:
    """Whether the schedule is still that of the spec that it was converted by."""
    file = path / SPEC_FILE
    if not file.is_file():
        return ()  # as after save_pretrained; a note says so
    spec = read_spec(file)
    schedule = spec.schedule(section.parallel, section.divisible)
    same = schedule == section.schedule and spec.tracks == section.tracks
    same = same and spec.deferred == section.deferred and spec.digest == section.spec_digest
    seen = f"as in {SPEC_FILE}" if same else f"config.json and {SPEC_FILE} differ"
    return (Check("schedule as converted", same, seen),)


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend(settings: Settings) -> tuple[str, tuple[str, ...]]:
    """The backend, and what must be said about the figures that it gives."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("--device cuda: no GPU is available here; use --device cpu")
    gpus = torch.cuda.device_count() if settings.device == "cuda" else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", settings.ranks))
    backend = settings.backend or ("nccl" if gpus >= local else "gloo")
    if backend == "nccl" and not dist.is_nccl_available():
        raise CheckpointError("--backend nccl: this torch has no NCCL; use --backend gloo")
    if backend == "nccl" and gpus < local:
        raise CheckpointError(
            f"--backend nccl needs a GPU per rank: {local} ranks, {gpus} GPUs; use --backend gloo"
        )
    if backend == "gloo" and gpus:
        return backend, ("gloo between GPUs: counts and logits hold, times mean nothing",)
    return backend, ()


def torch_dtype(settings: Settings, shape: ModelShape) -> torch.dtype:
    """What to compute in: as asked for, else the checkpoint's own."""
    name = settings.dtype or TORCH_NAMES[shape.dtype or "F32"]
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_ranks(checkpoint: Checkpoint, settings: Settings, dtype: torch.dtype) -> None:
    """Raises CheckpointError where the ranks don't divide the model, or don't fit this machine."""
    shape, section = shape_of(checkpoint), read_section(checkpoint.config)
    ranks = settings.ranks
    held_dense = set(range(shape.layers)) - section.schedule.track_layers

    def fits(n: int) -> bool:  # which also share out the layers held dense
        return not shape.indivisible(n) and shape.parted(n, held_dense) is None

    if reason := wrong_ranks("the checkpoint", section.tracks, ranks, fits):
        raise CheckpointError(f"--ranks {ranks}: {reason}")
    longest = settings.prompt_tokens + settings.new_tokens
    most = checkpoint.language.get("max_position_embeddings")
    if isinstance(most, int) and longest > most:
        raise CheckpointError(f"{longest} tokens are more than the model's {most} positions")
    if under_torchrun():
        return
    free = available_bytes(settings.device)
    for device, needed in enumerate(needed_bytes(checkpoint, ranks, len(free), dtype)):
        if needed > free[device]:
            where = f"GPU {device}" if settings.device == "cuda" else "this machine"
            raise CheckpointError(
                f"--ranks {ranks} needs about {needed / 1e9:.1f} GB of memory on {where}, "
                f"{free[device] / 1e9:.1f} GB are available; use fewer ranks, a smaller --dtype, "
                "or more machines with torchrun"
            )


def needed_bytes(checkpoint: Checkpoint, ranks: int, devices: int, dtype: torch.dtype) -> list[int]:
    """About what each device must hold, over which ranks are dealt out in turn: their weights in
    `dtype` and their processes; on rank 0's afterwards instead the single-process model, a layer at
    a time, in fp32. Activations and cache, of a few tokens, are not counted."""
    checkpoint = opened(checkpoint)
    shape = shape_of(checkpoint)
    stored = shape.bytes_per_token // shape.width
    scale = torch.empty((), dtype=dtype).element_size() / stored
    held = [0.0] * devices
    for rank in range(ranks):
        own = rank_bytes(checkpoint, Placement(rank, ranks))
        held[rank % devices] += scale * own + PROCESS_BYTES
    held[0] = max(held[0], 4 / stored * by_layer_bytes(checkpoint) + PROCESS_BYTES)
    return [int(nbytes) for nbytes in held]


def _checks(results: list[dict[str, Any]], expected: Expected) -> list[Check]:
    checks = [*_count_checks(results, expected), *_answer_checks(results, expected)]
    overlap = _overlap(results)
    steps = len(expected.steps()) * len(results)
    promised = sum(overlapped for _, overlapped, _ in expected.all_reduces()) * steps
    if promised and len(results) > 1:  # one rank has nothing to transfer
        seen = (
            f"{overlap['share']:.0%} of their transfer time ran under computation; "
            f"{overlap['exposed']} of {overlap['asynchronous']} exposed"
        )
        ok = overlap["asynchronous"] == promised and overlap["share"] > 0
        checks.append(Check("asynchronous all-reduces overlap", ok, seen))
    return checks


def _figures(results: list[dict[str, Any]], expected: Expected, backend: str) -> dict[str, Any]:
    return {
        "schedule": str(expected.schedule),
        "ranks": len(results),
        "backend": backend,
        "devices": [r["device"] for r in results],
        "dtype": str(expected.dtype).removeprefix("torch."),
        "batch": expected.batch,
        "prompt_tokens": expected.prompt_tokens,
        "new_tokens": expected.new_tokens,
        "comparison": _comparison(results, expected),
        "other_communication": _other(results),
        "overlap": _overlap(results),
        "reference": results[0]["reference"],
        "seen_by_rank": [{k: r[k] for k in ("counted", "profiled")} for r in results],
    }


def _count_checks(results: list[dict[str, Any]], expected: Expected) -> list[Check]:
    """Counts by both means against the schedule, rank by rank and step by step."""
    checks = []
    counts = expected.schedule.counts
    steps, ranks = counted(len(expected.steps()), "step"), counted(len(results), "rank")
    promised = f"{counts.all_reduces} per pass, in {steps}, on {ranks}"
    for name, means in (("flight recorder", "counted"), ("profiler", "profiled")):
        parts = [
            f"rank {result['rank']}, {departure}"
            for result in results
            for step in expected.steps()
            if (departure := expected.departure(step, result[means].get(step, [])))
        ]
        seen = parts[0] if parts else promised
        checks.append(Check(f"all-reduces by the {name}", not parts, seen))
    differ = [
        f"rank {result['rank']}, {step}: {len(a)} by the recorder, {len(b)} by the profiler"
        for result in results
        for step in expected.steps()
        if _bare(a := _reduces(result["counted"], step))
        != _bare(b := _reduces(result["profiled"], step))
    ]
    checks.append(Check("both agree", not differ, differ[0] if differ else "shape by shape"))
    first = results[0]["counted"]
    apart = [f"rank {r['rank']}" for r in results if r["counted"] != first]
    seen = f"{', '.join(apart)} differ from rank 0" if apart else "collective by collective"
    checks.append(Check("all ranks do the same", not apart, seen))
    return checks


def _reduces(steps: dict[str, Any], step: str) -> list[dict[str, Any]]:
    return [c for c in steps.get(step, []) if c["op"] == ALL_REDUCE]


def _bare(collectives: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(c["shape"]), c["dtype"]) for c in collectives]


def _answer_checks(results: list[dict[str, Any]], expected: Expected) -> list[Check]:
    reference = results[0]["reference"]
    fp32 = expected.dtype is torch.float32
    tolerance = expected.fp32_tolerance if fp32 else NOISE_FACTOR * reference["noise"]
    said = f"difference {reference['difference']:.2g}, allowed {tolerance:.2g}"
    if not fp32:
        said += f" ({NOISE_FACTOR:g} times what it differs from itself in fp32)"
    alike = all(
        (r["tokens"], r["logits_digest"]) == (results[0]["tokens"], results[0]["logits_digest"])
        for r in results
    )
    tokens_ok = alike and (reference["tokens_agree"] or not fp32)
    seen = "on all ranks" if alike else "ranks differ"
    if fp32:
        seen += " and in one process" if reference["tokens_agree"] else ", but not in one process"
    return [
        Check("logits of the single-process model", reference["difference"] <= tolerance, said),
        Check("greedy tokens", tokens_ok, seen),
    ]


def _overlap(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all ranks' asynchronous all-reduces: how much of them ran under computation."""
    transfers = [t for r in results for t in r["transfers"]]
    total = sum(t["end"] - t["start"] for t in transfers)
    hidden: dict[str, float] = {}
    for t in transfers:
        hidden[t["stage"]] = hidden.get(t["stage"], 0.0) + t["hidden"]
    return {
        "asynchronous": len(transfers),
        "share": sum(t["hidden"] for t in transfers) / total if total else 0.0,
        "exposed": sum(t["share"] < EXPOSED_BELOW for t in transfers),
        "exposed_below": EXPOSED_BELOW,
        "hidden_by_stage": hidden,
    }


def _other(results: list[dict[str, Any]]) -> dict[str, int]:
    """Collectives other than all-reduces inside the counted steps, by name, on rank 0."""
    steps = results[0]["counted"].values()
    return dict(Counter(c["op"] for step in steps for c in step if c["op"] != ALL_REDUCE))


def _comparison(results: list[dict[str, Any]], expected: Expected) -> dict[str, Any]:
    """All-reduces, bytes and times of the schedule and of tensor parallelism, and their ratios.

    A step takes as long as its slowest rank. Ratios are taken repeat by repeat, since the two
    alternate.
    """
    found: dict[str, Any] = {}
    for name, means in (("schedule", "counted"), ("baseline", "baseline")):
        step = results[0][means]
        reduces = _reduces(step, "prefill")
        tokens = expected.batch * expected.prompt_tokens
        times = {
            kind: [max(r) for r in zip(*(x["times"][name][kind] for x in results), strict=True)]
            for kind in ("prefill", "decode")
        }
        found[name] = {
            "all_reduces": len(reduces),
            "bytes_per_token": sum(c["nbytes"] for c in reduces) // tokens,
            "seconds": times,
        }
    found["speed_up"] = {
        kind: _spread(
            [
                b / a
                for a, b in zip(
                    found["schedule"]["seconds"][kind],
                    found["baseline"]["seconds"][kind],
                    strict=True,
                )
            ]
        )
        for kind in ("prefill", "decode")
    }
    return found


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
