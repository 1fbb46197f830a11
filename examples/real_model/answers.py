"""What checkpoints answer to twenty questions, beside each other, by greedy decoding.

    python examples/real_model/answers.py CHECKPOINT... [--tokens N] [--html FILE]

The first checkpoint is the one that the others are compared with: of each answer, how many tokens
it goes along with the first one's. Questions are put by the tokenizer's chat template.
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptconvert  # noqa: F401  # makes AutoModelForCausalLM open converted checkpoints
from ptconvert.report.html import environment

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits that are red.",
    "What is 7 times 8?",
    "Write a sentence about the sea.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a short recipe for pancakes.",
    "What is the largest planet in our solar system?",
    "Write a Python function that adds two numbers.",
    "What is the opposite of 'cold'?",
    "How many days are there in a week?",
    "Explain what a database is in one sentence.",
    "Which language is spoken in Brazil?",
    "What is a good name for a cat?",
    "Give two tips for sleeping well.",
    "What is water made of?",
    "Complete the sentence: Once upon a time,",
    "What does a carpenter do?",
)

PAGE = """{% extends "page.html" %}
{% import "parts.html" as parts %}
{% block content %}
<section>
<h2>Answers</h2>
{% for line in told %}
<p>{{ line }}</p>
{% endfor %}
{{ parts.table([""] + names, rows, text=range(1 + names | length)) }}
</section>
{% endblock %}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer, at most")
    parser.add_argument("--html", type=Path)
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    answers = [answer(path, given.tokens) for path in given.checkpoints]
    texts = [[text for text, _ in found] for found in answers]
    ids = [[tokens for _, tokens in found] for found in answers]
    console = Console(highlight=False)
    for number, question in enumerate(QUESTIONS):
        console.print(f"\n[bold]{question}[/bold]")
        for path, found in zip(given.checkpoints, texts, strict=True):
            console.print(f"  [cyan]{path.name}[/cyan]  ", end="")
            console.print(" ".join(found[number].split()), markup=False)
    told = [
        f"{p.name}: {_alike(ids[0], each)}" for p, each in zip(given.checkpoints, ids, strict=True)
    ]
    console.print()
    for line in told[1:]:
        console.print(line)
    if given.html is not None:
        rows = [[q, *(found[n] for found in texts)] for n, q in enumerate(QUESTIONS)]
        page = (
            environment()
            .from_string(PAGE)
            .render(
                title=f"Twenty questions to {given.checkpoints[0].name} and what was made of it",
                subtitle=f"greedy, {given.tokens} tokens at most",
                names=[path.name for path in given.checkpoints],
                rows=rows,
                told=told[1:],
            )
        )
        given.html.write_text(page)


@torch.inference_mode()
def answer(path: Path, tokens: int) -> list[tuple[str, list[int]]]:
    """The text of each answer and its token ids."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    answers = [row.tolist() for row in output[:, inputs["input_ids"].shape[1] :]]
    cut = [_until(ids, tokenizer.eos_token_id) for ids in answers]
    return [(tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in cut]


def _until(ids: list[int], end: int) -> list[int]:
    """Token ids up to and with the one that ends the answer."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def _alike(first: list[list[int]], other: list[list[int]]) -> str:
    """How far answers go along with the first checkpoint's."""
    same = [
        len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))))
        for one, two in zip(first, other, strict=True)
    ]
    whole = sum(one == two for one, two in zip(first, other, strict=True))
    return (
        f"{whole} of {len(first)} answers are the same, and of the {sum(map(len, first))} tokens "
        f"{sum(same)} come before the first difference"
    )


if __name__ == "__main__":
    main()
