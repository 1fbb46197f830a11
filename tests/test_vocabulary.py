"""Token ids beyond the embedding: one line, from every command that reads text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Convert, MakeDense, byte_level, spec_text
from transformers import AutoTokenizer

import ptconvert
from ptconvert.cli import main
from ptconvert.evaluate import tasks

TEXT = Path(ptconvert.__file__).parent / "models" / "shape.py"
LAST = 260  # the first id without a row, and the last that the tokenizers here give


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(make_dense, tmp_path_factory.mktemp("vocabulary") / "dense")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    tasks.make_tasks(path, (TEXT,), 0)
    return path


def added(model: Path, path: Path, **special: Any) -> Path:
    """A copy of a model whose tokenizer has four tokens more than there were ids in use, the last
    without a row in the embedding; `special` names that one, as `bos_token` say."""
    shutil.copytree(model, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<|a|>", "<|b|>", "<|c|>"])
    tokenizer.add_special_tokens(special)
    assert max(tokenizer.get_vocab().values()) == LAST
    tokenizer.save_pretrained(path)
    return path


Arguments = Callable[[Path, Path, Path, Path], tuple[object, ...]]
COMMANDS: dict[str, Arguments] = {
    "eval --text": lambda s, t, _, __: ("eval", t, "--baseline", s, "--text", TEXT),
    "eval --tasks": lambda s, t, _, made: (
        *("eval", t, "--baseline", s, "--include-path", made, "--limit", 2),
        *("--tasks", f"{tasks.PERPLEXITY_TASK},{tasks.CLOZE_TASK}"),
    ),
    "plan": lambda s, _, d, __: (
        *("plan", s, "--tracks", 2, "--text", TEXT, "--max-syncs", 4, "--window", 32),
        *("--windows", 2, "-o", d / "out"),
    ),
    "transform": lambda s, _, d, __: (
        *("transform", s, d / "out", "--text", TEXT, "--window", 32, "--tokens", 64),
        *("--spec", d / "spec.yaml"),
    ),
    "heal": lambda s, t, d, __: (
        *("heal", t, d / "out", "--teacher", s, "--text", TEXT, "--tokens", 500, "--window", 32),
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_first_token_without_embedding_is_one_line(
    command: str, dense: Path, convert: Convert, own_tasks: Path, tmp_path: Path
) -> None:
    source = added(dense, tmp_path / "source", bos_token="<|begin|>")
    converted = convert(source, 2, "use: parallel_track, depth: 2")
    spec = spec_text(2, "use: parallel_track, depth: 2", "assignment: affinity\n")
    (tmp_path / "spec.yaml").write_text(spec)
    arguments = COMMANDS[command](source, converted, tmp_path, own_tasks)
    cache = ("--cache", tmp_path / "cache") if command[:4] in ("eval", "plan") else ()
    done = CliRunner().invoke(main, [str(a) for a in (*arguments, *cache)])
    assert done.exit_code == 2, done.output
    line = done.stderr.strip().splitlines()[-1]
    assert f"gives '<|begin|>' the id {LAST}" in line and "embedding has 260 rows" in line, line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("text", ["x", "<|d|>"])
def test_a_token_without_embedding_matters_where_it_is_in_the_text(
    text: str, dense: Path, tmp_path: Path
) -> None:
    """Many models have one, for padding in training, and work."""
    source = added(dense, tmp_path / "source", extra_special_tokens=["<|d|>"])
    sample = tmp_path / "text"
    sample.write_text(text * 100)
    arguments = ["eval", source, "--baseline", source, "--text", sample, "--window", 16]
    arguments += ["--cache", tmp_path / "cache", "--dtype", "float32"]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == (0 if text == "x" else 2), done.output
    assert ("the id 260" in done.output) == (text != "x")


def test_padding_without_embedding_is_one_line(dense: Path, tmp_path: Path) -> None:
    """What lm-eval pads prompts of unequal lengths with."""
    source = added(dense, tmp_path / "source", pad_token="<|pad|>")
    lines = "\n".join(
        f'{{"context": "{c}", "choices": ["x"], "answer": 0}}' for c in ("one", "three more")
    )
    (tmp_path / "two.jsonl").write_text(lines)
    (tmp_path / "two.yaml").write_text(
        "task: two\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'two.jsonl'}}}}}\n"
        "doc_to_text: '{{context}}'\ndoc_to_target: x\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 2, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = ["eval", source, "--tasks", "two", "--include-path", tmp_path]
    arguments += ["--cache", tmp_path / "cache", "--dtype", "float32", "--batch-size", 2]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 2, done.output
    assert "gives '<|pad|>' the id 260" in done.stderr.strip().splitlines()[-1], done.output
