"""verify in vLLM: what its workers do in each forward pass, against the schedule.

A real engine prefills a batch of prompts and decodes greedily; a worker extension counts what each
rank sends, and the tokens are compared with those of the single-process model.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import vllm

from ptconvert.engines.verify import (
    Answers,
    answer_checks,
    count_checks,
    figures_of,
)
from ptconvert.engines.vllm.counting import EXTENSION
from ptconvert.errors import EngineError
from ptconvert.models.shape import TORCH_NAMES, ModelShape
from ptconvert.verify.run import (
    Report,
    Settings,
    as_converted,
    check_ranks,
    open_converted,
)


def verify_in_vllm(path: Path, settings: Settings, eager: bool = False) -> Report:
    """Runs a converted checkpoint in vLLM on `settings.ranks` tensor-parallel ranks and checks it.

    `eager` switches torch.compile and CUDA graphs off. Raises PTConvertError for input that is
    wrong, EngineError where vLLM doesn't start.
    """
    checkpoint, section, shape = open_converted(path)
    dtype = settings.dtype or TORCH_NAMES[shape.dtype or "F32"]
    check_ranks(checkpoint, settings, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.batch, settings.prompt_tokens)
    ids_BS = torch.randint(shape.vocabulary, size, generator=generator)
    limits = {
        "max_num_seqs": settings.batch,
        "max_num_batched_tokens": max(ids_BS.numel(), settings.batch),
        "max_model_len": settings.prompt_tokens + settings.new_tokens,
        "kv_cache_memory_bytes": _cache_bytes(shape, section.tracks, settings),
        # replaying a whole pass as a graph runs no Python, where passes are told apart
        "compilation_config": {"cudagraph_mode": "NONE"},
    }
    if shape.wrapper is not None:  # without its tower, as prompts are texts
        limits["language_model_only"] = True
    running = engine(path, settings.ranks, dtype=dtype, enforce_eager=eager, **limits)
    with _logs_on_stderr(), running as llm:
        generate(llm, ids_BS.tolist(), 2)  # compiles, and fills caches
        llm.collective_rpc("ptconvert_start_counting")
        answers = generate(llm, ids_BS.tolist(), settings.new_tokens)
        passes = llm.collective_rpc("ptconvert_stop_counting")
    checks = [
        *as_converted(path, section),
        *count_checks(passes, section.schedule, shape, settings.new_tokens),
        *answer_checks(path, shape, ids_BS, answers, dtype),
    ]
    named, mode = f"vllm {vllm.__version__}", "eager" if eager else "compiled"
    figures = figures_of(named, mode, section.schedule, settings, dtype, passes)
    return Report(tuple(checks), figures)


@contextlib.contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """What vLLM and its workers log goes to stderr, so that stdout is for figures."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def engine(path: Path, ranks: int, **arguments: Any) -> Iterator[Any]:
    """An offline engine for as long as the `with` block lasts; token ids in, token ids out.

    `arguments` are vLLM's. Raises EngineError where it doesn't start.
    """
    # Its core in this process: that starts faster, and an error arrives as what it is.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Else attention by Triton rounds what is in float32 to TF32, further than is allowed here.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    defaults: dict[str, Any] = {
        "worker_extension_cls": EXTENSION,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # each prefill computes all of its tokens
        "seed": 0,
    }
    try:
        llm = vllm.LLM(str(path), tensor_parallel_size=ranks, **(defaults | arguments))
    except Exception as error:  # whatever its parts raise
        said = " ".join(str(error).split())
        if "NUMA" in said:
            said += " (on CPU, VLLM_CPU_OMP_THREADS_BIND gives each rank its cores, such as '0|1')"
        raise EngineError(f"vLLM did not start: {said}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _cache_bytes(shape: ModelShape, tracks: int, settings: Settings) -> int:
    """KV cache for the batch, with room to spare; vLLM would take most of the machine's memory.

    With linear attention vLLM's pages are as large as a layer's state of a request, and a request
    has one of each layer at least, in whole pages.
    """
    kv_width = max(shape.kv_width, tracks * shape.head_size)
    tokens = settings.batch * (settings.prompt_tokens + settings.new_tokens + 256)
    pages = shape.layers * (settings.batch + 1)
    return 2**28 + 2 * 4 * kv_width * shape.layers * tokens + pages * 4 * shape.linear_state


def generate(llm: Any, prompts: list[list[int]], new_tokens: int) -> Answers:
    """Greedy tokens of each prompt, and their log-probabilities."""
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy, use_tqdm=False)
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        found.append((tokens, [step[token].logprob for token, step in steps]))
    return found
