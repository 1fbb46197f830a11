"""Checkpoints from and to the hub: the real command line against a loopback stand-in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hub_stand_in import Files, HubStandIn, commit_id
from safetensors.numpy import load_file

SPEC = """format: 1
tracks: 2
schedule:
  - {layers: 0, use: tensor_parallel}
  - {layers: 1, use: parallel_track, depth: 1}
"""
DENSE, PUSHED = "acme/tiny-llama", "acme/tiny-llama-tracks"
# Beside the weights: what goes along, and what must not be downloaded.
SMALL: Files = {
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}\n',
    "tokenization_x.py": b"from .base_x import X\n",
    "base_x.py": b"from transformers import PreTrainedTokenizerFast as X\n",
    "tokenizer.model.v3": b"sentencepiece\n",
    "chat_template.jinja": b"{{ messages }}\n",
    "LICENSE.txt": b"do as you like\n",
    "README.md": b"---\nlicense: apache-2.0\n---\n# tiny\n",
}
UNWANTED: Files = {
    "consolidated.safetensors": b"a vendor's second copy",
    "consolidated.safetensors.index.json": b"{}",
    "params.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "train.py": b"raise SystemExit\n",
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in several shards, in a directory of the name that it has on the hub."""
    path = tmp_path_factory.mktemp("source") / "tiny-llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    for name, data in SMALL.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def hub(dense: Path) -> Iterator[HubStandIn]:
    """A hub with the checkpoint at the tag v1; `main` can't be converted, so it isn't mistaken."""
    with HubStandIn() as hub:
        hub.repos[DENSE] = {"main": {"config.json": b"{}"}, "v1": {**files(dense), **UNWANTED}}
        yield hub


@pytest.fixture
def run(hub: HubStandIn, tmp_path: Path) -> Run:
    """Runs the command line in `tmp_path`, where the spec lies, with an empty cache of its own."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    # The rest of the suite runs with HF_HUB_OFFLINE, and a proxy doesn't reach our loopback.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "dummy",
        "NO_PROXY": "127.0.0.1",
    }

    def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ptconvert", *arguments],
            cwd=tmp_path,
            env={**inherited, **settings, **env},
            capture_output=True,
            text=True,
            timeout=30,  # no failure may take longer either
        )

    return call


@pytest.fixture
def nowhere() -> str:
    """The address of a hub that has gone."""
    with HubStandIn() as gone:
        return gone.url


def files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def written(directory: Path) -> Files:
    """A result's files, the name by which its model card calls it taken out."""
    card = re.sub(rb'from_pretrained\("[^"]+"', b"", (directory / "README.md").read_bytes())
    return {**files(directory), "README.md": card}


def tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor's dtype, shape and bytes."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for file in directory.glob("model*.safetensors"):
        found.update(load_file(file))
    return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in found.items()}


# A line of progress as a whole: when, what, how far, for how long.
PROGRESS = re.compile(
    r"[\d-]{10} [\d:]{8} .+: (\d.* of \d.*, )?[\d:]+ so far(, about [\d:]+ left)?"
)


def check_done(result: subprocess.CompletedProcess[str]) -> None:
    # On a busy machine a step takes longer than the two seconds after which it is told.
    said = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert (result.returncode, said) == (0, [])


def check_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, and one line on stderr that has all the words, beside progress."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


def test_a_hub_id_converts_like_a_directory(
    hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    check_done(run("transform", str(dense), "local", "--spec", "spec.yaml"))
    assert hub.requests == []
    check_done(run("transform", DENSE, "dst", "--spec", "spec.yaml", "--revision", "v1"))
    local, remote = written(tmp_path / "local"), written(tmp_path / "dst")
    assert SMALL.keys() <= remote.keys()
    # They differ by the source's name alone, which only a hub id makes a base model.
    base, hub_id, name = f"base_model: {DENSE}\n".encode(), DENSE.encode(), dense.name.encode()
    assert base in remote["README.md"]
    assert {k: v.replace(base, b"").replace(hub_id, name) for k, v in remote.items()} == local
    assert hub.files_asked_for() == files(dense).keys()


def test_a_cached_checkpoint_needs_no_hub(run: Run, nowhere: str, tmp_path: Path) -> None:
    arguments = ("--spec", "spec.yaml", "--revision", "v1")
    check_done(run("transform", DENSE, "first", *arguments))
    check_done(run("transform", DENSE, "second", *arguments, HF_ENDPOINT=nowhere))
    assert written(tmp_path / "first") == written(tmp_path / "second")


@pytest.mark.parametrize("alone", [False, True])
def test_adapters_are_refused(alone: bool, hub: HubStandIn, run: Run, dense: Path) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    hub.repos["acme/adapter"] = {"main": adapter if alone else {**files(dense), **adapter}}
    result = run("transform", "acme/adapter", "dst", "--spec", "spec.yaml")
    check_refused(result, "acme/adapter has an adapter", "merge it")
    assert hub.files_asked_for() == set()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused(
    weights: str, hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    config = (dense / "config.json").read_bytes()
    hub.repos["acme/pickled"] = {"main": {"config.json": config, weights: b"a pickle"}}
    result = run("transform", "acme/pickled", "dst", "--spec", "spec.yaml")
    check_refused(result, "acme/pickled", weights, "safetensors", "save_pretrained")
    assert weights not in hub.files_asked_for()
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("acme/unknown", "main", ("acme/unknown", "not on the hub")),
        (DENSE, "v2", (DENSE, "no revision v2")),
        ("acme/gated", "main", ("acme/gated is gated", "hf auth login")),
        ("acme/away", "main", ("acme/away", "out of reach")),
    ],
)
@pytest.mark.parametrize("command", ["transform", "show"])
def test_what_the_hub_refuses(
    command: str,
    source: str,
    revision: str,
    words: tuple[str, ...],
    hub: HubStandIn,
    run: Run,
    dense: Path,
    nowhere: str,
    tmp_path: Path,
) -> None:
    hub.repos["acme/gated"] = {"main": files(dense)}
    hub.gated = {"acme/gated"}
    env = {"HF_ENDPOINT": nowhere} if source == "acme/away" else {}
    arguments = {
        "transform": ("transform", source, "dst", "--spec", "spec.yaml"),
        "show": ("show", "spec.yaml", "--model", source),
    }
    check_refused(run(*arguments[command], "--revision", revision, **env), *words)
    assert not (tmp_path / "dst").exists()


