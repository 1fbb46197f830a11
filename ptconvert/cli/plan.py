"""`ptconvert plan`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptconvert.checkpoint.source import display_name, locate
from ptconvert.cli.common import (
    check_outputs,
    free_room,
    given,
    need_packages,
    print_figures,
    print_needs,
    timing,
    torch_device,
)
from ptconvert.cli.options import F, File, Number, Source, shared
from ptconvert.cli.progress import step_progress
from ptconvert.errors import PlanError
from ptconvert.plan.frontier import SUFFIX
from ptconvert.runtime.quiet import quiet_libraries
from ptconvert.spec.document import COMPUTED, unfit
from ptconvert.spec.terms import MAX_TRACKS

if TYPE_CHECKING:  # they import torch
    from ptconvert.measure.progress import Progress
    from ptconvert.models.shape import ModelShape
    from ptconvert.plan.case import Case
    from ptconvert.plan.planner import Frontier, Objective
    from ptconvert.plan.report import Planned
    from ptconvert.schedule.schedule import Schedule


def _for_the_spec(command: F) -> F:
    """An option for each thing that a spec may want to be computed from a text."""
    for f in reversed(COMPUTED):
        about, allowed = f.metadata, f.metadata.get("allowed")
        command = click.option(
            f"--{f.name}",
            type=click.Choice(allowed)
            if allowed
            else click.IntRange(about["least"], about["most"]),
            metavar=None if allowed else about["inside"].upper(),
            help=f"For the spec: {about['says']}",
        )(command)
    return command


@click.command()
@click.argument("source", metavar="SRC", type=Source())
@click.option(
    "--tracks", type=click.IntRange(2, MAX_TRACKS), required=True, help="Tracks to cut into."
)
@shared("--text", required=True)
@click.option("--max-syncs", type=click.IntRange(1), metavar="K", help="All-reduces to wait for.")
@click.option(
    "--max-loss",
    type=Number(min=0),
    metavar="X",
    help="By how much the loss on the text may rise, in nats per token.",
)
@click.option(
    "--overlap/--no-overlap",
    default=True,
    show_default=True,
    help="Whether all-reduces may run beside computation; else those waited for are all.",
)
@click.option(
    "--objective",
    type=click.Choice(["syncs", "latency"]),
    help="What to make small. [latency with --hardware, else syncs]",
)
@shared("--hardware")
@shared("--engine", says="the hardware's")
@shared("--vocabulary", says="the engine's")
@shared("--ranks", says="one per track")
@shared("--batch")
@shared("--prompt", 1024)
@shared("--new", 512)
@click.option(
    "-o",
    "--output",
    metavar="SPEC",
    type=File(dir_okay=False),
    help="Write the spec here. [print it]",
)
@click.option(
    "--frontier",
    "frontier_file",
    metavar="FILE.csv|.html",
    type=File(dir_okay=False),
    help="Also write the frontier, as a table or as a page.",
)
@_for_the_spec
@shared("--window", says="1024")
@shared("--windows", says="all, at most 64")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of the search, at most. [2]")
@click.option(
    "--time-limit",
    type=Number(min=0, min_open=True),
    metavar="MINUTES",
    help="Search for about so long, fits not counted; with fewer rounds and points then. "
    "[as long as it takes]",
)
@shared("--batch-size", "auto")
@shared("--device", says="cuda where there is")
@shared("--dtype", "auto", says="auto: what is stored, or float32 if faster")
@shared("--revision")
@shared("--cache", says="~/.cache/ptconvert")
@shared("--dry-run")
@shared("--json")
def plan(
    source: str,
    output: Path | None,
    frontier_file: Path | None,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the schedule that costs the dense checkpoint SRC least, for a budget.

    Weighs on your text what each change of a sublayer's all-reduce does to the predictions,
    searches all mixtures of them, measures the best ones whole, and writes the best for the budget
    as a spec for `ptconvert transform`. Needs a copy of SRC on disk while it runs.

    With --assignment affinity and --guess it measures with units assigned and guesses in place,
    fitted for no schedule in particular on what the windows leave of the text, or on the windows
    where that is too little; `transform` fits those of the spec.

    With --hardware it minimises the time of a request there (--batch, --prompt, --new) within
    --max-loss, as `ptconvert estimate` has it. Without, it counts all-reduces that are waited for:
    an overlapped one is free then, which on fast links it is not.
    """
    need_packages("plan", "scipy")
    quiet_libraries()
    from ptconvert.measure.cache import cache_directory
    from ptconvert.plan.needs import plan_needs

    if (options["max_syncs"] is None) == (options["max_loss"] is None):
        raise click.UsageError("give a budget, one of --max-syncs K and --max-loss X")
    _settle_objective(options)
    check_outputs({"--output": output, "--frontier": frontier_file}, options["texts"])
    if frontier_file is not None and frontier_file.suffix not in (SUFFIX, ".html"):
        raise click.UsageError(f"--frontier {frontier_file}: its name must end in .csv or .html")
    with step_progress() as progress:
        case, objective = _case(source, revision, options, progress)
        cache = options["cache"] or cache_directory()
        if not dry_run:
            planned = _plan(case, objective, cache, source, options, progress)
        else:
            room = free_room(case.device, cache)
            progress("timing a layer's first steps", 0, None)
            with timing(case.device):
                needs = plan_needs(case, objective, options["rounds"], options["time_limit"])
    if dry_run:
        print_needs(needs, room, as_json)
    else:
        _write(planned, output, frontier_file, as_json)


