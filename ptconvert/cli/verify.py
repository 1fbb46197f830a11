"""`ptconvert verify`."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from ptconvert.cli.progress import waiting

_TORCH_ONLY = ("device", "backend", "repeats", "timeout", "trace")


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--ranks", type=click.IntRange(1), help="Processes to run on; must divide the tracks."
)
@click.option(
    "--engine",
    type=click.Choice(["torch", "vllm"]),
    default="torch",
    show_default=True,
    help="What runs it: ptconvert's own runtime, or vLLM on so many tensor-parallel ranks.",
)
@click.option("--enforce-eager", is_flag=True, help="vLLM: without torch.compile and CUDA graphs.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is.")
@click.option("--backend", type=click.Choice(["gloo", "nccl"]), help="Default: the best that fits.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What to compute in.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=8, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Timed passes of each schedule.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="Seconds until ranks that are not done are ended.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write rank 0's Chrome/Perfetto trace, with stages named.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write the whole report as JSON; - is standard output.",
)
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    checkpoint: Path,
    ranks: int | None,
    engine: str,
    enforce_eager: bool,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Run the converted checkpoint CKPT on real ranks and check what it promises.

    Counts every all-reduce by two independent means, compares logits and greedy tokens with the
    single-process model, measures how far overlapped all-reduces are hidden, and times it against
    the same weights under tensor parallelism. Under torchrun it joins the ranks that are there.

    With --engine vllm it counts the all-reduces of each forward pass inside vLLM's workers, and
    compares greedy tokens and their log-probabilities.
    """
    from ptconvert.render import print_report
    from ptconvert.runtime.launch import under_torchrun
    from ptconvert.verify import Report, Settings, default_device, verify

    for file in (options["trace"], json_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise click.UsageError(f"{file}: the directory {file.resolve().parent} does not exist")
    _check_options(ctx, engine)
    options["device"] = options["device"] or default_device()
    if engine == "torch" and under_torchrun():
        ranks = int(os.environ["WORLD_SIZE"])
    if ranks is None:
        raise click.UsageError("give the number of processes: --ranks R")
    with waiting(f"verifying on {ranks} ranks"):
        settings = Settings(ranks=ranks, **options)
        report: Report | None
        if engine == "vllm":
            from ptconvert.serving.verify import verify_in_vllm

            report = verify_in_vllm(checkpoint, settings, enforce_eager)
        else:
            report = verify(checkpoint, settings)
    if report is None:
        return
    text = json.dumps(report.to_json(), indent=2)
    if json_file == Path("-"):
        click.echo(text)
    else:
        if json_file is not None:
            json_file.write_text(text + "\n", encoding="utf-8")
        print_report(Console(highlight=False, markup=False), report)
    if not report.ok:
        raise SystemExit(1)


def _check_options(ctx: click.Context, engine: str) -> None:
    """Raises for options that the engine doesn't have, and where vLLM isn't installed."""
    others = {"torch": ("enforce_eager",), "vllm": _TORCH_ONLY}
    for name in others[engine]:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--engine {engine} takes no --{name.replace('_', '-')}")
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise click.UsageError("--engine vllm needs vLLM: pip install 'ptconvert[vllm]'")
