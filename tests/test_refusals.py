"""docs/refusals.md has what engines refuse, all of it, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from refused import ANY, ENGINES, in_table, listed

import ptconvert.engines
from ptconvert.checkpoint.section import SECTION
from ptconvert.models.quantised import QUANTIZATION
from ptconvert.spec import terms

FOLDER = Path(ptconvert.engines.__file__).parent
MODULES = ("checkpoints.py", "formats.py", "refusals.py", "families.py")


def strings(path: Path) -> Iterator[str]:
    """What a module says, but in docstrings and its log."""
    left = set[ast.AST]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        by_itself = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if by_itself or (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warning")):
            left.update(ast.walk(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left:
            yield from (part.strip() for part in node.value.split("{}"))


def said(engine: str) -> set[str]:
    files = (FOLDER / "formats.py", *(FOLDER / engine / name for name in MODULES))
    return {text for file in files if file.exists() for text in strings(file)}


@pytest.mark.parametrize("engine", ENGINES.values())
def test_each_refusal_has_its_row(engine: str) -> None:
    rows = "\n".join(listed()[engine])
    assert [text for text in said(engine) if " " in text and text not in rows] == []


def test_a_row_is_of_one_refusal() -> None:
    """However open it ends or begins."""
    known = "float16: vLLM's linear attention on CPUs takes bfloat16 only"
    assert in_table("vllm", known) and in_table("vllm", f"{known}; {known}")
    assert not in_table("vllm", f"something else; {known}")
    known = "attention_bias True: SGLang's layers for it have 2"
    assert in_table("sglang", known) and not in_table("sglang", f"{known}; something else")


@pytest.mark.parametrize("engine", ENGINES.values())
def test_each_row_has_its_refusal(engine: str) -> None:
    also = {QUANTIZATION, SECTION, *strings(Path(terms.__file__))}  # what they say, too
    known = sorted(said(engine) | also, key=len, reverse=True)
    lines = listed()[engine]
    assert len(lines) == len(set(lines))
    for line in lines:
        left = line
        for text in known:
            left = left.replace(text, ANY) if len(text) > 2 else left
        assert not re.search(r"[A-Za-z]{3}", left), f"{line}: {left}"