def _settle_objective(options: dict[str, Any]) -> None:
    """Fills in the objective that the options imply. Raises UsageError where they contradict."""
    hardware = options["hardware"]
    options["objective"] = options["objective"] or ("syncs" if hardware is None else "latency")
    if options["objective"] == "latency":
        for name, value in (("--hardware NAME", hardware), ("--max-loss X", options["max_loss"])):
            if value is None:
                raise click.UsageError(f"to minimise latency, plan needs {name}")
    elif unused := given("hardware", "engine", "vocabulary", "ranks", "batch", "prompt", "new"):
        raise click.UsageError(
            f"{unused}: for latency only; give --hardware NAME and leave out --objective syncs"
        )


def _write(
    planned: Planned, output: Path | None, frontier_file: Path | None, as_json: bool
) -> None:
    from ptconvert.plan.report import plan_page, print_plan, table, to_json, to_spec

    spec = to_spec(planned)
    if output is not None:
        output.write_text(spec, encoding="utf-8")
    if frontier_file is not None:
        form = table if frontier_file.suffix == SUFFIX else plan_page
        frontier_file.write_text(form(planned), encoding="utf-8")
    figures = {**to_json(planned), "spec": spec}
    print_figures(figures, as_json, lambda console: print_plan(console, planned))
    if not as_json:
        if output is None:
            click.echo(f"\n{spec}", nl=False)
        for file in (output, frontier_file):
            if file is not None:
                click.echo(f"wrote {file}")


def _case(
    source: str, revision: str | None, options: dict[str, Any], progress: Progress
) -> tuple[Case, Objective]:
    """The checkpoint opened, the text read and the options settled. Raises PTConvertError."""
    from ptconvert.calibrate.conversion import check_device
    from ptconvert.calibrate.stand_ins import KEYS
    from ptconvert.checkpoint.reader import open_checkpoint
    from ptconvert.measure.batch import BatchSize
    from ptconvert.measure.dtype import fastest_dtype
    from ptconvert.measure.opening import is_dense
    from ptconvert.models.shape import ModelShape
    from ptconvert.plan.case import Case, read_texts

    tracks, dtype, device = options["tracks"], options["dtype"], torch_device(options["device"])
    progress(f"finding {source}", 0, None)
    checkpoint = open_checkpoint(locate(source, revision))
    shape = ModelShape.from_config(checkpoint.config, str(checkpoint.path / "config.json"))
    if reason := shape.indivisible(tracks):
        raise PlanError(f"--tracks {tracks}: {reason}")
    for key, why in unfit(shape, options).items():
        raise PlanError(f"--{key} {why}")
    if not is_dense(checkpoint):
        raise PlanError(f"{source} is converted already; plan starts from the dense checkpoint")
    objective = _objective(options, shape)
    if dtype == "auto":
        dtype = fastest_dtype(checkpoint, device, functools.partial(click.echo, err=True))
    progress("tokenizing the text", 0, None)
    wanted = _wanted(options)
    check_device(checkpoint, device, [key for key in wanted if key in KEYS])
    size = options["window"], options["windows"]
    windows, in_place = read_texts(checkpoint, options["texts"], *size, wanted)
    batch = BatchSize(options["batch_size"], device)
    return Case(checkpoint, tracks, windows, dtype, device, batch, in_place), objective


