"""`ptconvert verify`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ptconvert.cli.common import waiting


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option(
    "--ranks", type=click.IntRange(1), help="Processes to run on; must divide the tracks."
)
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
def verify(checkpoint: Path, ranks: int | None, json_file: Path | None, **options: Any) -> None:
    """Run the converted checkpoint CKPT on real ranks and check what it promises.

    Counts every all-reduce by two independent means, compares logits and greedy tokens with the
    single-process model, measures how far overlapped all-reduces are hidden, and times it against
    the same weights under tensor parallelism. Under torchrun it joins the ranks that are there.
    """
    from ptconvert.render import print_report
    from ptconvert.runtime.launch import under_torchrun
    from ptconvert.verify import Settings, default_device, verify

    for file in (options["trace"], json_file):
        if file is not None and not file.resolve().parent.is_dir():
            raise click.UsageError(f"{file}: the directory {file.resolve().parent} does not exist")
    options["device"] = options["device"] or default_device()
    if under_torchrun():
        ranks = int(os.environ["WORLD_SIZE"])
    if ranks is None:
        raise click.UsageError("give the number of processes: --ranks R")
    with waiting(f"verifying on {ranks} ranks"):
        report = verify(checkpoint, Settings(ranks=ranks, **options))
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
