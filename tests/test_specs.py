"""The ready specs: each read, fitted to its model's public config, and counted."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from ptconvert.checkpoint.files import read_config
from ptconvert.cli import main
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.recipes import RECIPES
from ptconvert.spec.document import parse_spec, read_spec

SPECS = Path(__file__).parents[1] / "specs"
MODELS = sorted(p.stem for p in (SPECS / "configs").glob("*.json"))
HEAD = re.compile(r"All-reduces per forward pass: (\d+) before, (\d+) after; waited for: \d+ before, (\d+) after")  # fmt: skip # noqa: E501


@pytest.fixture(scope="module")
def specs() -> ModuleType:
    """examples/specs.py as a module."""
    file = SPECS.parent / "examples" / "specs.py"
    found = importlib.util.spec_from_file_location("specs", file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_all_models_are_there() -> None:
    assert MODELS == [
        "gemma-4-31b",
        "gpt-oss-120b",
        "llama-3.1-405b",
        "llama-3.1-70b",
        "llama-3.1-8b",
        "llama-3.2-1b",
        "mistral-7b",
        "mistral-small-24b",
        "phi-4",
        "qwen2.5-7b",
        "qwen3-0.6b",
        "qwen3-30b-a3b",
        "qwen3-8b",
        "qwen3.6-27b",
        "qwen3.6-35b-a3b",
    ]
    ready = [path for path in SPECS.glob("*.yaml") if "-ranks" not in path.stem]
    assert len(ready) == 3 * len(MODELS)


def test_there_is_a_spec_of_as_many_tracks_as_ranks(specs: ModuleType) -> None:
    """For 2, 4 and 8 ranks, as far as the model's own spec goes, which one spec serves where no
    layer is held as tracks; each with nothing but its tracks changed, as examples/specs.py does."""
    expected = dict(specs.variants())
    assert set(expected) == set(SPECS.glob("*-ranks.yaml")) and len(expected) == 50
    for path, text in expected.items():
        assert path.read_text(encoding="utf-8") == text
        own, ranks = re.fullmatch(r"(.*)-(\d)-ranks", path.stem).groups()  # type: ignore[union-attr]
        few, many = read_spec(path), read_spec(path.with_stem(own))
        assert (few.tracks, few.schedule()) == (int(ranks), many.schedule())
        assert many.tracks in (4, 8) and few.tracks < many.tracks
        model = own.rsplit("-", 1)[0]
        few.check(ModelShape.from_config(read_config(SPECS / "configs" / f"{model}.json")))
        assert f", for {ranks} ranks: " in few.text.splitlines()[0]
    gentle = [read_spec(path) for path in SPECS.glob("*-gentle.yaml")]
    assert not any(spec.schedule().track_layers for spec in gentle)


def test_show_says_what_fewer_ranks_than_tracks_mean() -> None:
    def shown(name: str, *options: str) -> str:
        command = ["show", str(SPECS / f"{name}.yaml"), "--layers", "32", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        return " ".join(result.stdout.split())

    def note(name: str) -> str | None:
        said: str | None = json.loads(shown(name, "--json"))["note"]
        assert said is None or said in shown(name)
        return said

    first, one = "a track each. ", "On one rank use the dense checkpoint, which needs no tracks."
    more = (
        "a rank runs several tracks one after another, each with its own kernels, and tensor "
        "parallelism can be faster: take a spec of as many tracks. "
    )
    balanced = "llama-3.1-8b-balanced"
    assert note(balanced) == f"For 8 ranks, {first}On 2 or 4 {more}{one}"
    assert note(f"{balanced}-4-ranks") == f"For 4 ranks, {first}On 2 {more}{one}"
    assert note(f"{balanced}-2-ranks") == f"For 2 ranks, {first}{one}"
    assert note("llama-3.1-8b-gentle") is None


@pytest.mark.parametrize("strength", ["gentle", "balanced", "aggressive"])
@pytest.mark.parametrize("model", MODELS)
def test_spec_fits_and_says_its_counts(model: str, strength: str) -> None:
    spec = read_spec(SPECS / f"{model}-{strength}.yaml")
    shape = ModelShape.from_config(read_config(SPECS / "configs" / f"{model}.json"))
    spec.check(shape)
    schedule = spec.schedule()
    assert schedule.layers == shape.layers
    said = HEAD.search(spec.text)
    assert said is not None
    counts = schedule.counts
    assert tuple(map(int, said.groups())) == (
        2 * shape.layers,
        counts.all_reduces,
        counts.waited_for,
    )


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_ready_spec_is_its_recipe(path: Path) -> None:
    """For the model's own number of layers, and for no other recipe."""
    schedule = read_spec(path).schedule()
    names = [r.name for r in RECIPES if r.schedule(schedule.layers) == schedule]
    assert names == [name for name in (r.name for r in RECIPES) if f"-{name}" in path.stem]


@pytest.mark.parametrize("layers", range(1, 12))
def test_recipes_suit_any_depth(layers: int) -> None:
    for recipe in RECIPES:
        schedule = recipe.schedule(layers)
        assert schedule.layers == layers and schedule != dense_schedule(layers)
        first = recipe.dense(layers)
        text = "format: 1\ntracks: 1\nschedule:\n"
        if first:
            text += f"  - {{layers: 0-{first - 1}, use: tensor_parallel}}\n"
        text += f"  - {{{recipe.says(layers)}}}\n"
        assert parse_spec(text, "spec").schedule() == schedule


@pytest.mark.parametrize("model", MODELS)
def test_each_step_waits_for_fewer(model: str) -> None:
    waits = [
        read_spec(SPECS / f"{model}-{strength}.yaml").schedule().counts.waited_for
        for strength in ("gentle", "balanced", "aggressive")
    ]
    assert waits == sorted(waits, reverse=True)


@pytest.mark.parametrize("model", MODELS)
def test_gentle_says_what_estimate_gives_over_fast_links(model: str) -> None:
    path, config = SPECS / f"{model}-gentle.yaml", SPECS / "configs" / f"{model}.json"
    text = " ".join(path.read_text().replace("\n#", "").split())
    said = re.findall(r"at ([\d.]+)(?: times [a-z ]+)? on (\d) H100 (SXM|PCIe)", text)
    assert [kind for *_, kind in said] == ["SXM", "PCIe"]
    for speed_up, ranks, kind in said:
        given = ("--hardware", f"h100-{kind.lower()}", "--ranks", ranks, "--json")
        result = CliRunner().invoke(main, ["estimate", str(path), "--model", str(config), *given])
        found = json.loads(result.stdout)["rows"][1]["speed_up"]["tokens_per_second"]
        assert f"{found:.2f}" == speed_up


def parameters(shape: ModelShape) -> int:
    total = 0
    for _, size in shape.tensors():
        count = 1
        for n in size:
            count *= n
        total += count
    return total


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        # the published parameter counts
        ("llama-3.2-1b", 1236),
        ("llama-3.1-8b", 8030),
        ("llama-3.1-70b", 70554),
        ("llama-3.1-405b", 405853),
        ("qwen2.5-7b", 7616),
        ("qwen3-0.6b", 596),
        ("qwen3-8b", 8191),
        ("mistral-7b", 7248),
        ("gemma-4-31b", 30697),  # of 31 B, which has a tower too
        ("gpt-oss-120b", 116829),
    ],
)
def test_configs_describe_the_public_models(model: str, millions: int) -> None:
    shape = ModelShape.from_config(read_config(SPECS / "configs" / f"{model}.json"))
    assert round(parameters(shape) / 1e6) == millions
