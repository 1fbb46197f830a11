"""`ptconvert eval`."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from ptconvert.checkpoint.source import display_name, locate
from ptconvert.cli.common import (
    check_outputs,
    given,
    need_packages,
    to_json,
    torch_device,
)
from ptconvert.cli.options import File, Source, shared
from ptconvert.cli.progress import step_progress
from ptconvert.runtime.quiet import quiet_libraries

if TYPE_CHECKING:  # they import torch
    from ptconvert.evaluate.run import Report, Text


@click.command("eval")
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=Source())
@click.option(
    "--baseline", metavar="SRC", type=Source(), help="The source model: a directory or a hub id."
)
@click.option("--tasks", metavar="A,B,...", help="lm-eval tasks; without it, see below.")
@click.option(
    "--include-path",
    "include_paths",
    multiple=True,
    type=File(exists=True, file_okay=False),
    help="A directory with lm-eval tasks of your own (YAML); may be given again.",
)
@shared("--text")
@shared("--window", says="1024")
@shared("--windows", says="all, at most 64")
@click.option(
    "--blocks", is_flag=True, help="Also run each block of the schedule alone: a pass for each."
)
@shared("--speculate")
@shared("--draft")
@click.option(
    "--make-tasks",
    metavar="DIR",
    type=File(file_okay=False),
    help="Write two lm-eval tasks made from --text: perplexity, and cloze questions.",
)
@shared("--limit")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in each prompt.")
@shared("--batch-size", "auto")
@click.option("--apply-chat-template", is_flag=True, help="Prompt as a chat.")
@shared("--device", says="cuda where there is")
@shared("--dtype", "auto", says="auto: what is stored, or float32 if faster")
@shared("--seed", says="lm-eval's own")
@click.option(
    "--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run what a model writes."
)
@shared("--revision")
@shared("--cache", says="~/.cache/ptconvert")
@shared("--html")
@shared("--json")
def evaluate(
    checkpoint: str | None,
    baseline: str | None,
    tasks: str | None,
    include_paths: tuple[Path, ...],
    texts: tuple[Path, ...],
    make_tasks: Path | None,
    html_file: Path | None,
    as_json: bool,
    revision: str | None,
    cache: Path | None,
    device: str | None,
    window: int | None,
    windows: int | None,
    blocks: bool,
    speculate: int | None,
    draft: str,
    **options: Any,
) -> None:
    """Score the checkpoint CKPT and its source, and say whether the difference is real.

    Both models answer the same documents of lm-eval's tasks; intervals and p-values are of paired
    tests. --text compares the models' predictions on your own text, which is the most sensitive
    and needs no task; --blocks also says what each block of the schedule costs, and --speculate
    how many drafted tokens each model accepts, for `estimate --accepted`. Without --tasks,
    --text alone measures just that; else it is gsm8k, ifeval and wikitext, which show the damage
    of such conversions (multiple choice hides it).

    --make-tasks DIR --text FILE writes two tasks; with CKPT, they are scored at once.
    """
    need_packages("eval", "lm_eval", "scipy")
    quiet_libraries()
    from ptconvert.evaluate.run import Text
    from ptconvert.evaluate.tasks import DEFAULT_TASKS
    from ptconvert.evaluate.tasks import make_tasks as write_tasks

    if make_tasks is not None and not texts:
        raise click.UsageError("--make-tasks needs a text to make them from: --text FILE")
    if checkpoint is None and make_tasks is None:
        raise click.UsageError("give the checkpoint to score: ptconvert eval CKPT --baseline SRC")
    check_outputs({"--html": html_file}, texts)
    if not texts and (unused := given("window", "windows", "blocks", "speculate", "draft")):
        raise click.UsageError(f"{unused}: for --text FILE only")
    if speculate is None and given("draft"):
        raise click.UsageError("--draft needs --speculate K, the tokens drafted")
    names = tuple(dict.fromkeys(t.strip() for t in (tasks or "").split(",") if t.strip()))
    if make_tasks is not None:
        made = write_tasks(make_tasks, texts, options["seed"] or 0)
        include_paths = (*include_paths, make_tasks)
        names = names or made
        if checkpoint is None:
            if as_json:
                click.echo(json.dumps({"include_path": str(make_tasks), "tasks": made}))
            else:
                click.echo(f"wrote {', '.join(made)} to {make_tasks}; use them with")
                click.echo(f"  --include-path {make_tasks} --tasks {','.join(made)}")
            return
    if not names and not texts:
        names = DEFAULT_TASKS
    if not names and (unused := given("limit", "num_fewshot", "include_paths")):
        raise click.UsageError(f"{unused}: for --tasks only")
    if baseline is None and given("speculate", "draft"):
        raise click.UsageError("--speculate compares with a source: give --baseline SRC")
    if not names and baseline is None:
        raise click.UsageError("--text measures the divergence from a source: give --baseline SRC")
    assert checkpoint is not None
    report = _run(
        checkpoint,
        baseline,
        revision,
        dict(options, tasks=names, include_path=include_paths, device=torch_device(device)),
        Text(texts, window, windows, blocks) if texts and baseline else None,
        None if speculate is None else (speculate, draft),
        cache,
    )
    if as_json:
        click.echo(to_json(report.to_json()))
    else:
        from ptconvert.evaluate.terminal import print_evaluation

        print_evaluation(Console(highlight=False, markup=False, width=_width()), report)
    if html_file is not None:
        from ptconvert.evaluate.page import evaluation_page

        html_file.write_text(evaluation_page(report), encoding="utf-8")
        click.echo(f"wrote {html_file}", err=True)


def _run(
    checkpoint: str,
    baseline: str | None,
    revision: str | None,
    options: dict[str, Any],
    text: Text | None,
    drafts: tuple[int, str] | None,
    cache: Path | None,
) -> Report:
    """The report; `drafts` are the tokens drafted for each step, and by what."""
    from ptconvert.checkpoint.reader import open_checkpoint
    from ptconvert.evaluate.acceptance import LAYER, NGRAM, Drafts
    from ptconvert.evaluate.harness import Settings
    from ptconvert.evaluate.run import evaluate
    from ptconvert.measure.cache import cache_directory
    from ptconvert.measure.dtype import fastest_dtype

    cache = cache or cache_directory()
    with step_progress() as progress:
        progress(f"finding {checkpoint}", 0, None)
        found = locate(checkpoint, None)
        source = locate(baseline, revision) if baseline is not None else None
        if text is not None and drafts is not None:
            drafted, draft = drafts
            own = draft in (NGRAM, LAYER)
            model = None if own else open_checkpoint(locate(draft, None))
            text = replace(text, drafts=Drafts(drafted, display_name(draft), model))
        names = tuple(
            None if name is None else display_name(name) for name in (checkpoint, baseline)
        )
        if options["dtype"] == "auto":
            opened, say = open_checkpoint(found), functools.partial(click.echo, err=True)
            options["dtype"] = fastest_dtype(opened, options["device"], say)
        try:
            return evaluate(
                found,
                source,
                Settings(**options),
                text,
                cache,
                progress,
                (names[0] or "", names[1]),
                lambda line: click.echo(line, err=True),
            )
        except KeyboardInterrupt:
            if options["tasks"]:
                click.echo(
                    f"the answers so far are kept in {cache}; the same command goes on from there",
                    err=True,
                )
            raise


def _width() -> int | None:
    """The terminal's own width; into a file or a pipe, enough for a table in one piece."""
    return None if sys.stdout.isatty() else 120
