"""lm-eval over our models: one request cache per model, our progress, batches that fit."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import lm_eval
import lm_eval.evaluator
import yaml
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager

from ptconvert.errors import EvaluationError, PTConvertError, first_line
from ptconvert.evaluate.lm import FittingHFLM, UnopenedLM
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.cache import named_by
from ptconvert.measure.progress import Progress

# For lm-eval's own standard errors of metrics other than means, which are only shown.
_LM_EVAL_RESAMPLES = 1_000
_TASKS_FAULTS = (
    *(OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, NotImplementedError, jinja2.TemplateError, yaml.YAMLError),
)


@dataclass(frozen=True)
class Settings:
    """How lm-eval is to score; the names are those of its own options.

    `batch_size` None means automatic; `seed` None means lm-eval's own seeds.
    """

    tasks: tuple[str, ...]
    include_path: tuple[Path, ...] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    apply_chat_template: bool = False
    device: str = "cpu"
    dtype: str = "auto"
    seed: int | None = None
    confirm_run_unsafe_code: bool = False


@dataclass(frozen=True)
class Metric:
    """One metric of one task: its value for each document, in order."""

    name: str
    filter: str
    stderr: float | None  # lm-eval's own, of this model alone
    higher_is_better: bool | None
    documents: tuple[str, ...]  # which documents, in order: number and hash
    values: tuple[Any, ...]
    aggregate: Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class Task:
    """One task's scores."""

    name: str
    version: str
    output_type: str
    fewshot: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class GroupOfTasks:
    """A group with an aggregate: each metric's mean over tasks, by size or each task alike."""

    name: str
    metric: str
    filter: str
    by_size: bool
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What one model scored."""

    tasks: tuple[Task, ...]
    groups: tuple[GroupOfTasks, ...]


class _Tasks(TaskManager):  # type: ignore[misc]
    """lm-eval's task manager, which remembers what it loaded: metrics' functions are there."""

    loaded: Mapping[str, Any]

    def load(self, names: Any) -> Any:
        self.loaded = super().load(names)
        return self.loaded


def cache_file(cache: Path, model_digest: str, settings: Settings) -> Path:
    """The file of a model's answers.

    Within it lm-eval keeps one answer for each request, by its whole text: prompt, few-shot
    examples, chat template, continuation or generation settings. So another version of a task, or
    another number of shots, finds only those answers that it would have got. What a request
    doesn't tell is in the file's name: the model's content, device, dtype and versions.
    """
    told = [model_digest, settings.device.split(":")[0], settings.dtype]
    return cache / "answers" / named_by(told, ("torch", "transformers", "lm_eval"))


def one_task(settings: Settings) -> None:
    """Raises EvaluationError unless the settings name one task that is there."""
    with _quiet():
        manager = _manager(settings)
    found = _named(settings.tasks, manager)
    groups = [name for name in found if name in manager.all_groups]
    if len(found) != 1 or groups:
        raise EvaluationError(f"{', '.join(settings.tasks)}: names several tasks; name one")


def score(
    build: Callable[[], Any],
    tokenizer: Any,
    settings: Settings,
    answers: Path,
    label: str,
    progress: Progress,
) -> Scores:
    """Scores one model on all tasks with lm-eval's `simple_evaluate`.

    `build` opens the model; it isn't called when all answers are in the cache, whose file is
    `answers`, and the model is let go of at the end. Raises EvaluationError for tasks that aren't
    there, can't be loaded, or don't work with this model.
    """
    batch = BatchSize(settings.batch_size, settings.device)
    lm = UnopenedLM(lambda tok: FittingHFLM(build(), tok, batch), tokenizer, label, progress)
    progress(f"{label}: loading tasks", 0, None)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    seeds = {} if settings.seed is None else dict.fromkeys(names, settings.seed)
    with _quiet():
        manager = _manager(settings)
        try:
            with _explained(settings.tasks, answers):
                results = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=_named(settings.tasks, manager),
                    task_manager=manager,
                    num_fewshot=settings.num_fewshot,
                    limit=settings.limit,
                    apply_chat_template=settings.apply_chat_template,
                    use_cache=str(answers),
                    bootstrap_iters=_LM_EVAL_RESAMPLES,
                    log_samples=True,
                    confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                    **seeds,
                )
        finally:
            lm.close()
    tasks = tuple(
        _task(name, manager.loaded["tasks"][name], results) for name in results["samples"]
    )
    scores = Scores(tasks, tuple(_groups(manager.loaded["groups"], tasks)))
    manager.loaded = {}  # documents and requests, beside the next model
    return scores


def _manager(settings: Settings) -> _Tasks:
    """The tasks of `include_path`, and lm-eval's own where those are not all that is asked for."""
    paths = tuple(str(path) for path in settings.include_path)
    if paths:
        local = _indexed(paths, False)
        if all(_matching(name, local) for name in settings.tasks):
            return local
    manager = _indexed(paths, True)
    for name in settings.tasks:
        if not _matching(name, manager):
            raise EvaluationError(
                f"there is no task {name!r} in lm-eval {importlib.metadata.version('lm_eval')}"
                f"{' or in --include-path' if paths else ''}; `lm-eval ls tasks` lists its tasks, "
                "and one of your own is named by its YAML file"
            )
    return manager


