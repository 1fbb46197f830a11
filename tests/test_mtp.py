"""A checkpoint's own head for further tokens (MTP): what it says, and how often it is right."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from conftest import Convert, MakeDense, byte_level, with_bytes
from safetensors.torch import load_file, save_file
from seeing import seeing_model
from served import add_head
from test_evaluate import TEXTS, quiet
from test_modeling import left_padded
from test_transform import tensors
from torch import nn
from transformers.modeling_layers import MtpLayer

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.errors import CheckpointError, HealError
from ptconvert.heal import run as healing
from ptconvert.heal.data import read_data
from ptconvert.heal.mtp import measured_head
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model
from ptconvert.measure.windows import windows_for
from ptconvert.runtime.mtp import head_on_meta, open_head

FAMILIES = ["glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
HERE = torch.float32, torch.device("cpu")


def with_head(source: Path, path: Path) -> Path:
    """A copy of a dense checkpoint with a head of random parts."""
    shutil.copytree(source, path)
    add_head(path)
    file = path / "model.safetensors"
    found, before = load_file(file), load_file(source / "model.safetensors")
    torch.manual_seed(0)
    own = {n: t + 0.1 * torch.randn_like(t) for n, t in found.items() if n not in before}
    save_file(found | own, file, {"format": "pt"})
    return path


def begins(family: str) -> str:
    return "mtp." if family.startswith("qwen") else "model.layers.6."


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_one_more_layer_of_the_model(
    family: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Against transformers' own heads where it has them, else against the model's classes, step by
    step; out of a conversion it is the same."""
    source = with_head(make_dense(family), tmp_path / "source")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = left_padded(2, 9)[0] % 40
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids[:, :-1]).last_hidden_state
        embedded = model.get_input_embeddings()(ids[:, 1:])
        found = open_head(open_checkpoint(source), *HERE)(hidden, embedded)
        expected = literal(model, source, family, hidden, embedded)
        assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
        assert found.abs().max() > 0.1
        path = convert(source, 2, "use: parallel_track, depth: 2")
        assert torch.equal(open_head(open_checkpoint(path), *HERE)(hidden, embedded), found)


def literal(
    model: Any, source: Path, family: str, hidden: torch.Tensor, embedded: torch.Tensor
) -> torch.Tensor:
    """What a head gives, by a copy of the model's classes with the head's tensors put in."""
    stored, before = load_file(source / "model.safetensors"), begins(family)
    join, one, two, last = (
        ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        if before == "mtp."
        else ("eh_proj", "enorm", "hnorm", "shared_head.norm")
    )

    def norm(name: str) -> Any:
        made = copy.deepcopy(model.model.norm)
        made.weight = nn.Parameter(stored[f"{before}{name}.weight"])
        return made

    if before != "mtp.":
        embedded = embedded.clone()
        embedded[:, 0] = 0  # as vLLM has it
    joined = stored[f"{before}{join}.weight"]
    inside = "mtp.layers.0." if before == "mtp." else before
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 6
    at = max(i for i, kind in enumerate(kinds) if kind == "full_attention")
    layer = copy.deepcopy(model.model.layers[at])
    tensors = {n.removeprefix(inside): t for n, t in stored.items() if n.startswith(inside)}
    for name, parameter in layer.state_dict().items():
        if name in tensors:
            parameter.copy_(tensors[name])
        elif name.endswith("gate_up_proj"):  # of all experts, which are stored one by one
            for expert, both in enumerate(parameter):
                each = f"mlp.experts.{expert}."
                ends = ("gate_proj.weight", "up_proj.weight")
                both.copy_(torch.cat([tensors[each + end] for end in ends]))
        elif name.endswith("down_proj"):
            for expert, both in enumerate(parameter):
                both.copy_(tensors[f"mlp.experts.{expert}.down_proj.weight"])
        else:
            parameter.copy_(model.state_dict()[f"model.layers.{at}.{name}"])
            assert "correction_bias" in name, name
    positions = torch.arange(hidden.shape[1])[None]
    if family.startswith("qwen3_5"):
        positions = positions[None].expand(3, -1, -1)
    mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    turned = model.model.rotary_emb(hidden, positions)
    if before != "mtp.":
        whole = MtpLayer(model.config, type(layer), type(model.model.norm), at)
        whole.enorm, whole.hnorm, whole.post_norm = norm(one), norm(two), norm(last)
        whole.mtp_block, whole.eh_proj.weight = layer, nn.Parameter(joined)
        out: torch.Tensor = whole(embedded, hidden, turned, mask, positions, None)
        return out
    x = torch.cat([norm(one)(embedded), norm(two)(hidden)], -1) @ joined.T
    given: torch.Tensor = norm(last)(layer(x, position_embeddings=turned, attention_mask=mask))
    return given


def test_eval_counts_what_a_models_own_head_drafts(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """One that says for the token after the next what the model says for the next: right where a
    token comes twice."""
    source = with_head(
        make_dense("glm4_moe", vocab_size=260, max_position_embeddings=256, eos_token_id=0),
        tmp_path / "source",
    )
    with_bytes(source)
    file = source / "model.safetensors"
    found = load_file(file)
    own = {n: t for n, t in found.items() if n.startswith("model.layers.6.")}
    width = found["model.norm.weight"].numel()
    ones = {n: torch.ones_like(t) for n, t in own.items() if n.endswith("norm.weight")}
    nothing = {n: torch.zeros_like(t) for n, t in own.items() if "o_proj" in n or "down_proj" in n}
    join = torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)
    own |= ones | nothing | {"model.layers.6.eh_proj.weight": join}
    save_file(found | own, file, {"format": "pt"})
    path = convert(source, 2, "use: ladder")
    arguments = ["eval", path, "--baseline", source, "--text", TEXTS[0], "--window", 64]
    arguments += ["--windows", 6, "--speculate", 1, "--draft", "layer", "--dtype", "float32"]
    arguments += ["--cache", tmp_path / "cache", "--device", "cpu", "--json"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["speculation"]
    assert (told["drafted"], told["draft"]) == (1, "layer")
    for model, name in ((source, "source"), (path, "converted")):
        right, steps = twice(model)
        assert told[name]["steps"] == steps
        assert told[name]["accepted"]["value"] == pytest.approx(right / steps)
        assert 0 < right < steps


def twice(path: Path) -> tuple[int, int]:
    """In how many of a model's steps, each of which gives one token or two, a token comes twice."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    right = steps = 0
    for ids in windows_for(open_checkpoint(path), [TEXTS[0]], 64, 6).ids:
        given = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": 0}
        out = model.generate(ids[None, :32], **given)[0].tolist()
        known = 33
        while known + 1 <= len(out):
            same = out[known] == out[known - 1]
            right, steps, known = right + same, steps + 1, known + 1 + same
    return right, steps


@pytest.mark.parametrize(
    ("drafted", "variant", "said"),
    [
        ("1", "llama", "it has no head for further tokens (MTP)"),
        ("2", "llama", "it has no head for further tokens (MTP)"),
        ("2", "glm4_moe", "--speculate 2: a model's own head was trained for one token"),
    ],
)
def test_heads_that_cant_be_measured_are_a_line(
    drafted: str, variant: str, said: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = byte_level(make_dense, tmp_path / "source")
    if variant != "llama":
        source = with_head(make_dense(variant, vocab_size=260), tmp_path / variant)
        with_bytes(source)
    path = convert(source, 2, "use: ladder")
    arguments = ["eval", path, "--baseline", source, "--text", TEXTS[0], "--window", 64]
    arguments += ["--speculate", drafted, "--draft", "layer", "--device", "cpu"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert len(done.stderr.splitlines()) == 1


def test_what_training_a_head_takes_is_told_and_what_it_cant_do(
    make_dense: MakeDense,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A phase of its own in --dry-run; no head, and several processes, are a line."""
    plain = byte_level(make_dense, tmp_path / "plain")
    made = make_dense("glm4_moe", vocab_size=260, max_position_embeddings=256)
    source = with_head(made, tmp_path / "source")
    with_bytes(source)
    found = {path: convert(path, 2, "use: ladder") for path in (plain, source)}

    def heal(path: Path, *more: str) -> Result:
        given = ["heal", found[path], tmp_path / "healed", "--teacher", path, "--text", TEXTS[0]]
        given += ["--window", 32, "--tokens", 1024, "--device", "cpu", "--mtp", *more]
        return CliRunner().invoke(main, list(map(str, given)))

    done = heal(source, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    names = [phase["name"] for phase in json.loads(done.stdout)["phases"]]
    assert names == ["measuring on held-out text", "end to end", "its head for further tokens"]
    none = heal(plain)
    assert none.exit_code == 2 and "has no head for further tokens" in none.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = heal(source)
    assert said.exit_code == 2 and "--mtp: a head is trained in one process" in said.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "it has no head for further tokens"),
        ({"eh_proj.weight": None}, "model.layers.6.eh_proj.weight is missing"),
        ({"self_attn.o_proj.weight": None}, "model.layers.6.self_attn.o_proj.weight is missing"),
        (
            {"enorm.weight": torch.ones(3)},
            r"model.layers.6.enorm.weight has shape \[3\], not \[32\]",
        ),
    ],
)
def test_a_head_of_which_something_is_wrong(
    changed: dict[str, Any], said: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    source = make_dense("glm4_moe")
    if changed:
        source = with_head(source, tmp_path / "source")
        file = source / "model.safetensors"
        found = load_file(file) | {f"model.layers.6.{name}": t for name, t in changed.items()}
        save_file({n: t for n, t in found.items() if t is not None}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        head_on_meta(open_checkpoint(source))


def test_a_head_beside_what_sees(tmp_path: Path) -> None:
    """Of a vision-language model: beside its language model's layers and its tower."""
    dense = tmp_path / "dense"
    seeing_model("qwen3_5").save_pretrained(dense)
    file = dense / "model.safetensors"
    found = load_file(file)
    last = "model.language_model.layers.3."
    assert f"{last}self_attn.o_proj.weight" in found
    width = found["model.language_model.norm.weight"].numel()
    own = {f"mtp.layers.0.{n.removeprefix(last)}": t for n, t in found.items() if last in n}
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    own |= {f"mtp.{name}.weight": torch.randn(width) for name in norms}
    own["mtp.fc.weight"] = torch.randn(width, 2 * width)
    save_file(found | {n: t.clone() for n, t in own.items()}, file, {"format": "pt"})
    head = open_head(open_checkpoint(dense), *HERE)
    assert torch.equal(head.eh_proj.weight, own["mtp.fc.weight"])
    assert torch.equal(head.decoder.norm.weight, own["mtp.norm.weight"])
    own_layer = head.decoder.layers[0].self_attn.o_proj.weight
    assert torch.equal(own_layer, found[f"{last}self_attn.o_proj.weight"])
    assert head(torch.randn(1, 4, width), torch.randn(1, 4, width)).isfinite().all()


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_5_text"])
def test_heal_trains_a_head_along(
    family: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Towards the healed model's own choices; nothing else moves by it, and its experts, which are
    stored one by one, go back to where they came from."""
    made = make_dense(family, vocab_size=260, max_position_embeddings=256, eos_token_id=0)
    source = with_head(made, tmp_path / "source")
    with_bytes(source)
    path = convert(source, 2, "use: ladder")
    arguments = ["heal", path, tmp_path / "healed", "--teacher", source, "--text", TEXTS[0]]
    arguments += ["--window", 32, "--tokens", 1024, "--batch-size", 4, "--evaluations", 2]
    arguments += ["--learning-rate", 1e-2, "--device", "cpu", "--no-kl", "--mtp", "--json"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    before, after = json.loads(done.stdout)["head"]
    assert after["kl"] < 0.9 * before["kl"]
    was, now = tensors(path), tensors(tmp_path / "healed")
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, was[name])}
    head = {name for name in was if name.startswith(begins(family))}
    assert moved and moved <= head
    still = ("embed_tokens.weight", "shared_head.head.weight", "e_score_correction_bias")
    assert all(name.endswith(still) for name in head - moved)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "healed").eval()
    ids = windows_for(open_checkpoint(source), [TEXTS[0]], 32, 4).ids
    measured = [
        measured_head(
            open_head(open_checkpoint(p), *HERE), model, ids, BatchSize(4, "cpu"), quiet, ""
        )
        for p in (path, tmp_path / "healed")
    ]
    assert measured[1].kl < measured[0].kl
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "its head for further tokens by KL(healed || head)" in card
    assert "the model's weights are as before" in card and "did not help" not in card
    assert f"KL from this model {before['kl']:.4f} before, {after['kl']:.4f} after" in card


def test_a_model_and_then_its_head_in_16_bits(
    make_dense: MakeDense, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of the head is that of the one that is written; a run that failed at the very
    end goes on there."""
    made = make_dense("glm4_moe", torch.bfloat16, vocab_size=260, max_position_embeddings=256)
    source, out = with_head(made, tmp_path / "source"), tmp_path / "healed"
    with_bytes(source)
    path = convert(source, 2, "use: ladder")
    arguments = ["heal", path, out, "--teacher", source, "--text", TEXTS[0], "--window", 32]
    arguments += ["--tokens", 1024, "--batch-size", 4, "--evaluations", 2, "--mtp", "--json"]
    arguments += ["--learning-rate", 3e-3, "--device", "cpu", "--dtype", "bfloat16"]

    def no_room(*_: object) -> None:
        raise HealError("no room")

    def again(*_: object) -> None:
        raise AssertionError("it was trained already")

    with monkeypatch.context() as changed:
        changed.setattr(healing, "write", no_room)
        assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 2
    monkeypatch.setattr(healing, "heal_head", again)
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["kept"] == "KL" and told["head"][1]["kl"] < told["head"][0]["kl"]
    healed = open_checkpoint(out)
    model = open_model(healed, "bfloat16", "cpu")
    held_out = read_data(healed, (TEXTS[0],), None, (), 32, 1024, quiet).held_out.ids
    head = open_head(healed, torch.bfloat16, model.device)
    found = measured_head(head, model, held_out, BatchSize(None, "cpu"), quiet, "")
    assert found.kl == pytest.approx(told["head"][1]["kl"], rel=1e-6)
