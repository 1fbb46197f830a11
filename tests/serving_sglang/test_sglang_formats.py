"""Quantised checkpoints in SGLang, up to its loaded tensors: what it has them multiplied by are
kernels of GPUs. Models are built as rank 1 of 2, of which the other isn't there."""

from __future__ import annotations

import os
import sys

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # before SGLang is imported

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantising
import torch
from conftest import random_model
from loaded import (
    BESIDE,
    LATENT,
    LINEARS,
    as_published,
    check_experts,
    check_linears,
    convert,
    holds,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from served import COMPILED, with_rope

from ptconvert.engines.quantised import by_names

RANK, RANKS = 1, 2
FORMS = (
    *("block FP8", "compressed block FP8", "FP8 per channel", "FP8 per tensor", "INT8"),
    *("W4A16", "W4A16 with zero points", "W8A16", "AWQ", "GPTQ in groups of 32"),
    *("NVFP4", "NVFP4 of ModelOpt"),
)
MIXTURES: dict[str, tuple[str, tuple[tuple[str, str], str], dict[str, Any]]] = {
    "mixtral": ("block_sparse_moe.experts", (("w1", "w3"), "w2"), {"intermediate_size": 512}),
    "qwen3_moe": (
        *("mlp.experts", (("gate_proj", "up_proj"), "down_proj")),
        {"shared_expert_intermediate_size": 0, "moe_intermediate_size": 512},
    ),
    "glm4_moe": (
        *("mlp.experts", (("gate_proj", "up_proj"), "down_proj")),
        {"moe_intermediate_size": 512},
    ),
    # whose first projections end within a block, as published
    "deepseek_v3": (
        *("mlp.experts", (("gate_proj", "up_proj"), "down_proj")),
        {
            **{"moe_intermediate_size": 512, "attention_bias": False, "q_lora_rank": 128},
            **{"kv_lora_rank": 128, "qk_rope_head_dim": 32, "head_dim": 32, "v_head_dim": 32},
            **{"qk_nope_head_dim": 32, **with_rope("deepseek_v3")},
        },
    ),
}
OF_EXPERTS = (
    "block FP8",
    "compressed block FP8",
    "FP8 per channel",
    "FP8 per tensor",
    "AWQ in groups of 32",
)
PACKED = ("W4A16", "W8A16", "NVFP4", "NVFP4 of ModelOpt")  # of GLM-4.5 SGLang asks for a weight
# Its kernels of four bits take 128 inputs of a rank at a time.
WIDE: dict[str, Any] = {
    **{"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32, "intermediate_size": 256},
    "max_position_embeddings": 512,
}
# What it takes of these on GPUs.
MARLIN = {"awq": "awq_marlin", "gptq": "gptq_marlin"}


@pytest.fixture
def model_config() -> Callable[[Path], Any]:
    """What SGLang, started for a checkpoint as rank 1 of 2, says of it."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()

    def made(path: Path) -> Any:
        arguments = ServerArgs(
            **{"model_path": str(path), "tp_size": RANKS, "device": "cpu", "dtype": "bfloat16"},
            **{"attention_backend": "torch_native", "skip_tokenizer_init": True},
        )
        arguments.resolve_once()
        ranks = runtime_context.SpawnRanks(world_rank=RANK)
        runtime_context.publish(arguments, role="scheduler", ranks=ranks)
        return ModelConfig.from_server_args(arguments)

    return made


@pytest.fixture
def load(
    model_config: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Any]:
    """Builds a checkpoint's model as on Blackwell, and loads its tensors."""
    from sglang.kernels.ops.quantization.awq_triton import awq_dequantize_decomposition
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.layers.quantization import BASE_QUANTIZATION_METHODS
    from sglang.srt.model_loader.loader import _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.models.deepseek_common import deepseek_weight_loader as latents

    from ptconvert.engines.sglang import model as served
    from ptconvert.engines.sglang import refusals

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    blackwell = SimpleNamespace(is_blackwell=True, is_sm100=True, is_sm120=False, is_sm90=False)
    # of sizes, too, as models here are small
    checks = (
        *("verify_marlin_supported", "check_marlin_supports_layer"),
        *("verify_marlin_supports_shape", "check_moe_marlin_supports_layer"),
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.srt.layers.quantization"):
            for check in checks:
                if hasattr(module, check):
                    monkeypatch.setattr(module, check, lambda *_, **__: True)
            if hasattr(module, "get_platform"):
                monkeypatch.setattr(module, "get_platform", lambda: blackwell)
    monkeypatch.setattr(served, "is_cpu", lambda: False)  # which kernels it has is what it says
    monkeypatch.setattr(refusals, "SINKS", {refusals.ON_CPUS})  # as nothing attends
    # what it makes of latents' weights there, which for AWQ it has in plain torch, too
    monkeypatch.setattr(latents, "_is_cuda", True)
    monkeypatch.setattr(latents, "awq_dequantize_func", lambda: awq_dequantize_decomposition)

    def loaded(path: Path) -> Any:
        config = model_config(path)
        quantization = None
        if said := getattr(config.hf_config, "quantization_config", None):
            method = MARLIN.get(said["quant_method"], said["quant_method"])
            said = {**said, "packed_modules_mapping": {}}  # as there
            quantization = BASE_QUANTIZATION_METHODS[method].from_config(said)
        group = SimpleNamespace(rank_in_group=RANK, world_size=RANKS, cpu_group=None)
        with (
            set_default_torch_dtype(torch.bfloat16),
            runtime_context.get_parallel().override(tp_group=group),
        ):
            model = _initialize_model(config, LoadConfig(), quantization)
        model.load_weights(tensors_of(path).items())
        return model

    return loaded


# As recipes leave them in bf16: of a layer in tracks, what SGLang has in one, and one by itself.
LEFT = (
    *(f"layers.2.self_attn.{name}_proj" for name in "qkv"),
    *("layers.3.mlp.down_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
)


def dense_mlps(form: str, directory: Path, variant: str = "llama", **more: Any) -> Path:
    """A converted model whose linears are quantised, but for LEFT."""
    sizes = {**WIDE, "num_hidden_layers": 4, **more}
    random_model(variant, torch.bfloat16, **sizes).save_pretrained(directory / "dense")
    source = quantising.quantise(
        *(directory / "dense", directory / "source", form),
        lambda module: ".layers." in module and not module.endswith(LEFT),
    )
    as_published(source, form, ["lm_head", *(f"model.{name}" for name in LEFT)])
    if quantising.format_of(form).config["quant_method"] == "gptq":
        with quantising.changed(source) as quantization:
            quantization["dynamic"] = {f"-:model.{name}$": {} for name in LEFT}
    return convert(source, directory / "converted", COMPILED)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_a_format(form: str, load: Callable[[Path], Any], tmp_path: Path) -> None:
    """Each parameter of a linear is this rank's tensors, byte for byte."""
    path = dense_mlps(form, tmp_path)
    assert check_linears(load(path).model.layers, tensors_of(path), RANK, RANKS) > 4 * 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_values", [True, False])
def test_tensors_of_layers_of_two_kinds(
    as_values: bool, form: str, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    """What makes Gemma 4's keys makes its values, too, in layers where they are the same."""
    more = {"global_head_dim": 64, "attention_k_eq_v": as_values}
    layer_types = ["sliding_attention", "full_attention"] * 2
    path = dense_mlps(form, tmp_path, "gemma4_text", layer_types=layer_types, **more)
    given = tensors_of(path)
    keys = {name: tensor for name, tensor in given.items() if ".k_proj." in name}
    values = {name.replace(".k_proj.", ".v_proj."): tensor for name, tensor in keys.items()}
    assert (values.keys() - given.keys() != set()) == as_values
    layers = load(path).model.layers
    assert check_linears(layers, {**values, **given}, RANK, RANKS) > 4 * 4


def quantised_head(form: str, directory: Path) -> Path:
    """A converted Llama of which lm_head is quantised, too."""
    sizes = {**WIDE, "num_hidden_layers": 4, "vocab_size": 256}  # which needs no padding
    random_model("llama", torch.bfloat16, **sizes).save_pretrained(directory / "dense")
    source = quantising.quantise(
        *(directory / "dense", directory / "source", form),
        lambda module: ".layers." in module or module == "lm_head",
    )
    as_published(source, form, [])
    return convert(source, directory / "converted", COMPILED)


def test_tensors_of_a_head(load: Callable[[Path], Any], tmp_path: Path) -> None:
    """Each rank has its part of the vocabulary."""
    path = quantised_head("NVFP4 of ModelOpt", tmp_path)
    given, own = tensors_of(path), dict(load(path).lm_head.named_parameters())
    assert {f"lm_head.{end}" for end in own} == {n for n in given if n.startswith("lm_head.")}
    assert own["weight"].dtype == torch.uint8
    for end, parameter in own.items():
        assert holds(parameter.data, [given[f"lm_head.{end}"]], RANK, RANKS), end


@pytest.mark.parametrize("form", [form for form in FORMS if form != "NVFP4 of ModelOpt"])
def test_other_heads_are_refused(form: str, load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = quantised_head(form, tmp_path)
    with pytest.raises(ValueError, match=r"^lm_head\.\w+: SGLang takes no lm_head that is kept so"):
        load(path)


@pytest.mark.parametrize("form", FORMS)
def test_modules_are_asked_for_by_the_names_of_the_checkpoint(
    form: str, load: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptconvert.engines.sglang import layers

    path = dense_mlps(form, tmp_path)

    def by_other_names(quant_config: Any, _: Any) -> Any:
        return by_names(quant_config, lambda module: module.replace("layers.", "layers.9"))

    monkeypatch.setattr(layers, "by_names", by_other_names)
    with pytest.raises((ValueError, AssertionError)):
        load(path)


def test_an_expert_of_which_sglang_has_nothing_is_named(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    sizes = {**WIDE, "num_hidden_layers": 4, **MIXTURES["mixtral"][2]}
    random_model("mixtral", torch.bfloat16, **sizes).save_pretrained(tmp_path / "dense")
    source = quantising.quantise(
        *(tmp_path / "dense", tmp_path / "source", "block FP8"), lambda m: ".experts." in m
    )
    as_published(source, "block FP8", ["lm_head", "self_attn", "gate", "experts"])
    with pytest.raises(ValueError, match=r"experts\.\d\.w\d\.weight_scale_inv has no place in"):
        load(convert(source, tmp_path / "converted", COMPILED))


def mixture(variant: str, form: str, directory: Path, left: str = "none") -> Path:
    """A converted one whose linears and experts are quantised, but for routers and one layer's
    experts."""
    sizes = {**WIDE, "num_hidden_layers": 4, **MIXTURES[variant][2]}
    random_model(variant, torch.bfloat16, **sizes).save_pretrained(directory / "dense")
    linears = [n for n, t in tensors_of(directory / "dense").items() if t.ndim == 2]
    ends = "_proj", "_mqa", "w1", "w2", "w3"

    def chosen(module: str) -> bool:
        return module.endswith(ends) and left not in module

    names = (name.removesuffix(".weight") for name in linears if "embed" not in name)
    source = quantising.quantise(directory / "dense", directory / "source", form, chosen)
    said = [name for name in names if not chosen(name)]
    if variant == "deepseek_v3" and left == "none":  # whose config names none
        said = ["lm_head"]
    as_published(source, form, said)
    return convert(source, directory / "converted", COMPILED)


@pytest.mark.parametrize("form", [*OF_EXPERTS, "W4A16", "NVFP4 of ModelOpt"])
def test_a_layers_experts_are_left_by_name(
    form: str, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = mixture("qwen3_moe", form, tmp_path, "layers.2.mlp.experts.")
    given, projections = tensors_of(path), MIXTURES["qwen3_moe"][1]
    assert f"model.layers.2.tracks.{RANK}.mlp.experts.0.up_proj.weight" in given
    layers = load(path).model.layers
    parameters = dict(layers[2].named_parameters())
    assert parameters[f"parts.{RANK}.mlp.experts.w13_weight"].dtype == torch.bfloat16
    assert check_experts(layers, given, "mlp.experts", projections, "mlp.experts", RANK, RANKS)


@pytest.mark.parametrize(
    ("variant", "form", "left"),
    [
        *((variant, form, "none") for variant in MIXTURES for form in OF_EXPERTS),
        *((variant, form, "none") for variant in ("mixtral", "qwen3_moe") for form in PACKED),
        *(("deepseek_v3", form, "self_attn") for form in PACKED),
    ],
)
def test_tensors_of_quantised_experts(
    variant: str, form: str, left: str, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    lies, (gate_up, down), _ = MIXTURES[variant]
    if form == "NVFP4":  # kernels of Blackwell have up before gate
        gate_up = gate_up[1], gate_up[0]
    path = mixture(variant, form, tmp_path, left)
    given = tensors_of(path)
    layers = load(path).model.layers
    seen = check_experts(layers, given, lies, (gate_up, down), "mlp.experts", RANK, RANKS)
    other = f".tracks.{1 - RANK}."
    stored = [n for n in given if ".experts." in n and not n.endswith(BESIDE) and other not in n]
    assert seen == len(stored) * 2 / 3 > 0  # gate and up are one there


def test_experts_leave_alone_what_they_read(load: Callable[[Path], Any], tmp_path: Path) -> None:
    """A track's guess reads it after them; SGLang's kernels of GPUs would write there."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    layers = load(mixture("qwen3_moe", "block FP8", tmp_path)).model.layers
    experts = [module for module in layers.modules() if isinstance(module, FusedMoE)]
    assert experts
    for one in experts:
        assert one.quant_method.runner.config is one.moe_runner_config
        assert not one.moe_runner_config.inplace


@pytest.mark.parametrize(
    ("form", "left"),
    [
        *((form, "none") for form in (*OF_EXPERTS, "block FP8 of 128")),
        ("INT8", ".experts."),
        *(("W4A16", "kv_b_proj"), ("W8A16", "kv_b_proj")),
        *(("NVFP4", "self_attn"), ("NVFP4 of ModelOpt", "self_attn")),
    ],
)
def test_tensors_of_latents(
    form: str, left: str, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    """And what queries and outputs are multiplied by in place of latents' keys and values, which
    SGLang makes of kv_b_proj: in bfloat16, or in FP8 with one scale."""
    path = mixture("deepseek_v3", form, tmp_path, left)
    given = tensors_of(path)
    layers = load(path).model.layers
    assert check_linears(layers, given, RANK, RANKS, LATENT) > 4 * 6
    for index, layer in enumerate(layers):
        for name, part in layer.parts.items():
            track, attention = "" if name == "whole" else f"tracks.{name}.", part.self_attn
            kv_b = f"model.layers.{index}.{track}self_attn.kv_b_proj"
            meant = given[f"{kv_b}.weight"] if left in kv_b else quantising.meant(given, form, kv_b)
            meant = meant if track else meant.chunk(RANKS)[RANK]
            is_fp8 = attention.w_kc.dtype == torch.float8_e4m3fn
            assert is_fp8 == ("FP8" in form and form != "block FP8 of 128")
            heads = meant.float().reshape(-1, 64, meant.shape[-1])
            rtol, atol = 2.0**-7, 0.0
            if is_fp8:
                rtol, atol = 2.0**-4, 2.0**-9 * float(attention.w_scale)
            pairs = (attention.w_kc, heads[:, :32]), (attention.w_vc.transpose(1, 2), heads[:, 32:])
            for own, other in pairs:
                scaled = own.float() * attention.w_scale
                torch.testing.assert_close(scaled, other, rtol=rtol, atol=atol)


def gpt_oss(directory: Path, quantised: bool, neurons: int) -> Path:
    """A converted one, whose experts are MXFP4 or aren't quantised."""
    sizes = {**WIDE, "num_hidden_layers": 4, "num_key_value_heads": 2, "intermediate_size": neurons}
    model = random_model("gpt_oss", torch.bfloat16, **sizes, tie_word_embeddings=False)
    model.save_pretrained(source := directory / "dense")
    if quantised:
        source = quantising.mxfp4_experts(source, directory / "source")
    return convert(source, directory / "converted", COMPILED)


@pytest.mark.parametrize(("quantised", "neurons"), [(False, 320), (True, 320), (True, 288)])
def test_tensors_of_gpt_oss(
    quantised: bool, neurons: int, load: Callable[[Path], Any], tmp_path: Path
) -> None:
    """All experts' in one tensor, MXFP4's as they are published, to which SGLang adds zeros; and
    what attention has of each head. Of 9 blocks the second rank has 4."""
    path = gpt_oss(tmp_path, quantised, neurons)
    given, layers = tensors_of(path), load(path).model.layers
    linears = {name: LINEARS[name] for name in ("self_attn.qkv_proj",)}
    assert check_linears(layers, given, RANK, RANKS, linears) == 4 * 2  # weights and biases
    kept = {"weight_bias": "_bias", "weight": "_blocks" if quantised else ""}
    kept |= {"weight_scale": "_scales"} if quantised else {}
    share = neurons // 64 * 32 if quantised else neurons // 2
    for index, layer in enumerate(layers):
        ((name, part),) = layer.parts.items()
        before = f"model.layers.{index}." + ("" if name == "whole" else f"tracks.{name}.")
        sinks = given[f"{before}self_attn.sinks"]
        assert torch.equal(part.self_attn.sinks, sinks.chunk(RANKS if name == "whole" else 1)[-1])
        assert part.self_attn.sinks.any()
        own = dict(part.mlp.experts.named_parameters())
        assert own.keys() == {f"{which}_{end}" for which in ("w13", "w2") for end in kept}
        for end, theirs in kept.items():
            for which, projection in (("w13", "gate_up_proj"), ("w2", "down_proj")):
                held = own[f"{which}_{end}"]
                if (which, end) == ("w2", "weight_bias"):  # which the first rank adds
                    assert not held.any()
                    continue
                whole = given[f"{before}mlp.experts.{projection}{theirs}"]
                if whole.dim() > 2:
                    whole = whole.flatten(2) if quantised else whole.mT
                axis = 1 if which == "w13" else -1
                size = whole.shape[axis]
                if name == "whole":
                    size = size * share // neurons
                    whole = whole.narrow(axis, whole.shape[axis] - size, size)
                place = tuple(slice(size) for size in whole.shape)
                assert torch.equal(held[place], whole.to(held.dtype))
                if end != "weight_scale":
                    assert held.count_nonzero() == whole.count_nonzero()


def test_mxfp4_for_which_a_kernel_has_no_room_is_named(
    load: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some of SGLang's have none for more than equal shares."""
    from sglang.srt.layers.quantization import mxfp4

    path = gpt_oss(tmp_path, True, 320)
    monkeypatch.setattr(mxfp4, "round_up", lambda size, _: size - 32)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj\w+ has 320 of .* room for 256"):
        load(path)


def test_an_experts_tensor_that_is_missing_is_named(
    load: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = gpt_oss(tmp_path, False, 320)
    for file in path.glob("track-01-*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if "gate_up_proj_bias" not in n}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"parts\.1\..*w13_weight_bias is not in the checkpoint"):
        load(path)


def test_sglang_knows_that_attention_has_sinks_and_windows(
    model_config: Callable[[Path], Any], tmp_path: Path
) -> None:
    """By its own model's name; its caches and its choice of a backend go by it."""
    found = model_config(gpt_oss(tmp_path, False, 320))
    assert found.has_attention_sinks and found.is_hybrid_swa
    assert found.swa_attention_layer_ids == [0, 2] and found.full_attention_layer_ids == [1, 3]
    assert found.hf_config.architectures == ["PTConvertGptOssForCausalLM"]
