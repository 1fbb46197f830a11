"""What each rank does under verify: a counted pass, a profiled pass, and timed passes.

A pass is a prefill and greedy decode steps with a KV cache, on random token ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from ptconvert.modeling.executor import Communicator
from ptconvert.modeling.layers import Placement
from ptconvert.runtime.by_layer import opened_by_layer
from ptconvert.runtime.communicator import ProcessGroupCommunicator
from ptconvert.runtime.counters import FlightRecorder, Profile
from ptconvert.runtime.launch import Rank
from ptconvert.runtime.load import load_rank
from ptconvert.schedule.schedule import Schedule

WARM_UP = 1


@dataclass(frozen=True)
class Job:
    """A verification, as every rank gets it. `wrap` lets tests put faults into a rank."""

    checkpoint: Path
    dtype: torch.dtype
    prompt_tokens: int
    new_tokens: int
    batch: int
    seed: int
    repeats: int
    trace: Path | None = None
    wrap: Callable[[Communicator, int], Communicator] | None = None


def prompt(job: Job, vocabulary: int) -> torch.Tensor:
    """The token ids of every pass, (batch, prompt tokens)."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randint(vocabulary, (job.batch, job.prompt_tokens), generator=generator)


def greedy_steps(
    model: Any, ids_BS: torch.Tensor, new_tokens: int
) -> Iterator[tuple[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]]:
    """The steps of a pass: name, and the function that runs it.

    It returns logits (B, S, V) and the tokens chosen (B, 1), which the next step is fed.
    """
    state: dict[str, Any] = {"ids": ids_BS.to(model.device), "cache": None}

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            out = model(input_ids=state["ids"], past_key_values=state["cache"], use_cache=True)
            state.update(cache=out.past_key_values, ids=out.logits[:, -1:].argmax(-1))
        return out.logits, state["ids"]

    for index in range(new_tokens):
        yield ("prefill" if index == 0 else f"decode {index}"), step


def run_rank(job: Job, rank: Rank) -> dict[str, Any]:
    """Everything that one rank does; what it found, as JSON types."""
    torch.manual_seed(job.seed)
    if rank.device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // rank.ranks))
    communicator: Communicator = ProcessGroupCommunicator(None, rank.journal)
    if job.wrap is not None:
        communicator = job.wrap(communicator, rank.rank)
    rank.journal.write("pass", "loading")
    placement = Placement(rank.rank, rank.ranks)
    model = load_rank(job.checkpoint, placement, communicator, job.dtype, rank.device)
    layers = model.get_decoder().layers
    schedule, baseline = layers.schedule, layers.dense
    ids_BS = prompt(job, model.get_input_embeddings().num_embeddings)
    counted, tokens, logits = _counted_pass(model, ids_BS, job, rank)
    profiled, transfers = _profiled_pass(model, ids_BS, job, rank)
    model.get_decoder().layers.schedule = baseline
    baseline_counted, _, _ = _counted_pass(model, ids_BS, job, rank, name="baseline")
    times = _timed_passes(model, {"schedule": schedule, "baseline": baseline}, ids_BS, job, rank)
    found = {
        "rank": rank.rank,
        "counted": counted,
        "profiled": profiled,
        "baseline": baseline_counted,
        "transfers": transfers,
        "tokens": tokens,
        "logits_digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "times": times,
        "device": str(rank.device),
    }
    dist.barrier()  # nobody leaves while a peer may still need a connection
    del model, layers  # the single-process model takes its place in memory
    if rank.rank == 0:
        rank.journal.write("pass", "the single-process model")
        found["reference"] = _against_one_process(job, ids_BS, logits, tokens, rank.device)
    return found


def _counted_pass(
    model: Any, ids_BS: torch.Tensor, job: Job, rank: Rank, name: str = "counted"
) -> tuple[dict[str, Any], list[list[int]], torch.Tensor]:
    """Collectives per step from the flight recorder; greedy tokens; logits of all positions."""
    recorder = FlightRecorder(rank.backend)
    model.get_decoder().layers.entered = lambda index: rank.journal.write("stage", index)
    steps: dict[str, Any] = {}
    found: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    for step_name, step in greedy_steps(model, ids_BS, job.new_tokens):
        rank.journal.write("pass", f"{name} {step_name}")
        logits, tokens = step()
        steps[step_name] = [asdict(c) | {"nbytes": c.nbytes} for c in recorder.new()]
        found.append(logits.float().cpu())
        chosen.append(tokens.cpu())
    return steps, torch.cat(chosen, dim=1).tolist(), torch.cat(found, dim=1)


