"""`ptconvert transform`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.filesize import decimal

from ptconvert.cli.common import (
    ByteSize,
    free_room,
    need_packages,
    print_figures,
    timing,
    torch_device,
)
from ptconvert.cli.options import File, Source, shared
from ptconvert.cli.progress import byte_progress, step_progress, waiting
from ptconvert.errors import SpecError
from ptconvert.runtime.quiet import quiet_libraries
from ptconvert.spec.document import Spec, read_spec

if TYPE_CHECKING:  # they import torch
    from ptconvert.checkpoint.calibration import Calibration
    from ptconvert.checkpoint.reader import Checkpoint
    from ptconvert.convert.transform import Plan
    from ptconvert.measure.needs import Needs


@click.command()
@click.argument("source", metavar="SRC", type=Source())
@click.argument("destination", metavar="DST", type=File())
@click.option("--spec", type=File(), help="The YAML spec to convert by.")
@shared("--text")
@shared("--windows", says="all, of 65,536 tokens at most")
@click.option("--tokens", type=click.IntRange(2), hidden=True)
@shared("--window", says="1024")
@shared("--device", says="cuda where there is")
@shared("--dtype", "auto", says="auto: float32 on a CPU, else what is stored")
@click.option("--to-dense", is_flag=True, help="Undo a conversion: SRC is a converted checkpoint.")
@shared("--dry-run")
@shared("--overwrite")
@click.option(
    "--shard-size", type=ByteSize(), default="5GB", show_default=True, help="Largest file written."
)
@shared("--revision")
@click.option("--push-to-hub", metavar="REPO", help="Upload the result, with a model card.")
@click.option(
    "--ladder-layers-config",
    is_flag=True,
    help="Also write ladder_layers to config.json, for the Ladder Residual authors' code.",
)
@shared("--json")
def transform(
    source: str,
    destination: Path,
    spec: Path | None,
    texts: tuple[Path, ...],
    window: int | None,
    windows: int | None,
    tokens: int | None,
    device: str | None,
    dtype: str,
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
    not at all. Without --spec, SRC must have ladder_layers or farskip in its config.json.

    A spec with `assignment: affinity`, `scale: fitted` or `guess` has something to compute from a
    --text; that runs the whole model, on --device and in --dtype.
    """
    from ptconvert.checkpoint.atomic import check_apart, check_destination
    from ptconvert.checkpoint.reader import open_checkpoint
    from ptconvert.checkpoint.section import read_section
    from ptconvert.checkpoint.source import display_name, locate
    from ptconvert.convert.transform import (
        check_converts,
        check_unchanged,
        execute,
        free_bytes,
        plan_conversion,
        plan_to_dense,
    )
    from ptconvert.engines import unserved
    from ptconvert.report.terminal import fewer_ranks, print_unserved

    if to_dense and (spec is not None or ladder_layers_config or push_to_hub):
        raise click.UsageError(
            "--to-dense takes none of --spec, --ladder-layers-config and --push-to-hub"
        )
    if tokens is not None:
        click.echo("--tokens N: use --windows, N tokens in windows of --window", err=True)
    read = read_spec(spec) if spec is not None else None
    _check_text(read, texts, dry_run)
    check_destination(destination, overwrite)
    if push_to_hub:
        from ptconvert.checkpoint import hub

        push_to_hub = hub.whole_id(push_to_hub)
    with waiting(f"finding {source}", bars_of_its_own=True):
        checkpoint = open_checkpoint(locate(source, revision))
    check_apart(destination, checkpoint.path)
    computed: dict[str, Any] | None = None
    if to_dense:
        plan = plan_to_dense(checkpoint, shard_bytes=shard_size)
    else:
        options: dict[str, Any] = {
            "source_name": display_name(source),
            "name": push_to_hub or destination.name,
            "shard_bytes": shard_size,
            "ladder_layers_config": ladder_layers_config,
        }
        plan = plan_conversion(checkpoint, read, **options)  # finds faults before any work
        quiet_libraries()
        check_converts(plan)
        refused = unserved(plan.config, read_section(plan.config))
        print_unserved(Console(stderr=True, highlight=False, markup=False), refused, plan.tracks)
        if read is not None and not plan.complete and not dry_run:
            asked = (texts, window, windows, tokens)
            known, computed = _calibrate(checkpoint, read, asked, device, dtype, destination)
            plan = plan_conversion(checkpoint, read, calibration=known, **options)
    free = free_bytes(destination)
    figures = {**plan.summary(), "bytes_free": free, "calibration": computed, "note": None}
    figures["unserved"] = {}
    if not to_dense:
        figures["note"] = fewer_ranks(figures["tracks"], figures["layers_as_tracks"])
        figures["unserved"] = refused
    if dry_run:
        if to_dense:
            check_unchanged(plan)
        needs, room = None, dict[str, int]()
        if read is not None and not plan.complete:
            room = free_room(torch_device(device), destination)
            needs = _needs(plan, read, (texts, window, windows, tokens), device, dtype)
        _print_dry_run(figures, needs, room, as_json)
        return
    if push_to_hub:
        hub.create(push_to_hub)
    started = time.monotonic()
    with byte_progress(plan.nbytes, f"writing {destination.name}") as advance:
        execute(plan, destination, overwrite=overwrite, progress=advance)
    figures["seconds"] = time.monotonic() - started
    figures["destination"] = str(destination)
    if push_to_hub:
        with waiting(f"uploading to {push_to_hub}", bars_of_its_own=True):
            figures["commit"] = hub.push(destination, push_to_hub)
    print_figures(figures, as_json, lambda console: _print_done(console, figures))


