"""`ptconvert transform`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal

from ptconvert.cli.common import ByteSize, byte_progress, print_figures
from ptconvert.spec import read_spec


@click.command()
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
    from ptconvert.checkpoint.source import display_name, locate
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
        source_name = display_name(source)
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
        print_figures(figures, as_json, lambda console: _print_plan(console, figures, free))
        return
    if push_to_hub:
        hub.create(push_to_hub)
    started = time.monotonic()
    with byte_progress(plan.nbytes, f"writing {destination.name}") as advance:
        execute(plan, destination, overwrite=overwrite, progress=advance)
    figures["seconds"] = time.monotonic() - started
    figures["destination"] = str(destination)
    if push_to_hub:
        figures["commit"] = hub.push(destination, push_to_hub)
    print_figures(figures, as_json, lambda console: _print_done(console, figures))


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
