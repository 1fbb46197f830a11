"""`ptconvert heal`."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from ptconvert.checkpoint.source import display_name, locate
from ptconvert.cli.common import (
    free_room,
    given,
    need_packages,
    print_figures,
    print_needs,
    timing,
    torch_device,
)
from ptconvert.cli.options import SEQUENCES, File, Number, Source, shared
from ptconvert.cli.progress import first_process, step_progress
from ptconvert.engines import unserved
from ptconvert.errors import HealError
from ptconvert.runtime.quiet import quiet_libraries

if TYPE_CHECKING:  # they import torch
    from ptconvert.checkpoint.reader import Checkpoint
    from ptconvert.heal.distill import Judge
    from ptconvert.heal.run import Case
    from ptconvert.heal.settings import Settings


@click.command()
@click.argument("checkpoint", metavar="CKPT", type=Source())
@click.argument("destination", metavar="DST", type=File())
@click.option(
    "--teacher",
    required=True,
    metavar="SRC",
    type=Source(),
    help="CKPT's source: directory or hub id.",
)
@shared("--text")
@click.option(
    "--dataset",
    metavar="ID",
    help="Train on a Hugging Face dataset, streamed, or a local one (file or directory).",
)
@click.option("--dataset-config", metavar="NAME", help="The dataset's configuration.")
@click.option("--split", default="train", show_default=True, help="The dataset's split.")
@click.option("--column", default="text", show_default=True, help="The dataset's column.")
@click.option(
    "--held-out",
    multiple=True,
    metavar="FILE",
    type=File(exists=True, dir_okay=False),
    help="Judge by this text. [a part of the other, not trained on]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens that each stage trains on, passes over the text repeated as needed. [one pass; of "
    "a dataset 10 million]",
)
@shared("--window", says="1024")
@click.option(
    "--blockwise",
    is_flag=True,
    help="First train block by block, with one block in memory; whole weights, with --lora too.",
)
@click.option(
    "--kl/--no-kl", default=True, show_default=True, help="Train end to end by KL(teacher || it)."
)
@click.option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="Keep the teacher's K likeliest tokens at each position, and train on these: it runs once "
    "for a text. [all tokens, and it runs at every step]",
)
@shared("--cache", says="~/.cache/ptconvert")
@click.option(
    "--lora",
    type=click.IntRange(1),
    metavar="R",
    help="Train a LoRA of rank R, merged; beside quantised weights it stays one.",
)
@click.option(
    "--train",
    type=click.Choice(["changed", "all"]),
    default="changed",
    show_default=True,
    help="Weights that move: of the layers that the schedule changes, or all, embeddings too.",
)
@click.option(
    "--learning-rate",
    type=Number(0, min_open=True),
    help="End to end, and of --mtp; see below.",
)
@click.option(
    "--block-learning-rate",
    type=Number(0, min_open=True),
    default=1e-4,
    show_default=True,
    help="Of --blockwise.",
)
@shared("--batch-size", 8, takes=click.IntRange(1, SEQUENCES))
@click.option(
    "--gradient-accumulation",
    "accumulation",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Batches in one step.",
)
@click.option(
    "--warmup",
    type=Number(0, 1),
    default=0.05,
    show_default=True,
    help="The share of steps in which the rate rises; then it falls as a half cosine.",
)
@click.option(
    "--evaluations",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="How often to judge and to save, over the run.",
)
@click.option(
    "--stop-on",
    default="kl",
    show_default=True,
    metavar="kl|TASK",
    help="What says which state is best and when to stop: KL on held-out text, or the first metric "
    "of an lm-eval task (its name or YAML file), scored as often.",
)
@shared("--limit")
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Evaluations without gain before it stops; the last steps, at small rates, gain much.",
)
@click.option(
    "--mtp",
    is_flag=True,
    help="Then train the head for further tokens (MTP), to foresee the healed model's choices.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory for more time.")
@click.option(
    "--fsdp",
    is_flag=True,
    help="Shard weights, gradients and optimizer over the processes of torchrun (FSDP2).",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A field of transformers' TrainingArguments; may be given again.",
)
@shared("--seed", 0)
@shared("--device", says="cuda where there is")
@shared(
    "--dtype",
    "auto",
    says="auto: bfloat16 for weights stored in 16 bits, on CPUs for those in bfloat16 and where "
    "these have instructions for it, else float32",
    takes=click.Choice(["auto", "float32", "bfloat16"]),
)
@click.option(
    "--work",
    type=File(file_okay=False),
    help="Where the state is kept until it is done. [DST.healing]",
)
@shared("--revision")
@shared("--dry-run")
@shared("--overwrite")
@shared("--json")
def heal(
    checkpoint: str,
    destination: Path,
    as_json: bool,
    dry_run: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train the converted checkpoint CKPT towards its source; write the result to DST.

    By KL(source || converted) at each token of your text, through transformers' Trainer; with
    --blockwise first block by block. Part of the text is held out; the state with the smallest KL
    on it is written, and never one worse than CKPT. The default learning rate is 2e-5, and 2e-4
    with --lora, for models of billions of parameters; small ones take more. --batch-size is each
    process's; --dtype is what frozen weights are held in, trained ones are float32.

    After Ctrl-C or a crash the same command goes on from the last state saved. On several GPUs:
    torchrun --nproc-per-node GPUS -m ptconvert heal ... [--fsdp]
    """
    lora = ("peft",) if options["lora"] else ()
    need_packages("heal", "scipy", *lora)
    if options["stop_on"] != "kl":
        need_packages("eval", "lm_eval")
    quiet_libraries()
    if bool(options["texts"]) == bool(options["dataset"]):
        raise click.UsageError("give what to train on, one of --text FILE and --dataset ID")
    if not options["dataset"] and (unused := given("dataset_config", "split", "column")):
        raise click.UsageError(f"{unused}: for --dataset only")
    if not options["top_k"] and (unused := given("cache")):
        raise click.UsageError(f"{unused}: for --top-k only")
    if options["stop_on"] == "kl" and (unused := given("limit")):
        raise click.UsageError(f"{unused}: for --stop-on TASK only")
    end_to_end = ("top_k", "lora", "train", "gradient_checkpointing", "fsdp")
    trainers = () if options["mtp"] else ("options",)
    if not options["kl"] and (unused := given(*end_to_end, *trainers)):
        raise click.UsageError(f"{unused}: for the end-to-end stage, which --no-kl leaves out")
    if options["dataset"] and importlib.util.find_spec("datasets") is None:
        raise HealError("--dataset needs the package datasets, not installed here")
    from ptconvert.heal.needs import heal_needs
    from ptconvert.heal.run import check_case, check_places
    from ptconvert.heal.run import heal as run
    from ptconvert.measure.opening import section_of
    from ptconvert.report.terminal import print_unserved

    folder = options["work"] or destination.with_name(f"{destination.name}.healing")
    check_places(destination, folder, overwrite)
    needs = report = None
    with step_progress() as progress:
        case = _case(checkpoint, folder, options, progress)
        refused = _unserved(case)
        if first_process():
            console = Console(stderr=True, highlight=False, markup=False)
            print_unserved(console, refused, section_of(case.student).tracks)
        try:
            if dry_run:
                check_case(case, destination, overwrite)
                room = free_room(case.settings.device, folder)
                progress("timing a layer's first steps", 0, None)
                with timing(case.settings.device):
                    needs = heal_needs(case.student, case.teacher, case.data, case.settings)
            else:
                report = run(case, destination, command_line(sys.argv[1:]), overwrite)
        except KeyboardInterrupt:
            if not dry_run:
                click.echo(f"what was trained is in {folder}; the same command goes on", err=True)
            raise
    if needs is not None and first_process():
        print_needs(needs, room, as_json)
    if report is not None:
        figures = {**report.as_json(), "destination": str(destination), "unserved": refused}
        print_figures(figures, as_json, lambda console: _print_healed(console, figures))


