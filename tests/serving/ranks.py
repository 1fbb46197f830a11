"""The ranks of test_parity.py's engines: processes that run each case in an engine.

They are forked from one that has imported vLLM, which takes longer than most of the cases.
"""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import delta_rule
import expert_kernels
import lockstep
import picture_masks
import pictured
from starting import started

freeze = gc.freeze
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(
    ["ptconvert.engines.vllm.verify", "ptconvert.engines.vllm.model", "vllm.v1.worker.gpu_worker"]
)


def start(rank: int, ranks: int, directory: Path, meeting: Path) -> ForkServerProcess:
    """A rank that reads DIRECTORY/cases.json and writes DIRECTORY/found.RANK.json and
    DIRECTORY/output.RANK; `meeting` is how the files begin in which ranks meet, one for each
    engine."""
    with mock.patch.dict("os.environ", OMP_NUM_THREADS="1"):  # see lockstep.bind
        given = rank, ranks, directory, meeting, dict(os.environ)
        process = _forking.Process(target=_main, args=given)
        process.start()
    return process


def _main(
    rank: int, ranks: int, directory: Path, meeting: Path, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # else that of the first test that started a rank
    with (directory / f"output.{rank}").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    cases = json.loads((directory / "cases.json").read_text())
    if all(case["device"] == "cpu" for case in cases):
        lockstep.bind(rank)
        delta_rule.install()
        expert_kernels.install()
        picture_masks.install()
    engines_start_faster()
    found = {}
    for index, case in enumerate(cases):
        place = rank, ranks
        if case["alone"] is not None:  # one of the processes, as the only rank
            if case["alone"] != rank:
                continue
            place = 0, 1
        try:
            runs = pictured.run if "model" in case else run
            found[case["name"]] = runs(case, *place, Path(f"{meeting}_{index}"))
        except Exception:
            found[case["name"]] = {"error": traceback.format_exc()}
            break  # the ranks may not be in step any more
    (directory / f"found.{rank}.json").write_text(json.dumps(found))


def engines_start_faster() -> None:
    """Leaves out what vLLM does at the start and the end of each engine because it expects one in a
    process: three quarters of what a small one takes.

    It looks for garbage seven times, each time among all that was imported, unless that is frozen
    (see `run`); and in all that was imported for Triton's kernels, to replace them once more. What
    class a model has it asks in a process of its own, so as to import nothing in this one.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    gc.freeze = gc.unfreeze = lambda: None  # else an engine's end undoes ours
    once = functools.cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = once
    registry._run_in_subprocess = lambda ask: ask()


def run(case: dict[str, Any], rank: int, ranks: int, rendezvous: Path) -> dict[str, Any]:
    """Answers, counted passes, and answers with each fault; the engine is gone afterwards."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import default_loader

    from ptconvert.checkpoint.section import read_section
    from ptconvert.engines.vllm.verify import generate
    from ptconvert.schedule.schedule import Schedule

    gc.collect()
    freeze()  # what is left of engines before this one: modules
    files: list[str] = []
    read = default_loader.safetensors_weights_iterator

    def recording(weights_files: list[str], *arguments: Any, **keywords: Any) -> Any:
        files.extend(Path(file).name for file in weights_files)
        return read(weights_files, *arguments, **keywords)

    default_loader.safetensors_weights_iterator = recording
    silent = "speculative_config" not in case["arguments"]
    llm = started(case, rank, ranks, rendezvous, disable_log_stats=silent)
    prompts, new = case["prompts"], case["new_tokens"]
    default_loader.safetensors_weights_iterator = read
    found: dict[str, Any] = {"files": files, "answers": generate(llm, prompts, new)}
    found["drafts"] = drafts(llm) if "speculative_config" in case["arguments"] else None
    found["again"] = generate(llm, prompts, new)
    found["cached"] = cached_tokens(llm, prompts)
    llm.collective_rpc("ptconvert_start_counting")
    generate(llm, *(([[7, 8, 9, 10, 11]], 3) if found["drafts"] is None else (prompts[4:6], new)))
    found["passes"] = llm.collective_rpc("ptconvert_stop_counting")[0]
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    with set_current_vllm_config(llm.llm_engine.vllm_config):
        if case["faults"]:
            found["faults"] = {}
            for name, undo in faults(model.model):
                llm.reset_prefix_cache()
                found["faults"][name] = generate(llm, prompts, new)
                undo()
        if case["drawn"]:
            found["drawn"] = {}
            tracks = read_section(vars(model.config)).tracks
            for rule, schedule in case["drawn"]:
                model.model.program = Schedule.parse(schedule).program
                model.model.waiting_weight = 1 / tracks if rule == "mean" else 1.0
                llm.reset_prefix_cache()
                found["drawn"][f"{rule} {schedule}"] = generate(llm, prompts[:4], 4)
    llm.llm_engine.engine_core.shutdown()
    return found


def drafts(llm: Any) -> dict[str, int]:
    """How many tokens were drafted so far, and how many of them accepted."""
    begins = "vllm:spec_decode_num_"
    found = {m.name.removeprefix(begins): m for m in llm.get_metrics() if begins in m.name}
    names = {"drafted": "draft_tokens", "accepted": "accepted_tokens"}
    return {ours: int(found[theirs].value) for ours, theirs in names.items()}


def cached_tokens(llm: Any, prompts: list[list[int]]) -> int:
    """How many tokens of these prompts vLLM takes from its cache."""
    import vllm

    one = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], one, use_tqdm=False)
    return sum(output.num_cached_tokens for output in outputs)


def faults(model: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Puts one fault after another into a model: its name, and how to undo it."""
    import torch

    from ptconvert.modeling.layers import Guess

    program = model.program

    def undo() -> None:
        model.program = program

    at = next(i for i, step in enumerate(program) if step.merges)
    bucket = program[at].bucket if program[at].overlapped else -1  # which nobody launches
    dropped = replace(program[at], bucket=bucket, merges=())
    model.program = (*program[:at], dropped, *program[at + 1 :])
    yield "a merge is dropped", undo
    late = next((i for i, s in enumerate(program) if s.merges and s.index not in s.merges), None)
    if late is not None and late + 1 < len(program):
        here, after = program[late], program[late + 1]
        here = replace(here, merges=())
        after = replace(after, merges=(*program[late].merges, *after.merges))
        model.program = (*program[:late], here, after, *program[late + 2 :])
        yield "a lag is changed", undo
    biases = [bias for layer in model.layers for bias in layer.common.values()]
    if biases:
        kept = biases[0].data.clone()
        biases[0].data *= 2
        yield "a bias is counted twice", lambda: biases[0].data.copy_(kept)
    guesses = [g for g in model.modules() if isinstance(g, Guess)]
    if guesses:
        left_out = mock.patch.object(Guess, "forward", lambda *given: torch.zeros_like(given[2]))
        left_out.start()
        yield "a guess is left out", left_out.stop
