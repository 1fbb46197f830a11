"""The one-file form of the model code, for `trust_remote_code` where ptconvert isn't installed.

It is this package's own modules, put together in the order of their dependencies with the imports
between them taken out: one implementation, two wrappings.
"""

from __future__ import annotations

import ast
import functools
from importlib import resources

MODULES = (
    "errors.py",
    "schedule/endings.py",
    "schedule/stages.py",
    "schedule/lower.py",
    "schedule/schedule.py",
    "schedule/presets.py",
    "schedule/theirs.py",
    "models/gemma4.py",
    "models/families.py",
    "models/mixtures.py",
    "models/wrappers.py",
    "spec/terms.py",
    "checkpoint/section.py",
    "modeling/executor.py",
    "modeling/config.py",
    "modeling/layers.py",
    "modeling/model.py",
)
_HEAD = '''"""Model code of a checkpoint converted by ptconvert, for trust_remote_code.

Generated from the ptconvert package, which takes its place where it is installed. Licence:
Apache-2.0.
"""

from __future__ import annotations
'''
# What importing the package does for its classes, this file's import does for its own.
_TAIL = "\n\nregister_layouts()\nregister_tokenizers()\n"


@functools.cache
def modeling_source() -> str:
    """The text of modeling_ptconvert.py."""
    package = resources.files("ptconvert")
    parts = [_HEAD]
    for module in MODULES:
        text = package.joinpath(*module.split("/")).read_text(encoding="utf-8")
        parts.append(f"\n# ---- ptconvert/{module}\n{_without_own_imports(text).strip()}\n")
    return "\n".join(parts) + _TAIL


def _without_own_imports(text: str) -> str:
    """A module's text less its docstring, __future__ imports and imports from this package."""
    lines = text.splitlines()
    tree = ast.parse(text)
    dropped = [n for n in tree.body if isinstance(n, ast.ImportFrom) and _is_own(n)]
    if ast.get_docstring(tree) is not None:
        dropped.append(tree.body[0])  # type: ignore[arg-type]
    for node in dropped:
        assert node.end_lineno is not None
        for number in range(node.lineno - 1, node.end_lineno):
            lines[number] = ""
    return "\n".join(lines)


def _is_own(node: ast.ImportFrom) -> bool:
    return node.module == "__future__" or (node.module or "").startswith("ptconvert")
