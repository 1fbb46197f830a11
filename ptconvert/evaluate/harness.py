"""lm-eval over our models: one request cache per model, our progress, batches that fit."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import lm_eval.evaluator
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ptconvert import __version__
from ptconvert.errors import EvaluationError
from ptconvert.evaluate.models import BatchSize, Progress, first_line

# Rolling requests are saved when a call of lm-eval's is through with them: so, few per call.
_ROLLING_AT_ONCE = 16
# For lm-eval's own standard errors of metrics other than means, which are only shown.
_LM_EVAL_RESAMPLES = 1_000


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


@dataclass(frozen=True)
class Metric:
    """One metric of one task: its value, and its value for each document in order."""

    name: str
    filter: str
    value: float
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
    batch_size: int


class _FittingHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's model for transformers, with batches that halve when memory runs out."""

    def __init__(self, model: Any, tokenizer: Any, batch: BatchSize) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch.size)
        self.batch = batch

    def _loglikelihood_tokens(
        self,
        requests: list[Any],
        disable_tqdm: bool = False,  # noqa: ARG002  (the name is lm-eval's)
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        def run(size: int) -> Any:
            self.batch_size_per_gpu = size
            return HFLM._loglikelihood_tokens(self, requests, True, override_bs)

        answers: list[tuple[float, bool]] = self.batch.fitting(run)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        answers: list[float] = []
        for first in range(0, len(requests), _ROLLING_AT_ONCE):
            some = requests[first : first + _ROLLING_AT_ONCE]
            answers += super().loglikelihood_rolling(some, disable_tqdm)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        def run(size: int) -> Any:
            self.batch_size_per_gpu = size
            return HFLM.generate_until(self, requests, disable_tqdm)

        answers: list[str] = self.batch.fitting(run)
        return answers


class _Unopened(LM):  # type: ignore[misc]
    """A model that is opened when a request isn't in the cache, and not before."""

    def __init__(self, build: Callable[[], _FittingHFLM], label: str, progress: Progress) -> None:
        super().__init__()
        self._build, self._label, self._progress = build, label, progress
        self._lm: _FittingHFLM | None = None
        self._done = self._total = 0

    @property
    def lm(self) -> _FittingHFLM:
        if self._lm is None:
            self._progress(f"{self._label}: opening the model", 0, None)
            self._lm = self._build()
            self._lm.set_cache_hook(self)
        return self._lm

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """lm-eval's call for each answer: it goes into the cache, and progress is told."""
        self.cache_hook.add_partial(kind, request, answer)
        self._done += 1
        self._progress(self._label, min(self._done, self._total), self._total)

    def _run(self, kind: str, requests: list[Any]) -> Any:
        lm = self.lm
        self._done, self._total = 0, len(requests)
        self._progress(self._label, 0, self._total)
        return getattr(lm, kind)(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = self._run("loglikelihood", requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        answers: list[float] = self._run("loglikelihood_rolling", requests)
        return answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers: list[str] = self._run("generate_until", requests)
        return answers

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        return str(self.lm.apply_chat_template(*args, **kwargs))

    @property
    def tokenizer_name(self) -> str:
        return str(self.lm.tokenizer_name)


class _Tasks(TaskManager):  # type: ignore[misc]
    """lm-eval's task manager, which remembers what it loaded: metrics' functions are there."""

    loaded: Mapping[str, Any]

    def load(self, names: Any) -> Any:
        with _explained(names):
            self.loaded = super().load(names)
        return self.loaded


def cache_file(cache: Path, model_digest: str, settings: Settings) -> Path:
    """The file of a model's answers.

    Within it lm-eval keeps one answer for each request, by its whole text: prompt, few-shot
    examples, chat template, continuation or generation settings. So another version of a task, or
    another number of shots, finds only those answers that it would have got. What a request
    doesn't tell is in the file's name: the model's content, device, dtype and versions.
    """
    versions = [importlib.metadata.version(p) for p in ("torch", "transformers", "lm_eval")]
    told = [model_digest, settings.device.split(":")[0], settings.dtype, __version__, *versions]
    name = hashlib.sha256("\0".join(told).encode()).hexdigest()[:32]
    return cache / "answers" / name


def score(
    build: Callable[[], tuple[Any, Any]],
    settings: Settings,
    answers: Path,
    label: str,
    progress: Progress,
) -> Scores:
    """Scores one model on all tasks with lm-eval's `simple_evaluate`.

    `build` opens the model and its tokenizer; it isn't called when all answers are in the cache,
    whose file is `answers`. Raises EvaluationError for tasks that aren't there or can't be loaded.
    """
    batch = BatchSize(settings.batch_size, settings.device)
    lm = _Unopened(lambda: _FittingHFLM(*build(), batch), label, progress)
    progress(f"{label}: loading tasks", 0, None)
    with _quiet():
        manager = _manager(settings)
        seed = settings.seed
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(settings.tasks),
                task_manager=manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                use_cache=str(answers),
                bootstrap_iters=_LM_EVAL_RESAMPLES,
                log_samples=True,
                **({} if seed is None else dict.fromkeys(names, seed)),
            )
        finally:
            if getattr(lm.cache_hook, "dbdict", None) is not None:
                lm.cache_hook.dbdict.close()  # what was answered so far is on disk
    tasks = tuple(
        _task(name, manager.loaded["tasks"][name], results) for name in results["samples"]
    )
    return Scores(tasks, tuple(_groups(manager.loaded["groups"], tasks)), batch.size)


def _manager(settings: Settings) -> _Tasks:
    """The tasks of `include_path`, and lm-eval's own where those are not all that is asked for."""
    paths = [str(path) for path in settings.include_path]
    if paths:
        local = _Tasks(include_path=paths, include_defaults=False)
        if all(name in local.all_tasks for name in settings.tasks):
            return local
    manager = _Tasks(include_path=paths or None)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            raise EvaluationError(
                f"there is no task {name!r} in lm-eval {importlib.metadata.version('lm_eval')}"
                f"{' or in --include-path' if paths else '; --include-path DIR adds your own'}; "
                "`lm-eval ls tasks` lists its tasks"
            )
    return manager


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval prints and logs, and asks git where there may be none; standard output is ours."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    """What goes wrong while lm-eval loads tasks and their data, in one line."""
    named = ", ".join(tasks)
    try:
        yield
    except ImportError as error:
        raise EvaluationError(
            f"{named}: needs a package that isn't here: {error}; pip install 'ptconvert[eval]' "
            "brings what the default tasks need"
        ) from error
    except (ConnectionError, HfHubHTTPError) as error:
        raise EvaluationError(
            f"{named}: the task's data is neither here nor can the hub be reached "
            f"({first_line(error)}); without a network, use local tasks (--make-tasks, "
            "--include-path) or --text"
        ) from error
    except (OSError, KeyError, ValueError) as error:
        raise EvaluationError(f"{named}: lm-eval can't load it: {first_line(error)}") from error


def _task(name: str, task: Any, results: Mapping[str, Any]) -> Task:
    samples = results["samples"][name]
    figures, aggregations = results["results"][name], task.aggregation()
    metrics = []
    for key in sorted({(metric, s["filter"]) for s in samples for metric in s["metrics"]}):
        metric, filtered = key
        some = [s for s in samples if s["filter"] == filtered and metric in s]
        some.sort(key=lambda s: s["doc_id"])
        value, stderr = (figures[f"{m},{filtered}"] for m in (metric, f"{metric}_stderr"))
        metrics.append(
            Metric(
                name=metric,
                filter=filtered,
                value=float(value),
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
