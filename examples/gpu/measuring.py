"""What the scripts of this folder share: where they run, their models, their rows and tables.

Every figure is a ratio of one run, in which models take turns, repeat by repeat: given are the
median and the range.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptconvert.errors import PTConvertError
from ptconvert.runtime.quiet import quiet_libraries

quiet_libraries()  # before they are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import serve  # noqa: E402
import torch  # noqa: E402
from slow_link import TABLE_WIDTH, Failed, Missing  # noqa: E402
from slow_link import convert as convert_all_layers  # noqa: E402

DENSE = serve.DENSE
# Models whose weights a GPU reads for long enough, and that a CPU is done with in a moment.
SIZES = {
    "cuda": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
    },
    "cpu": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
# Batches, prompt tokens, repeats.
WORK: dict[str, tuple[list[int], list[int], int]] = {
    "cuda": ([1, 16], [128, 1024], 5),
    "cpu": ([1, 2], [8], 2),
}

# What was found: milliseconds by phase and name, for each batch and prompt (`serve.on_rank`).
Found = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A model under a setting at a batch and a prompt. Times in ms: `ttft`, of the prefill, and
    `tpot`, of a decode step; tokens per second over the batch; `times_..` over what it is compared
    with, in the same repeat: median, least and most."""

    name: str
    over: str
    batch: int
    prompt: int
    ttft_ms: float
    tpot_ms: float
    prefill_tokens_s: float
    decode_tokens_s: float
    times_prefill: tuple[float, float, float]
    times_decode: tuple[float, float, float]


def rows_of(found: Found, over: Mapping[str, str]) -> Iterator[Row]:
    """A row for each name, batch and prompt; `over` says by name what it is compared with."""
    for one in found:
        batch, prompt = one["batch"], one["prompt"]
        prefill, decode = (one["times"][phase] for phase in serve.PHASES)
        for name, base in over.items():
            ttft, tpot = (statistics.median(times[name]) for times in (prefill, decode))
            yield Row(
                name,
                base,
                batch,
                prompt,
                ttft,
                tpot,
                1e3 * batch * prompt / ttft,
                1e3 * batch / tpot,
                _ratios(prefill[base], prefill[name]),
                _ratios(decode[base], decode[name]),
            )


def _ratios(base: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    ratios = [b / a for a, b in zip(own, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def show(title: str, rows: Sequence[Row], as_json: bool) -> None:
    """The rows as a table, or as JSON under `title` and the device's name."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if as_json:
        print(json.dumps({"title": title, "device": where, "rows": [asdict(r) for r in rows]}))
        return
    table = Table(title=f"{title} ({where})", title_justify="left")
    table.add_column("", overflow="fold")
    columns = ("batch", "prompt", "TTFT, ms", "TPOT, ms", "prefill, tokens/s", "decode, tokens/s")
    for column in (*columns, "times: prefill", "decode", "over"):
        table.add_column(column, justify="left" if column == "over" else "right")
    for row in rows:
        ratios = [
            "{:.2f} ({:.2f}-{:.2f})".format(*x) for x in (row.times_prefill, row.times_decode)
        ]
        table.add_row(
            row.name,
            *(f"{value:,}" for value in (row.batch, row.prompt)),
            *(f"{value:.2f}" for value in (row.ttft_ms, row.tpot_ms)),
            *(f"{value:,.0f}" for value in (row.prefill_tokens_s, row.decode_tokens_s)),
            *(["", ""] if row.name == row.over else ratios),
            "" if row.name == row.over else row.over,
        )
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def make_models(
    given: argparse.Namespace, tracks: int, presets: Mapping[str, str], directory: Path
) -> dict[str, Path]:
    """The dense model, made here unless there is a --source, and its conversions, by name."""
    source = given.source or serve.make_model(directory / "source", **SIZES[given.device])
    models = {DENSE: source}
    for index, (name, preset) in enumerate(presets.items()):
        models[name] = directory / f"converted-{index}"
        convert_all_layers(source, models[name], preset, tracks)
    return models


def in_vllm(
    models: Mapping[str, tuple[Path, Mapping[str, Any]]],
    given: argparse.Namespace,
    ranks: int,
    directory: Path,
    what: str,
) -> Found:
    """Times of vLLM's engines of these models, with these arguments of vLLM's each, in turns on so
    many ranks; on a CPU eager unless they say otherwise, as compiling takes longest."""
    own = serve.engine_arguments(given.batches, given.prompts) | {
        "enforce_eager": given.device == "cpu",
        "async_scheduling": False,  # a step's time is that of its own tokens
        "kv_cache_memory_bytes": 2**31 if given.device == "cuda" else 2**27,
        "gpu_memory_utilization": 0.9 / len(models),
    }
    return serve.take_turns(
        {n: {"path": str(p), "arguments": own | dict(a)} for n, (p, a) in models.items()},
        works_of(given),
        given.repeats,
        directory,
        link=serve.Loopback(ranks),
        ranks=ranks,
        what=what,
        bound=given.device == "cpu",
    )


def works_of(given: argparse.Namespace) -> list[tuple[int, int]]:
    """Each batch with each length of prompt."""
    return [(batch, prompt) for batch in given.batches for prompt in given.prompts]


def count(text: str) -> int:
    """One or more."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def need_vllm() -> None:
    """Raises Missing where vLLM isn't installed."""
    if find_spec("vllm") is None:
        raise Missing("needs vLLM, which isn't installed here: pip install 'ptconvert[vllm]'")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--source", type=Path, help="a dense checkpoint (default: one made here)")
    made.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the same code, tiny"
    )
    made.add_argument("--batches", type=count, nargs="+", help="sequences at once")
    made.add_argument("--prompts", type=count, nargs="+", help="prompt tokens")
    made.add_argument("--repeats", type=count)
    made.add_argument("--json", action="store_true", dest="as_json")
    return made


def run(
    name: str,
    arguments: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, Path], None],
    gpus: Callable[[argparse.Namespace], int] = lambda _: 1,
) -> None:
    """Does a script's work; what is missing is one line and exit code 2, what fails 1."""
    given = arguments.parse_args()
    batches, prompts, repeats = WORK[given.device]
    given.batches = given.batches or batches
    given.prompts = given.prompts or prompts
    given.repeats = given.repeats or repeats
    try:
        there, wanted = torch.cuda.device_count(), gpus(given)
        if given.device == "cuda" and there < wanted:
            raise Missing(f"needs {wanted} GPU(s), here are {there}; --device cpu runs it tiny")
        with (
            contextlib.suppress(KeyboardInterrupt),
            tempfile.TemporaryDirectory(prefix="ptconvert-gpu-") as directory,
        ):
            work(given, Path(directory))
    except (Missing, Failed, PTConvertError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, Failed) else 2) from None
