"""A hardware row from the ranks at hand: matrix products, memory, operators, all-reduces, overlap.

All ranks measure at the same time, as they will share the machine when they serve. Small figures
come from a tiny model in the runtime that `verify` uses, so that an all-reduce is timed between
stages that really end at different moments: a decode step of it with a single all-reduce, with a
blocking one after each stage, and with as many overlapped. Rates and bandwidths come from large
operands. Of repeats the fastest counts, as what disturbs a measurement only ever adds to it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ptconvert.checkpoint.section import SECTION_FORMAT
from ptconvert.errors import HardwareError
from ptconvert.estimate.collective import Reduction, Transfer
from ptconvert.estimate.hardware import (
    Device,
    Engine,
    Hardware,
    Link,
    Protocol,
    read_engine,
)
from ptconvert.estimate.sources import Sources, numbers
from ptconvert.estimate.timeline import run
from ptconvert.modeling.config import CONFIGS
from ptconvert.modeling.model import CAUSAL_LMS
from ptconvert.runtime.communicator import ProcessGroupCommunicator
from ptconvert.runtime.launch import Rank, RanksFailed, join, launch, under_torchrun
from ptconvert.schedule.presets import dense_schedule, ladder, parallel_track
from ptconvert.schedule.schedule import Schedule

ENGINE = "ptconvert"
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
_MESSAGES = [2**n for n in range(12, 24, 2)]  # bytes, 4 KiB to 4 MiB
_REPEATS = 9
_GLOO_THREADS = 2  # torch.distributed's ProcessGroupGloo has as many by default
_TIMEOUT_SECONDS = 300.0


def measure(ranks: int | None) -> Hardware | None:
    """Measures `ranks` new processes, or torchrun's; None on all of torchrun's ranks but the first.

    GPUs and NCCL where there is one for each rank of this machine, else CPU and gloo. Raises
    HardwareError where a rank fails.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks or 1))
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    device, backend = ("cuda", "nccl") if gpus >= local else ("cpu", "gloo")
    try:
        if under_torchrun():
            results = join(measure_rank, None, backend, device, _TIMEOUT_SECONDS)
        else:
            results = launch(measure_rank, None, ranks or 1, backend, device, _TIMEOUT_SECONDS)
    except RanksFailed as error:
        raise HardwareError([f"measuring failed: {error}"]) from None
    return to_hardware(results, backend, read_engine(ENGINE)) if results else None


def measure_rank(_: None, rank: Rank) -> dict[str, Any]:
    """What one rank finds, in seconds and bytes, as JSON types."""
    if rank.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.ranks))
    with torch.inference_mode():
        found: dict[str, Any] = {"name": _name(rank), "memory": _memory(rank)}
        found["matmul_flops"] = _matmul_rate(rank)
        found["copy_bytes"] = _copy_rate(rank)
        found["read_bytes"] = [_read_rate(rank, tokens) for tokens in (1, 16)]
        found["steps"] = _steps(rank)
        found["reduces"] = _reduces(rank)
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


def _seconds(rank: Rank, work: Callable[[], object], times: int) -> float:
    """The time of a call, in the fastest repeat of `times` calls that all ranks begin together."""
    work()
    found = []
    for _ in range(_REPEATS):
        dist.barrier()
        _settle(rank)
        started = time.perf_counter()
        for _ in range(times):
            work()
        _settle(rank)
        found.append((time.perf_counter() - started) / times)
    return min(found)


def _settle(rank: Rank) -> None:
    if rank.device.type == "cuda":
        torch.cuda.synchronize(rank.device)


def _matmul_rate(rank: Rank) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192 if rank.device.type == "cuda" else 768
    a = torch.randn(size, size, device=rank.device, dtype=_dtype(rank))
    return 2 * size**3 / _seconds(rank, lambda: a @ a, 4)


def _copy_rate(rank: Rank) -> float:
    """Bytes read and written per second by a copy too large for any cache."""
    nbytes = 2**30 if rank.device.type == "cuda" else 2**26
    a = torch.zeros(nbytes, dtype=torch.uint8, device=rank.device)
    b = torch.empty_like(a)
    return 2 * nbytes / _seconds(rank, lambda: b.copy_(a), 4)


def _read_rate(rank: Rank, tokens: int) -> float:
    """Bytes of weights read per second by products with a few tokens; no cache holds them all."""
    size, count = (8192, 8) if rank.device.type == "cuda" else (1024, 16)
    weights = [
        torch.randn(size, size, device=rank.device, dtype=_dtype(rank)) for _ in range(count)
    ]
    x = torch.randn(tokens, size, device=rank.device, dtype=_dtype(rank))
    seconds = _seconds(rank, lambda: [x @ weight.T for weight in weights], 1)
    return count * weights[0].nbytes / seconds


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
        _settle(rank)
        started = time.perf_counter()
        cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
        _settle(rank)
        found.append(time.perf_counter() - started)
    return found


