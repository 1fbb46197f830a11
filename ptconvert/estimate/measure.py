"""A hardware row from the ranks at hand: matrix products, memory, operators, all-reduces, overlap.

All ranks measure at the same time, as they will share the machine when they serve. Small figures
come from a tiny model in the runtime that `verify` uses, so that an all-reduce is timed between
stages that really end at different moments: a decode step of it with a single all-reduce, with a
blocking one after each stage, and with as many overlapped. Rates and bandwidths come from large
operands; what all-reduces take by size, from `sweep`. Of repeats the fastest counts, as what
disturbs a measurement only ever adds to it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ptconvert.checkpoint.section import SECTION_FORMAT
from ptconvert.errors import HardwareError
from ptconvert.estimate.collective import Reduction, Transfer, all_reduce
from ptconvert.estimate.fit import Point, digits, fit_links, with_one_shot, with_token
from ptconvert.estimate.hardware import Device, Engine, Hardware, read_engine
from ptconvert.estimate.sources import Sources, numbers
from ptconvert.estimate.sweep import BESIDE, P2P_OFF, Maker, chained, peers_off, settle, sweep
from ptconvert.estimate.timeline import run
from ptconvert.modeling.config import CONFIGS
from ptconvert.modeling.model import CAUSAL_LMS
from ptconvert.runtime.communicator import ProcessGroupCommunicator
from ptconvert.runtime.launch import Rank, RanksFailed, join, launch, under_torchrun
from ptconvert.schedule.presets import dense_schedule, ladder, parallel_track
from ptconvert.schedule.schedule import Schedule

ENGINE = "ptconvert"  # whose steps are measured
SERVING = {"nccl": "vllm", "gloo": ENGINE}  # what serves on such ranks
_LAYERS = 8
_SIZES: dict[str, int] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_REPEATS = 9
_ONE_SHOT = 2**18  # bytes up to which one-shot kernels are used by those that have them
_SAID = ("NCCL_", "GLOO_")  # variables that change what is measured
_GLOO_THREADS = 2  # torch.distributed's ProcessGroupGloo has as many by default
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Sample:
    """An all-reduce of `nbytes` over `ranks` by a way, one of several in a row, in seconds: the
    slowest rank's; `said` is what the fitted formulas give, None for an engine's own kernel."""

    way: str
    ranks: int
    nbytes: int
    seconds: float
    said: float | None


@dataclass(frozen=True)
class Measured:
    """A row, the all-reduces behind it, and what there is to say of them."""

    hardware: Hardware
    samples: list[Sample]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.hardware.name,
            "samples": [vars(sample) for sample in self.samples],
            "notes": self.notes,
        }


def measure(ranks: int | None, makers: Sequence[Maker]) -> Measured | None:
    """Measures `ranks` new processes, or torchrun's; None on all of torchrun's ranks but the first.

    GPUs and NCCL where there is one for each rank of this machine, else CPU and gloo. `makers` are
    of engines' own all-reduces. Raises HardwareError where a rank fails, or sums are wrong.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks or 1))
    device = "cuda" if gpus() >= local else "cpu"
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        if under_torchrun():
            results = join(measure_rank, list(makers), backend, device, _TIMEOUT_SECONDS)
        else:
            how = ranks or 1, backend, device, _TIMEOUT_SECONDS
            results = launch(measure_rank, list(makers), *how)
    except RanksFailed as error:
        raise HardwareError([f"measuring failed: {error}"]) from None
    return to_measured(results, backend, read_engine(ENGINE)) if results else None


def gpus() -> int:
    """The GPUs of this machine that NCCL could join."""
    return torch.cuda.device_count() if dist.is_nccl_available() else 0


def has_peers() -> bool:
    """Whether GPUs of this machine read each other's memory, as far as they and the environment
    say."""
    return not peers_off() and gpus() > 1 and torch.cuda.can_device_access_peer(0, 1)


@contextmanager
def without_peers() -> Iterator[None]:
    """The environment of processes started meanwhile, in which GPUs don't read each other's
    memory."""
    os.environ[P2P_OFF] = "1"
    try:
        yield
    finally:
        del os.environ[P2P_OFF]


