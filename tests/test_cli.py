"""The command line: what people and machines see, and exit codes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import Convert, MakeDense, spec_text
from safetensors.torch import load_file

from ptconvert import __version__
from ptconvert.cli import main
from ptconvert.cli.common import to_json

SPEC = spec_text(4, "use: parallel_track, depth: 2")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Runs a command; returns stdout and stderr."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_help_and_version() -> None:
    out, _ = run("--help")
    assert "ptconvert transform SRC DST --spec SPEC" in out and "Exit codes" in out
    for command in ("transform", "show"):
        assert "Usage:" in run(command, "--help")[0]
    version = [sys.executable, "-m", "ptconvert", "--version"]
    assert __version__ in subprocess.run(version, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_other_libraries_say_nothing_of_themselves() -> None:
    """torchao, where it is, names at import the kernels that it has for other machines."""
    code = (
        "from ptconvert.runtime.quiet import quiet_libraries; quiet_libraries()\n"
        "import transformers.modeling_utils"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_verify_says_which_runtime_takes_an_option(tmp_path: Path) -> None:
    for options, word in (
        (("--runtime", "torch", "--enforce-eager"), "--enforce-eager"),
        (("--runtime", "vllm", "--backend", "gloo"), "--backend"),
    ):
        _, err = run("verify", tmp_path, "--ranks", 2, *options, code=2)
        assert f"takes no {word}" in err
    if importlib.util.find_spec("vllm") is None:
        _, err = run("verify", tmp_path, "--ranks", 2, "--runtime", "vllm", code=2)
        assert "pip install 'ptconvert[vllm]'" in err


def test_transform_and_back(make_dense: MakeDense, spec: Path, tmp_path: Path) -> None:
    source = make_dense("llama")
    out, err = run("transform", source, tmp_path / "out", "--spec", spec)
    first, said = out.split("\n", 1)
    assert "12 → 3" in first and err == ""
    assert " ".join(said.split()).startswith("For 4 ranks, a track each. On 2 a rank runs")
    out, _ = run("transform", tmp_path / "out", tmp_path / "back", "--to-dense", "--json")
    figures = json.loads(out)
    assert figures["all_reduces"] == {"before": 3, "after": 12} and figures["note"] is None
    a, b = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_dry_run_writes_nothing(make_dense: MakeDense, spec: Path, tmp_path: Path) -> None:
    arguments = ("transform", make_dense("llama"), tmp_path / "out", "--spec", spec, "--dry-run")
    out, _ = run(*arguments)
    for what in ("6 as 4 tracks (0-5)", "12 before, 3 after", "57 tensors", "enough", "free"):
        assert what in out
    figures = json.loads(run(*arguments, "--json")[0])
    assert figures["layers_as_tracks"] == [0, 1, 2, 3, 4, 5] and figures["bytes_free"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]


def test_errors_are_lines_with_exit_code_2(
    make_dense: MakeDense, spec: Path, tmp_path: Path
) -> None:
    source, out = make_dense("llama"), tmp_path / "out"
    _, err = run("transform", tmp_path / "none", out, "--spec", spec, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1
    spec.write_text(SPEC.replace("tracks: 4", "tracks: 5").replace("0-5", "0-6"))
    _, err = run("transform", source, out, "--spec", spec, code=2)
    assert [line.split(":")[:3] for line in err.splitlines()] == [
        ["error", f" {spec}", "2"],
        ["error", f" {spec}", "4"],
    ]
    run("transform", source, out, code=2)
    run("transform", source, out, "--spec", spec, "--to-dense", code=2)
    run("transform", source, out, "--spec", spec, "--shard-size", "5 parsecs", code=2)
    run("transform", source, out, "--spec", tmp_path / "none.yaml", code=2)
    run("transform", source, out, "--spec", spec, "--revision", "main", code=2)
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", "small", "'rms_norm_eps'"),
        ("hidden_act", "none-such", "'none-such'"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "'factor'"),
        ("rope_parameters", 3, "'rope_parameters'"),
    ],
)
def test_a_config_that_transformers_cannot_open_is_refused_before_anything_is_written(
    key: str,
    value: object,
    said: str,
    make_dense: MakeDense,
    spec: Path,
    tmp_path: Path,
) -> None:
    source = shutil.copytree(make_dense("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    for more in ((), ("--dry-run",)):
        _, err = run("transform", source, tmp_path / "out", "--spec", spec, *more, code=2)
        assert err.startswith(f"error: {source}/config.json: transformers can't make a model of it")
        assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (("show", ""), "SPEC"),
        (("show", "spec.yaml", "--model", ""), "--model"),
        (("plan", "", "--tracks", 2), "SRC"),
        (("estimate", "--model", "llama-3.1-8b", ""), "[SPEC]..."),
        (("transform", "", "out"), "SRC"),
        (("transform", "source", ""), "DST"),
        (("transform", "source", "out", "--spec", ""), "--spec"),
        (("heal", "", "out"), "CKPT"),
        (("heal", "source", ""), "DST"),
        (("heal", "source", "out", "--teacher", ""), "--teacher"),
        (("verify", ""), "CKPT"),
        (("verify", "source", "--report", " "), "--report"),
        (("eval", ""), "[CKPT]"),
        (("eval", "source", "--baseline", ""), "--baseline"),
        (("eval", "source", "--cache", ""), "--cache"),
    ],
)
def test_an_empty_path_is_no_path(line: tuple[object, ...], named: str) -> None:
    """And not the directory that one is in."""
    result = CliRunner().invoke(main, list(map(str, line)))
    assert result.exit_code == 2
    assert f"Invalid value for '{named}': it is empty; name a path" in result.output


def test_a_revision_is_of_a_hub_id(make_dense: MakeDense, convert: Convert, spec: Path) -> None:
    converted = str(convert(make_dense("llama"), 2, "use: ladder"))
    hardware = ("--hardware", "h100-pcie")
    for named, line in (
        (spec, ("show", spec, "--layers", 6)),
        (converted, ("show", converted)),
        (converted, ("estimate", converted, *hardware)),
        ("llama-3.1-8b", ("estimate", "llama-3.1-8b", *hardware)),
    ):
        result = CliRunner().invoke(main, [*map(str, line), "--revision", "main"])
        assert result.exit_code == 2
        assert result.output == f"error: --revision main: {named} is not a hub id\n"


def test_json_has_no_nan() -> None:
    figures = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (2, -math.inf)}, "e": "nan"}
    read = json.loads(to_json(figures), parse_constant=pytest.fail)
    assert read == {"a": None, "b": [None, 1.5], "c": {"d": [2, None]}, "e": "nan"}


def test_show_of_what_is_not_converted(make_dense: MakeDense) -> None:
    source = make_dense("llama")
    _, err = run("show", source, code=2)
    assert err == f"error: {source} is not converted; name a spec, or a converted checkpoint\n"


def test_an_unreadable_file_is_one_line(
    make_dense: MakeDense, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every file can be read, so reading is made to fail."""
    real = os.open

    def refuse(path: str, *arguments: int, **options: int) -> int:
        if str(path).endswith("model.safetensors") and "out" not in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    _, err = run("transform", make_dense("llama"), tmp_path / "out", "--spec", spec, code=2)
    assert "Permission denied" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["spec.yaml"]


