"""Mixtures of experts: how checkpoints hold them, what a track does with them, what they cost."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import SIZES, WITHOUT_PTCONVERT, Convert, MakeDense, byte_level, load, spec_text
from forking import Run
from reference import reference_logits
from safetensors.torch import load_file, save_file
from test_modeling import SCHEDULES, TOLERANCE, difference, left_padded
from test_transform import back, same, tensors

import ptconvert.modeling.layers as layers_module
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.cli import main
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import ConfigError
from ptconvert.estimate.hardware import read_engine
from ptconvert.estimate.roofline import Pass, sublayer_parts
from ptconvert.heal.blockwise import Pieces
from ptconvert.heal.models import is_of_experts
from ptconvert.heal.write import write
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import section_of
from ptconvert.measure.windows import Windows
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import load_rank, shape_of
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec

FAMILIES = ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text"]
CONFIGS = Path(__file__).parents[1] / "specs" / "configs"


def fused(source: Path, path: Path) -> Path:
    """The same checkpoint with all experts of a layer in one tensor, as transformers has them in
    memory."""
    path.mkdir()
    found = {n: t.contiguous() for n, t in load(source).state_dict().items()}
    save_file(found, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text((source / "config.json").read_text())
    return path


@pytest.mark.parametrize("tracks", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", FAMILIES)
def test_experts_apart_or_fused(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Checkpoints hold each expert by itself, or all in one tensor: the result is the same model,
    in the layout that its source has, and so is what is got back."""
    apart, (ids_BS, keep_BS) = make_dense(variant), left_padded()
    sources = apart, fused(apart, tmp_path / "fused")
    found = []
    for number, source in enumerate(sources):
        there = tensors(source)
        assert any(".experts.0." in name for name in there) == (number == 0)
        path = convert(source, tracks, SCHEDULES["track-2-rest"])
        assert any(".experts.0." in name for name in tensors(path)) == (number == 0)
        with torch.no_grad():
            found.append(load(path)(input_ids=ids_BS, attention_mask=keep_BS).logits)
        assert same(tensors(back(path, tmp_path / f"back-{number}")), there)
    one, other = found
    assert difference(one, other, keep_BS) < TOLERANCE


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_it_opens_without_ptconvert_and_saves_as_it_was(
    variant: str,
    make_dense: MakeDense,
    convert: Convert,
    run_without_ptconvert: Run,
    tmp_path: Path,
) -> None:
    path, ids_BS = convert(make_dense(variant), 2, SCHEDULES["track-2-rest"]), left_padded(1)[0]
    with torch.no_grad():
        expected = load(path)(ids_BS).logits
    script = f"""{WITHOUT_PTCONVERT}
import torch, transformers
options = dict(trust_remote_code=True, dtype=torch.float32, attn_implementation="eager")
model = transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}, **options).eval()
with torch.no_grad():
    torch.save(model(torch.tensor({ids_BS.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
model.save_pretrained({str(tmp_path / "again")!r})
"""
    done = run_without_ptconvert(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=TOLERANCE)
    assert same(tensors(tmp_path / "again"), tensors(path))


def test_controls(make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """What must differ: gate and up projection in the other order, a track that routes by another's
    stream."""
    source, (ids_BS, keep_BS) = make_dense("qwen3_moe"), left_padded(1)
    path = convert(source, 2, SCHEDULES["track-2-rest"])
    schedule = str(section_of(open_checkpoint(path)).schedule)
    expected = reference_logits(load(source), schedule, 2, ids_BS)
    model = load(path)
    with torch.no_grad():
        assert difference(model(ids_BS).logits, expected, keep_BS) < TOLERANCE
        experts = model.model.layers[2].tracks["1"].mlp.experts
        halves = experts.gate_up_proj.chunk(2, 1)
        before = experts.gate_up_proj.clone()
        experts.gate_up_proj.copy_(torch.cat(halves[::-1], 1))
        assert difference(model(ids_BS).logits, expected, keep_BS) > 100 * TOLERANCE
        experts.gate_up_proj.copy_(before)
        first: list[torch.Tensor] = []

        def as_the_first(layer: Any, family: Any, kind: Kind, x: Any, context: Any) -> Any:
            block = family.block_of(kind, layer)
            module = getattr(layer, block.name)
            if kind is Kind.MLP and hasattr(module, "experts"):
                if first:  # the second track's router is told what the first's was
                    other = first.pop()
                    module.gate.register_forward_pre_hook(
                        lambda *_: (other.view(-1, other.shape[-1]),), prepend=True
                    )
                else:
                    first.append(x)
            return plain(layer, family, kind, x, context)

        plain = layers_module.run_normed
        monkeypatch.setattr(layers_module, "run_normed", as_the_first)
        assert difference(model(ids_BS).logits, expected, keep_BS) > 100 * TOLERANCE


BIAS = "mlp.experts.down_proj_bias"  # GPT-OSS's, of each expert, which its router weighs


@pytest.mark.parametrize("tracks", [2, 8])
def test_an_experts_bias_is_the_first_tracks(
    tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """The others have zeros, which are in no checkpoint and are no parameters, wherever the model
    comes from."""
    path = convert(make_dense("gpt_oss"), tracks, SCHEDULES["track-2-rest"])
    held = {name for name in tensors(path) if name.endswith(BIAS)}
    first = {f"model.layers.{i}.tracks.0.{BIAS}" for i in range(1, 6)}
    assert held == first | {f"model.layers.0.{BIAS}"}
    model = load(path)
    assert {name for name, _ in model.named_parameters() if name.endswith(BIAS)} == held
    model.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(path))
    others = (
        *(model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))),
        *(load(tmp_path / "saved"), load_rank(path, Placement(), OneProcess())),
    )
    for one in others:
        zeros = {n: t for n, t in one.named_buffers() if n.endswith(BIAS)}
        assert len(zeros) == 5 * (tracks - 1) and not any(t.any() for t in zeros.values())


def test_an_experts_bias_is_learned_once(make_dense: MakeDense, convert: Convert) -> None:
    """What training moves is the one that is counted."""
    model = load(convert(make_dense("gpt_oss"), 2, "use: parallel_track, depth: 2")).train()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids_BS = left_padded()[0]
    model(ids_BS, labels=ids_BS).loss.backward()
    optimizer.step()
    experts = [t.mlp.experts for la in model.model.layers.children() for t in la.tracks.values()]
    assert not any(own.down_proj_bias.any() for own in experts[1::2])
    for name, tensor in model.named_parameters():
        assert not torch.equal(tensor, before[name]), name


def test_an_experts_bias_is_the_first_ranks(make_dense: MakeDense, convert: Convert) -> None:
    """Of a layer held dense, which ranks cut: what the two give together is what it gives."""
    source = make_dense("gpt_oss")
    path, x_BSD = convert(source, 2, "use: tensor_parallel"), torch.randn(2, 7, 32)
    whole = load(source).model.layers[0].mlp
    cut = [
        load_rank(path, Placement(rank, 2), OneProcess()).model.layers[0].mlp for rank in range(2)
    ]
    with torch.no_grad():
        expected_BSD, (own_BSD, other_BSD) = whole(x_BSD)[0], (mlp(x_BSD)[0] for mlp in cut)
        assert torch.allclose(own_BSD + other_BSD, expected_BSD, atol=TOLERANCE)
        cut[1].experts.down_proj_bias = whole.experts.down_proj_bias.detach()
        twice_BSD = own_BSD + cut[1](x_BSD)[0]
        assert float((twice_BSD - expected_BSD).abs().max()) > 100 * TOLERANCE