def _case(checkpoint: str, folder: Path, chosen: dict[str, Any], progress: Any) -> Case:
    """The checkpoints opened, the text read and the settings made of the options."""
    from ptconvert.checkpoint.inventory import under_own_names, weights_dtype
    from ptconvert.checkpoint.reader import open_checkpoint
    from ptconvert.heal.arguments import read_options
    from ptconvert.heal.data import DatasetSource, read_data
    from ptconvert.heal.models import check_pair
    from ptconvert.heal.run import Case
    from ptconvert.heal.settings import Settings
    from ptconvert.measure.cache import cache_directory
    from ptconvert.measure.dtype import training_dtype
    from ptconvert.runtime.load import shape_of

    device = torch_device(chosen["device"])
    if device.startswith("cuda:"):  # transformers' Trainer takes the first GPU that it sees
        raise HealError(
            f"--device {device}: use --device cuda and CUDA_VISIBLE_DEVICES={device[5:]}"
        )
    progress(f"finding {checkpoint} and {chosen['teacher']}", 0, None)
    student = open_checkpoint(locate(checkpoint, None))
    teacher = open_checkpoint(locate(chosen["teacher"], chosen["revision"]))
    teacher = under_own_names(teacher, check_pair(student, teacher))
    dtype = chosen["dtype"]
    if dtype == "auto":
        dtype = training_dtype(weights_dtype(student, shape_of(student)), device)
    dataset = None
    if chosen["dataset"]:
        dataset = DatasetSource(
            chosen["dataset"], chosen["dataset_config"], chosen["split"], chosen["column"]
        )
    data = read_data(
        student, chosen["texts"], dataset, chosen["held_out"], chosen["window"], chosen["tokens"],
        progress,
    )  # fmt: skip
    own = {"dtype": dtype, "device": device, "options": read_options(chosen["options"])}
    asked = {f.name: chosen[f.name] for f in fields(Settings) if f.name in chosen}
    settings = Settings(**{**asked, **own})
    return Case(
        student,
        teacher,
        display_name(chosen["teacher"]),
        data,
        settings,
        folder,
        progress,
        _say,
        chosen["cache"] or cache_directory(),
        None if settings.stop_on == "kl" else _judge(student, settings, progress),
    )