def _plan(
    case: Case,
    objective: Objective,
    cache: Path,
    source: str,
    options: dict[str, Any],
    progress: Progress,
) -> Planned:
    from ptconvert.measure.cache import content_digest
    from ptconvert.plan.planner import ROUNDS, choose, search
    from ptconvert.plan.report import Planned
    from ptconvert.plan.sensitivity import Meter, Store, store_file

    store = Store(store_file(cache, content_digest(case.source, progress), case))
    meter = Meter(case, store, progress)
    try:
        limit = options["time_limit"] and 60 * options["time_limit"]
        budget = options["max_syncs"], options["max_loss"]
        found = search(meter, objective, options["rounds"] or ROUNDS, *budget, limit)
    except KeyboardInterrupt:
        click.echo(
            f"what was measured is kept in {cache}; the same command goes on from there",
            err=True,
        )
        raise
    chosen = choose(found, options["max_syncs"], options["max_loss"])
    if chosen is None:
        raise PlanError(f"{_budget(options)}: {_closest(found)}")
    return Planned(
        model=display_name(source),
        tracks=case.tracks,
        texts=tuple(path.name for path in options["texts"]),
        windows=len(case.windows.ids),
        length=case.windows.length,
        dtype=case.dtype,
        budget=_budget(options),
        objective=objective,
        frontier=found,
        chosen=chosen,
        shape=case.shape,
        wanted=_wanted(options),
        in_place=case.in_place,
        guess_rank=options["guess"] or 0,
    )


def _wanted(options: dict[str, Any]) -> dict[str, Any]:
    """What the spec will want to be computed from a text, by its key."""
    return {f.name: options[f.name] for f in COMPUTED if options[f.name] not in (None, f.default)}


def _budget(options: dict[str, Any]) -> str:
    """The budget as it was given."""
    if options["max_syncs"] is not None:
        return f"--max-syncs {options['max_syncs']}"
    return f"--max-loss {options['max_loss']:g}"


def _objective(options: dict[str, Any], shape: ModelShape) -> Objective:
    """What is to be made small. Raises PlanError and the estimate's errors."""
    from ptconvert.plan.planner import latency, waited_for

    if options["objective"] == "syncs":
        return waited_for(options["overlap"])
    from ptconvert.estimate.hardware import read_engine, read_hardware
    from ptconvert.estimate.model import Workload, estimate
    from ptconvert.models.guesses import most_guesses

    tracks = options["tracks"]
    hardware, ranks = read_hardware(options["hardware"]), options["ranks"] or tracks
    if tracks % ranks:
        raise PlanError(f"--ranks {ranks} doesn't divide --tracks {tracks}")
    engine = read_engine(options["engine"] or hardware.engine, options["vocabulary"])
    engine = engine.alike()  # what a conversion saves at once is no part's of a schedule
    workload = Workload(options["batch"], options["prompt"], options["new"])

    def seconds(schedule: Schedule) -> float:
        found = estimate(
            *(schedule, shape, hardware, engine, ranks, workload),
            tracks=tracks,
            guesses=most_guesses(schedule, tracks, options["guess"], shape),
        )
        return workload.batch * workload.new / found.tokens_per_second

    return latency(seconds, shape.layers, options["overlap"], parallel=shape.family.parallel)


def _closest(frontier: Frontier) -> str:
    """What there is instead of a point that fits the budget."""
    light, exact = frontier.points[0], frontier.points[-1]
    return (
        f"nothing found fits; the least waited for is {light.schedule.counts.waited_for}, the "
        f"smallest rise of the loss {exact.cost.loss:+.4f} nats per token"
    )
