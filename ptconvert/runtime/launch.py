"""Starting ranks, and never waiting for one forever.

`launch` starts R processes on this machine; `join` makes this process one of the ranks that
torchrun started. Either way every rank runs the same function and its results come back in rank
order; what goes wrong ends as RanksFailed, with each failed rank that is known here (under torchrun
each process knows itself), where it stood and its traceback.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ptconvert.runtime.communicator import Journal

PRELOADED = ["ptconvert.runtime.preloaded"]  # with torch and transformers, which take longest
_GRACE_SECONDS = 3.0
_TRACE_LINES = 12
# Torch's words for a peer that is gone or silent: such a rank is a victim, not the cause.
_INPUT_ERROR = re.compile(r"ptconvert\.errors\.\w+: ")
_VICTIM = ("closed by peer", "timed out", "Timed out", "timeout", "Connection reset", "Broken pipe")


@dataclass(frozen=True)
class Rank:
    """What a rank's function gets to know about where it runs."""

    rank: int
    ranks: int
    backend: str
    device: torch.device
    journal: Journal


@dataclass(frozen=True)
class RankFailure:
    """A rank that didn't finish: why in one line, and its traceback as far as it is known."""

    rank: int
    why: str
    trace: str
    victim: bool


class RanksFailed(Exception):  # noqa: N818  # it reads as what happened
    """At least one rank failed; the failures, the likely cause first, and the ranks' journals.

    `wrong_input` is the message where all that ranks raised were errors of the user's input.
    """

    def __init__(self, failures: list[RankFailure], directory: Path) -> None:
        self.failures = sorted(failures, key=lambda f: (f.victim, f.rank))
        causes = [f.why for f in self.failures if not f.victim]
        inputs = all(_INPUT_ERROR.match(why) for why in causes) and bool(causes)
        self.wrong_input = _INPUT_ERROR.sub("", causes[0]) if inputs else None
        self.journals = {
            int(path.suffix[1:]): Journal.read(path) for path in directory.glob("journal.*")
        }
        super().__init__("; ".join(f"rank {f.rank}: {f.why}" for f in failures))


Work = Callable[[Any, Rank], dict[str, Any]]