def measure_rank(makers: Sequence[Maker], rank: Rank) -> dict[str, Any]:
    """What one rank finds, in seconds and bytes, as JSON types."""
    if rank.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.ranks))
    with torch.inference_mode():
        found: dict[str, Any] = {"name": _name(rank), "memory": _memory(rank)}
        found["matmul_flops"] = _matmul_rate(rank)
        found["copy_bytes"] = _copy_rate(rank)
        found["read_bytes"] = [_read_rate(rank, tokens) for tokens in (1, 16)]
        found["steps"] = _steps(rank)
        found["in_graph"] = _in_graph(rank) if rank.device.type == "cuda" else None
        found["sweep"] = sweep(rank, makers)
    dist.barrier()
    return found


def _name(rank: Rank) -> str:
    if rank.device.type == "cuda":
        return torch.cuda.get_device_name(rank.device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def _memory(rank: Rank) -> float:
    if rank.device.type == "cuda":
        return float(torch.cuda.get_device_properties(rank.device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / rank.ranks


def _dtype(rank: Rank) -> torch.dtype:
    return torch.bfloat16 if rank.device.type == "cuda" else torch.float32


def _matmul_rate(rank: Rank) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if rank.device.type == "cuda" else 768
    a = torch.randn(size, size, device=rank.device, dtype=_dtype(rank))
    return 2 * size**3 / chained(rank, lambda: a @ a, 4)


def _copy_rate(rank: Rank) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    nbytes = 2**30 if rank.device.type == "cuda" else 2**26
    a = torch.zeros(nbytes, dtype=torch.uint8, device=rank.device)
    b = torch.empty_like(a)
    return 2 * nbytes / chained(rank, lambda: b.copy_(a), 4)


def _read_rate(rank: Rank, tokens: int) -> float:
    """Bytes of weights read per second by products with a few tokens; no cache holds them all."""
    size, count = (8192, 8) if rank.device.type == "cuda" else (1024, 16)
    weights = [
        torch.randn(size, size, device=rank.device, dtype=_dtype(rank)) for _ in range(count)
    ]
    x = torch.randn(tokens, size, device=rank.device, dtype=_dtype(rank))
    seconds = chained(rank, lambda: [x @ weight.T for weight in weights], 1)
    return count * weights[0].nbytes / seconds


def _in_graph(rank: Rank) -> float:
    """Seconds of one of many small kernels, each after the other, in a CUDA graph: engines serve
    decode steps so, where the host launches nothing."""
    x, count = torch.zeros(1024, device=rank.device), 1000
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return chained(rank, graph.replay, 4) / count


def _steps(rank: Rank) -> dict[str, list[list[float]]]:
    """Seconds of each decode step of the tiny model, by repeat: one, blocking, overlapped."""
    torch.manual_seed(0)
    layers = range(_LAYERS)
    one = Schedule(parallel_track(layers, depth=_LAYERS))
    # every rank runs a track, all layers of which can run under any schedule
    section = {"format": SECTION_FORMAT, "tracks": 1, "schedule": str(one), "deferred": "sum"}
    model = CAUSAL_LMS["llama"](CONFIGS["llama"](**_SIZES, ptconvert=section))
    model = model.to(device=rank.device, dtype=_dtype(rank)).eval()
    model.get_decoder().layers.communicator = ProcessGroupCommunicator(None, rank.journal)
    runs = {
        "one": one,
        "blocking": dense_schedule(_LAYERS),
        "overlapped": Schedule(ladder(layers)),
    }
    ids = torch.zeros(1, 1, dtype=torch.long, device=rank.device)
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(1 + _REPEATS):
        for name, schedule in runs.items():  # alternating, as the machine drifts
            model.get_decoder().layers.schedule = schedule
            found[name].append(_decode_seconds(rank, model, ids))
    return {name: repeats[1:] for name, repeats in found.items()}


def _decode_seconds(rank: Rank, model: Any, ids: torch.Tensor, steps: int = 16) -> list[float]:
    """Seconds of each of some decode steps, which all ranks begin together."""
    cache = model(input_ids=ids.expand(1, 16), use_cache=True).past_key_values
    found = []
    for _ in range(steps):
        dist.barrier()
        settle(rank)
        started = time.perf_counter()
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
        settle(rank)
        found.append(time.perf_counter() - started)
    return found


def _lockstep(ranks: list[list[list[float]]]) -> float:
    """Seconds of a step of ranks that wait for each other: the slowest's, in the fastest repeat."""
    repeats = zip(*ranks, strict=True)
    return min(statistics.fmean(map(max, zip(*steps, strict=True))) for steps in repeats)


def to_measured(results: list[dict[str, Any]], backend: str, engine: Engine) -> Measured:
    """The row that all ranks' measurements make: the slowest rank's rates and times. Raises
    HardwareError where the sums of the backend's own all-reduces were wrong."""
    ranks = len(results)
    swept = [result["sweep"] for result in results]
    notes = _faults(swept, backend)
    steps = {k: _lockstep([r["steps"][k] for r in results]) for k in results[0]["steps"]}
    operators = _LAYERS * (engine.attention_kernels + engine.mlp_kernels) + engine.head_kernels
    # Two schedules differ by 2L - 1 all-reduces; computation is what is left without any.
    reduce_seconds = max(0.0, steps["blocking"] - steps["one"]) / (2 * _LAYERS - 1)
    kernel = max(0.0, steps["one"] - (reduce_seconds if ranks > 1 else 0.0)) / operators
    kernels = [seconds for r in results if (seconds := r["in_graph"]) is not None]
    dtype = "bfloat16" if backend == "nccl" else "float32"
    copied = min(r["copy_bytes"] for r in results)
    read, batched = (min(r["read_bytes"][i] for r in results) for i in (0, 1))
    device = Device(
        matmul_tflops=min(r["matmul_flops"] for r in results) / 1e12,
        memory_gb_s=copied / 1e9,
        memory_reach=min(read / copied, 1.0),
        batched_reach=min(batched / read, 1.0),
        reduces_at_once=1 if backend == "nccl" else _GLOO_THREADS,
        memory_gb=min(r["memory"] for r in results) / 1e9,
        kernel_us=max(kernels) * 1e6 if kernels else kernel * 1e6,
        overlap_share=0.0,
        bulk_overlap_share=0.0,
        matmul_dtype=dtype,
        matmul_rate="reached",
    )
    levels = [ranks for ranks, _ in swept[0]["levels"]]
    names = [name for _, name in swept[0]["levels"]]
    slowest = _slowest(swept)
    wrong = {name for one in swept for name in one["wrong"]}
    links = chain = fit_links(_points(slowest, {backend}), levels, names)
    if links:
        share = _overlap_share(steps, reduce_seconds, kernel, engine, device)
        beside = [one["beside"] for one in swept]
        device = replace(device, overlap_share=share, bulk_overlap_share=_bulk_share(beside))
        notes.append(_said_beside(device.bulk_overlap_share))
        notes.append(_said_between(reduce_seconds))
        token = _SIZES["hidden_size"] * (2 if dtype == "bfloat16" else 4)
        links = with_token(links, token, reduce_seconds)
        owns = {way for way, _, _ in slowest} - {backend} - wrong
        links = with_one_shot(links, _points(slowest, owns, _ONE_SHOT))
    row = Hardware(
        name=f"{ranks} ranks here: {results[0]['name']}, {backend}",
        engine=SERVING[backend],
        device=_rounded(device),
        links=links,
    )
    how = f"ptconvert estimate --measure, {_conditions(swept[0], ranks, backend, dtype)}"
    row = replace(row, sources=Sources(measured={number.path: how for number in numbers(row)}))
    samples = [
        Sample(way, n, m, t, all_reduce(m, n, chain).seconds if way == backend else None)
        for (way, n, m), t in slowest.items()
        if way not in wrong
    ]
    return Measured(row, samples, notes)


def _slowest(swept: list[dict[str, Any]]) -> dict[tuple[str, int, int], float]:
    """Of each way, number of ranks and size, the slowest rank's seconds."""
    found: dict[tuple[str, int, int], float] = {}
    for way, ranks, nbytes, seconds in (sample for one in swept for sample in one["samples"]):
        key = (way, ranks, nbytes)
        found[key] = max(seconds, found.get(key, 0.0))
    return found


def _points(
    slowest: Mapping[tuple[str, int, int], float], ways: set[str], most: float = float("inf")
) -> list[Point]:
    return [Point(n, m, t) for (way, n, m), t in slowest.items() if way in ways and m <= most]


def _faults(swept: list[dict[str, Any]], backend: str) -> list[str]:
    """What there is to say of wrong sums and of the ranks' order. Raises HardwareError where the
    backend's own are wrong, as peer-to-peer of GPUs that don't have it can be."""
    wrong: dict[str, set[int]] = {}
    for one in swept:
        for way, sizes in one["wrong"].items():
            wrong.setdefault(way, set()).update(sizes)
    if backend in wrong:
        sizes = ", ".join(map(str, sorted(wrong[backend])))
        peers = backend == "nccl" and not peers_off()
        cure = f"; with {P2P_OFF}=1 it may be right" if peers else ""
        raise HardwareError([f"{backend} gives wrong sums of {sizes} bytes on these ranks{cure}"])
    notes = [
        f"{way} gives wrong sums of {', '.join(map(str, sorted(sizes)))} bytes, and is left out"
        for way, sizes in wrong.items()
    ]
    order = swept[0]["order"]
    if order != sorted(order):
        said = ",".join(map(str, order))
        notes.append(
            f"closest ranks aren't neighbours: CUDA_VISIBLE_DEVICES={said} would have it so"
        )
    return notes


def _bulk_share(beside: list[dict[str, float]]) -> float:
    """What an all-reduce of many bytes takes from the products beside it, as a share of its own
    time, by the slowest rank's times."""
    reduce, products, both = (max(one[k] for one in beside) for k in ("reduce", "products", "both"))
    return min(max((both - products) / reduce, 0.0), 0.99)


def _said_beside(share: float) -> str:
    size = f"{BESIDE // 2**20} MiB"
    if share > 0.9:
        return f"computation doesn't go on beside an all-reduce of {size}: overlap won't help here"
    return f"{1 - share:.0%} of an all-reduce of {size} goes on beside computation"


def _said_between(seconds: float) -> str:
    return (
        f"between a model's stages, where ranks wait for each other, one token's takes "
        f"{seconds * 1e6:,.0f} us: the row's fixed time is by that"
    )


def _conditions(swept: Mapping[str, Any], ranks: int, backend: str, dtype: str) -> str:
    """Under which a row was measured."""
    library = f"torch {torch.__version__}"
    if backend == "nccl":
        version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        library += f", NCCL {'.'.join(map(str, version))}"
    said = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_SAID)]
    joined = " of ".join(str(joins) for joins, _ in swept["levels"]) or str(ranks)
    of = f"{joined} ranks, {swept['machines']} machine(s), {backend}, {dtype}, {library}"
    return ", ".join([of, *said, datetime.now(UTC).date().isoformat()])


def _overlap_share(
    steps: dict[str, float], reduce_seconds: float, kernel: float, engine: Engine, device: Device
) -> float:
    """The share with which the timeline of the tiny model takes as long as it was measured to."""
    schedule = Schedule(ladder(range(_LAYERS)))
    stages = [engine.attention_kernels * kernel, engine.mlp_kernels * kernel] * _LAYERS
    head = engine.head_kernels * kernel
    once = Transfer(reduce_seconds)

    def seconds(share: float) -> float:
        sharing = replace(device, overlap_share=share)
        return run(schedule, stages, head, [Reduction(once, once)] * len(stages), sharing).seconds

    shares = np.linspace(0.0, 0.99, 100)
    return float(min(shares, key=lambda share: abs(seconds(float(share)) - steps["overlapped"])))


def _rounded(device: Device) -> Device:
    rounded: dict[str, Any] = {
        name: digits(value) for name, value in vars(device).items() if isinstance(value, float)
    }
    return replace(device, **rounded)
