"""`ptconvert show`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ptconvert.checkpoint import compensations
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.section import SECTION, Section, read_section, source_config
from ptconvert.cli.common import model_config, print_figures, spec_or_checkpoint
from ptconvert.cli.options import Source, shared
from ptconvert.engines import unserved
from ptconvert.errors import CheckpointError
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import dense_schedule
from ptconvert.spec.document import read_spec


@click.command()
@click.argument("spec", metavar="SPEC", type=Source())
@shared("--model")
@click.option("--layers", type=click.IntRange(1, 4096), help="Its number of layers, instead.")
@shared("--revision")
@shared("--json")
def show(
    spec: str, model: str | None, layers: int | None, revision: str | None, as_json: bool
) -> None:
    """Draw the schedule of SPEC (a spec file, or a converted checkpoint, or its hub id) with its
    counts.

    A spec is checked against --model, or against a number of --layers.
    """
    from ptconvert.report.terminal import (
        fewer_ranks,
        print_compensations,
        print_schedule,
        print_unserved,
    )

    path = spec_or_checkpoint(spec, None if model else revision)
    if not path.exists():
        raise CheckpointError(f"{spec} is neither a spec file nor a converted checkpoint")
    if sum(given is not None for given in (model, layers)) != (0 if path.is_dir() else 1):
        raise click.UsageError(
            "a spec needs --model SRC or --layers N to be checked against; a checkpoint, neither"
        )
    config, shape = model_config(model, revision) if model else ({}, None)
    if path.is_dir():
        config, shape, section = converted(path)
        schedule, tracks, values = section.schedule, section.tracks, section.compensations
    else:
        read = read_spec(path)
        if shape is not None:
            read.check(shape)
        elif layers is not None:
            read.check_layers(layers)
        of = (False, None) if shape is None else (shape.family.parallel, shape.divisible)
        schedule, tracks = read.schedule(*of), read.tracks
        values = compensations.most(shape, schedule, read) if shape is not None else {}
        section = Section(schedule, tracks, read.deferred, {}, compensations=values)
    dense = shape.dense if shape else dense_schedule(schedule.layers)
    before, after = dense.counts, schedule.counts
    figures: dict[str, Any] = {
        "schedule": str(schedule),
        "tracks": tracks,
        "layers": schedule.layers,
        "layers_as_tracks": sorted(schedule.track_layers),
        "all_reduces": {"before": before.all_reduces, "after": after.all_reduces},
        "waited_for": {"before": before.waited_for, "after": after.waited_for},
        "bytes_per_token_per_all_reduce": shape and shape.bytes_per_token,
        "bytes_per_token": shape and shape.bytes_all_reduced(schedule),
        **compensations.figures(shape, tracks, values),
        "note": fewer_ranks(tracks, schedule.track_layers),
        "unserved": unserved(config, section) if config else {},
    }

    def show(console: Console) -> None:
        print_schedule(console, schedule, dense, tracks, shape)
        print_compensations(console, figures, decided=path.is_dir())
        if figures["note"]:
            console.print(figures["note"], style="dim")
        print_unserved(console, figures["unserved"], tracks)

    print_figures(figures, as_json, show)


def converted(path: Path) -> tuple[Mapping[str, Any], ModelShape, Section]:
    """A converted checkpoint's config.json, its source's shape, and what config.json says of its
    conversion."""
    config = read_config(path)
    section = read_section(config, str(path / "config.json"))
    if SECTION not in config and section.schedule == section.dense:
        raise CheckpointError(f"{path} is not converted; name a spec, or a converted checkpoint")
    source = source_config(config, section) if SECTION in config else config
    shape = ModelShape.from_config(source, str(path / "config.json"))
    return config, shape, section
