"""`ptconvert verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from ptconvert.cli.common import check_outputs, to_json
from ptconvert.cli.options import File, Number, Renamed, Source, shared
from ptconvert.cli.progress import waiting
from ptconvert.engines import find_engine
from ptconvert.runtime.quiet import quiet_libraries
from ptconvert.shorten import counted

_TORCH = "torch"  # ptconvert's own
_TORCH_ONLY = ("device", "backend", "repeats", "timeout", "trace")


class _JsonFile(click.Command):
    """Takes `--json FILE`, as it was, for `--report FILE`, and `--json -` for `--json`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flag, equals = "--json", "--json="
        args = [part for a in args for part in ((flag, a[7:]) if a.startswith(equals) else (a,))]
        value = args.index(flag) + 1 if flag in args else len(args)
        if value < len(args) and (args[value] == "-" or not args[value].startswith("-")):
            _, too_many, _ = self.make_parser(ctx).parse_args(list(args))
            if too_many:  # else what follows is CKPT
                file = args.pop(value)
                new = [flag] if file == "-" else ["--report", file]
                click.echo(f"{flag} {file} is now {' '.join(new)}", err=True)
                args[value - 1 : value] = new
        return super().parse_args(ctx, args)


class _Verify(Renamed, _JsonFile):
    """`verify` with the options that it had."""


@click.command(
    cls=_Verify,
    renamed={"--engine": "--runtime", "--prompt-tokens": "--prompt", "--new-tokens": "--new"},
)
@click.argument("checkpoint", metavar="CKPT", type=Source())
@shared("--ranks")
@click.option(
    "--runtime",
    metavar="NAME",
    default=_TORCH,
    show_default=True,
    help="What runs it: torch, ptconvert's own runtime, or a serving engine: vllm, sglang.",
)
@click.option(
    "--enforce-eager", is_flag=True, help="Serving engines: without torch.compile and CUDA graphs."
)
@shared("--device", says="cuda where there is", takes=click.Choice(["cpu", "cuda"]))
@click.option("--backend", type=click.Choice(["gloo", "nccl"]), help="Default: the best that fits.")
@shared("--dtype", "float32")
@shared("--prompt", 16)
@shared("--new", 8)
@shared("--batch")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Timed passes of each schedule.",
)
@click.option(
    "--timeout",
    type=Number(min=1),
    default=600.0,
    show_default=True,
    help="Seconds until ranks that are not done are ended.",
)
@shared("--seed", 0)
@click.option(
    "--trace",
    type=File(),
    metavar="FILE",
    help="Write rank 0's Chrome/Perfetto trace, with stages named.",
)
@click.option(
    "--report",
    "report_file",
    type=File(dir_okay=False),
    metavar="FILE",
    help="Also write all figures as JSON.",
)
@shared("--json")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    checkpoint: str,
    ranks: int | None,
    runtime: str,
    enforce_eager: bool,
    report_file: Path | None,
    as_json: bool,
    prompt: int,
    new: int,
    **options: Any,
) -> None:
    """Run the converted checkpoint CKPT (a directory or a hub id) on real ranks, which must divide
    its tracks, and check what it promises.

    Counts every all-reduce by two independent means, compares logits and greedy tokens with the
    single-process model, measures how far overlapped all-reduces are hidden, and times it against
    the same weights under tensor parallelism. Under torchrun it joins the ranks that are there.

    With a serving engine as --runtime it counts the all-reduces of each forward pass inside of the
    engine's workers, and compares greedy tokens and their log-probabilities.
    """
    quiet_libraries()
    from ptconvert.checkpoint.source import locate
    from ptconvert.runtime.launch import under_torchrun
    from ptconvert.verify.run import Report, Settings, default_device, verify
    from ptconvert.verify.terminal import print_report

    check_outputs({"--trace": options["trace"], "--report": report_file}, [])
    _check_options(ctx, runtime)
    if new < 2:
        raise click.UsageError("--new: at least 2, so that there is a decode step")
    options["device"] = options["device"] or default_device()
    options["dtype"] = None if options["dtype"] == "auto" else options["dtype"]
    if runtime == _TORCH and under_torchrun():
        ranks = int(os.environ["WORLD_SIZE"])
    if ranks is None:
        raise click.UsageError("give the number of processes: --ranks R")
    path = locate(checkpoint, None)
    with waiting(f"verifying on {counted(ranks, 'rank')}"):
        settings = Settings(ranks=ranks, prompt_tokens=prompt, new_tokens=new, **options)
        report: Report | None
        if runtime == _TORCH:
            report = verify(path, settings)
        else:
            report = find_engine(runtime).verify(path, settings, enforce_eager)
    if report is None:
        return
    text = to_json(report.to_json())
    if report_file is not None:
        report_file.write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        print_report(Console(highlight=False, markup=False), report)
    if not report.ok:
        raise SystemExit(1)


def _check_options(ctx: click.Context, runtime: str) -> None:
    """Raises for options that the runtime doesn't have."""
    for name in ("enforce_eager",) if runtime == _TORCH else _TORCH_ONLY:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--runtime {runtime} takes no --{name.replace('_', '-')}")
