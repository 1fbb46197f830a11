"""README and docs: every link leads somewhere, and every page is linked to."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page less its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)


def anchors(page: Path) -> Iterator[str]:
    """What GitHub calls a page's headings."""
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(prose(page)) if not link.startswith("http")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("script", sorted(ROOT.glob("docs/*.py")), ids=lambda p: p.stem)
def test_a_generated_page_is_what_its_script_prints(script: Path) -> None:
    page, command = script.with_suffix(".md"), [sys.executable, str(script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    said = f"python docs/{script.name} > docs/{page.name}"
    assert printed == page.read_text(encoding="utf-8"), said


def test_the_readme_leads_to_every_page() -> None:
    assert {f"docs/{page.name}" for page in PAGES if page.parent != ROOT} <= {
        link.partition("#")[0] for link in links(ROOT / "README.md")
    }