def _unserved(case: Case) -> dict[str, list[str]]:
    """Why engines won't serve the result, by their names, of those that won't."""
    from ptconvert.heal.run import beside
    from ptconvert.measure.opening import section_of

    adapter = case.student.adapter is not None or bool(beside(case))
    return unserved(case.student.config, replace(section_of(case.student), adapter=adapter))


def _judge(student: Checkpoint, settings: Settings, progress: Any) -> Judge:
    """Scores a model, whose tokenizer is the checkpoint's, on the task that the settings name, by
    the first metric that `ptconvert eval` has of it. Raises EvaluationError."""
    from ptconvert.evaluate.harness import Settings as Scoring
    from ptconvert.evaluate.harness import one_task, score
    from ptconvert.heal.report import Score
    from ptconvert.measure.opening import open_tokenizer

    scoring = Scoring((settings.stop_on,), limit=settings.limit, device=settings.device)
    one_task(scoring)
    tokenizer, label = open_tokenizer(student), f"scoring {Path(settings.stop_on).stem}"

    def judge(model: Any) -> Score:
        with tempfile.TemporaryDirectory() as folder:  # the model's next state has other answers
            answers = Path(folder) / "answers"
            (task,) = score(lambda: model, tokenizer, scoring, answers, label, progress).tasks
        metric = task.metrics[0]
        value = float(metric.aggregate(metric.values))
        return Score(f"{task.name} {metric.name}", value, metric.higher_is_better is not False)

    return judge


def _say(text: str) -> None:
    """A line of what happened, on stderr, by the first of several processes."""
    if first_process():
        click.echo(text, err=True)


def command_line(arguments: Sequence[str]) -> str:
    """The command line, for the model card; of many texts in a row the first three."""
    text = r" --text[ =]\S+"
    line = shlex.join(["ptconvert", *arguments])
    return re.sub(rf"((?:{text}){{3}})(?:{text})+", r"\1 --text ...", line)


def _print_healed(console: Console, figures: dict[str, Any]) -> None:
    """The held-out figures of every stage, and what was written."""
    from ptconvert.report.terminal import figures_table

    judged = next((row["score"]["metric"] for row in figures["rows"] if row["score"]), None)
    scored = [judged] if judged else []
    table = figures_table("held out", "loss", "over source", "KL", *scored)
    source = figures["rows"][0]["loss"]
    for row in figures["rows"]:
        kept = "→ " if row["name"] == figures["kept"] else "  "
        over = f"{row['loss'] - source:+.4f}"
        cells = [kept + row["name"], f"{row['loss']:.4f}", over, f"{row['kl']:.4f}"]
        if judged:
            cells.append("" if row["score"] is None else f"{row['score']['value']:.4f}")
        table.add_row(*cells)
    console.print(table)
    if head := figures["head"]:
        before, after = (f"{row['kl']:.4f}" for row in head)
        console.print(f"its head for further tokens: KL from the model {before} → {after}")
    settings = figures["settings"]
    if figures["kept"] == "before" and (settings["kl"] or settings["blockwise"]):
        console.print("training did not help; the weights are those of the checkpoint as it came")
    console.print(f"wrote {figures['destination']}", soft_wrap=True)