def _lockstep(ranks: list[list[list[float]]]) -> float:
    """Seconds of a step of ranks that wait for each other: the slowest's, in the fastest repeat."""
    repeats = zip(*ranks, strict=True)
    return min(statistics.fmean(map(max, zip(*steps, strict=True))) for steps in repeats)


def _reduces(rank: Rank) -> list[tuple[int, int, float]]:
    """(ranks, bytes, seconds) of all-reduces, among 2, 4, ... and all ranks."""
    found = []
    sizes = [2**n for n in range(1, 11) if 2**n < rank.ranks] + [rank.ranks]
    for size in sizes if rank.ranks > 1 else []:
        group = dist.new_group(list(range(size)))
        for nbytes in _MESSAGES:
            dist.barrier()
            if rank.rank < size:
                tensor = torch.zeros(nbytes // 4, device=rank.device)
                found.append((size, nbytes, _reduce_seconds(rank, tensor, group)))
        dist.destroy_process_group(group)
    return found


def _reduce_seconds(rank: Rank, tensor: torch.Tensor, group: Any) -> float:
    times = []
    for _ in range(20):
        dist.barrier(group)
        _settle(rank)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _settle(rank)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:])


def to_hardware(results: list[dict[str, Any]], backend: str, engine: Engine) -> Hardware:
    """The row that all ranks' measurements make: the slowest rank's rates and times."""
    ranks = len(results)
    steps = {k: _lockstep([r["steps"][k] for r in results]) for k in results[0]["steps"]}
    operators = _LAYERS * (engine.attention_kernels + engine.mlp_kernels) + engine.head_kernels
    # Two schedules differ by 2L - 1 all-reduces; computation is what is left without any.
    reduce_seconds = max(0.0, steps["blocking"] - steps["one"]) / (2 * _LAYERS - 1)
    kernel = max(0.0, steps["one"] - (reduce_seconds if ranks > 1 else 0.0)) / operators
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
        kernel_us=kernel * 1e6,
        overlap_share=0.0,
        bulk_overlap_share=0.0,
        matmul_dtype=dtype,
    )
    if ranks > 1:
        share = _overlap_share(steps, reduce_seconds, kernel, engine, device)
        device = replace(device, overlap_share=share, bulk_overlap_share=share)
    links = (_link(results, reduce_seconds),) if ranks > 1 else ()
    row = Hardware(
        name=f"{ranks} ranks here: {results[0]['name']}, {backend}",
        engine=ENGINE,
        device=_rounded(device),
        links=links,
    )
    how = f"ptconvert estimate --measure on {ranks} ranks, {backend}, {dtype}"
    return replace(row, sources=Sources(measured={number.path: how for number in numbers(row)}))


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


def _link(results: list[dict[str, Any]], reduce_seconds: float) -> Link:
    """Base, step and bandwidth by least squares on relative errors, and the base as in the model.

    The sweep over sizes and ranks gives step and bandwidth; the base is what one token's
    all-reduce took between real stages, where ranks also wait for each other.
    """
    ranks = len(results)
    slowest: dict[tuple[int, int], float] = {}
    for result in results:
        for size, nbytes, seconds in result["reduces"]:
            slowest[size, nbytes] = max(seconds, slowest.get((size, nbytes), 0.0))
    points = [(n, m, t) for (n, m), t in slowest.items()]
    terms = np.array([[1.0, 2 * (n - 1), 2 * (n - 1) / n * m] for n, m, _ in points])
    used = [0, 2] if ranks == 2 else [0, 1, 2]  # two ranks can't tell base and steps apart
    times = np.array([t for _, _, t in points])
    solved = np.zeros(3)
    solved[used] = np.linalg.lstsq(terms[:, used] / times[:, None], np.ones(len(times)))[0]
    step, per_byte = max(solved[1], 0.0), max(solved[2], 1e-12)
    base = max(reduce_seconds - 2 * (ranks - 1) * step, 0.0)
    protocol = Protocol(step_us=_digits(step * 1e6), gb_s=_digits(1e-9 / per_byte))
    return Link(
        name="between the ranks",
        ranks=ranks,
        base_us=_digits(base * 1e6),
        algorithm="ring",
        protocols=(protocol,),
    )


def _rounded(device: Device) -> Device:
    rounded: dict[str, Any] = {
        name: _digits(value) for name, value in vars(device).items() if isinstance(value, float)
    }
    return replace(device, **rounded)


def _digits(value: float) -> float:
    """The value to 4 significant digits: more would suggest a precision that isn't there."""
    return float(f"{value:.4g}")
