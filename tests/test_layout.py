"""Which way imports go: from a folder to those below it, and to no command but one's own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ptconvert

PACKAGE = Path(ptconvert.__file__).parent
# From the bottom up; folders of one line don't know each other.
LEVELS = [
    {"errors", "shorten"},
    {"schedule"},
    {"models"},
    {"spec"},
    {"checkpoint"},
    {"modeling"},
    {"convert"},
    {"runtime"},
    {"measure"},
    {"report"},
    {"calibrate"},
    {"verify", "plan", "heal", "estimate", "evaluate"},
    {"engines"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# What registers classes with other libraries, and starts the command line.
TOP = {"__init__", "__main__"}


def imports(file: Path) -> Iterator[str]:
    """The modules of this package that a file imports anywhere in it, for type checking too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            # a name may be a module of that package, or something in it
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "ptconvert")


def folder_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = [f for f in sorted(PACKAGE.rglob("*.py")) if folder_of(f) not in TOP]


def test_every_folder_has_its_place() -> None:
    assert {folder_of(file) for file in FILES} == set(LEVEL)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    own = folder_of(file)
    for name in imports(file):
        other = name.split(".")[1] if "." in name else None
        if other in LEVEL and other != own:
            assert LEVEL[other] < LEVEL[own], f"{own} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {
        ".".join(("ptconvert", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): f
        for f in FILES
    }
    needs = {
        module: {name for name in imports(file) if name in modules} - {module}
        for module, file in modules.items()
    }
    TopologicalSorter(needs).prepare()  # raises where there is a cycle