def launch(
    work: Work, job: Any, ranks: int, backend: str, device: str, timeout: float
) -> list[dict[str, Any]]:
    """Runs `work(job, rank)` in `ranks` new processes; returns their results in rank order.

    `work` and `job` must pickle. Raises RanksFailed when a rank raises, dies or is not done after
    `timeout` seconds; no process is left then.
    """
    with tempfile.TemporaryDirectory(prefix="ptconvert-ranks-") as name:
        directory = Path(name)
        context = _context(device)
        started = [
            context.Process(
                target=_rank_main,
                args=(work, job, rank, ranks, backend, device, timeout, directory),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        try:
            for process in started:
                process.start()
            late = _wait(started, time.monotonic() + timeout)
        finally:
            _end(started)
        failures = [f for r, p in enumerate(started) if (f := _failure(r, p, late, directory))]
        if any(f.rank not in late and not f.victim for f in failures):
            # then those ended while still at work were only waiting, or would have been
            failures = [_ended(f) if f.rank in late else f for f in failures]
        if failures:
            raise RanksFailed(failures, directory)
        return [json.loads((directory / f"result.{r}").read_text()) for r in range(ranks)]


def _context(device: str) -> Any:
    """How processes begin. On CPUs they are forked from one that has imported what ranks need:
    importing it takes each as long as much of its work. CUDA can't be used in a process forked from
    one that has asked for GPUs, as torchao, which transformers imports, does when it is imported.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _wait(processes: Sequence[BaseProcess], deadline: float) -> set[int]:
    """Waits until all are done, one has failed (and the others had their grace), or too late.

    Returns the ranks that were still at work.
    """
    while any(p.is_alive() for p in processes):
        if any(p.exitcode not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return {rank for rank, p in enumerate(processes) if p.is_alive()}


def _end(processes: Sequence[BaseProcess]) -> None:
    """Has every process still alive print where it stands, then ends it."""
    alive = [p for p in processes if p.is_alive()]
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR1)
    if alive:
        time.sleep(0.5)
    for process in processes:
        if process.is_alive():
            process.kill()
        if process.pid is not None:
            process.join()


def _failure(
    rank: int, process: BaseProcess, late: set[int], directory: Path
) -> RankFailure | None:
    if process.exitcode == 0 and (directory / f"result.{rank}").exists():
        return None
    raised, output = directory / f"error.{rank}", directory / f"output.{rank}"
    trace = raised.read_text() if raised.exists() else ""
    if rank in late and not trace:
        return RankFailure(rank, "did not finish in time", _stack(output), victim=False)
    if trace:
        why = trace.strip().splitlines()[-1]
        return RankFailure(rank, why, _last(trace), any(w in why for w in _VICTIM))
    code = process.exitcode or 0
    why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return RankFailure(rank, why, _stack(output), victim=False)


def _ended(failure: RankFailure) -> RankFailure:
    return replace(failure, why="ended, since another rank failed", victim=True)


def _stack(path: Path) -> str:
    """Where a rank stood, as faulthandler printed it last: innermost call first, so its head."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    heads = [i for i, line in enumerate(lines) if "most recent call first" in line]
    begin = heads[-1] if heads else max(0, len(lines) - _TRACE_LINES)
    return "\n".join(lines[begin : begin + _TRACE_LINES])


def _last(trace: str) -> str:
    return "\n".join(trace.rstrip().splitlines()[-_TRACE_LINES:])


def _rank_main(
    work: Work,
    job: Any,
    rank: int,
    ranks: int,
    backend: str,
    device: str,
    timeout: float,
    directory: Path,
) -> None:
    """A rank's process, from its start to its result file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the ranks
    with (directory / f"output.{rank}").open("w") as output:
        for stream in (1, 2):  # what C++ prints, too, is shown only where a rank fails
            os.dup2(output.fileno(), stream)
        faulthandler.enable(output, all_threads=False)
        faulthandler.register(signal.SIGUSR1, output, all_threads=False)
        # where the parent is killed, too, nobody else would end this process
        faulthandler.dump_traceback_later(timeout + 30, exit=True, file=output)
        try:
            dist.init_process_group(
                backend,
                init_method=f"file://{directory}/rendezvous",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=timeout / 2),
            )
            journal = Journal(directory / f"journal.{rank}")
            result = work(job, Rank(rank, ranks, backend, _device(device, rank), journal))
            (directory / f"result.{rank}").write_text(json.dumps(result))
            dist.destroy_process_group()
        except BaseException:
            (directory / f"error.{rank}").write_text(traceback.format_exc())
            os._exit(1)  # a process group that failed may never let go otherwise


def under_torchrun() -> bool:
    """Whether torchrun (or another elastic launcher) started this process as one of its ranks."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def join(work: Work, job: Any, backend: str, device: str, timeout: float) -> list[dict[str, Any]]:
    """Runs `work(job, rank)` as the rank that torchrun made this process.

    Returns all results on rank 0, none on the others.

    When time runs out the process prints its stack and ends; torchrun then ends the others.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    faulthandler.dump_traceback_later(timeout, exit=True)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout / 2))
    with tempfile.TemporaryDirectory(prefix="ptconvert-ranks-") as name:
        journal = Journal(Path(name) / f"journal.{rank}")
        try:
            result = work(job, Rank(rank, ranks, backend, _device(device, local), journal))
        except Exception as error:
            why = traceback.format_exception_only(error)[-1].strip()
            victim = any(word in why for word in _VICTIM)
            failure = RankFailure(rank, why, _last(traceback.format_exc()), victim)
            raise RanksFailed([failure], Path(name)) from None
    results: list[dict[str, Any]] = [{}] * ranks
    dist.all_gather_object(results, result)
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    return results if rank == 0 else []


def _device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: GPUs are dealt out in turn, several ranks to one if need be."""
    if device != "cuda":
        return torch.device(device)
    chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen
