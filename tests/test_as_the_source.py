"""Sources with something about them that transformers copes with: what it does with the source
decides what is done with the converted checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, load
from safetensors.torch import load_file, save_file
from test_modeling import SCHEDULES, TOLERANCE, difference, left_padded

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.convert.transform import check_unchanged, execute, plan_to_dense
from ptconvert.errors import CheckpointError
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.runtime.load import load_rank

TIED = {"tie_word_embeddings": True}


def edited(path: Path, edit: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Changes a checkpoint's tensors and the fields of its config in place."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **config}))
    return path


def with_head(same: bool) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = head if same else head.flip(0).contiguous()

    return edit


@pytest.fixture
def copied(make_dense: MakeDense, tmp_path: Path) -> Callable[..., Path]:
    def copy(variant: str = "llama", **settings: Any) -> Path:
        return Path(shutil.copytree(make_dense(variant, **settings), tmp_path / "source"))

    return copy


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_beside_a_tied_embedding(
    same: bool, copied: Callable[..., Path], convert: Convert, tmp_path: Path
) -> None:
    """It is the embedding's copy, or one of its own whatever the config says; on ranks too."""
    source = edited(copied(**TIED), with_head(same))
    assert torch.equal(load(source).lm_head.weight, load_file(source / "model.safetensors")[
        "lm_head.weight"
    ])  # fmt: skip
    path = convert(source, 4, "use: tensor_parallel")
    ids_BS, keep_BS = left_padded()
    with torch.no_grad():
        found, expected = load(path)(ids_BS).logits, load(source)(ids_BS).logits
    assert difference(found, expected, torch.ones_like(keep_BS)) < TOLERANCE
    tracks = convert(source, 4, SCHEDULES["track-2-rest"])
    rank: Any = load_rank(tracks, Placement(), OneProcess())
    with torch.no_grad():
        assert difference(rank(ids_BS).logits, load(tracks)(ids_BS).logits, keep_BS) < TOLERANCE
    back = tmp_path / "back"
    execute(plan_to_dense(open_checkpoint(tracks)), back)
    for name in ("config.json", "model.safetensors"):
        read = load_file if name.endswith("s") else lambda p: json.loads(p.read_text())
        a, b = read(source / name), read(back / name)
        assert a.keys() == b.keys() and all(
            torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
        )


@pytest.mark.parametrize(
    "which", ["mlp.up_proj", "self_attn.o_proj", "embed_tokens", "norm.weight"]
)
@pytest.mark.parametrize("trained", ["one weight", "one element", "one track"])
def test_weights_that_moved_are_not_the_sources(
    which: str, trained: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Though copies of the same tensor still agree; trained as any other tool would, and saved."""
    path = convert(make_dense("llama"), 2, SCHEDULES["track-2-rest"])
    model = load(path)
    names = [n for n, _ in model.named_parameters() if which in n and "layernorm" not in n]
    chosen = {"one weight": names[-1:], "one element": names[-1:], "one track": names}[trained]
    with torch.no_grad():
        for name in chosen:
            weight = model.get_parameter(name)
            (weight.view(-1)[:1] if trained == "one element" else weight).mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    plan = plan_to_dense(open_checkpoint(tmp_path / "trained"))
    with pytest.raises(CheckpointError, match="changed since the conversion"):
        execute(plan, tmp_path / "back")
    with pytest.raises(CheckpointError, match="changed since the conversion"):
        check_unchanged(plan)
    assert not (tmp_path / "back").exists()


def test_the_same_weights_saved_by_transformers_are_the_sources(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = make_dense("qwen2-two-kv-tied")
    path = convert(source, 4, SCHEDULES["mixed"])
    assert str(read_section(open_checkpoint(path).config).tensors_digest).startswith("sha256:")
    load(path).save_pretrained(tmp_path / "saved")
    plan = plan_to_dense(open_checkpoint(tmp_path / "saved"))
    check_unchanged(plan)
    execute(plan, tmp_path / "back")
    a, b = (load_file(p / "model.safetensors") for p in (source, tmp_path / "back"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_of_versions_without_a_digest_go_back(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    path = convert(make_dense("llama"), 2, SCHEDULES["track-4"])
    config = json.loads((path / "config.json").read_text())
    del config["ptconvert"]["tensors_digest"]
    (path / "config.json").write_text(json.dumps(config))
    execute(plan_to_dense(open_checkpoint(path)), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").is_file()


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_sources_config_asks_for(
    flag: str, copied: Callable[..., Path], make_dense: MakeDense, convert: Convert
) -> None:
    """Logits come all the same; what there is none of is left out, unless it is asked for here."""
    source = edited(copied(), lambda _: None, **{flag: True})
    model = load(convert(source, 2, SCHEDULES["track-2-rest"]))
    assert getattr(model.config, flag)
    ids_BS, _ = left_padded()
    plain = load(convert(make_dense("llama"), 2, SCHEDULES["track-2-rest"]))
    with torch.no_grad():
        found, expected, base = model(ids_BS), plain(ids_BS), model.model(ids_BS)
    assert torch.equal(found[0], expected.logits)
    assert torch.equal(base[0], plain.model(ids_BS).last_hidden_state)
    assert model.generate(ids_BS, max_new_tokens=2, do_sample=False).shape[1] == 14
    with pytest.raises(ValueError, match=flag):
        model(ids_BS, **{flag: True})