def _profiled_pass(
    model: Any, ids_BS: torch.Tensor, job: Job, rank: Rank
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Collectives per step from the profiler, and how far asynchronous ones were hidden."""
    activities = [ProfilerActivity.CPU]
    if rank.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    stages = model.get_decoder().layers.schedule.stages
    with contextlib.ExitStack() as stack, profile(activities=activities, record_shapes=True) as p:

        def entered(index: int) -> None:
            stack.close()
            rank.journal.write("stage", index)
            stack.enter_context(record_function(f"stage {index + 1} {stages[index]}"))

        model.get_decoder().layers.entered = entered
        for step_name, step in greedy_steps(model, ids_BS, job.new_tokens):
            rank.journal.write("pass", f"profiled {step_name}")
            with record_function(f"step {step_name}"):
                step()
                stack.close()
    model.get_decoder().layers.entered = None
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        p.export_chrome_trace(str(trace))
        if job.trace is not None and rank.rank == 0:
            shutil.copyfile(trace, job.trace)
        seen = Profile(trace)
        steps = {name: [asdict(c) for c in cs] for name, cs in seen.collectives().items()}
        transfers = [asdict(t) | {"share": t.share} for t in seen.transfers()]
    return steps, transfers


def _timed_passes(
    model: Any, schedules: dict[str, Schedule], ids_BS: torch.Tensor, job: Job, rank: Rank
) -> dict[str, Any]:
    """Seconds of the prefill and of a decode step (mean over a pass), schedules alternating."""
    times: dict[str, Any] = {name: {"prefill": [], "decode": []} for name in schedules}
    for repeat in range(WARM_UP + job.repeats if job.repeats else 0):
        for name, schedule in schedules.items():
            model.get_decoder().layers.schedule = schedule
            rank.journal.write("pass", f"timed {name} barrier")
            dist.barrier()
            seconds = []
            for step_name, step in greedy_steps(model, ids_BS, job.new_tokens):
                rank.journal.write("pass", f"timed {name} {step_name}")
                started = time.perf_counter()
                step()
                if rank.device.type == "cuda":
                    torch.cuda.synchronize(rank.device)
                seconds.append(time.perf_counter() - started)
            if repeat >= WARM_UP:
                times[name]["prefill"].append(seconds[0])
                if seconds[1:]:
                    times[name]["decode"].append(sum(seconds[1:]) / len(seconds[1:]))
    return times


def first_choices(logits_BNV: torch.Tensor) -> torch.Tensor:
    """The tokens with the largest logits, (B, N); -1, which is none's, where any isn't a number."""
    tokens_BN = logits_BNV.argmax(-1)
    return tokens_BN.masked_fill(logits_BNV.isnan().any(-1), -1)


def furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def _against_one_process(
    job: Job, ids_BS: torch.Tensor, logits: torch.Tensor, tokens: list[list[int]], device: Any
) -> dict[str, Any]:
    """The largest difference to the single-process model, fed the tokens that the ranks chose."""
    full = torch.cat([ids_BS, torch.tensor(tokens)[:, :-1]], dim=1).to(device)

    @torch.inference_mode()
    def alone(dtype: torch.dtype) -> torch.Tensor:
        model = opened_by_layer(job.checkpoint, dtype, device)
        found: torch.Tensor = model(full).logits.float().cpu()
        return found

    expected = alone(job.dtype)
    # The same weights: what is left is what the type of 16 bits rounds away.
    noise = 0.0 if job.dtype == torch.float32 else furthest(expected, alone(torch.float32))
    return {
        "difference": furthest(logits, expected),
        "noise": noise,
        "tokens_agree": bool(
            torch.equal(first_choices(expected[:, job.prompt_tokens - 1 :]), torch.tensor(tokens))
        ),
    }
