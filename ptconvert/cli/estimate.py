"""`ptconvert estimate`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.section import SECTION, Section
from ptconvert.checkpoint.source import config_names, display_name
from ptconvert.cli.common import (
    SPECS,
    check_outputs,
    model_config,
    print_figures,
    spec_or_checkpoint,
)
from ptconvert.cli.options import File, Number, Source, shared
from ptconvert.cli.progress import waiting
from ptconvert.cli.show import converted
from ptconvert.engines import unserved
from ptconvert.errors import ConfigError, PlanError
from ptconvert.models.guesses import most_guesses
from ptconvert.models.shape import DTYPES, ModelShape
from ptconvert.plan.frontier import SUFFIX as FRONTIER
from ptconvert.plan.frontier import read_frontier
from ptconvert.spec.document import read_spec

if TYPE_CHECKING:
    from ptconvert.estimate.compare import Candidate
    from ptconvert.estimate.hardware import Hardware
    from ptconvert.estimate.measure import Measured
    from ptconvert.estimate.model import Speculation
    from ptconvert.estimate.server import Load

MEASURED = "measured"  # the hardware that is here
CHUNK = 2048  # vLLM's max_num_batched_tokens, where a device's memory doesn't ask for more


@click.command()
@click.argument("specs", metavar="[SPEC]...", nargs=-1, type=Source())
@shared("--model")
@shared("--revision")
@shared("--hardware")
@shared("--engine", says="the hardware's")
@shared("--vocabulary", says="the engine's")
@shared("--ranks", says="all that the hardware joins")
@shared("--batch")
@shared("--prompt", 1024)
@shared("--new", 512)
@shared("--speculate")
@click.option(
    "--accepted",
    type=Number(min=0),
    metavar="A",
    help="How many of K are right, on average.",
)
@shared("--draft", takes=click.Choice(["ngram", "layer"]))
@click.option(
    "--rate",
    type=Number(min=0, min_open=True, max=1e6),
    metavar="R",
    help="Also serve requests that come at random, R a second, their prompts in chunks.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1, 2**20),
    metavar="TOKENS",
    help=f"Tokens of a server's step at most, those of prompts among them.  [{CHUNK}]",
)
@click.option(
    "--seqs",
    type=click.IntRange(1, 2**20),
    metavar="N",
    help="Requests in a server's step at most (vLLM's max_num_seqs).  [as memory holds]",
)
@shared("--dtype", "auto", says="auto: the model's")
@shared("--json")
@shared("--html")
@click.option(
    "--measure",
    type=File(),
    metavar="OUT.yaml",
    help="Measure the ranks at hand instead, and write a hardware file.",
)
@click.option("--list", "listing", is_flag=True, help="List hardware, engines and models and stop.")
def estimate(
    specs: tuple[str, ...],
    measure: Path | None,
    ranks: int | None,
    listing: bool,
    **options: Any,
) -> None:
    """Estimate what a model gains on hardware that needn't be here, and say whether to convert it.

    Takes only --model and --hardware: the gentle, balanced and aggressive schedules are tried, with
    as many tracks as ranks, against tensor parallelism, pipeline stages and replicas. SPEC is a
    spec file (with --model), a converted checkpoint or its hub id, or a frontier that `plan
    --frontier` wrote (.csv, with --model) to try instead. The estimate is a roofline for each stage
    and a cost for each all-reduce, calibrated on published H100 runs. With --measure it times this
    machine's ranks, or torchrun's, and with --hardware measured it goes on to estimate for them.
    """
    hardware, model = options["hardware"], options["model"]
    if listing:
        _unused("--list", set())
        return _list(options["as_json"])
    if measure is not None:
        _unused("--measure", {"measure", "ranks"})
        return _measure(measure, ranks, options["as_json"])
    revision = None if model else options["revision"]
    paths = {spec: spec_or_checkpoint(spec, revision) for spec in specs}
    if model is None and len(specs) == 1 and _is_model(paths[specs[0]]):
        model, paths = specs[0], {}
    for name, given in (("--model SRC", paths or model), ("--hardware NAME", hardware)):
        if not given:
            raise click.UsageError(
                f"{name} is missing; or --measure OUT.yaml to time the ranks here"
            )
    return _estimate(paths, hardware, model, ranks, options)


def _unused(option: str, used: set[str]) -> None:
    """Raises UsageError where something is given that an option has no use for."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        by_user = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if by_user and name not in {"listing", "as_json", *used}:
            said = parameter.opts[0] if isinstance(parameter, click.Option) else "a SPEC or model"
            raise click.UsageError(f"{option} has no use for {said}; leave it out")


def _is_model(path: Path) -> bool:
    """Whether the only argument is no spec file, frontier or converted checkpoint."""
    if path.is_dir():
        return SECTION not in read_config(path)
    return path.suffix not in SPECS


