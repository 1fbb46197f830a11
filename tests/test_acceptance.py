"""What `eval --speculate` says: how many drafted tokens each model accepts."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Convert, MakeDense, byte_level
from test_evaluate import TEXTS, quiet

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.errors import EvaluationError
from ptconvert.evaluate.acceptance import (
    LAYER,
    Drafts,
    accepted,
    check_draft,
    from_choices,
    from_text,
    new_tokens,
    speculation,
)
from ptconvert.evaluate.harness import Settings
from ptconvert.evaluate.run import Report, Text, evaluate
from ptconvert.evaluate.terminal import speculation_title
from ptconvert.modeling.model import MODELS

WINDOW, WINDOWS = 64, 6


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("accepted") / "source")


def test_a_step_takes_drafts_up_to_the_first_that_is_wrong() -> None:
    text = [9, 9, 1, 2, 3, 4, 5, 6, 7, 8]
    # after the prompt 9 9 and the prefill's 1: three right; wrong at once; one right, one not
    choices = [0, 2, 3, 4, 0, 0, 7, 0]
    draft = from_choices(choices, 2, 3)
    # 1 | 2 3 4, and 5 | 6: wrong | 7 right, then too short to tell
    assert accepted(text, 2, 3, draft) == [3, 0]
    assert accepted(text, 2, 1, from_choices(choices, 2, 1)) == [1, 1, 0, 1]
    assert accepted(text[:5], 2, 3, draft) == []


def test_drafts_from_the_text_follow_the_first_longest_match() -> None:
    #       0  1  2  3  4  5  6  7  8  9  10
    text = [1, 2, 3, 9, 1, 2, 4, 2, 1, 2, 3]
    draft = from_text(text, 3, 1, 2)
    assert draft(10) == [3, 9, 1]  # after 1 2, which begins the text, and not after the later one
    assert draft(8) == [3, 9, 1]  # after 2 alone: 4 2 stands nowhere before
    assert draft(4) == ()  # 9 is new
    assert draft(6) == [3, 9, 1] and from_text(text, 9, 1, 2)(6) == [3, 9, 1, 2]  # no more is known
    assert from_text(text, 3, 2, 2)(8) == ()
    # 3 9 1 2, of which the first and then its own follower come: 1 2 | 3 right, 9 isn't 7
    assert accepted([1, 2, 3, 9, 1, 2, 3, 7], 5, 2, from_text([1, 2, 3, 9, 1, 2, 3, 7], 2)) == [1]


def run(source: Path, found: Path, drafts: Drafts, cache: Path) -> Report:
    text = Text(TEXTS, WINDOW, WINDOWS, drafts=drafts)
    settings = Settings((), dtype="float32", batch_size=4)
    return evaluate(found, source, settings, text, cache, quiet)


def test_a_models_own_drafts_are_all_right(source: Path, convert: Convert, tmp_path: Path) -> None:
    """The source's are for the source: 3 of 3; for a conversion that changes nothing too, for
    another they aren't."""
    own = Drafts(3, "source", open_checkpoint(source))
    same = run(source, convert(source, 2, "use: tensor_parallel"), own, tmp_path).speculation
    assert same is not None and (same.drafted, same.draft) == (3, "source")
    assert (same.prompt, same.new, same.windows) == (32, 32, 6)
    for model in (same.source, same.converted):
        assert model.accepted.value == 3 and model.right == (1, 1, 1)
        assert 0 < model.steps <= 6 * (32 - 1) // 4  # each gives four tokens
    assert same.difference.value == 0
    other = run(source, convert(source, 2, "use: parallel_track, depth: 2"), own, tmp_path)
    assert other.speculation is not None and other.speculation.source.accepted.value == 3
    less = other.speculation.converted
    assert less.accepted.value < 1 and less.accepted.value == pytest.approx(sum(less.right))
    assert other.speculation.difference.value == less.accepted.value - 3
    assert other.speculation.difference.p_value is not None


def test_the_command_reports_it_everywhere(source: Path, convert: Convert, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["eval", convert(source, 2, "use: ladder"), "--baseline", source]
    arguments += ["--text", TEXTS[0], "--window", WINDOW, "--windows", 2, "--speculate", 2]
    arguments += ["--dtype", "float32", "--cache", tmp_path, "--device", "cpu"]
    done = CliRunner().invoke(main, [*map(str, arguments), "--json", "--html", str(page)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["speculation"]
    assert (found["drafted"], found["draft"], found["windows"]) == (2, "ngram", 2)
    one = found["converted"]
    assert one["accepted"]["value"] == pytest.approx(sum(one["right"]))
    assert len(one["right"]) == 2 and one["steps"] > 0
    assert "Speculative decoding" in page.read_text()
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "2 tokens drafted by ngram for each step" in done.stdout
    assert f"accepted, of 2 drafted  {found['source']['accepted']['value']:.4f}" in done.stdout


def test_texts_that_end_at_once_have_no_step(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    said = r"--speculate 40: 32 tokens are written in windows of 64, and a step takes 41"
    with pytest.raises(EvaluationError, match=said):
        run(source, convert(source, 2, "use: ladder"), Drafts(40), tmp_path)
    with pytest.raises(EvaluationError, match=r"--speculate 3: .* fewer than 4 tokens after"):
        speculation([[[1, 2, 3]]], 2, 4, Drafts(3), None, 0)


def test_what_drafted_is_said() -> None:
    texts = [[[1, 2, 3, 4, 5, 6]] * 6] * 2
    for drafts, said in (
        (Drafts(1, LAYER), "1 token drafted by its own head for each step"),
        (Drafts(2, "small"), "2 tokens drafted by small for each step"),
    ):
        assert said in speculation_title(speculation(texts, 2, 4, drafts, None, 0))


def test_a_draft_of_other_tokens_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    file = other / "tokenizer.json"
    told: dict[str, Any] = json.loads(file.read_text())
    told["model"]["vocab"] = {f"{k}x": v for k, v in told["model"]["vocab"].items()}
    file.write_text(json.dumps(told))
    with pytest.raises(EvaluationError, match="its tokens aren't the source's"):
        check_draft(open_checkpoint(other), open_checkpoint(source))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--speculate", "3"), "--speculate: for --text FILE only"),
        (("--text", "T", "--draft", "D"), "--draft needs --speculate K, the tokens drafted"),
    ],
)
def test_wrong_options_are_a_line(arguments: tuple[str, ...], said: str) -> None:
    given = [str(TEXTS[0]) if a == "T" else a for a in arguments]
    done = CliRunner().invoke(main, ["eval", "CKPT", "--baseline", "SRC", *given])
    assert done.exit_code == 2 and said in done.stderr


def test_every_model_leaves_logits_that_nobody_reads() -> None:
    """Of a long prompt only the last token's are made."""
    for model in MODELS.values():
        assert "logits_to_keep" in inspect.signature(model.forward).parameters, model


def test_a_short_window_is_halved() -> None:
    assert (new_tokens(1024), new_tokens(64)) == (128, 32)