def test_push_and_back(hub: HubStandIn, run: Run, dense: Path, tmp_path: Path) -> None:
    arguments = ("--spec", "spec.yaml", "--revision", "v1", "--push-to-hub", PUSHED)
    result = run("transform", DENSE, "dst", *arguments)
    check_done(result)
    pushed = hub.repos[PUSHED]["main"]
    assert f"pushed: {hub.url}/{PUSHED}/commit/{commit_id(pushed)}" in result.stdout
    assert pushed == files(tmp_path / "dst")
    check_card(pushed["README.md"].decode())
    check_done(run("transform", PUSHED, "back", "--to-dense"))
    assert tensors(tmp_path / "back") == tensors(dense)


def test_a_second_push_replaces_the_first(
    hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    arguments = (str(dense), "dst", "--spec", "spec.yaml", "--push-to-hub", PUSHED)
    check_done(run("transform", *arguments))
    (tmp_path / "spec.yaml").write_text(SPEC.replace("depth: 1", "depth: 1, overlap: 1"))
    check_done(run("transform", *arguments, "--overwrite"))
    pushed = hub.repos[PUSHED]["main"]
    assert b"overlap: 1" in pushed["ptconvert.yaml"]
    assert pushed == files(tmp_path / "dst")


def test_a_push_over_a_dense_model_leaves_none_of_its_weights(
    hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    hub.repos[PUSHED] = {"main": {"model.safetensors": b"old"}}
    check_done(run("transform", str(dense), "dst", "--spec", "spec.yaml", "--push-to-hub", PUSHED))
    assert hub.repos[PUSHED]["main"] == files(tmp_path / "dst")


def test_a_pushed_conversion_is_shown_estimated_and_verified(
    hub: HubStandIn, run: Run, dense: Path
) -> None:
    """By its hub id: shown and estimated from its config.json alone."""
    arguments = (str(dense), "dst", "--spec", "spec.yaml", "--push-to-hub", PUSHED)
    check_done(run("transform", *arguments))
    hub.requests.clear()
    shown = run("show", PUSHED, "--json")
    check_done(shown)
    assert json.loads(shown.stdout) == json.loads(run("show", "dst", "--json").stdout)
    estimated = run("estimate", PUSHED, "--hardware", "h100-sxm", "--ranks", "2", "--json")
    check_done(estimated)
    names = [row["name"] for row in json.loads(estimated.stdout)["rows"]]
    assert names == ["tensor_parallel", PUSHED]
    assert hub.files_asked_for() == {"config.json"}
    verified = run("verify", PUSHED, "--ranks", "2", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["ok"], verified.stderr
    check_refused(run("show", "acme/nothing"), "acme/nothing")


def check_card(card: str) -> None:
    """The card states the source, the schedule, the all-reduces before and after, and the spec."""
    _, front_matter, text = card.split("---\n", 2)
    data = yaml.safe_load(front_matter)
    assert (data["base_model"], data["license"]) == (DENSE, "apache-2.0")
    assert DENSE in text
    assert "\na0! m0! a1. m1!\n" in text
    assert "| all-reduces per forward pass | 4 | 3 |\n" in text
    assert SPEC in text


def test_a_push_that_is_not_allowed_ends_before_the_work(
    hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    hub.forbidden = ("/api/repos/create",)
    arguments = (str(dense), "dst", "--spec", "spec.yaml", "--push-to-hub", PUSHED)
    check_refused(run("transform", *arguments), PUSHED, "403")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("step", ["/lfs/", f"/api/models/{PUSHED}/commit/"])
def test_a_push_that_fails_leaves_the_result(
    step: str, hub: HubStandIn, run: Run, dense: Path, tmp_path: Path
) -> None:
    check_done(run("transform", str(dense), "whole", "--spec", "spec.yaml"))
    hub.forbidden = (step,)
    arguments = (str(dense), "dst", "--spec", "spec.yaml", "--push-to-hub", PUSHED)
    check_refused(run("transform", *arguments), PUSHED)
    assert written(tmp_path / "dst") == written(tmp_path / "whole")
    assert hub.repos[PUSHED]["main"] == {}


def test_show_downloads_the_config_only(hub: HubStandIn, run: Run) -> None:
    result = run("show", "spec.yaml", "--model", DENSE, "--revision", "v1", "--json")
    check_done(result)
    figures = json.loads(result.stdout)
    assert figures["schedule"] == "a0! m0! a1. m1!"
    assert figures["all_reduces"] == {"before": 4, "after": 3}
    assert figures["bytes_per_token_per_all_reduce"] == 32 * 4
    assert hub.files_asked_for() == {"config.json"}
