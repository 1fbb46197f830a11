"""verify in SGLang: what its workers do in each forward pass, against the schedule.

A real engine prefills a batch of prompts and decodes greedily under torch's profiler, which SGLang
starts in each of its workers; the model marks its passes there. The tokens are compared with those
of the single-process model.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sglang
import torch

from ptconvert.engines.sglang.refusals import check
from ptconvert.engines.verify import (
    Answers,
    Passes,
    answer_checks,
    count_checks,
    figures_of,
)
from ptconvert.errors import EngineError
from ptconvert.models.shape import TORCH_NAMES
from ptconvert.runtime.counters import Profile
from ptconvert.verify.run import Report, Settings, as_converted, check_ranks, open_converted

PASS = re.compile(r"(\d+) of (\d+) tokens")  # as the model marks them


def verify_in_sglang(path: Path, settings: Settings, eager: bool = False) -> Report:
    """Runs a converted checkpoint in SGLang on `settings.ranks` ranks and checks it.

    CUDA graphs are off, in which no Python runs that could mark a pass: `eager` changes nothing.
    Raises PTConvertError for input that is wrong, EngineError where SGLang doesn't start.
    """
    del eager
    checkpoint, section, shape = open_converted(path)
    dtype = settings.dtype or TORCH_NAMES[shape.dtype or "F32"]
    check(
        *(checkpoint.config, shape, section, settings.ranks),
        on_cpu=settings.device == "cpu",
    )
    check_ranks(checkpoint, settings, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_tokens)
    ids_BS = torch.randint(shape.vocabulary, size, generator=generator)
    tokens = settings.batch * (settings.prompt_tokens + settings.new_tokens)
    limits = {
        "max_running_requests": settings.batch,
        "max_total_tokens": max(2048, 2 * tokens),
        "max_mamba_cache_size": 2 * settings.batch,  # states of linear attention, if it has any
        "chunked_prefill_size": -1,
        "disable_radix_cache": True,  # each prefill computes all of its tokens
    }
    with engine(path, settings.ranks, settings.device, dtype=dtype, **limits) as running:
        generate(running, ids_BS.tolist(), 2)
        with counted(running, settings.ranks) as passes:
            answers = generate(running, ids_BS.tolist(), settings.new_tokens)
    checks = [
        *as_converted(path, section),
        *count_checks(passes, section.schedule, shape, settings.new_tokens),
        *answer_checks(path, shape, ids_BS, answers, dtype),
    ]
    named = f"sglang {sglang.__version__}"
    figures = figures_of(named, "eager", section.schedule, settings, dtype, passes)
    return Report(tuple(checks), figures)


@contextlib.contextmanager
def engine(path: Path, ranks: int, device: str, **arguments: Any) -> Iterator[Any]:
    """An offline engine for as long as the `with` block lasts; token ids in, token ids out.

    `arguments` are SGLang's. Raises EngineError where it doesn't start.
    """
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,  # which runs a pass ahead of what is asked for
        "log_level": "error",
        "random_seed": 0,
    }
    if device == "cpu":
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
        defaults |= {"device": "cpu", "attention_backend": "torch_native"}
    try:
        running = sglang.Engine(model_path=str(path), tp_size=ranks, **(defaults | arguments))
    except (Exception, SystemExit) as error:  # whatever its parts raise
        said = " ".join(str(error).split())
        raise EngineError(f"SGLang did not start: {said}") from error
    try:
        yield running
    finally:
        running.shutdown()


def generate(running: Any, prompts: list[list[int]], new_tokens: int) -> Answers:
    """Greedy tokens of each prompt, and their log-probabilities."""
    greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    outputs = running.generate(input_ids=prompts, sampling_params=greedy, return_logprob=True)
    return [
        (
            list(one["output_ids"]),
            [float(log) for log, _, _ in one["meta_info"]["output_token_logprobs"]],
        )
        for one in outputs
    ]


@contextlib.contextmanager
def counted(running: Any, ranks: int) -> Iterator[list[Passes]]:
    """The passes of each rank while the `with` block lasts, there once it has ended."""
    found = list[Passes]()
    with tempfile.TemporaryDirectory() as directory:
        running.start_profile(output_dir=directory, activities=["CPU"], record_shapes=True)
        yield found
        running.stop_profile()
        for rank in range(ranks):
            own = re.compile(rf"TP-{rank}(?!\d).*\.trace\.json\.gz$")
            traces = [file for file in Path(directory).rglob("*") if own.search(file.name)]
            if len(traces) != 1:
                raise EngineError(f"SGLang wrote {len(traces)} traces of rank {rank}, not one")
            trace = traces[0]
            plain = trace.with_suffix("")
            plain.write_bytes(gzip.decompress(trace.read_bytes()))
            found.append(_passes(plain))


def _passes(trace: Path) -> Passes:
    steps = Profile(trace).collectives()
    numbered = {name: match for name in steps if (match := PASS.fullmatch(name))}
    return [
        {"tokens": int(match[2]), "collectives": [asdict(c) for c in steps[name]]}
        for name, match in sorted(numbered.items(), key=lambda one: int(one[1][1]))
    ]
