"""eval: lm-eval over converted models, the cache, the divergence, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import WITHOUT_PTCONVERT, Convert, MakeDense, byte_level, load
from forking import Run
from hypothesis import assume, given
from hypothesis import strategies as st
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

import ptconvert
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.errors import EvaluationError
from ptconvert.evaluate import lm, tasks
from ptconvert.evaluate import run as running
from ptconvert.evaluate.harness import Metric, Scores, Settings, Task
from ptconvert.evaluate.run import Text, evaluate
from ptconvert.measure import divergence
from ptconvert.measure import dtype as dtypes
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model, open_tokenizer
from ptconvert.measure.windows import DEFAULT_WINDOWS, cut_windows, windows_for
from ptconvert.modeling import model

# Text for tests: this package's own modules.
TEXTS = tuple(
    Path(ptconvert.__file__).parent / name for name in ("spec/document.py", "models/shape.py")
)
MADE = (tasks.PERPLEXITY_TASK, tasks.CLOZE_TASK)
GENERATE = {
    "task": "continue",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
GROUP = {
    "group": "both",
    "task": [tasks.CLOZE_TASK, "continue"],
    "aggregate_metric_list": [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": True, "filter_list": ["none"]}
    ],
}
Answers = Callable[..., Any]


def quiet(*_: object) -> None:
    """No progress; who shows it isn't made for several threads."""
    assert threading.current_thread() is threading.main_thread()


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("eval") / "source")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two made tasks, one that generates, and a group."""
    path = tmp_path_factory.mktemp("tasks")
    tasks.make_tasks(path, TEXTS, 0)
    data = {"data_files": {"test": str(path / f"{tasks.CLOZE_TASK}.jsonl")}}
    (path / "continue.yaml").write_text(yaml.safe_dump({**GENERATE, "dataset_kwargs": data}))
    (path / "both.yaml").write_text(yaml.safe_dump(GROUP))
    return path


@pytest.fixture
def settings(own_tasks: Path) -> Settings:
    names = (*MADE, "continue")
    return Settings(names, (own_tasks,), limit=6, dtype="float32", batch_size=4)


def by_name(found: running.Report) -> dict[tuple[str, str], running.Row]:
    return {(row.task, row.metric): row for row in found.rows}


# lm-eval


@pytest.mark.slow
def test_tensor_parallel_answers_just_as_its_source(
    source: Path, settings: Settings, convert: Convert, tmp_path: Path
) -> None:
    same = convert(source, 4, "use: tensor_parallel")
    other = convert(source, 4, "use: parallel_track, depth: 2")
    scores = {
        path: running._scored("", open_checkpoint(path), str(path), settings, tmp_path, quiet)
        for path in (source, same, other)
    }
    values = {
        path: [(m.documents, m.values) for task in found.tasks for m in task.metrics]
        for path, found in scores.items()
    }
    assert values[same] == values[source]
    assert values[other] != values[source]  # the check can fail
    found = evaluate(same, source, settings, None, tmp_path / "cache", quiet)
    differences = [row.difference for row in found.rows if row.difference is not None]
    assert len(differences) == len(found.rows) == 5
    assert {(d.value, d.p_value) for d in differences} == {(0.0, 1.0)}


@pytest.mark.slow
def test_source_scores_are_those_of_lm_evals_own_backend(
    source: Path, settings: Settings, convert: Convert, tmp_path: Path
) -> None:
    found = evaluate(
        convert(source, 4, "use: ladder"), source, settings, None, tmp_path / "cache", quiet
    )
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(source), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=list(settings.tasks),
        limit=6,
        task_manager=TaskManager(
            include_path=[str(p) for p in settings.include_path], include_defaults=False
        ),
    )["results"]
    assert len(found.rows) == 5
    for row in found.rows:
        assert row.source is not None and row.source.interval is not None
        expected = theirs[row.task][f"{row.metric},{row.filter}"]
        assert row.source.value == pytest.approx(expected, rel=1e-6), (row.task, row.metric)
        assert row.source.interval[0] <= row.source.value <= row.source.interval[1]
        stderr = theirs[row.task][f"{row.metric}_stderr,{row.filter}"]
        assert row.source_stderr == (pytest.approx(stderr) if stderr != "N/A" else None)


@pytest.mark.slow
def test_plain_lm_eval_scores_a_converted_checkpoint(
    source: Path, settings: Settings, convert: Convert, run_without_ptconvert: Run, tmp_path: Path
) -> None:
    """In a process of its own that can't import ptconvert: lm-eval with trust_remote_code."""
    converted = convert(source, 4, "use: parallel_track, depth: 2")
    arguments = f"pretrained={converted},trust_remote_code=True,dtype=float32"
    command = ["run", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", *MADE, "--include_path", str(settings.include_path[0])]
    command += ["--limit", "6", "--batch_size", "4", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    script = (
        f"{WITHOUT_PTCONVERT}\nimport runpy; runpy.run_module('lm_eval', None, '__main__', True)"
    )
    done = run_without_ptconvert(script, *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    written = next((tmp_path / "out").rglob("results_*.json"))
    theirs = json.loads(written.read_text())["results"]
    found = evaluate(converted, None, settings, None, tmp_path / "cache", quiet)
    for (task, metric), row in by_name(found).items():
        if task in MADE:
            assert row.converted.value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-5)
            assert row.source is None and row.difference is None


def test_groups_are_lm_evals(
    source: Path, own_tasks: Path, convert: Convert, tmp_path: Path
) -> None:
    asked = Settings(("both",), (own_tasks,), limit=6, dtype="float32")
    converted = convert(source, 4, "use: ladder")
    found = by_name(evaluate(converted, source, asked, None, tmp_path / "cache", quiet))
    group, task = found["both", "acc"], found[tasks.CLOZE_TASK, "acc"]
    assert group.group and not task.group
    assert group.converted.value == pytest.approx(task.converted.value)
    assert group.difference is not None and task.difference is not None
    assert group.difference.value == pytest.approx(task.difference.value)


# The cache


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that get opened."""
    names: list[str] = []
    real = open_model

    def counting(checkpoint: Any, dtype: str, device: str) -> Any:
        names.append(checkpoint.path.name)
        return real(checkpoint, dtype, device)

    monkeypatch.setattr(running, "open_model", counting)
    return names


@pytest.mark.slow
def test_the_next_conversion_finds_the_sources_answers(
    source: Path, settings: Settings, convert: Convert, tmp_path: Path, opened: list[str]
) -> None:
    cache = tmp_path / "cache"
    one, two = convert(source, 4, "use: ladder"), convert(source, 2, "use: sync_point_drop")
    moved = shutil.copytree(source, tmp_path / "moved")  # the content counts, not the place
    first = evaluate(one, source, settings, None, cache, quiet)
    assert opened == ["source", one.name]
    second = evaluate(two, moved, settings, None, cache, quiet)
    assert opened[2:] == [two.name]
    again = evaluate(one, source, settings, None, cache, quiet)
    assert opened[3:] == []
    assert again.to_json() == first.to_json()
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a.source is not None and b.source is not None
        assert (a.source.value, a.source.interval) == (b.source.value, b.source.interval)


@pytest.mark.parametrize("change", ["dtype", "weights", "documents", "task"])
def test_another_model_setting_or_task_is_answered_anew(
    change: str,
    source: Path,
    settings: Settings,
    tmp_path: Path,
    opened: list[str],
    own_tasks: Path,
) -> None:
    cache, model = tmp_path / "cache", shutil.copytree(source, tmp_path / "model")
    asked = Settings((tasks.CLOZE_TASK,), settings.include_path, limit=3, dtype="float32")
    evaluate(model, None, asked, None, cache, quiet)
    assert opened == ["model"]
    options = vars(asked)
    if change == "dtype":
        asked = Settings(**{**options, "dtype": "bfloat16"})
    elif change == "documents":
        asked = Settings(**{**options, "limit": 4})
    elif change == "task":
        edited = shutil.copytree(own_tasks, tmp_path / "edited")
        file = edited / f"{tasks.CLOZE_TASK}.yaml"
        file.write_text(file.read_text().replace("{{context}}", "Next line: {{context}}"))
        asked = Settings(**{**options, "include_path": (edited,)})
    else:
        weights = model / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    evaluate(model, None, asked, None, cache, quiet)
    assert opened == ["model", "model"]


def test_an_interrupted_run_goes_on_where_it_was(
    source: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, answered = tmp_path / "cache", list[str]()
    real = lm.UnopenedLM.add_partial

    def counting(self: Any, kind: str, request: Any, answer: Any) -> None:
        if answered and answered[-1] == "stop":
            answered.pop()
            raise KeyboardInterrupt
        real(self, kind, request, answer)
        answered.append(kind)
        if len(answered) == 11:
            answered.append("stop")

    monkeypatch.setattr(lm.UnopenedLM, "add_partial", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(source, None, settings, None, cache, quiet)
    assert len(answered) == 11
    found = evaluate(source, None, settings, None, cache, quiet)
    # 6 documents of perplexity, 6 x 4 choices, 6 to go on with: each was answered once.
    assert len(answered) == 6 + 24 + 6
    assert {row.documents for row in found.rows} == {6}


@pytest.mark.slow
def test_batches_shrink_when_memory_runs_out(
    source: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(source, None, settings, None, tmp_path / "one", quiet)
    real, sizes = torch.nn.Embedding.forward, list[int]()

    def small(self: Any, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", small)
    found = evaluate(source, None, settings, None, tmp_path / "two", quiet)
    assert max(sizes) == 4 and sizes[-1] == 1
    for a, b in zip(expected.rows, found.rows, strict=True):
        assert a.converted.value == pytest.approx(b.converted.value, rel=1e-5)

    def none(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.Embedding, "forward", none)
    with pytest.raises(EvaluationError, match="even with one sequence at a time"):
        evaluate(source, None, settings, None, tmp_path / "three", quiet)


def test_one_model_at_a_time_is_in_memory(
    source: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    others: list[int] = []

    def watching(checkpoint: Any, dtype: str, device: str) -> Any:
        others.append(len(alive))
        model = open_model(checkpoint, dtype, device)
        alive.add(model)
        return model

    monkeypatch.setattr(running, "open_model", watching)
    asked = Settings((tasks.CLOZE_TASK,), settings.include_path, limit=2, dtype="float32")
    other = shutil.copytree(source, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")  # another model, to be answered anew
    evaluate(other, source, asked, Text(TEXTS, 32, 4), tmp_path / "cache", quiet)
    assert others == [0, 0, 0, 0] and not alive


def test_metrics_are_paired_by_name_and_document() -> None:
    def metric(name: str, documents: tuple[str, ...], *values: float) -> Metric:
        return Metric(name, "none", None, True, documents, values, mean)

    one, two = ("0:a", "1:b"), ("0:a", "1:c")
    source = Task("t", "1", "generate_until", 0, (metric("b", one, 5, 5), metric("c", one, 1, 2)))
    ours = Task("t", "1", "generate_until", 0, (metric("a", one, 1, 1), metric("c", two, 1, 2)))
    rows = list(running._rows(Scores((source,), ()), Scores((ours,), ()), 0))
    assert [(row.metric, row.source, row.unpaired) for row in rows] == [
        ("a", None, True),
        ("c", None, True),
    ]
    (same,) = running._rows(
        Scores((source,), ()),
        Scores((dataclasses.replace(source, metrics=source.metrics[1:]),), ()),
        0,
    )
    assert same.source is not None and same.source.value == 1.5 and not same.unpaired


# The divergence


@pytest.mark.parametrize(
    ("characters", "windows"), [(99, 1), (197, 1), (198, 2), (494, 4), (495, 5), (7_000, 64)]
)
def test_as_many_windows_as_do_not_overlap(
    characters: int, windows: int, source: Path, tmp_path: Path
) -> None:
    """A text of 5T + 1 tokens, the first of which begins it, has 5 windows of T."""
    text = tmp_path / "text"
    text.write_text("x" * characters)
    found = windows_for(open_checkpoint(source), [text], 99, None)
    assert found.ids.shape == (windows, 100) and not found.overlapping
    assert found.tokens == characters + 1


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 12))
def test_windows_lie_evenly_and_apart_where_so_many_fit(
    tokens: int, length: int, count: int
) -> None:
    fitting = (tokens - 1) // length
    assume(fitting >= 1)
    ids, places = list(range(tokens)), tokens - length
    if count > places:
        with pytest.raises(EvaluationError, match="too few for so many windows"):
            cut_windows(ids, length, count)
        return
    found = cut_windows(ids, length, count)
    starts = found.ids[:, 0].tolist()
    assert found.ids.tolist() == [ids[s : s + length + 1] for s in starts]  # all within the text
    assert len(starts) == count and starts[0] == 0
    assert {b - a for a, b in itertools.pairwise(starts)} <= {found.step}
    assert found.overlapping == (count > fitting)
    assert tokens - 1 - length - starts[-1] <= found.step + count  # to the end of the text


def test_outputs_that_are_not_finite_are_said(source: Path, tmp_path: Path, run: Answers) -> None:
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][:] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    page = tmp_path / "r.html"
    arguments = [broken, "--baseline", source, "--text", TEXTS[0], "--window", 32, "--html", page]
    done = run(*arguments)
    assert "no intervals" in run(*arguments[:-2], "--windows", 5).stdout
    assert done.exit_code == 0 and "not all finite" in done.stdout and page.exists(), done.output
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["divergence"]["whole"]["kl"]["value"] is None


def test_a_model_and_itself_do_not_diverge(source: Path, convert: Convert, tmp_path: Path) -> None:
    asked = Settings((), dtype="float32")
    text = Text(TEXTS, 64, 12, blocks=True)
    for other in (source, convert(source, 4, "use: tensor_parallel")):
        found = evaluate(other, source, asked, text, tmp_path, quiet).divergence
        assert found is not None and found.by_block == ()
        assert found.whole.kl.value == 0 and found.whole.agreement.value == 1
        assert found.whole.loss.value == 0 and found.whole.loss.p_value == 1


def test_divergence_is_what_the_definitions_say(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted = convert(source, 4, "use: parallel_track, depth: 2")
    asked = Settings((), dtype="float32")
    found = evaluate(converted, source, asked, Text(TEXTS, 48, 10), tmp_path, quiet).divergence
    assert found is not None and (found.windows, found.length, found.overlapping) == (10, 48, False)
    tokenizer = open_tokenizer(open_checkpoint(source))
    ids = [t for path in TEXTS for t in (0, *tokenizer(path.read_text()).input_ids)]
    assert found.tokens == len(ids)
    step = (len(ids) - 49) // 10
    windows = torch.tensor([ids[i * step : i * step + 49] for i in range(10)])
    with torch.no_grad():
        p, q = (load(m)(windows[:, :-1]).logits.log_softmax(-1) for m in (source, converted))
    kl = (p.exp() * (p - q)).sum(-1)
    loss = -q.gather(-1, windows[:, 1:, None])[..., 0]
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    assert found.whole.kl.value == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.whole.converted_loss.value == pytest.approx(loss.mean().item(), rel=1e-4)
    assert found.whole.agreement.value == pytest.approx(agree.mean().item())
    assert [(b.first, b.last) for b in found.by_position] == [(0, 7), (8, 15), (16, 31), (32, 47)]
    assert found.by_position[2].closeness.kl.value == pytest.approx(
        kl[:, 16:32].mean().item(), rel=1e-4
    )


def test_a_block_alone_is_the_model_converted_so(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    """The block's figures are those of a checkpoint in which only its layers were converted."""
    rows = (
        "  - {layers: 0-1, use: parallel_track, depth: 2}\n"
        "  - {layers: 2, use: tensor_parallel}\n"
        "  - {layers: 3-5, use: delayed, delay: 2}\n"
    )
    alone = "  - {layers: 0-2, use: tensor_parallel}\n  - {layers: 3-5, use: delayed, delay: 2}\n"
    asked, text = Settings((), dtype="float32"), Text(TEXTS, 48, 8, blocks=True)
    whole, part = (
        evaluate(convert(source, 4, r), source, asked, text, tmp_path, quiet).divergence
        for r in (rows, alone)
    )
    assert whole is not None and part is not None
    assert [(b.first_layer, b.last_layer) for b in whole.by_block] == [(0, 1), (3, 5)]
    assert [(b.waited_before, b.waited_after) for b in whole.by_block] == [(4, 1), (6, 1)]
    assert whole.by_block[1].closeness.kl.value == pytest.approx(part.whole.kl.value, rel=1e-4)
    assert whole.by_block[1].closeness.kl.value != pytest.approx(whole.whole.kl.value, rel=0.01)


def test_windows_that_overlap_are_said(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("one two three four five six " * 5)
    asked = Settings((), dtype="float32")
    found = evaluate(source, source, asked, Text((text,), 40, 8), tmp_path, quiet)
    assert found.divergence is not None and found.divergence.overlapping
    assert any("overlap" in note for note in found.notes)
    with pytest.raises(EvaluationError, match="--windows 500: the text has 141 tokens"):
        evaluate(source, source, asked, Text((text,), 40, 500), tmp_path, quiet)


# Tasks from a text


def test_made_tasks_are_reproducible_and_fair(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert tasks.make_tasks(tmp_path / name, TEXTS, 7) == MADE
    files = {n: sorted((tmp_path / n).glob("*.jsonl")) for n in "ab"}
    assert [f.read_text() for f in files["a"]] == [f.read_text() for f in files["b"]]
    lines = (tmp_path / "a" / f"{tasks.CLOZE_TASK}.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    text = "".join(path.read_text() for path in TEXTS)
    assert len(questions) > 5
    for question in questions:
        choices = question["choices"]
        assert len(set(choices)) == 4 and all(choice in text for choice in choices)
        assert question["context"] + choices[question["answer"]] in text
    assert {q["answer"] for q in questions} > {0}  # the place tells nothing
    documents = (tmp_path / "a" / f"{tasks.PERPLEXITY_TASK}.jsonl").read_text().splitlines()
    assert all(json.loads(d)["text"] in text for d in documents)


def test_multiple_choice_alone_is_warned_of(
    source: Path, settings: Settings, tmp_path: Path
) -> None:
    choice = Settings((tasks.CLOZE_TASK,), settings.include_path, limit=2)
    notes = evaluate(source, None, choice, None, tmp_path, quiet).notes
    assert any("hides the damage" in note and "85.0 to 10.5" in note for note in notes)
    assert any("--limit 2" in note for note in notes)
    assert not any(
        "hides" in n for n in evaluate(source, None, settings, None, tmp_path, quiet).notes
    )


# The command


@pytest.fixture
def run(tmp_path: Path) -> Answers:
    def invoke(*arguments: object) -> Any:
        cache = ["--cache", tmp_path / "cache"] if "--cache" not in arguments else []
        return CliRunner().invoke(main, ["eval", *map(str, [*arguments, *cache])])

    return invoke


def test_the_whole_command(source: Path, convert: Convert, run: Answers, tmp_path: Path) -> None:
    converted, page = convert(source, 4, "use: parallel_track, depth: 2"), tmp_path / "r.html"
    texts = [x for path in TEXTS for x in ("--text", path)]
    arguments = [converted, "--baseline", source, *texts, "--window", 64, "--windows", 8]
    arguments += ["--make-tasks", tmp_path / "made", "--limit", 6, "--dtype", "float32"]
    done = run(*arguments, "--blocks", "--html", page)
    assert done.exit_code == 0, done.output
    assert re.search(
        r"^--blocks: 3 x a pass over 8 windows, about \d:\d\d:\d\d \(one over all 8 took ",
        done.stderr,
        re.MULTILINE,
    )
    for word in (*MADE, "KL(source || converted)", "a0. m0. a1. m1!", "--limit 6"):
        assert word in done.stdout, word
    html = page.read_text()
    assert "<script" not in html and not re.search(r"(src|href)\s*=", html)
    for word in (*MADE, "Divergence on text", "KL, nats per token", "McNemar", "position"):
        assert word in html
    again = run(*arguments, "--json")
    data = json.loads(again.stdout)
    assert {row["task"] for row in data["rows"]} == set(MADE)
    row = next(r for r in data["rows"] if r["metric"] == "byte_perplexity")
    assert row["difference"]["interval"][0] <= row["difference"]["value"]
    assert row["verdict"] in ("worse", "better", "no difference found")
    assert data["divergence"]["whole"]["kl"]["value"] > 0
    assert data["divergence"]["by_block"] == []  # only where asked for
    assert "--blocks" not in again.stderr
    assert data["digests"].keys() == {"source", "converted"}


def test_a_ladder_checkpoint_of_its_authors_is_scored_as_ladder(
    source: Path, tmp_path: Path, run: Answers
) -> None:
    theirs = shutil.copytree(source, tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "ladder_layers": [2, 3, 4, 5]}))
    done = run(
        theirs, "--baseline", source, "--text", TEXTS[0], "--window", 48, "--blocks", "--json"
    )
    found = json.loads(done.stdout)["divergence"]
    assert found["whole"]["kl"]["value"] > 0 and len(found["by_block"]) == 1


@pytest.mark.parametrize("owner", ["runner", "task"])
def test_our_own_faults_are_not_called_a_tasks(
    owner: str,
    source: Path,
    convert: Convert,
    own_tasks: Path,
    run: Answers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A TypeError in the converted model's forward pass, and one in a task's own function."""
    tasks_folder = shutil.copytree(own_tasks, tmp_path / "own")
    converted = convert(source, 4, "use: parallel_track, depth: 2")
    arguments = (converted, "--tasks", tasks.CLOZE_TASK, "--include-path", tasks_folder)
    if owner == "task":
        (tasks_folder / "code.py").write_text("def first(doc):\n    return doc + 1\n")
        task = tasks_folder / f"{tasks.CLOZE_TASK}.yaml"
        lines = [s for s in task.read_text().splitlines() if not s.startswith("doc_to_text")]
        task.write_text("\n".join([*lines, "doc_to_text: !function code.first", ""]))
        done = run(*arguments)
        assert done.exit_code == 2 and "can't run it on this model: TypeError" in done.output
    else:
        monkeypatch.setattr(model, "run_program", len)  # which takes no such arguments
        done = run(*arguments)
        assert isinstance(done.exception, TypeError), done.output


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", "x", "config.json: Validation error for field 'rms_norm_eps': "),
        ("hidden_act", "foo", "config.json asks for 'foo', which transformers doesn't have"),
    ],
)
def test_a_wrong_config_is_not_the_tokenizers_fault(
    key: str, value: str, said: str, source: Path, run: Answers, tmp_path: Path
) -> None:
    path = shutil.copytree(source, tmp_path / "bad")
    config = json.loads((path / "config.json").read_text()) | {key: value}
    (path / "config.json").write_text(json.dumps(config))
    done = run(path, "--baseline", source, "--text", TEXTS[0])
    assert done.exit_code == 2 and said in done.output and "tokenizer" not in done.output
    assert not done.output.endswith(":\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{src}", "--tasks", "text_cloze", "--include-path", "{own}", "--apply-chat-template"],
            "lm-eval can't run it on this model: ValueError",
        ),
        (["{src}", "--tasks", "long", "--include-path", "{long}"], "must be less than model's max"),
        (["{src}", "--make-tasks", "{theirs}", "--text", "{text}"], "not of --make-tasks"),
        (
            ["{damaged}", "--tasks", "text_cloze", "--include-path", "{own}"],
            "missing tensor lm_head",
        ),
        pytest.param(
            *(["{src}", "--tasks", "no_such_task"], "there is no task 'no_such_task'"),
            marks=pytest.mark.slow,  # lm-eval looks through all that it has
        ),
        (["{src}"], "gsm8k, ifeval, wikitext: "),
        (["{src}", "--tasks", "gsm8k"], "data is neither here nor can the hub be reached"),
        (["{src}", "--text", "{text}"], "give --baseline SRC"),
        (["{src}", "--baseline", "{src}", "--text", "{text}", "--window", "900"], "256 positions"),
        (["{src}", "--baseline", "{src}", "--text", "{binary}"], "is not a text in UTF-8"),
        (["{src}", "--baseline", "{src}", "--text", "{empty}"], "the text has 1 tokens"),
        (["{src}", "--baseline", "{src}/none", "--tasks", "x"], "neither a directory nor a hub id"),
        (["{src}", "--tasks", "x", "--device", "warp"], "--device warp: torch can't use it"),
        (["{src}", "--batch-size", "0"], "neither auto nor a number"),
        (["{src}", "--windows", "3"], "--windows: for --text FILE only"),
        (
            ["{src}", "--baseline", "{src}", "--text", "{text}", "--limit", "2"],
            "--limit: for --tasks only",
        ),
        (["{strict}", "--baseline", "{strict}", "--text", "{text}"], "rms_norm_eps"),
        (
            ["{src}", "--tasks", "x", "--text", "{text}", "--speculate", "3"],
            "--speculate compares with a source: give --baseline SRC",
        ),
        (["{src}", "--tasks", "x", "--blocks"], "--blocks: for --text FILE only"),
        (["--tasks", "x"], "give the checkpoint"),
        (["--make-tasks", "{dir}"], "needs a text"),
        (["--make-tasks", "{dir}", "--text", "{short}"], "too short to make tasks of"),
        (["{bare}", "--tasks", "text_cloze", "--include-path", "{own}"], "no tokenizer can be"),
        (["{bare}", "--baseline", "{bare}", "--text", "{text}"], "there is no file of one"),
        (
            ["{src}", "--tasks", "x", "--html", "{dir}/no/r.html"],
            "it must be a writable file in a directory that exists",
        ),
        (
            ["{other}", "--baseline", "{src}", "--text", "{text}"],
            "the source's vocab_size is 260, the converted model's 280; --baseline",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    arguments: list[str],
    message: str,
    source: Path,
    make_dense: MakeDense,
    own_tasks: Path,
    run: Answers,
    tmp_path: Path,
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a b c d\n")
    names = {"src": source, "bare": make_dense(), "text": TEXTS[0], "dir": tmp_path / "dir"}
    names |= {name: tmp_path / name for name in ("binary", "empty", "short")}
    names["own"] = own_tasks
    names |= {name: tmp_path / name for name in ("long", "theirs", "damaged")}
    shutil.copytree(own_tasks, tmp_path / "long")
    text = (own_tasks / "continue.yaml").read_text()
    text = text.replace("max_gen_toks: 8", "max_gen_toks: 600").replace(
        "task: continue", "task: long"
    )
    (tmp_path / "long" / "continue.yaml").write_text(text)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "text_cloze.yaml").write_text("task: text_cloze\n")
    shutil.copytree(source, tmp_path / "damaged")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    names["strict"] = shutil.copytree(source, tmp_path / "strict")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "strict" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "1e-6"}))
    names["other"] = make_dense(vocab_size=280, max_position_embeddings=512)
    done = run(*(argument.format(**names) for argument in arguments))
    assert done.exit_code == 2 and message in done.output, done.output
    assert "Traceback" not in done.output
    lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1 and not (tmp_path / "dir").exists()


def test_tasks_can_be_made_without_a_model(run: Answers, tmp_path: Path) -> None:
    done = run("--make-tasks", tmp_path / "made", "--text", TEXTS[0])
    assert done.exit_code == 0 and "--include-path" in done.output
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == sorted(
        f"{name}.{kind}" for name in MADE for kind in ("jsonl", "yaml")
    )


def test_auto_is_float32_where_the_stored_dtype_is_slow(
    source: Path, make_dense: MakeDense, run: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, said = open_checkpoint(make_dense("llama", torch.bfloat16)), list[str]()
    assert dtypes.fastest_dtype(stored, "cpu", quiet) in ("bfloat16", "float32")  # as it is here
    for seconds, expected in ((7.0, "float32"), (1.2, "bfloat16"), (0.5, "bfloat16")):
        times = {"float32": 1.0, "bfloat16": seconds}
        monkeypatch.setattr(dtypes, "_product_seconds", lambda _, __, dtype, t=times: t[dtype])
        assert dtypes.fastest_dtype(stored, "cpu", said.append) == expected
    assert said == ["computing in float32: bfloat16, which is stored, is 7.0 times slower on cpu"]
    monkeypatch.setattr(dtypes, "_product_seconds", None)  # never slower than itself
    assert dtypes.fastest_dtype(open_checkpoint(source), "cpu", said.append) == "float32"
    monkeypatch.setattr(dtypes, "fastest_dtype", lambda *_: "bfloat16")
    text = ("--text", TEXTS[0], "--window", 32, "--windows", 4)
    done = run(source, "--baseline", source, *text, "--json")
    assert json.loads(done.stdout)["settings"]["dtype"] == "bfloat16"


def test_batch_size_halves_and_stays() -> None:
    batch, tried = BatchSize(8, "cpu"), list[int]()

    def run(size: int) -> int:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    assert (batch.fitting(run), batch.fitting(run)) == (2, 2)
    assert tried == [8, 4, 2, 2]
    with pytest.raises(RuntimeError, match="something else"):
        batch.fitting(lambda _: (_ for _ in ()).throw(RuntimeError("something else")))


def test_default_suite_shows_damage() -> None:
    assert not tasks.hides_damage(["generate_until", "multiple_choice"])
    assert tasks.DEFAULT_TASKS[0] == "gsm8k"
    assert divergence.BLOCK_WINDOWS < DEFAULT_WINDOWS
