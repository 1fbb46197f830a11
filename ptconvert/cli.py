"""The command line: parse, call, print."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ptconvert import __version__
from ptconvert.errors import PTConvertError
from ptconvert.format import read_section, source_config
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape, read_config
from ptconvert.spec import read_spec

_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Commands(click.Group):
    """A group whose commands end with one line and exit code 2 where the user's input is wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # diagrams, where the locale can't draw
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # so that it cleans up, as Ctrl-C does
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            return ctx.exit(130)
        except BrokenPipeError:
            raise
        except PTConvertError as error:
            lines = str(error).splitlines()
        except OSError as error:
            lines = [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
        for line in lines:
            click.echo(f"error: {line}", err=True)
        return ctx.exit(2)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class ByteSize(click.ParamType):  # type: ignore[type-arg]
    """A size such as 5GB, 500MB or 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]I?B)?", str(value).strip().upper())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size such as 5GB, 500MB or 4GiB", param, ctx)
        return int(match[1]) * _SIZES[match[2] or ""]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ptconvert")
def main() -> None:
    """Convert dense transformer checkpoints into architectures that wait for far fewer all-reduces.

    \b
    ptconvert show SPEC --model SRC            look at a schedule and what it saves
    ptconvert transform SRC DST --spec SPEC    write the converted checkpoint
    ptconvert verify DST --ranks R             run it on R ranks and check what it promises
    ptconvert transform DST BACK --to-dense    undo it, bit for bit

    Exit codes: 0 done, 1 a check failed, 2 the input is wrong.
    """


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--spec", type=click.Path(path_type=Path), help="The YAML spec to convert by.")
@click.option("--to-dense", is_flag=True, help="Undo a conversion: SRC is a converted checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint.")
@click.option(
    "--shard-size", type=ByteSize(), default="5GB", show_default=True, help="Largest file written."
)
@click.option("--revision", help="Branch, tag or commit, where SRC is a hub id.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the result, with a model card.")
@click.option(
    "--ladder-layers-config",
    is_flag=True,
    help="Also write ladder_layers to config.json, for the Ladder Residual authors' code.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures as JSON.")
def transform(
    source: str,
    destination: Path,
    spec: Path | None,
    to_dense: bool,
    dry_run: bool,
    overwrite: bool,
    shard_size: int,
    revision: str | None,
    push_to_hub: str | None,
    ladder_layers_config: bool,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC (a directory or a hub id) into DST.

    The rewrite is streamed, so memory stays small whatever the model's size; DST appears whole or
    not at all. Without --spec, SRC must have ladder_layers in its config.json.
    """
    from ptconvert.checkpoint.atomic import check_apart, check_destination
    from ptconvert.checkpoint.reader import open_checkpoint
    from ptconvert.checkpoint.source import is_hub_id, locate
    from ptconvert.transform import (
        check_replicas,
        execute,
        free_bytes,
        plan_conversion,
        plan_to_dense,
    )

    if to_dense and (spec is not None or ladder_layers_config or push_to_hub):
        raise click.UsageError(
            "--to-dense takes none of --spec, --ladder-layers-config and --push-to-hub"
        )
    read = read_spec(spec) if spec is not None else None
    check_destination(destination, overwrite)
    if push_to_hub:
        from ptconvert.checkpoint import hub

        push_to_hub = hub.whole_id(push_to_hub)
    checkpoint = open_checkpoint(locate(source, revision))
    check_apart(destination, checkpoint.path)
    if to_dense:
        plan = plan_to_dense(checkpoint, shard_bytes=shard_size)
    else:
        source_name = source if is_hub_id(source) else Path(source).resolve().name
        plan = plan_conversion(
            checkpoint,
            read,
            source_name=source_name,
            name=push_to_hub or destination.name,
            shard_bytes=shard_size,
            ladder_layers_config=ladder_layers_config,
        )
    free = free_bytes(destination)
    figures = {**plan.summary(), "bytes_free": free}
    if dry_run:
        check_replicas(plan)
        _print(figures, as_json, lambda console: _print_plan(console, figures, free))
        return
    if push_to_hub:
        hub.create(push_to_hub)
    started = time.monotonic()
    with _progress(plan.nbytes, f"writing {destination.name}") as advance:
        execute(plan, destination, overwrite=overwrite, progress=advance)
    figures["seconds"] = time.monotonic() - started
    figures["destination"] = str(destination)
    if push_to_hub:
        figures["commit"] = hub.push(destination, push_to_hub)
    _print(figures, as_json, lambda console: _print_done(console, figures))


@main.command()
@click.argument("spec", metavar="SPEC", type=click.Path(path_type=Path, exists=True))
@click.option("--model", metavar="SRC", help="The model: a directory, a config.json or a hub id.")
@click.option("--layers", type=click.IntRange(1, 4096), help="Its number of layers, instead.")
@click.option("--revision", help="Branch, tag or commit, where --model is a hub id.")
@click.option("--json", "as_json", is_flag=True, help="Print the schedule and counts as JSON.")
def show(
    spec: Path, model: str | None, layers: int | None, revision: str | None, as_json: bool
) -> None:
    """Draw the schedule of SPEC (a spec file, or a converted checkpoint) with its counts.

    A spec is checked against --model, or against a number of --layers.
    """
    from ptconvert.render import print_schedule

    if sum(given is not None for given in (model, layers)) != (0 if spec.is_dir() else 1):
        raise click.UsageError(
            "a spec needs --model SRC or --layers N to be checked against; a checkpoint, neither"
        )
    shape = _shape(model, revision) if model else None
    if spec.is_dir():
        schedule, tracks, shape = _converted(spec)
    else:
        read = read_spec(spec)
        if shape is not None:
            read.check(shape)
        elif layers is not None:
            read.check_layers(layers)
        schedule, tracks = read.schedule(), read.tracks
    carries = shape.bytes_per_token if shape else None
    counts = schedule.counts
    figures = {
        "schedule": str(schedule),
        "tracks": tracks,
        "layers": schedule.layers,
        "layers_as_tracks": sorted(schedule.track_layers(tracks)),
        "all_reduces": {"before": 2 * schedule.layers, "after": counts.all_reduces},
        "waited_for": {"before": 2 * schedule.layers, "after": counts.waited_for},
        "bytes_per_token_per_all_reduce": carries,
    }
    _print(figures, as_json, lambda console: print_schedule(console, schedule, tracks, carries))


@main.command()
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
    with _waiting(f"verifying on {ranks} ranks"):
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


def _shape(model: str, revision: str | None) -> ModelShape:
    from ptconvert.checkpoint.source import locate

    path = locate(model, revision, config_only=True)
    return ModelShape.from_config(read_config(path), str(path))


def _converted(path: Path) -> tuple[Schedule, int, ModelShape]:
    """The schedule, tracks and source shape of a converted checkpoint."""
    config = read_config(path)
    section = read_section(config, str(path / "config.json"))
    shape = ModelShape.from_config(source_config(config, section), str(path / "config.json"))
    return section.schedule, section.tracks, shape


def _print(figures: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        show(Console(highlight=False, markup=False))


def _print_plan(console: Console, figures: dict[str, Any], free: int) -> None:
    from ptconvert.render import plan_table

    console.print(plan_table(figures, free))
    console.print("Nothing was written (--dry-run).", style="dim")


def _print_done(console: Console, figures: dict[str, Any]) -> None:
    seconds = max(figures["seconds"], 1e-3)
    all_reduces, waited = figures["all_reduces"], figures["waited_for"]
    console.print(
        f"wrote {figures['destination']}: {decimal(figures['bytes_out'])} in {seconds:.1f} s "
        f"({decimal(int(figures['bytes_out'] / seconds))}/s); all-reduces per forward pass "
        f"{all_reduces['before']} → {all_reduces['after']}, waited for {waited['before']} → "
        f"{waited['after']}",
        soft_wrap=True,
    )
    if "commit" in figures:
        console.print(f"pushed: {figures['commit']}", soft_wrap=True)


@contextmanager
def _waiting(label: str) -> Iterator[None]:
    """A spinner with the time gone by on a terminal; nothing elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = not sys.stderr.isatty()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        bar.add_task(label, total=None)
        yield


@contextmanager
def _progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


if __name__ == "__main__":
    main()
