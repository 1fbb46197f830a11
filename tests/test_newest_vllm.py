"""The check of the newest vLLM's source, on packages in which one thing or another is gone."""

from __future__ import annotations

from pathlib import Path

import newest_vllm
import pytest
from newest_vllm import (
    COUNTERS,
    ENGINE,
    MODELS,
    WRAPPERS,
    Source,
    departures,
    language_models,
    strangers,
    uncounted,
)

from ptconvert.engines.vllm.families import LANGUAGE_MODELS

PLUGIN = """
from vllm.distributed import reduced, state
from vllm.layers import Norm
from vllm.config import Draft

def run(x):
    Norm(8, eps=1e-5)
    return reduced(x), state._TP, Draft.override
"""
PACKAGE = {
    "distributed/__init__.py": "from .state import *\n",
    "distributed/state.py": "_TP = None\ndef reduced(x, group=None): ...\n",
    "config.py": "class Draft:\n    method: str = ''\n    def override(config): ...\n",
    "layers.py": "from vllm.norms import Own as Norm\n",
    "norms.py": (
        "class Base:\n    def __init__(self, width, eps=1e-6, *, out=None): ...\n"
        "class Own(Base): ...\n"
    ),
}


def found(tmp_path: Path, **changed: str) -> list[str]:
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "model.py").write_text(PLUGIN)
    for name, text in {**PACKAGE, **{k.replace("__", "/"): v for k, v in changed.items()}}.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return list(departures(plugin, "vllm", Source(tmp_path)))


def test_what_is_all_there(tmp_path: Path) -> None:
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("layers.py", "", "model.py:3: vllm.layers has no Norm"),
        ("distributed/state.py", "_TP = 1\n", "model.py:2: vllm.distributed has no reduced"),
        (
            "distributed/state.py",
            "def reduced(x): ...\n",
            "model.py:8: vllm.distributed.state has no _TP",
        ),
        (
            "config.py",
            "class Draft:\n    method: str = ''\n",
            "model.py:8: vllm.config.Draft has no override",
        ),
        (
            "norms.py",
            "class Own:\n    def __init__(self, width): ...\n",
            "model.py:7: Norm takes no eps",
        ),
        (
            "norms.py",
            "class Own:\n    def __init__(self, width, eps, kind): ...\n",
            "model.py:7: Norm wants kind",
        ),
        (
            "norms.py",
            "class Own:\n    def __init__(self, *, eps): ...\n",
            "model.py:7: Norm takes 0 arguments by place, not 1",
        ),
    ],
)
def test_what_is_gone_is_named(file: str, text: str, said: str, tmp_path: Path) -> None:
    assert found(tmp_path, **{file: text}) == [said]


def test_the_plugin_is_read_whole() -> None:
    """Against nothing at all: each of its imports is missed."""
    missed = list(departures(ENGINE, "vllm", Source(Path("/nowhere"))))
    assert len(missed) > 15 and any("support_torch_compile" in line for line in missed)


SEES = """
class Whole:
    def __init__(self):
        self.language_model = Made()
        self.layers = self.language_model.moe_layers

    def forward(self, ids, positions):
        self.language_model.model(ids, positions, inputs_embeds=None)
        return self.language_model.compute_logits(ids)
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Made", "Made", None),
        ("Made = 1", "Other = 1", "seen has no Made, by which Whole made its language model"),
        ("self.language_model.moe_layers", "self.language_model.foo", "its language model for foo"),
        ("inputs_embeds=None", "inputs_embeds=None, bar=1", "Whole gives its layers bar"),
        ("class Whole", "class Half", "seen has no Whole"),
    ],
)
def test_models_with_pictures(
    old: str, new: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one asks of its language model is what the converted one has."""
    models = tmp_path.joinpath(*MODELS.split("."))
    models.mkdir(parents=True)
    (models / "seen.py").write_text(("Made = 1" + SEES).replace(old, new))
    registry = '_MODELS = {"LlavaForConditionalGeneration": ("seen", "Whole")}'
    (models / "registry.py").write_text(registry)
    monkeypatch.setattr(newest_vllm, "language_models", lambda _: {"llava": "Made"})
    found = list(strangers(ENGINE, WRAPPERS, Source(tmp_path)))
    if said is None:
        assert found == []
    else:
        (one,) = found
        assert said in one


def test_all_models_with_pictures_are_read() -> None:
    """Each of them is missed where there is nothing."""
    missed = list(strangers(ENGINE, WRAPPERS, Source(Path("/nowhere"))))
    assert len(missed) == len(language_models(ENGINE / "families.py")) == len(LANGUAGE_MODELS)


@pytest.mark.parametrize(
    ("operations", "said"),
    [
        (["all_reduce", "flashinfer_trtllm_fused_allreduce_norm", "rocm_aiter_allreduce"], []),
        (["all_reduce"], ["vLLM has no operation vllm::flashinfer_trtllm_fused_allreduce_norm"]),
        (
            ["all_reduce", "flashinfer_trtllm_fused_allreduce_norm", "allreduce_norm"],
            ["vllm::allreduce_norm isn't counted (state.py)"],
        ),
    ],
)
def test_all_reduces_that_are_counted(
    operations: list[str], said: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "vllm" / "distributed" / "state.py"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f'register(op_name="{name}")\n' for name in operations))
    assert list(uncounted(COUNTERS, Source(tmp_path))) == [f"counters.py: {line}" for line in said]
