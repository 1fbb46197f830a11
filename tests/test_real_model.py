"""What `make real` makes its texts and its comparison of answers of."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import answers
import prepare
import pytest
from lm_eval.tasks import TaskManager

PAGE = """\
=======
A title of more words than twenty, so that only its ruler says that it is a heading and no running \
text of the document
=======

Django comes with a :ref:`robust cache <cache>` system that lets you save ``dynamic`` pages, such
as `Squid <http://www.squid-cache.org/>`_ does, so they don't have to be calculated each time::

    an example that is indented and has many more words than twenty so that only this keeps it out \
of the text that is kept

Too short to be kept.

.. note:: a directive with many words, which is no running text though it has more than twenty of \
them in one line, as here
"""
KEPT = (
    "Django comes with a robust cache system that lets you save `dynamic` pages, such as Squid "
    "does, so they don't have to be calculated each time"
)


def test_prose_is_running_text_without_markup(tmp_path: Path) -> None:
    sdist = tmp_path / "docs.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in (
            ("d-1/docs/b.txt", PAGE),
            ("d-1/docs/a.txt", "short\n"),
            ("d-1/x.txt", PAGE),
        ):
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert list(prepare.prose(sdist)) == [KEPT]


def test_held_out_documents_are_in_no_training_text(tmp_path: Path) -> None:
    prose, code = [f"prose {i:02}" for i in range(30)], [f"code {i:03}" for i in range(50)]
    prepare.write_texts(tmp_path, prose, code)
    texts = {p.stem: p.read_text() for p in tmp_path.iterdir()}
    assert len(texts["prose"]) == len(texts["code"])
    for name, documents in (("prose", prose), ("code", code)):
        held_out = texts[f"{name}-held-out"].split("\n\n")
        assert held_out == documents[::10]
        assert not set(held_out) & set(texts[name].split("\n\n"))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ([[1, 2, 3], [4, 5]], "2 of 2 answers are the same, and of the 5 tokens 5 come before"),
        ([[1, 9, 3], [4]], "0 of 2 answers are the same, and of the 5 tokens 2 come before"),
    ],
)
def test_answers_are_compared_up_to_the_first_difference(other: list[list[int]], told: str) -> None:
    assert answers._alike([[1, 2, 3], [4, 5]], other).startswith(told)


def test_answers_to_humaneval_are_run() -> None:
    """The package's own solutions pass, and an answer without one doesn't."""
    folder = Path(answers.__file__).parent / "tasks"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load(["humaneval_packaged"])["tasks"]["humaneval_packaged"]
    problems = list(task.test_docs())
    assert len(problems) == 164
    assert task.doc_to_text(problems[0]).startswith("from typing import List")
    for problem in problems[:3]:
        solved = problem["canonical_solution"]
        assert task.process_results(problem, [solved]) == {"pass@1": 1.0}
        assert task.process_results(problem, ["    pass\n"]) == {"pass@1": 0.0}