def _check_text(spec: Spec | None, texts: tuple[Path, ...], dry_run: bool) -> None:
    """Raises SpecError where a text is missing; says where one is given for nothing, as to a spec
    of `plan`, which may have found no use for it."""
    needed = spec is not None and spec.needs_text
    if texts and not needed:
        click.echo("--text isn't read: nothing in the spec needs a text", err=True)
    if spec is not None and needed and not texts and not dry_run:
        *_, wants = spec.wanted
        raise SpecError([f"{spec.name}: {wants} is computed from a text: --text FILE"])


def _calibrate(
    checkpoint: Checkpoint,
    spec: Spec,
    asked: tuple[tuple[Path, ...], int | None, int | None, int | None],
    device: str | None,
    dtype: str,
    destination: Path,
) -> tuple[Calibration, dict[str, Any]]:
    need_packages("plan", "scipy")
    quiet_libraries()
    from ptconvert.calibrate.conversion import calibrate, calibration_windows

    with step_progress() as progress:
        progress("reading the text", 0, None)
        windows = calibration_windows(checkpoint, *asked)
        scratch = destination.resolve().parent
        return calibrate(checkpoint, spec, windows, torch_device(device), dtype, scratch, progress)


def _needs(
    plan: Plan,
    spec: Spec,
    asked: tuple[tuple[Path, ...], int | None, int | None, int | None],
    device: str | None,
    dtype: str,
) -> Needs:
    """What computing what the spec wants will take; of a text that isn't given yet, as much as
    would be read."""
    need_packages("plan", "scipy")
    quiet_libraries()
    from ptconvert.calibrate.conversion import calibration_dtype, calibration_size, check_device
    from ptconvert.calibrate.needs import calibration_needs

    where = torch_device(device)
    check_device(plan.source, where, spec.wanted)
    with step_progress() as progress:
        progress("timing a layer's first steps", 0, None)
        size = calibration_size(plan.source, spec, *asked)
        dtype = calibration_dtype(plan.source, plan.shape, dtype, where)
        with timing(where):
            return calibration_needs(plan, spec, *size, dtype, where)


def _print_dry_run(
    figures: dict[str, Any], needs: Needs | None, room: Mapping[str, int], as_json: bool
) -> None:
    from ptconvert.checkpoint.compensations import COMPENSATIONS
    from ptconvert.report.terminal import needs_table, plan_table, print_mtp

    def show(console: Console) -> None:
        console.print(plan_table(figures, figures["bytes_free"]))
        print_mtp(console, figures)
        if figures["note"]:
            console.print(figures["note"], style="dim")
        for row in COMPENSATIONS:
            if row.undecided and row.told(figures[row.key]):
                console.print(row.undecided, style="dim")
        if needs is not None:
            console.print()
            needs_table(console, needs, room)
        console.print("Nothing was written (--dry-run).", style="dim")

    told = None if needs is None else needs.as_json(room)
    print_figures({**figures, "needs": told}, as_json, show)


def _print_done(console: Console, figures: dict[str, Any]) -> None:
    from ptconvert.report.terminal import print_mtp

    if figures["calibration"] is not None:
        from ptconvert.report.terminal import print_calibration

        print_calibration(console, figures["calibration"], figures)
    seconds = max(figures["seconds"], 1e-3)
    all_reduces, waited = figures["all_reduces"], figures["waited_for"]
    console.print(
        f"wrote {figures['destination']}: {decimal(figures['bytes_out'])} in {seconds:.1f} s "
        f"({decimal(int(figures['bytes_out'] / seconds))}/s); all-reduces per forward pass "
        f"{all_reduces['before']} → {all_reduces['after']}, waited for {waited['before']} → "
        f"{waited['after']}",
        soft_wrap=True,
    )
    print_mtp(console, figures)
    if figures["note"]:
        console.print(figures["note"], style="dim")
    if "commit" in figures:
        console.print(f"pushed: {figures['commit']}", soft_wrap=True)