@torch.no_grad()
def sets_chosen(model: Any, ids_NT: torch.Tensor) -> dict[str, list[set[int]]]:
    """The experts of each token, window after window, by the name of the router that says so."""
    found: dict[str, list[set[int]]] = {}

    def said(name: str) -> Any:
        def hook(_: Any, __: Any, out: tuple[torch.Tensor, ...]) -> None:
            found.setdefault(name, []).extend(set(row) for row in out[2].tolist())

        return hook

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(said(name))
    for ids_T in ids_NT:
        model(ids_T[None], use_cache=False)
    return found


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss"])
def test_how_often_tokens_go_to_other_experts(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """As counted by hand, from what the routers say; and never where all tracks read the same."""
    source, ids = make_dense(variant), left_padded(3, 13)[0]
    windows = Windows(ids, 12, ids.numel())
    batch = BatchSize(2, "cpu")
    reference = divergence.reference(load(source), windows, batch, quiet, routes=True)
    path = convert(source, 2, "use: parallel_track, depth: 3")
    tokens = divergence.measure(load(path), reference, windows, batch, quiet)
    theirs, ours = (sets_chosen(load(p), ids[:, :-1]) for p in (source, path))
    differ = [
        a != b
        for name, chosen in ours.items()
        for a, b in zip(chosen, theirs[re.sub(r"tracks\.\d\.", "", name)], strict=True)
    ]
    assert tokens.rerouted is not None and tokens.rerouted.shape == (3, 12)
    assert 0 < tokens.rerouted.mean() == pytest.approx(sum(differ) / len(differ))
    alike = divergence.measure(
        load(convert(source, 2, "use: tensor_parallel")), reference, windows, batch, quiet
    )
    assert alike.rerouted is not None and not alike.rerouted.any()


def quiet(*_: object) -> None:
    """No progress."""


def test_eval_says_so(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    source = byte_level(functools.partial(make_dense, "mixtral"), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    path = convert(source, 2, "use: parallel_track, depth: 2")
    command = ["eval", str(path), "--baseline", str(source), "--text", str(text)]
    command += ["--window", "32", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    said = CliRunner().invoke(main, [*command, "--html", str(tmp_path / "page.html")])
    assert said.exit_code == 0, said.output
    assert re.search(r"other experts, of layers and tracks +\d+\.\d\d%", said.output)
    assert "other experts than the source" in (tmp_path / "page.html").read_text()


def test_families_that_are_unknown_choose_nothing_known() -> None:
    """`eval` compares any two models."""
    sizes = {**SIZES, "vocab_size": 40}
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)).eval()
    windows = Windows(left_padded(2, 9)[0] % 40, 8, 18)
    found = divergence.reference(model, windows, BatchSize(2, "cpu"), quiet, routes=True)
    assert not found.routes


def test_biases_of_routers_stay_in_fp32(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """As transformers keeps them: by what bf16 leaves of them other experts would be chosen."""
    source = tmp_path / "source"
    shutil.copytree(make_dense("glm4_moe", dtype=torch.bfloat16), source)
    file = source / "model.safetensors"
    found = load_file(file)
    biases = [name for name in found if name.endswith("e_score_correction_bias")]
    for name in biases:
        found[name] = 5 + 0.01 * torch.randn(4)
    save_file(found, file, {"format": "pt"})
    path = convert(source, 2, SCHEDULES["track-2-rest"])
    on_a_rank = load_rank(path, Placement(), OneProcess(), torch.bfloat16).state_dict()
    pieces = Pieces(open_checkpoint(path), torch.bfloat16, "cpu")
    loaded = load(path, dtype=torch.bfloat16).state_dict()
    own = [name for name in loaded if name.endswith("e_score_correction_bias")]
    assert len(own) > len(biases) == 5
    for name in own:
        for kept in (on_a_rank[name], pieces.read(name), loaded[name]):
            assert kept.dtype == torch.float32
            assert torch.equal(kept, found[re.sub(r"tracks\.\d\.", "", name)])


@pytest.mark.parametrize("apart", [True, False])
def test_heads_for_further_tokens_come_along(
    apart: bool, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """In whatever layout they are, beside experts in the other."""
    sources = {"qwen3_5_moe_text": "mtp.layers.0.", "glm4_moe": "model.layers.6."}
    for variant, begins in sources.items():
        source = fused(make_dense(variant), tmp_path / f"{variant}-{apart}")
        if not apart:
            shutil.rmtree(source)
            shutil.copytree(make_dense(variant), source)
        file = source / "model.safetensors"
        more = "mlp.experts.0.gate_proj.weight" if apart else "mlp.experts.gate_up_proj"
        found = load_file(file) | {f"{begins}{more}": torch.randn(8, 4)}
        save_file(found, file, {"format": "pt"})
        path = convert(source, 2, SCHEDULES["track-2-rest"])
        assert torch.equal(tensors(path)[f"{begins}{more}"], found[f"{begins}{more}"])
        assert same(tensors(back(path, tmp_path / f"back-{variant}-{apart}")), tensors(source))


@pytest.mark.parametrize(
    ("variant", "begins"),
    [("deepseek_v3", "model.layers.6."), ("glm4_moe", "model.layers.6."), ("qwen3_next", "mtp.")],
)
def test_transform_says_what_becomes_of_a_head_for_further_tokens(
    variant: str, begins: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Carried as it was, and the converted model opens without it."""
    source = tmp_path / "source"
    shutil.copytree(make_dense(variant), source)
    file, head = source / "model.safetensors", {f"{begins}eh_proj.weight": torch.randn(8, 4)}
    save_file(load_file(file) | head, file, {"format": "pt"})
    spec, path = tmp_path / "spec.yaml", tmp_path / "path"
    spec.write_text(spec_text(2, SCHEDULES["track-2-rest"]))
    command = ["transform", str(source), str(path), "--spec", str(spec)]
    for more in (["--dry-run"], []):
        done = CliRunner().invoke(main, [*command, *more])
        said = " ".join(done.stdout.split())
        assert done.exit_code == 0 and "1 tensors of a head for further tokens (MTP)" in said
    (name,) = head
    assert torch.equal(tensors(path)[name], head[name])
    assert not any(own.startswith(begins) for own in load(path).state_dict())


def test_experts_of_several_dtypes_are_healed(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """Each keeps its own."""
    source = tmp_path / "source"
    shutil.copytree(make_dense("qwen3_moe"), source)
    file = source / "model.safetensors"
    one = "model.layers.0.mlp.experts.1.gate_proj.weight"
    found = load_file(file)
    save_file(found | {one: found[one].bfloat16()}, file, {"format": "pt"})
    path = convert(source, 2, "use: parallel_track, depth: 2")
    name = "model.layers.0.tracks.1.mlp.experts.gate_up_proj"
    moved = load(path).state_dict()[name] + 1
    write(open_checkpoint(path), {name: moved}, {}, "card", tmp_path / "healed", False)
    before, after = tensors(path), tensors(tmp_path / "healed")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"model.layers.0.tracks.1.mlp.experts.{e}.{which}_proj.weight"
        for e in range(4)
        for which in ("gate", "up")
    }
    assert all(before[n].dtype == after[n].dtype for n in before)


def test_what_a_dry_run_says_of_adapters(make_dense: MakeDense) -> None:
    """peft adapts linear layers, of which experts and routers have none."""
    for variant in ("qwen3_moe", "glm4_moe", "mixtral", "gpt_oss"):
        source = open_checkpoint(make_dense(variant))
        shape = shape_of(source)
        model = load(source.path)
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        matrices = {n for n, t in source.tensors.items() if len(t.shape) == 2 and ".layers." in n}
        counted = {n for n in matrices if not is_of_experts(n, shape)}
        assert counted == {f"{n}.weight" for n in linear if ".layers." in n}


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss"])
def test_router_logits(variant: str, make_dense: MakeDense, convert: Convert) -> None:
    """Tracks have routers each, so there are none of the model; where only the config asks for
    them, they are left out."""
    path, ids_BS = convert(make_dense(variant), 2, SCHEDULES["track-2-rest"]), left_padded(1)[0]
    model = load(path)
    with pytest.raises(ValueError, match="output_router_logits is not supported"):
        model(ids_BS, output_router_logits=True)
    with torch.no_grad():
        expected = model(ids_BS, labels=ids_BS)
        model.config.output_router_logits = True
        assert torch.equal(model(ids_BS, labels=ids_BS).loss, expected.loss)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_local_experts": 4}, "num_experts and num_local_experts differ"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None"),
        ({"decoder_sparse_step": 0}, "which layers have experts isn't clear"),
        ({"moe_intermediate_size": "x"}, "moe_intermediate_size is 'x'"),
    ],
)
def test_what_a_config_may_not_say(changed: dict[str, Any], says: str) -> None:
    config = {**json.loads((CONFIGS / "qwen3-30b-a3b.json").read_text()), **changed}
    with pytest.raises(ConfigError, match=says):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        *(("qwen3-30b-a3b", 30.53, 3.35), ("qwen3.6-35b-a3b", 34.66, 3.45)),
        ("gpt-oss-120b", 116.83, 5.13 + 0.58),  # as published, and the embedding
    ],
)
def test_parameters_in_all_and_of_one_token(name: str, total: float, active: float) -> None:
    """In billions, as their names say, of which the embedding and the output head are 0.6 and 1."""
    shape = ModelShape.from_config(read_config(CONFIGS / f"{name}.json"))
    sizes = [
        (torch.Size(shape.size(rule)).numel(), shape.routed_share(rule))
        for layer in range(shape.layers)
        for rule in shape.rules_of(layer)
    ]
    vocabulary = 2 * shape.vocabulary * shape.width
    norm = shape.width
    assert (sum(n for n, _ in sizes) + vocabulary + norm) / 1e9 == pytest.approx(total, abs=0.01)
    assert (sum(n * s for n, s in sizes) + vocabulary) / 1e9 == pytest.approx(active, abs=0.01)


def test_what_experts_take_on_paper() -> None:
    """Of Qwen3-30B-A3B on 4 ranks: one token reads and multiplies 8 experts of 128, many read all
    of them and multiply 8 each."""
    shape = ModelShape.from_config(read_config(CONFIGS / "qwen3-30b-a3b.json"))
    expert, router = 3 * 768 * 2048, 128 * 2048
    (one,), (many,) = (
        sublayer_parts(Sublayer(0, Kind.MLP), shape, read_engine("vllm"), 4, Pass(n, 1, 0, 1))
        for n in (1, 4096)
    )
    assert one.flops == 2 * (8 * expert / 4 + router)
    moved = 4 * 2048 + 4 * 8 * 768 / 4
    assert one.nbytes == pytest.approx(2 * (8 * expert / 4 + router + moved))
    assert many.flops == 4096 * one.flops
    assert many.nbytes == pytest.approx(2 * (128 * expert / 4 + router + 4096 * moved))


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss"])
def test_a_dry_run_counts_experts(variant: str, make_dense: MakeDense) -> None:
    source = open_checkpoint(make_dense(variant))
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 2"), "spec.yaml")
    plan = plan_conversion(source, spec, source_name="source")
    found = plan.summary()
    assert found["tensors_in"] == len(source.tensors)
    of_experts = [t for t in plan.targets if ".experts." in t.name]
    whole = sum(t.nbytes for n, t in source.tensors.items() if ".experts." in n)
    assert sum(t.nbytes for t in of_experts) == whole  # shared out, none of them twice


def test_a_conversion_of_many_small_tensors(tmp_path: Path, make_dense: MakeDense) -> None:
    """Each expert of each layer is a tensor of its own for each track."""
    source = make_dense("qwen3_moe", num_experts=64)
    spec = parse_spec(spec_text(8, "use: parallel_track, depth: 2"), "spec.yaml")
    execute(plan_conversion(open_checkpoint(source), spec, source_name="x"), tmp_path / "made")
    assert same(tensors(back(tmp_path / "made", tmp_path / "back")), tensors(source))
