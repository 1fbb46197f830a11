"""The evaluation as a whole: what is run, in what order, and the report it gives."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint
from ptconvert.checkpoint.section import Section
from ptconvert.errors import EvaluationError
from ptconvert.evaluate import acceptance, harness, metrics, tasks
from ptconvert.evaluate.acceptance import Drafts, Speculation
from ptconvert.evaluate.harness import GroupOfTasks, Metric, Scores, Settings, Task
from ptconvert.measure import divergence, statistics
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import content_digest
from ptconvert.measure.divergence import Divergence
from ptconvert.measure.opening import is_dense, open_model, open_tokenizer, section_of
from ptconvert.measure.progress import Progress
from ptconvert.measure.statistics import Difference, Estimate, Seed
from ptconvert.measure.windows import Windows, windows_for


@dataclass(frozen=True)
class Text:
    """The text for the divergence, how it is cut into windows of tokens, whether each block of
    the schedule is also run alone, which takes a pass over some windows for each, and what drafts
    for speculative decoding, where that is asked for."""

    paths: tuple[Path, ...]
    length: int | None = None
    windows: int | None = None
    blocks: bool = False
    drafts: Drafts | None = None


@dataclass(frozen=True)
class Row:
    """One metric of one task, or of a group of tasks, for both models.

    `stderr` are lm-eval's own, of each model alone; `difference` is converted less source.
    """

    task: str
    metric: str
    filter: str
    group: bool
    version: str
    fewshot: int
    documents: int
    higher_is_better: bool | None
    source: Estimate | None
    converted: Estimate
    source_stderr: float | None
    converted_stderr: float | None
    difference: Difference | None
    unpaired: bool = False  # both models were scored, but not alike

    @property
    def verdict(self) -> str:
        """better, worse, no difference found, or nothing where there is none to judge."""
        if self.difference is None or self.difference.p_value is None:
            return ""
        if self.difference.p_value >= statistics.SIGNIFICANT or self.difference.value == 0:
            return "no difference found"
        if self.higher_is_better is None:
            return "differs"
        return "better" if (self.difference.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Report:
    """What `ptconvert eval` found."""

    checkpoint: str
    baseline: str | None
    schedule: str
    dense_all_reduces: int
    tracks: int
    settings: Settings
    digests: dict[str, str]
    rows: tuple[Row, ...]
    divergence: Divergence | None
    speculation: Speculation | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; bootstrap distributions are left out."""
        plain: dict[str, Any] = _plain(self)
        for row, found in zip(plain["rows"], self.rows, strict=True):
            row["verdict"] = found.verdict
        return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (f.name for f in dataclasses.fields(value))
        return {n: _plain(getattr(value, n)) for n in names if n != "distribution"}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def evaluate(
    checkpoint: Path,
    baseline: Path | None,
    settings: Settings,
    text: Text | None,
    cache: Path,
    progress: Progress,
    names: tuple[str, str | None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Scores a converted checkpoint, beside its source where `baseline` is given.

    Tasks run if `settings` names any, the divergence if there is a `text` (and a baseline). One
    model at a time is in memory. Answers are kept in `cache` as they come, of both models, so a
    run that was interrupted goes on where it was, and the next conversion of the same source finds
    the source's. `names` are what the report calls the models; `say` gets a line before what takes
    long. Raises PTConvertError.
    """
    found = open_checkpoint(checkpoint)
    source = open_checkpoint(baseline) if baseline is not None else None
    section, notes, windows = section_of(found), list[str](), None
    if source is not None:
        _check_alike(source, found)
        if not is_dense(source) and is_dense(found):
            notes.append("the baseline is converted and the checkpoint is dense: swapped?")
    if text is not None:
        if source is None:
            raise EvaluationError(
                "the divergence is from a source model: give it as --baseline SRC"
            )
        windows = windows_for(source, text.paths, text.length, text.windows)
        if text.drafts is not None:
            acceptance.check_length(text.drafts, windows.length)
        if text.drafts is not None and text.drafts.model is not None:
            acceptance.check_draft(text.drafts.model, source)
        if text.drafts is not None and text.drafts.by_head:
            acceptance.check_heads(text.drafts, (source, found))
        if len(windows.ids) < statistics.MIN_DOCUMENTS:
            notes.append(
                f"with fewer than {statistics.MIN_DOCUMENTS} windows the divergence has no "
                "intervals; more text or a shorter --window gives more"
            )
        if windows.overlapping:
            notes.append(
                "windows of the text overlap, so the intervals of the divergence are too narrow; "
                "ask for fewer --windows or a shorter --window"
            )
    digests: dict[str, str] = {}
    rows: list[Row] = []
    if settings.tasks:
        models = {} if source is None else {"source": source}
        models["converted"] = found
        digests = {label: content_digest(model, progress) for label, model in models.items()}
        scores = {
            label: _scored(label, model, digests[label], settings, cache, progress)
            for label, model in models.items()
        }
        rows = list(_rows(scores.get("source"), scores["converted"], settings.seed or 0))
        notes += _notes(scores["converted"], settings, rows)
    apart = drafted = None
    if text is not None and source is not None and windows is not None:
        apart, drafted = _on_text(source, found, text, windows, settings, progress, say)
        if not math.isfinite(apart.whole.kl.value):
            notes.append(
                f"a model's outputs are not all finite in {settings.dtype}, so neither are the "
                "figures; --dtype float32 or bfloat16 may help"
            )
    return Report(
        checkpoint=names[0] if names else str(checkpoint),
        baseline=names[1] if names else str(baseline) if baseline else None,
        schedule=str(section.schedule),
        dense_all_reduces=section.dense.counts.all_reduces,
        tracks=section.tracks,
        settings=settings,
        digests=digests,
        rows=tuple(rows),
        divergence=apart,
        speculation=drafted,
        notes=tuple(notes),
    )


# What of config.json a conversion leaves as it is.
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "intermediate_size"),
)


def _check_alike(source: Checkpoint, found: Checkpoint) -> None:
    """Raises EvaluationError where one can't be the model that the other was converted from."""
    for size in _SIZES:
        theirs, ours = (c.language.get(size) for c in (source, found))
        if theirs != ours:
            raise EvaluationError(
                f"the source's {size} is {theirs}, the converted model's {ours}; --baseline must "
                "be the model that was converted"
            )


def _scored(
    label: str,
    checkpoint: Checkpoint,
    digest: str,
    settings: Settings,
    cache: Path,
    progress: Progress,
) -> Scores:
    return harness.score(
        lambda: open_model(checkpoint, settings.dtype, settings.device),
        open_tokenizer(checkpoint),
        settings,
        harness.cache_file(cache, digest, settings),
        f"{label} model",
        progress,
    )


def _on_text(
    source: Checkpoint,
    found: Checkpoint,
    text: Text,
    windows: Windows,
    settings: Settings,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Divergence, Speculation | None]:
    """Both models on the text, one after the other, and what drafts for them, at last."""
    seed, written, chosen = settings.seed or 0, list[list[list[int]]](), list[list[list[int]]]()
    new = acceptance.new_tokens(windows.length)
    prompts = windows.ids[:, : windows.length - new]

    def write(model: Any, checkpoint: Checkpoint, label: str) -> None:
        if text.drafts is None:
            return
        step = f"{label} model's greedy text: windows"
        written.append(acceptance.greedy_texts(model, prompts, new, batch, progress, step))
        if text.drafts.by_head:
            given = written[-1], prompts.shape[1], batch, progress
            chosen.append(acceptance.choices_of_head(model, checkpoint, *given))

    batch = BatchSize(settings.batch_size, settings.device)
    progress("divergence: opening the source", 0, None)
    model = open_model(source, settings.dtype, settings.device)
    reference = divergence.reference(model, windows, batch, progress, routes=True)
    write(model, source, "source")
    del model
    progress("divergence: opening the converted model", 0, None)
    model = open_model(found, settings.dtype, settings.device)
    started = time.monotonic()
    tokens = divergence.measure(model, reference, windows, batch, progress)
    pass_seconds = time.monotonic() - started
    blocks: tuple[divergence.Block, ...] = ()
    block_windows = 0
    if text.blocks and not is_dense(found):
        section = section_of(found)
        say(_blocks_cost(section, windows, pass_seconds))
        blocks, block_windows = divergence.by_block(
            model, section, reference, windows, batch, progress, seed
        )
    write(model, found, "converted")
    del model, reference
    apart = Divergence(
        texts=tuple(path.name for path in text.paths),
        tokens=windows.tokens,
        windows=len(windows.ids),
        length=windows.length,
        overlapping=windows.overlapping,
        whole=tokens.closeness(seed),
        by_position=tuple(divergence.by_position(tokens, seed)),
        by_block=blocks,
        block_windows=block_windows,
    )
    if text.drafts is None:
        return apart, None
    choices, prompt = chosen or None, prompts.shape[1]
    if text.drafts.model is not None:
        progress("drafts: opening the model", 0, None)
        given = settings.dtype, settings.device, batch, progress
        choices = acceptance.choices_of(text.drafts.model, written, prompt, *given)
    return apart, acceptance.speculation(written, prompt, new, text.drafts, choices, seed)


def _blocks_cost(section: Section, windows: Windows, pass_seconds: float) -> str:
    """What running each block alone takes, by the seconds of the whole model's pass."""
    blocks = len(divergence.converted_blocks(section))
    each, total = divergence.block_windows(windows), len(windows.ids)
    one, all_of_them = (
        timedelta(seconds=round(s)) for s in (pass_seconds, blocks * pass_seconds * each / total)
    )
    return (
        f"--blocks: {blocks} x a pass over {each} windows, about {all_of_them} "
        f"(one over all {total} took {one})"
    )


def _notes(scores: Scores, settings: Settings, rows: Sequence[Row]) -> Iterator[str]:
    if tasks.hides_damage([task.output_type for task in scores.tasks]):
        yield tasks.MULTIPLE_CHOICE_WARNING
    if settings.limit is not None:
        yield (
            f"--limit {settings.limit:g}: not the whole task was answered, so scores aren't "
            "comparable with published ones"
        )
    few = sorted({row.task for row in rows if row.documents < statistics.MIN_DOCUMENTS})
    if few:
        yield (
            f"{', '.join(few)}: with fewer than {statistics.MIN_DOCUMENTS} documents there is "
            "neither an interval nor a test"
        )
    unpaired = sorted({row.task for row in rows if row.unpaired})
    if unpaired:
        yield (
            f"{', '.join(unpaired)}: the task gives the models different metrics or documents, so "
            "they aren't compared"
        )
    tested = sum(row.difference is not None for row in rows)
    if tested > 10:
        yield (
            f"{tested} differences are tested, each by itself: about "
            f"{tested * statistics.SIGNIFICANT:.0f} of them would come out as significant (p < "
            f"{statistics.SIGNIFICANT:.2f}) by chance alone"
        )


def _rows(source: Scores | None, converted: Scores, seed: int) -> Iterator[Row]:
    """One row per metric of a task, and after the tasks one per metric of a group."""
    before = {
        (task.name, metric.name, metric.filter): metric
        for task in (source.tasks if source is not None else ())
        for metric in task.metrics
    }
    rows: dict[tuple[str, str, str], Row] = {}
    for number, task in enumerate(converted.tasks):
        for metric in task.metrics:
            key = (task.name, metric.name, metric.filter)
            rows[key] = _row(task, metric, before.get(key), source is not None, (seed, number))
            yield rows[key]
    for group in converted.groups:
        yield _group_row(group, [rows[name, group.metric, group.filter] for name in group.tasks])


def _group_row(group: GroupOfTasks, members: Sequence[Row]) -> Row:
    """A group's mean over its tasks, weighted as lm-eval does: by their documents, or alike."""
    sizes = [row.documents if group.by_size else 1 for row in members]
    weights = [size / sum(sizes) for size in sizes]
    sources = [row.source for row in members if row.source is not None]
    differences = [row.difference for row in members if row.difference is not None]
    paired = len(differences) == len(members)
    return Row(
        task=group.name,
        metric=group.metric,
        filter=group.filter,
        group=True,
        version=members[0].version,
        fewshot=members[0].fewshot,
        documents=sum(row.documents for row in members),
        higher_is_better=members[0].higher_is_better,
        source=statistics.weighted_sum(sources, weights) if paired else None,
        converted=statistics.weighted_sum([row.converted for row in members], weights),
        source_stderr=None,
        converted_stderr=None,
        difference=statistics.weighted_difference(differences, weights) if paired else None,
        unpaired=any(row.unpaired for row in members),
    )


def _row(task: Task, metric: Metric, source: Metric | None, compared: bool, seed: Seed) -> Row:
    documents = len(metric.values)
    over, resamples = metrics.over_documents(metric.values, metric.aggregate)
    before = difference = None
    if source is not None and source.documents == metric.documents:
        other, _ = metrics.over_documents(source.values, source.aggregate)
        before = statistics.estimate(other, documents, resamples, seed)
        difference = statistics.compare(other, over, documents, resamples, seed)
        accuracy = metrics.is_accuracy((*source.values, *metric.values), metric.aggregate)
        if accuracy and difference.p_value is not None:
            p_value = statistics.mcnemar(source.values, metric.values)
            difference = dataclasses.replace(difference, p_value=p_value, test="McNemar")
    return Row(
        task=task.name,
        metric=metric.name,
        filter=metric.filter,
        group=False,
        version=task.version,
        fewshot=task.fewshot,
        documents=documents,
        higher_is_better=metric.higher_is_better,
        source=before,
        converted=statistics.estimate(over, documents, resamples, seed),
        source_stderr=source.stderr if source is not None else None,
        converted_stderr=metric.stderr,
        difference=difference,
        unpaired=compared and difference is None,
    )
