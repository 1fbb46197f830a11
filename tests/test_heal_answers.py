"""heal --top-k: the teacher's likeliest tokens, kept on disk, and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, byte_level
from test_heal import MIDDLE, QUICK, TEXT, differing, heal, kls

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.heal import answers
from ptconvert.heal.answers import AnswerStore, answer_bytes
from ptconvert.heal.loss import compare, compare_likeliest, likeliest
from ptconvert.heal.settings import Settings
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import Windows

pytest.importorskip("peft", reason="peft is not installed")
VOCABULARY = 50


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("heal") / "source")


def quiet(*_: object) -> None:
    """No progress."""


# The loss


def compared(count: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, KL and its gradient of random models, whole or over so many tokens."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, VOCABULARY, bias=False)
    hidden, target = 3 * torch.randn(2, 3, 8), torch.randint(VOCABULARY, (2, 3))
    logits = (2 * torch.randn(2, 3, VOCABULARY)).requires_grad_()
    if count is None:
        loss, kl = compare(logits, hidden, head, target)
    else:
        ids, logp, others = likeliest(head(hidden).flatten(0, 1).detach(), count)
        kept = ids.view(2, 3, count), logp.view(2, 3, count), others.view(2, 3)
        loss, kl = compare_likeliest(logits, *kept, target)
    torch.autograd.backward(kl.sum())
    assert logits.grad is not None
    return loss.detach(), kl.detach(), logits.grad


def test_over_the_whole_vocabulary_it_is_the_whole_kl() -> None:
    for whole, kept in zip(compared(None), compared(VOCABULARY), strict=True):
        assert torch.allclose(whole, kept, atol=1e-6)


def test_over_fewer_tokens_it_is_less() -> None:
    """Each token apart from the others can only add to it; the loss is the same."""
    loss, whole, gradient = compared(None)
    for count in (1, 4, 16, VOCABULARY - 2):
        kept = compared(count)
        assert torch.allclose(kept[0], loss, atol=1e-6)
        assert (kept[1] < whole).all() and (kept[1] >= 0).all()
        assert (kept[1] >= compared(1)[1] - 1e-6).all()
        assert not torch.allclose(kept[2], gradient, atol=1e-6)


def test_the_others_are_one_outcome() -> None:
    """Against probabilities summed in float64, where the others have little and where much."""
    torch.manual_seed(0)
    for scale in (0.1, 30.0):
        p, q = scale * torch.randn(VOCABULARY), scale * torch.randn(VOCABULARY)
        ids, logp, others = likeliest(p[None], 5)
        target = torch.zeros(1, 1, dtype=torch.int64)
        _, kl = compare_likeliest(q.view(1, 1, -1), ids[None], logp[None], others[None], target)
        both = [x.double().softmax(-1) for x in (p, q)]
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[ids[0]] = False
        lumped = [torch.cat([x[ids[0]], x[rest].sum().view(1)]) for x in both]
        expected = (lumped[0] * (lumped[0] / lumped[1]).log()).sum()
        assert float(kl) == pytest.approx(float(expected), rel=1e-4)


# What is kept


def store(source: Path, cache: Path, count: int = 8) -> AnswerStore:
    return AnswerStore(open_checkpoint(source), "digest", Settings(top_k=count), cache, quiet)


def test_what_is_kept_is_what_the_teacher_says(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 90, (7, 17))
    used, held_out = torch.tensor([1, 2, 5, 6]), Windows(ids[:1], 16, 16)
    kept = store(source, tmp_path).answers(ids, used, held_out)
    model = open_model(open_checkpoint(source), "float32", "cpu")
    for window in used.tolist():
        with torch.inference_mode():
            logp = model(input_ids=ids[window : window + 1, :-1]).logits[0].log_softmax(-1)
        top = logp.topk(8)
        found = kept.of(window)
        assert torch.equal(found["ids"], top.indices) and found["ids"].dtype == torch.int64
        assert torch.allclose(found["logp"].float(), top.values, rtol=2**-11)
        others = (1 - top.values.double().exp().sum(-1)).log()
        assert torch.allclose(found["others"].double(), others, atol=1e-4)
    (file,) = tmp_path.rglob("train-*")
    assert file.stat().st_size == pytest.approx(
        4 * 16 * answer_bytes(8, len(model.lm_head.weight)), abs=400
    )
    with torch.inference_mode():
        hidden = kept.of_held_out(0)["hidden"]
        again = model(input_ids=ids[:1, :-1]).logits[0]
        assert torch.allclose(kept.held_out.head(hidden), again, atol=1e-5)


def test_only_what_is_missing_is_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill, or where a text has grown."""
    monkeypatch.setattr(answers, "TOKENS_A_FILE", 32)  # two windows
    asked, answered = list[int](), answers._answered

    def counted(model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        asked.append(len(ids))
        return answered(model, ids, *rest)

    monkeypatch.setattr(answers, "_answered", counted)
    ids = torch.randint(3, 90, (7, 17))
    used, held_out = torch.arange(7), Windows(ids[:1], 16, 16)
    first = store(source, tmp_path).answers(ids, used, held_out)
    assert asked == [2, 2, 2, 1]
    store(source, tmp_path).file("train", ids[2:4]).unlink()
    again = store(source, tmp_path).answers(ids, used, held_out)
    assert asked == [2, 2, 2, 1, 2]
    for window in range(7):
        assert all(torch.equal(a, again.of(window)[n]) for n, a in first.of(window).items())
    store(source, tmp_path, 9).answers(ids[:2], used[:2], held_out)
    assert asked[5:] == [2]


# The whole command


@pytest.mark.slow
def test_a_second_healing_does_not_open_the_teacher(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another schedule, at another rate; and the first one's result comes again in its bytes."""
    converted, kept = convert(source, 4, MIDDLE), ("--top-k", 16, "--cache", tmp_path / "cache")
    options = ("--text", TEXT, *QUICK)
    figures = heal(converted, tmp_path / "a", source, *options, *kept)
    assert figures["kept"] == "KL" and kls(figures)["KL"] < 0.9 * kls(figures)["before"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert "KL(source || healed) over the source's 16 likeliest tokens" in card

    def closed(*_: object) -> None:
        raise AssertionError("the teacher was opened")

    monkeypatch.setattr(answers, "open_model", closed)
    heal(converted, tmp_path / "b", source, *options, *kept)
    assert not differing(tmp_path / "a", tmp_path / "b")
    other = convert(source, 4, "use: parallel_track, depth: 3")
    lora = ("--lora", 4, "--learning-rate", 1e-2)
    assert heal(other, tmp_path / "c", source, *options, *kept, *lora)["kept"] == "KL"
    with pytest.raises(AssertionError, match="the teacher was opened"):
        heal(converted, tmp_path / "d", source, *options, *kept, "--top-k", 17)


@pytest.mark.slow
def test_the_whole_vocabulary_kept_heals_as_the_teacher_does(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted = convert(source, 4, MIDDLE)
    size = len(open_model(open_checkpoint(source), "float32", "cpu").lm_head.weight)
    found = [
        kls(heal(converted, tmp_path / name, source, "--text", TEXT, *QUICK, *kept))
        for name, kept in (("a", ()), ("b", ("--top-k", size, "--cache", tmp_path / "cache")))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_what_is_refused(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted, out, cache = convert(source, 4, MIDDLE), tmp_path / "out", tmp_path / "cache"

    def refused(what: str, *options: object) -> None:
        error = heal(converted, out, source, "--text", TEXT, *QUICK, *options, code=2)
        assert what in error.splitlines()[-1] and not out.exists()
        if "Usage" not in error:
            assert error.count("\n") == 1

    refused("--top-k 9999: the vocabulary has", "--top-k", 9999)
    refused("--cache: for --top-k only", "--cache", cache)
    refused("--top-k: for the end-to-end", "--top-k", 4, "--blockwise", "--no-kl")
    heal(converted, out, source, "--text", TEXT, *QUICK, "--top-k", 4, "--cache", cache)
    (file,) = cache.rglob("train-*")
    file.write_bytes(file.read_bytes()[:-10])
    error = heal(converted, tmp_path / "o", source, "--text", TEXT, *QUICK, "--top-k", 4,
                 "--cache", cache, code=2)  # fmt: skip
    assert f"{file} is damaged" in error.splitlines()[-1] and "Traceback" not in error