@functools.cache
def _indexed(paths: tuple[str, ...], defaults: bool) -> _Tasks:
    """The tasks of these paths, with lm-eval's own or without: their index of thousands of files
    takes ten seconds, and both models of a comparison need it."""
    return _Tasks(include_path=list(paths) or None, include_defaults=defaults)


def _matching(name: str, manager: _Tasks) -> list[str]:
    """The tasks that a name, a pattern such as arc_*, or the path of a YAML file stands for."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return [name]
    return list(manager.match_tasks([name]))


def _named(names: Sequence[str], manager: _Tasks) -> list[str]:
    return list(dict.fromkeys(task for name in names for task in _matching(name, manager)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints and logs, and asks git, where there may be none, and the whole machine for a
    description that no report of ours has; standard output is ours."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None),
            mock.patch.object(lm_eval.evaluator, "add_env_info"),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _explained(names: Sequence[str], answers: Path) -> Iterator[None]:
    """What goes wrong in lm-eval, its tasks and their data, in one line.

    Tasks are code and data of others, which fail in ways of their own; only what can't be a
    task's or its data's doing goes on as it is, and a fault of our own code that lm-eval calls.
    """
    named = ", ".join(names)
    try:
        yield
    except PTConvertError:
        raise
    except sqlite3.Error as error:
        raise EvaluationError(
            f"the cache of answers is damaged ({first_line(error)}); delete {answers}_rank0.db"
        ) from error
    except ImportError as error:
        raise EvaluationError(
            f"{named}: a task needs a package that isn't here: {error} (what the default tasks "
            "need comes with pip install 'ptconvert[eval]')"
        ) from error
    except (ConnectionError, HfHubHTTPError) as error:
        raise EvaluationError(
            f"{named}: the task's data is neither here nor can the hub be reached "
            f"({first_line(error)}); without a network, use local tasks (--make-tasks, "
            "--include-path) or --text"
        ) from error
    except _TASKS_FAULTS as error:
        if _is_ours(error):
            raise
        raise EvaluationError(
            f"{named}: lm-eval can't run it on this model: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether our code failed or what it called, rather than lm-eval or a task, as far as a
    traceback tells: by the innermost frame of either package.

    So a mistake of ours that fails only in lm-eval's code, as where our model goes on to its base
    class with wrong arguments, passes for lm-eval's.
    """
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__")).split(".")[0] for frame in frames]
    return next((p for p in reversed(packages) if p in ("ptconvert", "lm_eval")), "") == "ptconvert"


def _task(name: str, task: Any, results: Mapping[str, Any]) -> Task:
    samples = results["samples"][name]
    figures, aggregations = results["results"][name], task.aggregation()
    metrics = []
    for key in sorted({(metric, s["filter"]) for s in samples for metric in s["metrics"]}):
        metric, filtered = key
        some = [s for s in samples if s["filter"] == filtered and metric in s]
        some.sort(key=lambda s: s["doc_id"])
        stderr = figures[f"{metric}_stderr,{filtered}"]
        metrics.append(
            Metric(
                name=metric,
                filter=filtered,
                stderr=float(stderr) if isinstance(stderr, float) else None,
                higher_is_better=results["higher_is_better"][name].get(metric),
                documents=tuple(f"{s['doc_id']}:{s['doc_hash']}" for s in some),
                values=tuple(s[metric] for s in some),
                aggregate=aggregations.get(metric, mean),
            )
        )
    return Task(
        name=name,
        version=str(results["versions"].get(name)),
        output_type=str(task.OUTPUT_TYPE),
        fewshot=int(results["n-shot"].get(name) or 0),
        metrics=tuple(metrics),
    )


def _groups(groups: Mapping[str, Any], tasks: Sequence[Task]) -> Iterator[GroupOfTasks]:
    for name, group in groups.items():
        members = {task.task_name for task in group.get_all_tasks()}
        for config in group.aggregate_metric_list or ():
            having: dict[tuple[str, str], list[str]] = {}
            for task in tasks:
                for metric in task.metrics:
                    wanted = config.filter_list is None or metric.filter in config.filter_list
                    if task.name in members and metric.name == config.metric and wanted:
                        having.setdefault((metric.name, metric.filter), []).append(task.name)
            for (metric_name, filtered), names in having.items():
                yield GroupOfTasks(
                    name, metric_name, filtered, bool(config.weight_by_size), tuple(names)
                )
