"""The engines of test_sglang.py, one after another: python engine.py CASES.json DIRECTORY, in which
it writes what each case found.

SGLang starts its workers anew for each engine, which takes longer than all else here. So they are
forked from a process that has imported what they need.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

WARM = [
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "ptconvert.engines.sglang.model",
]


def main() -> None:
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    workers_are_forked()
    for case in cases:  # what fails, fails them all: SGLang ends the process they are forked from
        found = run(case)
        (Path(sys.argv[2]) / f"{case['name']}.json").write_text(json.dumps(found))


def workers_are_forked() -> None:
    """Makes SGLang's own `spawn` a fork of a process with WARM in it, and the end of an engine that
    of its workers, not of every process that this one started."""
    from sglang.srt.entrypoints import engine

    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(WARM)
    engine.mp.set_start_method = lambda *_, **__: None
    engine.kill_process_tree = end_workers


def end_workers(*_: Any, **__: Any) -> None:
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Answers, answers out of the cache, those for which others leave it, and counted passes."""
    from ptconvert.engines.sglang.verify import counted, engine, generate

    prompts, new = case["prompts"], case["new_tokens"]
    limits = {
        "chunked_prefill_size": 64,  # less than the longest prompt, so that it comes in chunks
        "max_running_requests": 8,
        "max_total_tokens": 512,  # less than prompts and answers, so that places are taken again
        "max_mamba_cache_size": 24,  # as few states as so many requests take
    }
    with engine(Path(case["path"]), 2, "cpu", dtype="float32", **limits) as running:
        found: dict[str, Any] = {"answers": generate(running, prompts, new)}
        found["again"] = generate(running, prompts, new)
        greedy = {"temperature": 0, "max_new_tokens": 1}
        outputs = running.generate(input_ids=prompts, sampling_params=greedy)
        found["cached"] = sum(one["meta_info"]["cached_tokens"] for one in outputs)
        found["later"] = generate(running, case["later"], new)
        with counted(running, 2) as passes:
            generate(running, [[7, 8, 9, 10, 11]], 3)
        found["passes"] = passes
    return found


if __name__ == "__main__":
    main()
else:  # in a worker, which imports this again
    import gated_delta
    import sinks

    sinks.install()
    gated_delta.install()
