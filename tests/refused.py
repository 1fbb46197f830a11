"""docs/refusals.md, read: what engines say that they don't serve."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"
ENGINES = {"vLLM": "vllm", "SGLang": "sglang"}
ANY = "…"
_ROW = re.compile(r"^\| (vLLM|SGLang) \| .*?\| `(.*)` \|$", re.MULTILINE)


def listed() -> dict[str, list[str]]:
    """The page's lines by the engine's name in code, with `ANY` for what differs."""
    found: dict[str, list[str]] = {name: [] for name in ENGINES.values()}
    for engine, line in _ROW.findall(PAGE.read_text(encoding="utf-8")):
        found[ENGINES[engine]].append(line)
    return found


def in_table(engine: str, said: str) -> bool:
    """Whether what an engine's plugin says is a line of the page, or several."""
    anything = "[^;\n]+"  # of one refusal
    rows = "|".join(anything.join(map(re.escape, line.split(ANY))) for line in listed()[engine])
    return re.fullmatch(f"({rows})(; ({rows}))*", said) is not None
