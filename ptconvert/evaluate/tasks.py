"""Which tasks to score: the default suite, what multiple choice hides, and tasks from any text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ptconvert.errors import EvaluationError
from ptconvert.measure.windows import read_text

# Generation first: Llama-3.1-8B with its last 16 layers as Ladder fell from 85.0 to 10.5 on GSM8K
# and from 52.6 to 46.3 on IFEval, while HellaSwag lost 2.3 points of 80 (Ladder Residual,
# arXiv 2501.06589, the adaptation table). wikitext is perplexity, which moves with every schedule.
DEFAULT_TASKS = ("gsm8k", "ifeval", "wikitext")
# lm-eval's output types that only rank answers given to them.
_RANKED = frozenset({"multiple_choice"})
MULTIPLE_CHOICE_WARNING = (
    "all tasks are multiple choice, which hides the damage of such conversions: in published "
    "results GSM8K fell from 85.0 to 10.5 where HellaSwag lost 2.3 points; a generation task "
    "(gsm8k, ifeval), a perplexity task and --text show it"
)

PERPLEXITY_TASK, CLOZE_TASK = "text_perplexity", "text_cloze"
_DOCUMENT_CHARACTERS = 2_000
_CONTEXT_CHARACTERS = 600
_MAX_DOCUMENTS = 1_000
_CHOICES = 4
_MIN_WORDS = 3
_MAX_LINE = 400  # characters: longer ones, as data in code, may not fit a model's context
_MARK = "# Made by ptconvert eval --make-tasks; made again, it is replaced.\n"


def hides_damage(output_types: Sequence[str]) -> bool:
    """Whether every task only ranks answers given to it."""
    return bool(output_types) and set(output_types) <= _RANKED


def make_tasks(directory: Path, texts: Sequence[Path], seed: int) -> tuple[str, ...]:
    """Writes two lm-eval tasks made from texts into a directory, and returns their names.

    `text_perplexity` scores whole pieces of about 2,000 characters (rolling log-likelihood).
    `text_cloze` asks which of four lines comes next; the other three are lines of the same texts
    of about the same length. The tasks name their data by its absolute path, as lm-eval wants it.
    Raises EvaluationError for texts too short to make tasks of, and where a file of these names is
    something else's.
    """
    documents = [d for path in texts for d in _documents(read_text(path))]
    if len(documents) > _MAX_DOCUMENTS:
        documents = random.Random(seed).sample(documents, _MAX_DOCUMENTS)
    questions = _questions(documents, seed)
    if len(questions) < 2:
        raise EvaluationError(
            f"the text is too short to make tasks of: it needs two pieces of "
            f"{_DOCUMENT_CHARACTERS} characters with lines of {_MIN_WORDS} words or more"
        )
    for task in (PERPLEXITY_TASK, CLOZE_TASK):
        file = directory / f"{task}.yaml"
        if file.exists() and not file.read_text(encoding="utf-8", errors="replace").startswith(
            _MARK
        ):
            raise EvaluationError(f"{file} is there already, and not of --make-tasks")
    directory.mkdir(parents=True, exist_ok=True)
    perplexity: dict[str, object] = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        # No word_perplexity: code and many languages have few words to a space.
        "metric_list": [{"metric": name} for name in ("byte_perplexity", "bits_per_byte")],
    }
    cloze: dict[str, object] = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
    _write(directory, PERPLEXITY_TASK, [{"text": d} for d in documents], perplexity)
    _write(directory, CLOZE_TASK, questions, cloze)
    return PERPLEXITY_TASK, CLOZE_TASK


def _documents(text: str) -> list[str]:
    """Pieces of whole lines, each of _DOCUMENT_CHARACTERS or a little more; a short rest is left
    out, so that documents weigh about the same."""
    pieces, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _DOCUMENT_CHARACTERS:
            pieces.append("".join(lines))
            lines, size = [], 0
    return pieces


def _questions(documents: Sequence[str], seed: int) -> list[dict[str, object]]:
    """One question per document: its context, four next lines, and which of them is right."""
    rng = random.Random(seed)
    lines = [document.splitlines(keepends=True) for document in documents]
    usable = [[n for n, line in enumerate(piece) if n and _is_usable(line)] for piece in lines]
    pool = sorted(
        {piece[n] for piece, places in zip(lines, usable, strict=True) for n in places},
        key=lambda line: (len(line), line),
    )
    questions: list[dict[str, object]] = []
    for piece, places in zip(lines, usable, strict=True):
        later = [n for n in places if n >= len(piece) // 2]
        if not later or len(pool) < _CHOICES:
            continue
        place = rng.choice(later)
        answer = piece[place]
        # The lines nearest in length, so that length tells nothing.
        rank = pool.index(answer)
        near = [line for line in pool[max(0, rank - 10) : rank + 11] if line != answer]
        choices = [answer, *rng.sample(near, _CHOICES - 1)]
        rng.shuffle(choices)
        context = "".join(piece[:place])[-_CONTEXT_CHARACTERS:]
        questions.append({"context": context, "choices": choices, "answer": choices.index(answer)})
    return questions


def _is_usable(line: str) -> bool:
    return len(line) <= _MAX_LINE and len(re.findall(r"\w+", line)) >= _MIN_WORDS


def _write(
    directory: Path,
    task: str,
    documents: Sequence[Mapping[str, object]],
    config: Mapping[str, object],
) -> None:
    data = directory.resolve() / f"{task}.jsonl"
    whole = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **config,
        "metadata": {"version": 1.0},
    }
    data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    (directory / f"{task}.yaml").write_text(
        _MARK + yaml.safe_dump(whole, sort_keys=False), encoding="utf-8"
    )
