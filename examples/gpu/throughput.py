"""Tokens per second of converted models against the dense one, all tracks on one GPU.

    python examples/gpu/throughput.py [--source DIR] [--runtime torch] [--tracks 4] [--json]

At equal work: the same weights, batches, prompts and new tokens, in bfloat16 (float32 on the CPU),
nothing sent. What is left is what a conversion costs where it saves nothing: more and smaller
kernels. `torch` is transformers, eager; `vllm` is vLLM as it serves by itself, one rank. (None of
it has been run on a GPU.)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import measuring
import serve
import torch

import ptconvert
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.measure.opening import open_model
from ptconvert.verify.session import greedy_steps

NEW_TOKENS = 17


def step_ms(model: Any, ids_BS: torch.Tensor) -> list[float]:
    """Milliseconds of the prefill and of each decode step."""
    device: Any = torch.get_device_module(model.device)
    taken = []
    for _, step in greedy_steps(model, ids_BS, NEW_TOKENS):
        device.synchronize()
        started = time.perf_counter()
        step()
        device.synchronize()
        taken.append(1e3 * (time.perf_counter() - started))
    return taken


def in_torch(paths: dict[str, Path], given: argparse.Namespace) -> measuring.Found:
    """Times of transformers' models in this process, in turns."""
    ptconvert.register()
    dtype = "bfloat16" if given.device == "cuda" else "float32"
    models = {n: open_model(open_checkpoint(p), dtype, given.device) for n, p in paths.items()}
    found = []
    for batch, prompt in measuring.works_of(given):
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(3, 900, (batch, prompt), generator=generator)
        times: dict[str, Any] = {phase: {n: [] for n in models} for phase in serve.PHASES}
        for repeat in range(serve.WARM_UP + given.repeats):
            for name, model in models.items():
                prefill, *decode = step_ms(model, ids_BS)
                if repeat >= serve.WARM_UP:
                    times["prefill"][name].append(prefill)
                    times["decode"][name].append(sum(decode) / len(decode))
        found.append({"batch": batch, "prompt": prompt, "times": times})
    return found


def work(given: argparse.Namespace, directory: Path) -> None:
    """Makes the models, times them, shows the rows."""
    if given.runtime == "vllm":
        measuring.need_vllm()
    paths = measuring.make_models(given, given.tracks, serve.PRESETS, directory)
    if given.runtime == "torch":
        found = in_torch(paths, given)
    else:
        engines: dict[str, Any] = {name: (path, {}) for name, path in paths.items()}
        found = measuring.in_vllm(engines, given, 1, directory, "throughput")
    rows = list(measuring.rows_of(found, dict.fromkeys(paths, measuring.DENSE)))
    title = f"Dense and converted at equal work, {given.tracks} tracks on one device"
    measuring.show(f"{title}, {given.runtime}", rows, given.as_json)


if __name__ == "__main__":
    arguments = measuring.parser(__doc__)
    arguments.add_argument("--runtime", choices=["torch", "vllm"], default="torch")
    arguments.add_argument("--tracks", type=measuring.count, default=4)
    measuring.run("throughput", arguments, work)