def _estimate(
    specs: Mapping[str, Path],
    hardware: str,
    model: str | None,
    ranks: int | None,
    options: dict[str, Any],
) -> None:
    from ptconvert.estimate.advice import advise, recipes
    from ptconvert.estimate.compare import Candidate, Setting, accuracy, compare
    from ptconvert.estimate.hardware import read_engine, read_hardware
    from ptconvert.estimate.model import Workload
    from ptconvert.estimate.report import notes
    from ptconvert.estimate.server import Served, servers
    from ptconvert.estimate.terminal import print_estimates

    check_outputs({"--html": options["html_file"]}, specs.values())
    row = _measured_here(ranks) if hardware == MEASURED else read_hardware(hardware)
    if row is None:
        return
    engine_name = options["engine"] or row.engine
    engine = read_engine(engine_name, options["vocabulary"])
    config, shape = model_config(model, options["revision"]) if model else ({}, None)
    candidates: list[Candidate] = []
    checkpoints = dict[int, tuple[Mapping[str, Any], Section]]()  # of candidates, by their place
    for name, path in specs.items():
        if path.is_dir():
            own_config, own_shape, section = converted(path)
            checkpoints[len(candidates)] = own_config, section
            of = (section.schedule, section.tracks, section.guesses)
            candidates.append(Candidate(display_name(name), *of, lora=section.adapter))
            if shape is None:
                config, shape = own_config, own_shape
            _check_same(name, own_shape, shape)
        elif path.suffix == FRONTIER:
            candidates += _frontier(path, shape)
        else:
            candidates.append(_candidate(path, shape))
    assert shape is not None
    if options["dtype"] != "auto":
        shape = replace(shape, dtype=DTYPES[options["dtype"]])
    load = _load(options)
    workload = Workload(
        *(options["batch"], options["prompt"], options["new"]), _speculation(options)
    )
    if ranks is None:
        ranks = _most_ranks(row.whole(), shape, candidates)
    setting = Setting(shape, row, engine, engine_name, ranks, workload)
    candidates = candidates or recipes(setting)
    for place, one in enumerate(candidates):
        plain = config, Section(one.schedule, one.tracks, "sum", {})
        told = unserved(*checkpoints.get(place, plain), ranks, engine_name)
        candidates[place] = replace(one, unserved=tuple(told.get(engine_name, ())))
    rows = compare(candidates, setting)
    advice = advise(rows, setting)
    served = Served(load, servers(rows, setting, load)) if load else None
    if options["html_file"]:
        from ptconvert.estimate.report import to_html

        options["html_file"].write_text(to_html(rows, setting, served), encoding="utf-8")
    figures = {
        "hardware": row.name,
        "engine": engine_name,
        "engine_version": engine.version,
        "engine_date": engine.date,
        "accuracy": accuracy(setting),
        "sources": row.sources.by_kind(),
        "engine_sources": engine.sources.by_kind(),
        "ranks": ranks,
        "batch": workload.batch,
        "prompt_tokens": workload.prompt,
        "new_tokens": workload.new,
        "tokens_per_step": workload.tokens_per_step,
        "notes": notes(rows, setting),
        "rows": [one.to_json() for one in rows],
        **({"server": served.to_json()} if served else {}),
        "verdict": advice.to_json(),
    }
    print_figures(
        figures,
        options["as_json"],
        lambda console: print_estimates(console, rows, advice, setting, served),
    )


def _most_ranks(whole: int, shape: ModelShape, candidates: Sequence[Candidate]) -> int:
    """As many of the hardware's ranks as divide the model and all tracks; says so if not all."""
    from ptconvert.estimate.compare import dividing

    ranks = max(dividing(whole, shape, candidates))
    if ranks < whole:
        tracks = ", ".join(str(n) for n in sorted({c.tracks for c in candidates}))
        why = shape.indivisible(whole) or f"they must divide the {tracks} tracks"
        click.echo(f"{ranks} of {whole} ranks: {why}", err=True)
    return ranks


def _load(options: dict[str, Any]) -> Load | None:
    """The requests that come to a server, as options say."""
    from ptconvert.estimate.server import Load

    rate, chunk, seqs = options["rate"], options["chunk"], options["seqs"]
    if rate is None:
        for name, given in (("--chunk", chunk), ("--seqs", seqs)):
            if given is not None:
                raise click.UsageError(f"{name} needs --rate R, the requests that come in a second")
        return None
    return Load(rate, chunk or CHUNK, seqs or math.inf)


def _speculation(options: dict[str, Any]) -> Speculation:
    """The speculative decoding that options say."""
    from ptconvert.estimate.model import Speculation

    drafted, accepted, draft = (options[name] for name in ("speculate", "accepted", "draft"))
    if drafted is None:
        if accepted is not None or draft != "ngram":
            raise click.UsageError("--accepted and --draft need --speculate K, the tokens drafted")
        return Speculation(0, 0.0)
    if accepted is None or not accepted <= drafted:
        was = "is missing" if accepted is None else f"is {accepted:g}"
        raise click.UsageError(
            f"--accepted {was}; it must say how many of {drafted} drafted tokens are right, 0 to "
            f"{drafted}"
        )
    return Speculation(drafted, accepted, draft == "layer")


