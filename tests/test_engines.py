"""Serving engines by entry point: what verify does with one, installed or not. (vLLM's own tests
are in tests/serving.)"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import seeing
import torch
from click.testing import CliRunner
from conftest import VARIANTS, MakeDense, random_model, small_config, spec_text
from quantising import quantise
from refused import in_table
from torch import nn
from torch._inductor import config as inductor

from ptconvert import engines
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import Section, read_section
from ptconvert.cli import main
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.engines import ServingEngine
from ptconvert.engines.base import ServedPass, is_for_others, own_weights
from ptconvert.engines.in_flight import InFlight
from ptconvert.engines.sglang import ENGINE as IN_SGLANG
from ptconvert.engines.sglang import _as_known
from ptconvert.engines.sglang import refusals as of_sglang
from ptconvert.engines.sglang.families import SERVED
from ptconvert.engines.sglang.formats import unserved_weights as unserved_by_sglang
from ptconvert.engines.sglang.refusals import check as check_sglang
from ptconvert.engines.sglang.refusals import unpadded
from ptconvert.engines.vllm import ENGINE as IN_VLLM
from ptconvert.engines.vllm import checkpoints, unknown
from ptconvert.engines.vllm.formats import unserved_weights
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.modeling.executor import OneProcess, Streams, TorchEngine, Update, run_program
from ptconvert.models.families import FAMILIES, MODEL_TYPE_PREFIX
from ptconvert.models.shape import HEAD, ModelShape
from ptconvert.models.wrappers import WRAPPERS
from ptconvert.schedule.presets import dense_schedule, farskip, ladder
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer
from ptconvert.spec.document import parse_spec, read_spec
from ptconvert.verify.run import Check, Report


def verified(path: Path, settings: Any, eager: bool) -> Report:
    """An engine that runs nothing: it reports what it was asked for."""
    asked = f"{path.name} on {settings.ranks} ranks{', eagerly' * eager}"
    return Report((Check("asked for", settings.ranks == 2, asked),))


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
PARTIAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e4},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
BOTH_WAYS = "use_bidirectional_attention"
WAYS = (("gemma", True), ("gemma2", True), ("gemma3_text", True), ("gemma4_text", "all"))
HERE = ServingEngine("pytest", "pip install pytest", verified)
AWAY = ServingEngine("no_such_package", "pip install no-such-package", verified)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of another package: one is installed, one is not."""
    entries = [EntryPoint(n, f"test_engines:{n.upper()}", engines.GROUP) for n in ("here", "away")]

    def entry_points(group: str, name: str = "") -> list[EntryPoint]:
        assert group == engines.GROUP
        return [entry for entry in entries if name in ("", entry.name)]

    monkeypatch.setattr(engines, "entry_points", entry_points)


def test_what_comes_along_is_registered() -> None:
    assert {"sglang", "vllm"} <= set(engines.engine_names())


