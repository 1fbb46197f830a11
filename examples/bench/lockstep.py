"""vLLM engines whose tensor-parallel ranks are processes that we start, one rank in each.

vLLM calls this an external launcher: every process runs the whole engine with its own rank's worker
in it, and as scheduling is deterministic they stay in lockstep. So several engines can live in the
same processes, take turns, start in seconds, and run in different network namespaces.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def meeting(directory: Path) -> Iterator[Path]:
    """The beginning of the names of files in which ranks meet; wraps the processes that do.

    vLLM names its shared memory after these files, and can't start where an earlier run that was
    killed left memory of the same name: so no other run's names begin like this, and nothing stays
    behind.
    """
    beginning = f"vllm_dist_{uuid.uuid4().hex}"
    try:
        yield directory / beginning
    finally:
        for left in Path("/dev/shm").glob(f"{beginning}*"):
            left.unlink(missing_ok=True)


def engine(path: Path, rank: int, ranks: int, rendezvous: Path, **arguments: Any) -> Any:
    """This rank's part of an engine; all ranks must make the same engines in the same order.

    `rendezvous` is a file that doesn't exist yet, of a `meeting`, another for each engine: a rank
    that is still closing the engine before would leave its addresses in it, and the next one's
    ranks would wait for each other without end.
    `arguments` are vLLM's.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    # By file instead of by a port.
    method = f"file://{rendezvous.resolve()}"
    ExecutorWithExternalLauncher._distributed_args = lambda _: (method, rank, rank)
    defaults: dict[str, Any] = {
        "distributed_executor_backend": "external_launcher",
        "worker_extension_cls": "ptconvert.engines.vllm.counting.Counting",
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    return vllm.LLM(str(path), tensor_parallel_size=ranks, **(defaults | arguments))


def bind(rank: int) -> None:
    """Binds this process to one core, and torch to one thread; before torch is imported."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"