def _candidate(spec: Path, shape: ModelShape | None) -> Candidate:
    """The candidate of a spec file."""
    from ptconvert.estimate.compare import Candidate

    if shape is None:
        raise click.UsageError(f"{spec}: a spec file needs --model SRC")
    read = read_spec(spec)
    read.check(shape)
    schedule = read.schedule(shape.family.parallel, shape.divisible)
    guesses = most_guesses(schedule, read.tracks, read.guess, shape)
    return Candidate(spec.stem, schedule, read.tracks, guesses)


def _check_same(checkpoint: str, own: ModelShape, shape: ModelShape) -> None:
    """Raises ConfigError for a checkpoint that is no conversion of the model that is estimated."""
    for name in ("layers", "width", "heads", "kv_heads", "neurons", "experts", "vocabulary"):
        if (its := getattr(own, name)) != (other := getattr(shape, name)):
            raise ConfigError(
                f"{checkpoint}: its {name.replace('_', ' ')} are {its}, and {other} those of the "
                "model that is estimated (--model, or the first checkpoint); it is another model's"
            )
    if own.widths != shape.widths:
        raise ConfigError(
            f"{checkpoint}: its weights are quantised otherwise than the model's that is estimated "
            "(--model, or the first checkpoint); estimate it by itself"
        )


def _frontier(file: Path, shape: ModelShape | None) -> list[Candidate]:
    """The schedules that a plan found, each with its KL, but for the model's own."""
    from ptconvert.estimate.compare import Candidate

    if shape is None:
        raise click.UsageError(f"{file}: a frontier needs --model SRC")
    found: list[Candidate] = []
    for known in read_frontier(file):
        if known.schedule.layers != shape.layers:
            raise PlanError(
                f"{file}: its schedules have {known.schedule.layers} layers, the model "
                f"{shape.layers}; it is another model's"
            )
        if reason := shape.indivisible(known.tracks):
            raise PlanError(f"{file}: {reason}; it is another model's")
        if known.schedule != shape.dense:
            waited = known.schedule.counts.waited_for
            again = sum(c.schedule.counts.waited_for == waited for c in found)
            name = f"{file.stem}-{waited}" + (f"-{again + 1}" if again else "")
            rank, tracks = known.guess, known.tracks
            guesses = most_guesses(known.schedule, tracks, rank, shape) if rank else {}
            about = f"of {file.name}, with {waited} waits"
            candidate = Candidate(name, known.schedule, tracks, guesses, about, known.kl)
            found.append(candidate)
    if not found:
        raise PlanError(f"{file}: it has no schedule but the model's own")
    return found


def _measure(out: Path, ranks: int | None, as_json: bool) -> None:
    from ptconvert.estimate.hardware import to_yaml
    from ptconvert.estimate.measure import has_peers, without_peers
    from ptconvert.estimate.terminal import print_measured
    from ptconvert.runtime.launch import under_torchrun

    check_outputs({"--measure": out}, [])
    found = _timed(ranks, "measuring all-reduces, matrix products and memory")
    if found is None:
        return
    written: dict[Path, Measured] = {}

    def write(file: Path, one: Measured) -> None:
        file.write_text(to_yaml(one.hardware), encoding="utf-8")
        written[file] = one

    write(out, found)
    if has_peers() and not under_torchrun():
        with without_peers():
            other = _timed(ranks, "the same, peer-to-peer off")
        assert other is not None
        write(out.with_stem(f"{out.stem}-p2p-off"), other)
    figures = [{"file": str(file), **one.to_json()} for file, one in written.items()]

    def show(console: Console) -> None:
        for file, one in written.items():
            print_measured(console, one)
            console.print(f"{file}: {one.hardware.name}")

    print_figures({"rows": figures}, as_json, show)


def _measured_here(ranks: int | None) -> Hardware | None:
    """The ranks at hand as a row; None in all of torchrun's processes but the first."""
    found = _timed(ranks, "measuring the ranks here")
    return found.hardware if found else None


def _timed(ranks: int | None, what: str) -> Measured | None:
    from ptconvert.engines import own_all_reduces
    from ptconvert.estimate.measure import measure
    from ptconvert.runtime.launch import under_torchrun

    if ranks is None and not under_torchrun():
        raise click.UsageError("give the number of processes: --ranks R")
    with waiting(what):
        return measure(ranks, own_all_reduces())


def _list(as_json: bool) -> None:
    from ptconvert.estimate.hardware import engine_names, hardware_names, read_engine, read_hardware

    listed = {
        "hardware": {name: read_hardware(name).name for name in hardware_names()},
        "engines": {name: read_engine(name).edition for name in engine_names()},
        "models": dict.fromkeys(config_names(), ""),
    }

    def show(console: Console) -> None:
        for title, names in listed.items():
            console.print(f"{title}:")
            for name, what in names.items():
                console.print(f"  {name:26} {what}".rstrip(), soft_wrap=True, highlight=False)

    print_figures({**listed, "models": list(listed["models"])}, as_json, show)