@pytest.mark.parametrize(
    ("variant", "sizes", "settings", "said"),
    [
        ("llama", {}, {"ranks": 4}, "--tp 4: SGLang's cache has as many heads in all layers"),
        (
            "llama",
            {"hidden_act": "gelu"},
            {},
            "hidden_act gelu: SGLang's MLP for it is",
        ),
        (
            "arcee",
            {"hidden_act": "silu"},
            {},
            "hidden_act silu: SGLang's MLP for it is",
        ),
        (
            *("gemma2", {}, {"on_cpu": True}),
            "attn_logit_softcapping 50.0: SGLang's attention on CPUs (torch_native) leaves it out",
        ),
        ("cohere", {}, {}, "attention_bias True: SGLang's layers for it have no biases"),
        ("deepseek_v3", {}, {}, "attention_bias True: SGLang's layers for it have no biases"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, {}, "rms_norm_eps 1e-05: SGLang's layers for it"),
        ("deepseek_v3", {"rope_interleave": False}, {}, "rope_interleave False: SGLang's layers"),
        ("deepseek_v3", {}, {}, "rope_type default: SGLang's attention for it turns positions by"),
        (
            *("gemma4_text", {}, {"backends": ("triton", "fa3")}),
            "--attention-backend fa3: heads differ by kind of layer, which in SGLang only triton,",
        ),
        (
            *("gpt_oss", {}, {"backends": ("flashinfer",)}),
            "--attention-backend flashinfer: attention has sinks, which in SGLang only aiter, fa3,",
        ),
        (
            *("gpt_oss", {}, {"backends": ("torch_native",)}),
            "--attention-backend torch_native: attention has sinks, which in SGLang only aiter,",
        ),
        ("gpt_oss", {}, {"on_cpu": True}, "attention sinks: SGLang's attention on CPUs (torch_nat"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, {}, "swiglu_alpha 1.0: SGLang's layers for it have"),
        (
            *("gpt_oss", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, {}),
            "attention_factor 1.0 of rope_type yarn: SGLang's attention for it reads it otherwise",
        ),
        (
            *("gemma4_text", {}, {"backends": ("torch_native", "triton")}),
            "--attention-backend: torch_native beside another was not tried",
        ),
        (
            *("gemma4_text", {"rope_parameters": PARTIAL}, {}),
            "partial_rotary_factor 0.5 of rope_type default: SGLang's attention for it reads it",
        ),
        (
            *("deepseek_v3", {"rope_parameters": {**YARN, "truncate": False}}, {}),
            "truncate False of rope_type yarn: SGLang's attention for it reads it otherwise than",
        ),
        (
            *("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0}}, {}),
            "mscale, mscale_all_dim: SGLang takes one without the other otherwise",
        ),
        (
            "gemma4_text",
            {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), LINEAR)},
            {},
            "rope_type linear: SGLang's attention for it turns positions by default or",
        ),
        (
            "gemma4_text",
            {"num_global_key_value_heads": 1},
            {"on_cpu": True},
            "and 1 and 4 KV heads",
        ),
        (
            *("llama", {"rope_parameters": DYNAMIC}, {}),
            "rope_type dynamic: SGLang turns all positions as at the longest length",
        ),
        (
            "cwm",
            {"is_causal": False},
            {},
            "is_causal False: tokens see later ones, too, and SGLang",
        ),
        *((family, {BOTH_WAYS: way}, {}, f"{BOTH_WAYS} {way}: tokens see") for family, way in WAYS),
        ("llama", {"intermediate_size": 96}, {"on_cpu": True}, "96 FFN neurons and 4 KV heads"),
        ("llama", {"num_key_value_heads": 1}, {"on_cpu": True}, "128 FFN neurons and 1 KV heads"),
        (
            *("llama", {}, {"quantization": "fp8"}),
            "--quantization fp8: converted models are served as their weights are kept; leave it",
        ),
        ("llama", {}, {"groups": {"--pp-size": 2}}, "--pp-size: all layers must be on every rank"),
        (
            *("llama", {}, {"groups": {"--pp-size": 1, "--enable-dp-attention": 2}}),
            "--enable-dp-attention: all layers must be on every rank",
        ),
        ("llama", {}, {"groups": {"--attn-cp-size": 2}}, "--attn-cp-size: all layers must be"),
        ("llama", {}, {"groups": {"--dcp-size": 2}}, "--dcp-size: all layers must be on every"),
        ("mixtral", {}, {"groups": {"--ep-size": 2}}, "--ep-size: each track has a share of every"),
        ("mixtral", {}, {"groups": {"--moe-dp-size": 2}}, "--moe-dp-size: each track has a share"),
        ("glm4_moe", {}, {"dense_ranks": 1}, "--moe-dense-tp-size: each rank has its share of a"),
        ("qwen3_next", {}, {"on_cpu": True}, "linear attention: SGLang's operations for it"),
        ("qwen3_5_text", {"attention_bias": True}, {}, "attention_bias True: SGLang's layers for"),
        (
            *("llama", {}, {"drafts": "NGRAM"}),
            "--speculative-algorithm NGRAM: not tried in SGLang; leave it out, or serve it in vLLM",
        ),
        (
            *("qwen3_next", {"shared_expert_intermediate_size": 96}, {"on_cpu": True}),
            "32 FFN neurons and 4 KV heads: SGLang's CPU engine fills up what isn't a multiple of",
        ),
    ],
)
def test_what_sglang_cannot_serve_is_refused_by_name(
    variant: str, sizes: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    config = small_config(variant, **{"intermediate_size": 128, **sizes})
    shape, section = (
        ModelShape.from_config(config.to_dict()),
        Section(dense_schedule(6), 2, "sum", {}),
    )
    with pytest.raises(ConfigError) as refused:
        check_sglang(config.to_dict(), shape, section, **{"ranks": 2, "on_cpu": False, **settings})
    assert said in str(refused.value)
    assert in_table("sglang", str(refused.value))


@pytest.mark.parametrize(
    ("variant", "sizes", "said"),
    [
        ("ernie4_5", {}, "use_bias True: vLLM's layers for it have no biases; transformers runs"),
        ("qwen3_moe", {}, "shared_expert_intermediate_size 32: vLLM would add experts"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0: vLLM's layers for it have 7.0"),
        ("deepseek_v3", {}, "attention_bias True: vLLM's layers for it have no biases"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu: vLLM's experts would be activated"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act gelu: vLLM's linear attention knows"),
        ("cwm", {"is_causal": False}, "is_causal False: tokens see later ones, too, and vLLM"),
        *((family, {BOTH_WAYS: way}, f"{BOTH_WAYS} {way}: tokens see") for family, way in WAYS),
        ("gemma4_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0: vLLM would"),
    ],
)
def test_what_vllms_layers_are_not_is_known_without_vllm(
    variant: str, sizes: dict[str, Any], said: str
) -> None:
    found = unserved_by(small_config(variant, **sizes).to_dict())["vllm"]
    assert any(reason.startswith(said) and in_table("vllm", reason) for reason in found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_may_leave_out_what_transformers_has_then(variant: str) -> None:
    config = small_config(variant)
    whole = config.to_dict()
    little = config.to_diff_dict()
    assert little.keys() < whole.keys()
    shape = ModelShape.from_config(whole)
    given = {"model_type": shape.model_type} | little
    section = Section(shape.dense, 2, "sum", {})
    for engine in (IN_VLLM, IN_SGLANG):
        of_all, of_few = (list(engine.unserved(c, shape, section, 2)) for c in (whole, given))
        assert of_all == of_few


def unserved_by(config: dict[str, Any], **told: Any) -> dict[str, list[str]]:
    """Why a conversion of it to two tracks wouldn't be served, all layers dense."""
    shape = ModelShape.from_config(config)
    found = engines.unserved(config, Section(shape.dense, 2, "sum", {}, **told))
    assert all(found.values())
    return {"vllm": [], "sglang": []} | found


@pytest.mark.parametrize(
    ("variant", "in_vllm"),
    [
        ("llama", []),
        ("deepseek_v3", ["with attention to latents (MLA)", "in mixtures of experts"]),
        ("qwen3_next", ["beside linear attention", "in mixtures of experts"]),
        ("mixtral", ["in mixtures of experts"]),
    ],
)
def test_where_a_lora_beside_weights_is_served(variant: str, in_vllm: list[str]) -> None:
    """Elsewhere what is served would be what it was before it was healed."""
    lora = "a LoRA beside quantised weights (heal --lora): "
    config = small_config(variant, attention_bias=False).to_dict()
    found = unserved_by(config, adapter=True)
    for reason, said in itertools.zip_longest(found["vllm"], in_vllm, fillvalue="-"):
        assert reason == f"{lora}not tried {said}; transformers runs it"
    in_sglang = f"{lora}SGLang would leave it out; transformers runs it"
    assert in_sglang in found["sglang"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_of_what_sees_engines_say_what_they_serve(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = seeing.seeing_model(name).config.to_dict()
    found = unserved_by(config)
    assert found["sglang"] == [
        f"a converted {name} isn't served in SGLang, nor any other model with pictures; "
        "transformers runs it"
    ]
    assert found["vllm"] == []
    monkeypatch.setattr(checkpoints, "LANGUAGE_MODELS", {"another": ""})
    (refused,) = unserved_by(config)["vllm"]
    assert refused.startswith(
        f"a converted {name} isn't served in vLLM, of converted models with pictures only another"
    )


@pytest.mark.parametrize("preset", [farskip, ladder])
def test_a_mixture_in_two_parts_is_refused(preset: Callable[[range], Any]) -> None:
    config = small_config("glm4_moe", attention_bias=False).to_dict()
    shape = ModelShape.from_config(config)
    schedule = Schedule(preset(range(shape.layers)))
    found = engines.unserved(config, Section(schedule, 2, "sum", {}))
    if preset is ladder:
        assert found == {}
    else:
        said = "s0 and r0, a mixture in two parts (farskip): {} runs it whole; transformers runs it"
        assert found == {"vllm": [said.format("vLLM")], "sglang": [said.format("SGLang")]}


def test_positions_are_read_by_their_older_name(make_dense: MakeDense) -> None:
    config: dict[str, Any] = read_config(make_dense("llama"))
    rope = config.pop("rope_parameters")
    assert unserved_by(config)["sglang"] == []
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    for both in (config, config | {"rope_parameters": rope}):  # where the older one counts
        (found,) = unserved_by(both)["sglang"]
        assert found.startswith("rope_type dynamic: SGLang turns all positions as at the longest")


def test_a_plugin_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("gone", "no_such_package:ENGINE", engines.GROUP)]
    monkeypatch.setattr(engines, "entry_points", lambda **_: entries)
    config = small_config("llama").to_dict()
    found = engines.unserved(config, Section(dense_schedule(6), 2, "sum", {}))
    assert found == {"gone": ["its plugin can't be loaded: No module named 'no_such_package'"]}


def test_all_say_the_same_of_groups_that_ranks_would_part(tmp_path: Path) -> None:
    """On as many ranks as tracks, of which some have a group more: of layers held dense vLLM gives
    each rank as much."""
    random_model("llama", intermediate_size=96, head_dim=64).save_pretrained(tmp_path / "dense")
    source = quantise(tmp_path / "dense", tmp_path / "source", "GPTQ in groups of 32")
    spec = tmp_path / "spec.yaml"
    spec.write_text(spec_text(2, "use: ladder"))
    out = tmp_path / "out"
    said = "tensor_parallel_size 2: model.layers.0.mlp.down_proj keeps 32 of its inputs together"
    for command in (
        ["transform", str(source), str(out), "--spec", str(spec)],
        ["show", str(out)],
        ["show", str(spec), "--model", str(source)],
    ):
        told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["unserved"]
        assert any(reason.startswith(said) for reason in told["vllm"])
    section = read_section(read_config(out))
    assert "vllm" not in engines.unserved(read_config(out), section, ranks=1)


def test_commands_say_what_engines_refuse(make_dense: MakeDense, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(spec_text(2, "use: ladder"))
    source, out = str(make_dense("gpt_oss", swiglu_alpha=1.0)), str(tmp_path / "out")
    in_vllm = "vllm doesn't serve it on 2 ranks: swiglu_alpha 1.0: vLLM's layers for it have 1.702"
    in_sglang = in_vllm.replace("vllm", "sglang").replace("vLLM", "SGLang")
    for command in (
        ["show", str(spec), "--model", source],
        ["transform", source, out, "--spec", str(spec), "--dry-run"],
        ["transform", source, out, "--spec", str(spec)],
        ["show", out],
    ):
        shown = CliRunner().invoke(main, command)
        assert shown.exit_code == 0 and in_vllm in shown.output and in_sglang in shown.output
        told = json.loads(CliRunner().invoke(main, [*command, "--json", *OVER[command[0]]]).stdout)
        assert len(told["unserved"]["vllm"]) == len(told["unserved"]["sglang"]) == 1


def test_estimate_judges_each_candidate_by_itself(make_dense: MakeDense, tmp_path: Path) -> None:
    """And recommends none that the engine doesn't run."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(spec_text(2, "use: ladder"))
    for name, sizes in (("plain", {}), ("other", {"swiglu_limit": 5.0})):
        source = str(make_dense("gpt_oss", **sizes))
        done = CliRunner().invoke(
            main, ["transform", source, str(tmp_path / name), "--spec", str(spec)]
        )
        assert done.exit_code == 0
    plain, other = (str(tmp_path / name) for name in ("plain", "other"))
    command = ["estimate", other, plain, "--hardware", "rtx-3090-p2p-off", "--ranks", "2"]
    for engine, times in (("vllm", 1), ("tensorrt-llm", 0)):
        shown = CliRunner().invoke(main, [*command, "--engine", engine])
        text = " ".join(shown.stdout.split())
        assert shown.exit_code == 0
        assert text.count("vllm doesn't serve other: swiglu_limit 5.0") == times
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [len(row["unserved"]) for row in told["rows"]] == [0, 1, 0]
    served = {way["name"]: way["served"] for way in told["verdict"]["ways"] if way["converts"]}
    assert served == {"other": False, "plain": True}
    alone = ["estimate", other, *command[3:], "--json"]
    verdict = json.loads(CliRunner().invoke(main, alone).stdout)["verdict"]
    assert not verdict["convert"] and verdict["worth_it"] == []
    assert verdict["text"].startswith("Don't convert: the engine serves none of the schedules.")


OVER = {"show": [], "transform": ["--overwrite"]}
SPECS = Path(__file__).parents[1] / "specs"


def compressed(form: str, taken: Any = None, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one scheme."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": taken}
    named = {"quant_method": "compressed-tensors", "format": form}
    return {**named, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
_FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_AWQ = {"bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("quantization", "ranks", "said"),
    [
        (_GPTQ | {"desc_act": True}, 1, "groups in act-order (desc_act, actorder): vLLM would"),
        (compressed("pack-quantized", **_FOUR, actorder="group"), 1, "groups in act-order"),
        (
            compressed("pack-quantized", **_FOUR) | {"kv_cache_scheme": _TOKEN},
            1,
            "a quantised KV cache (kv_cache_scheme, kv_cache_quant_algo): not served",
        ),
        (_GPTQ | {"sym": False}, 1, "GPTQ with sym false: vLLM would leave its zero points out"),
        (
            compressed("int-quantized", _TOKEN, **{**_INT8, "symmetric": False}),
            1,
            "INT8 weights with zero points: vLLM has symmetric ones only",
        ),
        (compressed("int-quantized", **_INT8), 1, "INT8 weights beside activations that aren't"),
        (
            _GPTQ | {"group_size": 64},
            2,
            "tensor_parallel_size 2: model.layers.0.mlp.down_proj keeps 64 of its inputs together, "
            "and each rank would have 48 of them; take fewer ranks",
        ),
        (
            _BLOCKS | {"weight_block_size": [32, 32]},
            2,
            "model.layers.0.mlp.gate_proj keeps 32 of its outputs together",
        ),
    ],
)
def test_what_of_quantised_checkpoints_vllm_cannot_serve_is_refused_by_name(
    quantization: dict[str, Any], ranks: int, said: str
) -> None:
    (refused,) = unserved_of(quantization, ranks)
    assert said in refused and in_table("vllm", refused)


@pytest.mark.parametrize(
    "quantization",
    [
        *(_GPTQ, _BLOCKS, {"quant_method": "awq", "w_bit": 4, "q_group_size": 16}),
        _GPTQ | {"desc_act": True, "group_size": -1},  # one group: its order says nothing
        compressed("pack-quantized", **_FOUR, actorder="weight"),
        compressed("pack-quantized", **{**_FOUR, "symmetric": False}),
        compressed("int-quantized", _TOKEN, **_INT8),
    ],
)
def test_what_of_quantised_checkpoints_vllm_serves(quantization: dict[str, Any]) -> None:
    assert unserved_of(quantization, 2) == []


def unserved_of(
    quantization: dict[str, Any], ranks: int, family: str = "llama", **sizes: Any
) -> list[str]:
    """What of a small model so quantised vLLM is told not to serve, all its layers held dense."""
    sizes = {"intermediate_size": 96, "head_dim": 64, **sizes}
    config = small_config(family, **sizes).to_dict()
    shape = ModelShape.from_config({**config, "quantization_config": quantization})
    return list(
        unserved_weights(quantization, shape, Section(dense_schedule(6), 2, "sum", {}), ranks)
    )


def test_auto_rounds_experts_are_served_without_zero_points() -> None:
    given = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True}
    assert unserved_of(given, 1, "mixtral") == unserved_of(given | {"sym": False}, 1) == []
    (refused,) = unserved_of(given | {"sym": False}, 1, "mixtral")
    assert refused.startswith("quantization_config: AutoRound's experts with zero points: vLLM")


def test_fp8_experts_are_served_where_activations_are_fp8_too() -> None:
    assert unserved_of(_BLOCKS, 1, "mixtral") == []
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    taken = {**_TOKEN, "type": "float"}
    assert unserved_of(compressed("float-quantized", taken, **fp8), 1, "mixtral") == []
    (refused,) = unserved_of(compressed("float-quantized", **fp8), 1, "mixtral")
    assert refused == (
        "quantization_config: FP8 experts beside activations that aren't quantised: vLLM has no "
        "such"
    )
    assert unserved_of(compressed("float-quantized", **fp8), 1) == []  # a dense model
    mixed = compressed("float-quantized", **fp8)
    groups = mixed["config_groups"]
    groups["group_0"]["targets"] = ["re:.*self_attn.*"]
    four = compressed("pack-quantized", **_FOUR)["config_groups"]["group_0"]
    groups["group_1"] = four | {"targets": ["re:.*experts.*"], "format": "pack-quantized"}
    assert unserved_of(mixed, 1, "mixtral") == []


def test_of_experts_whose_groups_ranks_would_part() -> None:
    groups = compressed("pack-quantized", **{**_FOUR, "group_size": 32})
    (refused,) = unserved_of(groups, 2, "mixtral")
    assert refused == (
        "tensor_parallel_size 2: model.layers.0.block_sparse_moe.experts.0.w2 keeps 32 of its "
        "inputs together, and each rank would have 48 of them; take fewer ranks"
    )
    # by the names of single experts
    named = groups["config_groups"]["group_0"] | {"targets": [r"re:.*experts\.\d+\.w\d"]}
    whole = {**_FOUR, "group_size": 64}
    attention = compressed("pack-quantized", **whole)["config_groups"]["group_0"]
    both = {"group_0": named, "group_1": attention | {"targets": ["re:.*self_attn.*"]}}
    (refused,) = unserved_of(groups | {"config_groups": both}, 2, "mixtral")
    assert "experts.0.w2 keeps 32 of its inputs" in refused


def test_of_fp8_experts_vllm_parts_blocks_down_to_32() -> None:
    blocks = _BLOCKS | {"weight_block_size": [64, 64]}
    sizes: dict[str, Any] = {"intermediate_size": 192, "hidden_size": 64}
    assert unserved_of(blocks, 2, "mixtral", **sizes) == []  # 96 for a rank: blocks of 32
    (refused,) = unserved_of(blocks, 4, "mixtral", **sizes)  # 48: they would be of 16
    assert refused == (
        "tensor_parallel_size 4: model.layers.0.block_sparse_moe.experts.0.w1 keeps 64 of its "
        "outputs together, and each rank would have 48 of them; take fewer ranks"
    )
    # of whole blocks only: vLLM repeats all of the last one's scales
    (refused,) = unserved_of(blocks, 2, "mixtral", **sizes | {"intermediate_size": 160})
    assert "experts.0.w1 keeps 64 of its outputs together" in refused
    (refused,) = unserved_of(blocks, 2, **sizes)  # linears it refines none of
    assert "mlp.gate_proj keeps 64 of its outputs" in refused
    # nor where another method of vLLM's has them
    fp8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64]}
    taken = {**_TOKEN, "type": "float", "strategy": "group", "group_size": 64}
    (refused,) = unserved_of(
        compressed("float-quantized", taken, **fp8), 2, "mixtral", intermediate_size=192
    )
    assert "experts.0.w1 keeps 64 of its outputs" in refused


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gpt_oss_as_it_is_published_is_served_by_its_ready_specs(ranks: int) -> None:
    """Engines give each rank whole blocks of a layer held dense, and SGLang has room for those of
    tracks that have one more than others."""
    config: dict[str, Any] = read_config(SPECS / "configs" / "gpt-oss-120b.json")
    shape, fitting = ModelShape.from_config(config), []
    for path in sorted(SPECS.glob("gpt-oss-120b-*.yaml")):
        spec = read_spec(path)
        if spec.tracks % ranks == 0:
            section = Section(spec.schedule(), spec.tracks, "sum", {})
            assert (
                list(unserved_weights(config["quantization_config"], shape, section, ranks)) == []
            )
            fitting.append(path.stem)
        if spec.tracks == ranks:
            unequal = replace(section, together={"intermediate_size": 32})
            assert list(IN_SGLANG.unserved(config, shape, unequal, ranks)) == []
            others = config | {"quantization_config": None}
            (refused,) = IN_SGLANG.unserved(others, shape, unequal, ranks)
            assert refused.startswith("intermediate_size: tracks have unequal shares, and SGLang")
    assert len(fitting) >= 3


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu"])
def test_vllms_that_the_plugin_was_run_with(version: str) -> None:
    assert unknown(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.34.0.dev12+g1234", "1.0", "dev"])
def test_another_vllm_is_said_in_a_line(version: str) -> None:
    said = unknown(version)
    assert said == (
        f"ptconvert was run with vLLM 0.32 and 0.33, and this is {version}: "
        "`ptconvert verify --runtime vllm` says whether it works"
    )


_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize(
    ("family", "quantization", "said"),
    [
        ("llama", _GPTQ | {"desc_act": True}, "groups in act-order (desc_act, actorder): not"),
        ("llama", _GPTQ | {"sym": False}, "GPTQ with sym false: not served in SGLang"),
        ("llama", compressed("int-quantized", **_INT8), "INT8 weights beside activations that"),
        (
            *("llama", {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True}),
            "quant_method auto-round: of a llama SGLang serves only fp8, compressed-tensors, awq, ",
        ),
        (
            *("llama", compressed("mxfp4-pack-quantized", **_FOUR | {"type": "float"})),
            "weights in float 4, activations in none: not tried in SGLang",
        ),
        (
            *("llama", _BLOCKS | {"weight_block_size": [32, 32]}),
            "2 tracks, a rank for each: model.layers.0.mlp.gate_proj keeps 32 of its outputs "
            "together, and each rank would have 48 of them; convert to fewer",
        ),
        (
            "llama",
            _MXFP4,
            "quant_method mxfp4: of a llama SGLang serves only fp8, compressed-tensors",
        ),
        ("gpt_oss", _BLOCKS, "quant_method fp8: of a gpt_oss SGLang serves only mxfp4"),
        ("qwen3_next", _BLOCKS, "quant_method fp8: of a qwen3_next SGLang was tried with none"),
        ("mixtral", _GPTQ, "experts in GPTQ: SGLang has a rank's scales in the size of all ranks'"),
        ("mixtral", compressed("int-quantized", _TOKEN, **_INT8), "experts in integers beside"),
        ("mixtral", compressed("float-quantized", **_FP8), "weights in float 8, activations in"),
        (
            "llama",
            compressed("pack-quantized", _TOKEN, **_FOUR),
            "weights in int 4, activations in",
        ),
        ("llama", {"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo FP8 of ModelOpt"),
        ("mixtral", {"quant_method": "awq", **_AWQ}, "experts in AWQ, 48 neurons for a rank in"),
        ("glm4_moe", compressed("pack-quantized", **_FOUR), "shared experts in packed numbers"),
        ("deepseek_v3", compressed("pack-quantized", **_FOUR), "kv_b_proj in packed numbers: SGLa"),
        (
            *("deepseek_v3", {**_NVFP4, "ignore": ["lm_head", "*.kv_b_proj"]}),
            "q_a_proj in NVFP4: SGLang has one scale for it and kv_a_proj_with_mqa",
        ),
    ],
)
def test_what_of_quantised_checkpoints_sglang_cannot_serve_is_refused_by_name(
    family: str, quantization: dict[str, Any], said: str
) -> None:
    (refused,) = unserved_in_sglang(quantization, family)
    assert said in refused and in_table("sglang", refused)


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        *(("llama", q) for q in (_GPTQ, _BLOCKS, {"quant_method": "awq", **_AWQ})),
        *(("llama", compressed("pack-quantized", **_FOUR)),),
        *(("llama", compressed("int-quantized", _TOKEN, **_INT8)),),
        *(("mixtral", _BLOCKS), ("mixtral", compressed("pack-quantized", **_FOUR))),
        *(("glm4_moe", _BLOCKS), ("deepseek_v3", _BLOCKS), ("gemma4_text", _BLOCKS)),
        ("deepseek_v3", compressed("float-quantized", _TOKEN | {"type": "float"}, **_FP8)),
        ("deepseek_v3", compressed("pack-quantized", **_FOUR) | {"ignore": ["re:.*kv_b_proj"]}),
        ("deepseek_v3", {**_NVFP4, "ignore": ["lm_head", "*.self_attn*"]}),
        ("gpt_oss", _MXFP4),
    ],
)
def test_what_of_quantised_checkpoints_sglang_serves(
    family: str, quantization: dict[str, Any]
) -> None:
    assert unserved_in_sglang(quantization, family) == []
    (refused,) = unserved_in_sglang(quantization, family, on_cpu=True)
    assert "SGLang's kernels for CPUs (sgl_kernel) were never tried with it" in refused


def test_a_quantised_head_is_refused_in_sglang() -> None:
    assert unserved_in_sglang({**_GPTQ, "lm_head": False}, "llama") == []
    (refused,) = unserved_in_sglang({**_GPTQ, "lm_head": True}, "llama")
    assert refused == "quantization_config: a quantised lm_head (lm_head): not served in SGLang"


def test_sglang_has_no_place_for_blocks_that_part_two_projections() -> None:
    (refused,) = unserved_in_sglang(_BLOCKS, "deepseek_v3", q_lora_rank=24)
    assert "self_attn.q_a_proj has 24 outputs in blocks of 16: SGLang has kv_a_proj" in refused


def unserved_in_sglang(
    quantization: dict[str, Any], family: str, on_cpu: bool = False, **more: Any
) -> list[str]:
    """What of a small model so quantised SGLang is told not to serve, all its layers held dense."""
    sizes: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 96, "head_dim": 64}
    config = small_config(family, **{**sizes, **more}).to_dict()
    shape = ModelShape.from_config({**config, "quantization_config": quantization})
    section = Section(dense_schedule(6), 2, "sum", {})
    return list(unserved_by_sglang(quantization, shape, section, on_cpu))


def test_a_config_keeps_its_architectures_where_sglang_refuses_it() -> None:
    """It goes by another name while SGLang derives what a cache holds, which may raise."""
    config = SimpleNamespace(model_type=f"{MODEL_TYPE_PREFIX}deepseek_v3", architectures=["Own"])

    def derive(model_config: Any) -> None:
        raise ValueError(*model_config.hf_config.architectures)

    with pytest.raises(ValueError, match=r"^DeepseekV3ForCausalLM$"):
        _as_known(derive, SimpleNamespace(hf_config=config))
    assert config.architectures == ["Own"]


def test_a_family_that_sglang_has_no_layers_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(of_sglang, "SERVED", {"llama": SERVED["llama"]})
    (refused,) = unserved_by(small_config("qwen2").to_dict())["sglang"]
    assert refused.startswith(
        "a converted qwen2 isn't served in SGLang, of converted models only llama; transformers"
    )


def test_sglang_has_no_unequal_tracks() -> None:
    config = small_config("llama", intermediate_size=128).to_dict()
    shape = ModelShape.from_config(config)
    section = Section(dense_schedule(6), 2, "sum", {}, together={"intermediate_size": 48})
    with pytest.raises(ConfigError, match="intermediate_size: tracks have unequal shares, and"):
        check_sglang(config, shape, section, 2, on_cpu=False)


def test_what_sglang_makes_of_a_config_is_undone() -> None:
    theirs = {"intermediate_size": 128, "original_intermediate_size": 96, "num_attention_heads": 8}
    assert unpadded(theirs)["intermediate_size"] == 96
    assert unpadded(theirs)["num_attention_heads"] == 8
    kinds = {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4", "group_size": 16}
    own = {**kinds, "quant_method": "modelopt"}
    assert unpadded({"quantization_config": kinds})["quantization_config"] == own
    heads = {"head_dim": 16, "num_key_value_heads": 2}
    windows = {"swa_head_dim": 8, "swa_num_key_value_heads": 4}
    kinds_of_layers = {"layer_types": ["sliding_attention", "full_attention"]}
    found = unpadded({**heads, **windows, **kinds_of_layers})
    assert (found["head_dim"], found["num_key_value_heads"]) == (8, 4)
    assert found["per_layer_config"] == {"1": heads}


@pytest.mark.usefixtures("registered")
def test_a_registered_engine_is_found_and_one_that_is_not_installed_is_named() -> None:
    assert engines.engine_names() == ["away", "here"]
    assert engines.find_engine("here") is HERE
    with pytest.raises(ValueError, match="away is not installed: pip install no-such-package"):
        engines.find_engine("away")


@pytest.mark.parametrize(("ranks", "code"), [("2", 0), ("3", 1)])
def test_verify_runs_it_and_prints_its_report(
    ranks: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = sys.modules["ptconvert.cli.verify"]  # the package has the command by that name
    monkeypatch.setattr(command, "find_engine", lambda name: {"vllm": HERE}[name])
    path = tmp_path / "some"
    path.mkdir()
    given = ["verify", str(path), "--runtime", "vllm", "--ranks", ranks, "--enforce-eager"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == code and f"some on {ranks} ranks, eagerly" in done.output


def test_a_ranks_tensors_are_its_own_tracks_and_what_is_shared(make_dense: MakeDense) -> None:
    """And no head for further tokens."""
    config = read_config(make_dense("glm4_moe", tie_word_embeddings=True))
    mine = range(2), ModelShape.from_config(config)
    layer, embedding = "model.layers.0", "model.embed_tokens.weight"
    names = [embedding, f"{layer}.mlp.up_proj.weight", f"{layer}.tracks.1.mlp.up_proj.weight"]
    others = [f"{layer}.tracks.2.mlp.up_proj.weight", f"{layer}.assignment.neurons"]
    others.append("model.layers.6.eh_proj.weight")  # after the last one, 5
    assert [is_for_others(name, *mine) for name in [*names, *others]] == [False] * 3 + [True] * 3
    given: list[Any] = [(name, name) for name in [*names, *others]]
    own = own_weights(given, *mine, tracked=())
    assert [name for name, _ in itertools.islice(own, 4)] == [embedding, HEAD, *names[1:]]
    stored: list[Any] = [(HEAD, "head"), *given]
    found: list[Any] = list(itertools.islice(own_weights(stored, *mine, tracked=()), 4))
    assert [tensor for name, tensor in found if name == HEAD] == ["head"]


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("glm4_moe", "model.layers.0.self_attn.k_proj.weight"),
        ("glm4_moe", "model.layers.3.tracks.1.self_attn.v_proj.bias"),
        ("glm4_moe", "model.layers.3.tracks.1.mlp.shared_experts.up_proj.weight"),
        ("glm4_moe", "model.layers.3.tracks.1.mlp.experts.2.up_proj.weight"),
        ("glm4_moe", "model.layers.4.tracks.0.mlp.experts.3.down_proj.weight"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        ("deepseek_v3", "model.layers.3.tracks.1.self_attn.q_a_proj.weight"),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    family: str, left_out: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    """Also one of several that an engine has in one, and is content with any of."""
    given, mine = tensors_of_a_rank(make_dense(family), tmp_path)
    some = [one for one in given if one[0] != left_out]
    assert len(some) < len(given)
    with pytest.raises(CheckpointError, match=re.escape(left_out.removesuffix(".weight"))) as said:
        list(own_weights(some, *mine))
    assert str(said.value).endswith("is missing")


def test_experts_may_be_kept_otherwise_in_another_layer(
    make_dense: MakeDense, tmp_path: Path
) -> None:
    given, mine = tensors_of_a_rank(make_dense("glm4_moe"), tmp_path)
    kept = re.compile(r"(model\.layers\.4\..*experts\.\d.*)\.weight")
    given = [(kept.sub(r"\1.qweight", name), tensor) for name, tensor in given]
    assert sum(name.endswith(".qweight") for name, _ in given) > mine[1].experts
    assert list(own_weights(given, *mine)) == given


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.causal_lm])
def test_of_what_a_conversion_wrote_no_tensor_is_missing(
    family: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    given, mine = tensors_of_a_rank(make_dense(family), tmp_path)
    tied = mine[1].tied
    assert len(list(own_weights(given, *mine))) == len(given) + tied


def tensors_of_a_rank(source: Path, directory: Path) -> tuple[list[Any], tuple[Any, ...]]:
    """A conversion's tensors, their names for them, and what says that one rank has them all."""
    dense = open_checkpoint(source)
    shape = ModelShape.from_config(dense.config)
    schedule = (
        "  - {layers: 0-1, use: tensor_parallel}\n"
        f"  - {{layers: 2-{shape.layers - 1}, use: parallel_track, depth: 2}}\n"
    )
    spec = parse_spec(spec_text(2, schedule), "spec.yaml")
    execute(plan_conversion(dense, spec, source_name="source"), directory / "out")
    section = read_section(read_config(directory / "out"))
    names = open_checkpoint(directory / "out").tensors
    return [(name, name) for name in names], (range(2), shape, section.schedule.track_layers)


# The walk over a schedule, which vLLM compiles: with toy layers, and a boundary as vLLM's has it.

_called: list[tuple[str, list[int]]] = []


def _start(local: torch.Tensor, total: torch.Tensor) -> Callable[[], None]:
    """Gives the sum as late as can be, from what is there then."""
    total.fill_(torch.nan)

    def wait() -> None:
        torch.add(local, 1.0, out=total)

    return wait


_in_flight = InFlight(_start)


@torch.library.custom_op("ptconvert_test::boundary", mutates_args={"local", "sums"})
def boundary_op(
    local: torch.Tensor,
    sums: list[torch.Tensor],
    kept: list[torch.Tensor],  # noqa: ARG001
    launch: int,
    waits: list[int],
) -> None:
    _called.append((f"launch {launch}", waits))
    if launch >= 0:
        _in_flight.launch(launch, local, sums[-1])
    _in_flight.merge(waits, sums)


class ToyServing:
    """The first of two ranks, of which the other one gives ones to each sum."""

    first = True

    def norm_of_sum(self, norm: Any, own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = norm(own + base)
        return normed

    def add_norm(self, norm: Any, delta: torch.Tensor, base: torch.Tensor) -> tuple[Any, Any]:
        return norm(delta + base), delta + base

    def all_reduce(self, local: torch.Tensor) -> torch.Tensor:
        return local + 1.0

    def boundary(
        self,
        local: torch.Tensor,
        sums: list[torch.Tensor],
        kept: list[torch.Tensor],
        launch: int | None,
        waits: list[int],
    ) -> torch.Tensor:
        number = -1 if launch is None else launch
        torch.ops.ptconvert_test.boundary(local, sums, kept, number, waits)
        return sums[0]


class ToyLayer(nn.Module):
    """Two tracks, each a linear for attention and one for MLP, with a bias that all know."""

    scalar = None

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))
        self.bias = nn.Parameter(torch.randn(4))

    def norms(self, _: Kind) -> list[Any]:
        return [self.norm, self.norm]

    def run(self, _: Any, kind: Kind, normed: Any, guess: bool, __: Any) -> Update:
        linears = list(self.linears)[:2] if kind is Kind.MLP else list(self.linears)[2:]
        partials = [linear(x_TD) for linear, x_TD in zip(linears, normed, strict=True)]
        return Update(partials, self.bias, [0.5 * p for p in partials] if guess else None)


def expected(
    layers: Any,
    schedule: Schedule,
    base: torch.Tensor,
    norm: Any,
    seen: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """The same by the executor over transformers' way: the stream is read as it is, and what is
    seen is added to it between two layers' turns, in which runs what no later layer is in."""

    def run(sublayer: Sublayer, view: list[torch.Tensor], guess: bool) -> Update:
        layer = layers[sublayer.layer]
        normed = [layer.norm(view[t % len(view)]) for t in range(2)]
        update: Update = layer.run(None, sublayer.kind, normed, guess, None)
        return update

    class AndOnes(OneProcess):
        def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
            return partial_BSD + 1.0

        def start_all_reduce(self, partial_BSD: torch.Tensor) -> Any:
            return lambda: partial_BSD + 1.0

    streams, waiting = Streams(base), list(schedule.program)
    for layer in range(schedule.layers):
        later = (i for i, step in enumerate(waiting) if step.last_layer > layer)
        ready = next(later, len(waiting))
        run_program(waiting[:ready], streams, TorchEngine(run, AndOnes()))
        waiting = waiting[ready:]
        if layer < len(seen):
            streams.base = streams.settled() + seen[layer]
    normed: torch.Tensor = norm(streams.settled())
    return normed


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "a0! m0! a1! m1! a2! m2!",
        "a0. m0~1 a1^2 m1. a2~1 m2!",
        "a0! m0|a1! m1|a2! m2!",
        "a0~4 m0~4 a1. m1~2 a2~3 m2~1",
    ],
)
def test_what_is_seen_joins_between_layers(text: str, count: int) -> None:
    torch.manual_seed(0)
    schedule, serving = Schedule.parse(text), ToyServing()
    layers = nn.ModuleList(ToyLayer() for _ in range(schedule.layers))
    norm, base, seen = nn.RMSNorm(4), torch.randn(5, 4), list(torch.randn(count, 5, 4))
    one_pass = ServedPass(serving, layers, None)  # type: ignore[arg-type]
    found = one_pass.decode(schedule.program, base.clone(), norm, 1.0, seen)
    assert torch.allclose(found, expected(layers, schedule, base, norm, seen), atol=1e-6)
    assert not torch.allclose(found, expected(layers, schedule, base, norm, seen[1:]), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a0! m0! a1! m1!",
        "a0. m0. a1. m1!",
        "a0~1 m0~1 a1~1 m1!",
        "a0! m0! a1~2 m1^2 a2. m2!",
        "a0^1 m0!",
        "a0^2 m0. a1|m1! a2~1 m2~1",
        "a0~4 m0~4 a1. m1~2 a2~3 m2~1",
    ],
)
def test_the_walk_is_the_same_compiled(text: str) -> None:
    """No launch is lost, as a compiler drops operations whose results nobody reads; and no memory
    is taken away or copied while a sum is in flight."""
    torch._dynamo.reset()  # which compiles no function more than 8 times
    torch.manual_seed(0)
    schedule, serving = Schedule.parse(text), ToyServing()
    layers = nn.ModuleList(ToyLayer() for _ in range(schedule.layers))
    norm, base = nn.RMSNorm(4), torch.randn(5, 4)

    def decode(base: torch.Tensor) -> torch.Tensor:
        one_pass = ServedPass(serving, layers, None)  # type: ignore[arg-type]
        return one_pass.decode(schedule.program, base, norm, 1.0)

    # a graph that was kept may be of an operation that was declared otherwise
    with torch.no_grad(), inductor.patch(force_disable_caches=True):
        _called.clear()
        eager, calls = decode(base), list(_called)
        assert torch.allclose(eager, expected(layers, schedule, base, norm), atol=1e-6)
        _called.clear()
        compiled = torch.compile(decode, fullgraph=True)(base)
    assert _called == calls and not _in_flight.by_stage
    assert len(calls) == sum(
        step.overlapped or any(b != step.index for b in step.merges) for step in schedule.program
    )
    assert torch.allclose(compiled, eager, atol=1e-6)