def test_show_draws_the_schedule(make_dense: MakeDense, spec: Path, tmp_path: Path) -> None:
    out, _ = run("show", spec, "--layers", 6)
    assert "layer      0 1 2 3 4 5" in out
    assert "attention  . . . . . ." in out
    assert "MLP        . ! . ! . !" in out
    assert re.search(r"all-reduces per forward pass +12 +3 +4.0", out)
    out, _ = run("show", spec, "--model", make_dense("llama"))
    assert re.search(r"bytes per token per all-reduce +128 +128", out)
    figures = json.loads(run("show", spec, "--layers", 6, "--json")[0])
    assert figures["waited_for"] == {"before": 12, "after": 3}
    run("transform", make_dense("llama"), tmp_path / "out", "--spec", spec)
    assert run("show", tmp_path / "out")[0].startswith("layer")
    _, err = run("show", spec, "--layers", 5, code=2)
    assert f"{spec}:4: layers 0-5 exceed the model" in err
    run("show", spec, code=2)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_wide_schedules_wrap(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    spec = tmp_path / "s.yaml"
    text = SPEC.replace("0-5", "0-79").replace("depth: 2", "depth: 2, overlap: 10")
    spec.write_text(text)
    out, _ = run("show", spec, "--layers", 80)
    assert max(map(len, out.splitlines())) <= columns
    row = " ".join(line[10:] for line in out.splitlines() if line.startswith("layer "))
    assert row.split() == [str(i) for i in range(80)]


def test_a_progress_bar_on_a_terminal(make_dense: MakeDense, spec: Path, tmp_path: Path) -> None:
    main_end, terminal = pty.openpty()
    arguments = ["transform", make_dense("llama"), tmp_path / "out", "--spec", spec]
    command = [sys.executable, "-m", "ptconvert", *map(str, arguments)]
    done = subprocess.run(
        command, stderr=terminal, stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"}
    )
    os.close(terminal)
    assert done.returncode == 0
    assert b"writing out" in os.read(main_end, 65536)
    os.close(main_end)
