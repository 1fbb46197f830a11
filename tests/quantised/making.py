"""Tiny checkpoints in the formats that people publish, each written by the tool that writes it.

`FORMATS` is the table: who makes a format, which packages that takes, which it takes to open it
again and how. What a tool can't do on a CPU is done by the nearest code of its own that can, and
the maker's docstring says so. Every tool saves its own way, so names, dtypes, shapes and
`quantization_config` are its own.

The sizes are such that groups of 32 and 128 and blocks of 128 have several in every direction, and
that 2 tracks fit all of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# gptqmodel starts two loaders, which its pool of half the cores must hold; before its import.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY = 512
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4},
    **{"max_position_embeddings": 256, "tie_word_embeddings": False, "dtype": "bfloat16"},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
Maker = Callable[[Path, Path], None]  # from a source's folder to a new one
# What a family's config class is called, and what differs from `SIZES`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),  # biases on q, k and v
    "qwen3": ("Qwen3Config", {}),
    "phi3": ("Phi3Config", {}),  # fused projections
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
            **{"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        },
    ),
}
# One layer left as it was, and one module of another.
KEPT = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"


def source_config(family: str, **changes: Any) -> Any:
    """The config of a tiny model of a family of `FAMILIES`."""
    name, differs = FAMILIES[family]
    return getattr(transformers, name)(**{**SIZES, **differs, **changes})


def save_source(model: Any, directory: Path) -> Path:
    """A dense checkpoint in bfloat16, with a tokenizer: a family's name, a config or a model.

    Norms and biases differ from ones and zeros, so that nothing that is lost stays unseen."""
    if isinstance(model, str):
        model = source_config(model)
    if isinstance(model, transformers.PretrainedConfig):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def token_ids(rows: int = 16, length: int = 64, seed: int = 1) -> torch.Tensor:
    """Random token ids, (rows, length), for calibrating and for comparing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


# ---- llm-compressor: what it saves is compressed-tensors


def compressed_tensors(recipe: Callable[[], Any]) -> Maker:
    """`llmcompressor.oneshot` with a recipe, saved by `save_pretrained`."""

    def make(source: Path, directory: Path) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot

        ids = token_ids()
        samples = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        model = AutoModelForCausalLM.from_pretrained(source)
        oneshot(
            model=model,
            processor=AutoTokenizer.from_pretrained(source),
            dataset=Dataset.from_dict(samples),
            recipe=recipe(),
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
        )
        model.save_pretrained(directory)

    return make


def preset(scheme: str, *ignore: str, gptq: bool = False, **options: Any) -> Maker:
    """A scheme that llm-compressor has a name for; `ignore` beside the head and routers."""

    def recipe() -> Any:
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

        modifier = GPTQModifier if gptq else QuantizationModifier
        ignored = ["lm_head", r"re:.*mlp\.gate$", *ignore]
        return modifier(targets="Linear", scheme=scheme, ignore=ignored, **options)

    return compressed_tensors(recipe)


def weights_only(actorder: str | None = None, **weights: Any) -> Maker:
    """Integers of 4 bits in groups that no scheme has a name for."""

    def recipe() -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

        args = QuantizationArgs(**{"num_bits": 4, "type": "int", "symmetric": True, **weights})
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
        ignore = ["lm_head", r"re:.*mlp\.gate$"]
        if actorder is None:
            return QuantizationModifier(config_groups=groups, ignore=ignore)
        return GPTQModifier(config_groups=groups, ignore=ignore, actorder=actorder)

    return compressed_tensors(recipe)


def two_schemes() -> Any:
    """Attention in FP8, the MLP in 4 bits; the kept module by a regular expression."""
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    attention: QuantizationScheme = preset_name_to_scheme("FP8_DYNAMIC", [r"re:.*self_attn.*_proj"])
    mlp: QuantizationScheme = preset_name_to_scheme("W4A16", [r"re:.*mlp.*_proj"])
    return QuantizationModifier(
        config_groups={"attention": attention, "mlp": mlp},
        ignore=["lm_head", r"re:.*mlp\.gate$", r"re:.*layers\.1\.self_attn\.o_proj"],
    )


def group_order(source: Path, directory: Path) -> None:
    """4 bits in groups of 32 of columns that activations order: `weight_g_idx` beside the rest.

    Older llm-compressors wrote this (`actorder: group`); compressed-tensors 0.19 refuses it, 0.17
    still reads it. So the file is that of the same recipe without an order, requantised with the
    columns of each weight ordered at random, by today's functions of compressed-tensors and as
    those of 0.17 read it: groups count in the new order, packed columns stay where they were."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    group = 32
    weights_only(strategy="group", group_size=group)(source, directory)
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group)
    tensors, dense = load_file(directory / "model.safetensors"), load_source(source)
    generator = torch.Generator().manual_seed(2)
    for packed in [name for name in tensors if name.endswith(".weight_packed")]:
        name = packed.removesuffix("_packed")
        order = torch.randperm(dense[name].shape[1], generator=generator)
        ordered = dense[name][:, order]
        grouped = ordered.reshape(len(ordered), -1, group)
        scale, zero = calculate_qparams(grouped.amin(2), grouped.amax(2), args)
        values = quantize(ordered, scale, zero, args, dtype=torch.int8)
        back = order.argsort()
        tensors[packed] = pack_to_int32(values[:, back].contiguous(), args.num_bits)
        tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        tensors[f"{name}_g_idx"] = (back // group).to(torch.int32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with changed_config(directory) as config:
        groups = config["quantization_config"]["config_groups"]
        groups["group_0"]["weights"]["actorder"] = "group"


def load_source(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


@contextlib.contextmanager
def changed_config(directory: Path) -> Iterator[dict[str, Any]]:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    yield config
    path.write_text(json.dumps(config, indent=2) + "\n")


# ---- transformers' own


def block_fp8(**options: Any) -> Maker:
    """What DeepSeek and Qwen publish, by transformers' own quantiser.

    It refuses to quantise without a GPU, which its arithmetic doesn't need: that one check is left
    out, the rest is `from_pretrained` and `save_pretrained`."""

    def make(source: Path, directory: Path) -> None:
        from transformers import FineGrainedFP8Config
        from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

        with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment"):
            model = AutoModelForCausalLM.from_pretrained(
                source, quantization_config=FineGrainedFP8Config(**options)
            )
        model.save_pretrained(directory)

    return make


def gpt_oss_mxfp4(source: Path, directory: Path) -> None:
    """gpt-oss' experts as OpenAI publishes them, `*_blocks` and `*_scales`.

    transformers quantises to MXFP4 only by Triton kernels from a hub, so the packing is modelopt's
    `MXFP4QTensor`, whose result gpt-oss' layout is a reshape of: (experts, out, in / 32, 16)."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor
    from transformers import Mxfp4Config

    tensors = load_source(source)
    for name in [n for n in tensors if n.endswith((".gate_up_proj", ".down_proj"))]:
        weight_EOI = tensors.pop(name).transpose(1, 2).contiguous()
        quantised, scales = MXFP4QTensor.quantize(weight_EOI, 32)
        experts, outputs, inputs = weight_EOI.shape
        shape = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = quantised._quantized_data.reshape(*shape, 16)
        tensors[f"{name}_scales"] = scales.reshape(shape)
    shutil.copytree(source, directory, dirs_exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    with changed_config(directory) as config:
        config["quantization_config"] = Mxfp4Config(
            modules_to_not_convert=[*kept, "lm_head"]
        ).to_dict()


# ---- GPT-QModel, AutoRound, Model Optimizer


def gptqmodel(**options: Any) -> Maker:
    """GPT-QModel's `quantize` and `save`; `dynamic` is its way to treat modules apart."""

    def make(source: Path, directory: Path) -> None:
        from gptqmodel import GPTQModel, QuantizeConfig

        ids = token_ids(32)
        samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
        config = QuantizeConfig(**{"bits": 4, "group_size": 32, **options})
        model = GPTQModel.load(str(source), config, device="cpu")
        model.quantize(samples, batch_size=8)
        model.save(str(directory))

    return make


def optimum_gptq(**options: Any) -> Maker:
    """GPTQ while transformers opens a model, by optimum: has `modules_in_block_to_quantize`."""

    def make(source: Path, directory: Path) -> None:
        from transformers import GPTQConfig

        texts = [" ".join(f"w{i}" for i in row) for row in token_ids().tolist()]
        model = AutoModelForCausalLM.from_pretrained(
            source,
            device_map="cpu",
            quantization_config=GPTQConfig(
                bits=4,
                group_size=32,
                dataset=texts,
                tokenizer=AutoTokenizer.from_pretrained(source),
                **options,
            ),
        )
        model.save_pretrained(directory)

    return make


def autoround(form: str, **options: Any) -> Maker:
    """AutoRound's `quantize_and_save`, one step of its search; it names a folder of its own."""

    def make(source: Path, directory: Path) -> None:
        from auto_round import AutoRound

        rounding = AutoRound(
            AutoModelForCausalLM.from_pretrained(source),
            AutoTokenizer.from_pretrained(source),
            dataset=torch.utils.data.DataLoader(token_ids(), batch_size=8),  # type: ignore[arg-type]
            **{"nsamples": 16, "seqlen": 64, "batch_size": 8, "device_map": "cpu"},
            **{"bits": 4, "group_size": 32, "iters": 1, **options},
        )
        with tempfile.TemporaryDirectory() as folder:
            rounding.quantize_and_save(folder, format=form)
            (config,) = Path(folder).rglob("config.json")
            shutil.copytree(config.parent, directory, dirs_exist_ok=True)

    return make


def modelopt(scheme: str, *kept: str) -> Maker:
    """Model Optimizer's `quantize` and `export_hf_checkpoint`."""

    def make(source: Path, directory: Path) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = AutoModelForCausalLM.from_pretrained(source)
        model = mtq.quantize(model, getattr(mtq, scheme), lambda model: model(token_ids()))
        for name in kept:
            mtq.disable_quantizer(model, f"*{name}*")
        export_hf_checkpoint(model, export_dir=directory)

    return make


PLAINLY, DEQUANTISED = "plainly", "dequantised"
BOTH = PLAINLY, DEQUANTISED


@dataclass(frozen=True)
class Format:
    """How a format is made, and how transformers opens it again on a CPU, in float32.

    `made_by` and `opened_by` are modules that must be importable. `opens` has "plainly" where
    `from_pretrained` without options gives the model's logits, which may quantise activations too,
    and "dequantised" where its option for dense weights does; neither where transformers can't.
    `correlation` is the least one of its logits with the source's."""

    make: Maker
    made_by: tuple[str, ...]
    opened_by: tuple[str, ...] = ()
    opens: tuple[str, ...] = (PLAINLY,)
    family: str = "llama"
    correlation: float = 0.95

    def missing(self) -> list[str]:
        """What isn't installed of what this takes."""
        names = {*self.made_by, *(self.opened_by if self.opens else ())}
        return sorted(name for name in names if not importlib.util.find_spec(name))


def by_llmcompressor(make: Maker, *opens: str, correlation: float = 0.95) -> Format:
    made_by = "llmcompressor", "compressed_tensors", "datasets"
    return Format(make, made_by, ("compressed_tensors",), opens, correlation=correlation)


OPTIMUM = "gptqmodel", "optimum"
AUTOROUND = ("auto_round",)
AWQ = ("gptqmodel",)
MODELOPT = ("modelopt",)
NONE: tuple[str, ...] = ()
KEEP_DYNAMIC = {rf"-:{KEPT[0]}": {}, r"+:.*layers\.1\.self_attn\.o_proj": {"bits": 8}}
KEEP_ROUNDED = {KEPT[0]: {"bits": 16}, KEPT[1]: {"bits": 8}}
KEEP_DENSE = {KEPT[0]: {"bits": 16}}
KEEP_BLOCK = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GROUP: dict[str, Any] = {"strategy": "group", "group_size": 32}

FORMATS: dict[str, Format] = {
    "fp8-channel": by_llmcompressor(preset("FP8_DYNAMIC"), *BOTH),
    "fp8-tensor": by_llmcompressor(preset("FP8"), *BOTH),
    "fp8-block-ct": by_llmcompressor(preset("FP8_BLOCK"), *BOTH),
    "int8-w8a8": by_llmcompressor(preset("W8A8"), *BOTH),
    "int8-w8a16": by_llmcompressor(preset("W8A16"), *BOTH),
    "w4a16": by_llmcompressor(preset("W4A16"), *BOTH),
    "w4a16-g32": by_llmcompressor(weights_only(**GROUP), *BOTH),
    "w4a16-channel": by_llmcompressor(weights_only(strategy="channel"), *BOTH),
    # plainly, transformers expects zero points that aren't packed
    "w4a16-zero-points": by_llmcompressor(preset("W4A16_ASYM"), DEQUANTISED),
    "w4a16-weight-order": by_llmcompressor(weights_only("weight", **GROUP), *BOTH),
    # compressed-tensors itself refuses what it wrote before
    "w4a16-group-order": by_llmcompressor(group_order),
    "w4a16-kept": by_llmcompressor(
        preset("W4A16", KEPT[0], r"re:.*layers\.1\.self_attn\.o_proj"), *BOTH
    ),
    # transformers dequantises all of a model by one scheme
    "two-schemes": by_llmcompressor(compressed_tensors(two_schemes), PLAINLY),
    # plainly, these open in bfloat16 only
    "nvfp4-ct": by_llmcompressor(preset("NVFP4"), DEQUANTISED),
    "nvfp4a16-ct": by_llmcompressor(preset("NVFP4A16"), DEQUANTISED),
    "mxfp4-ct": by_llmcompressor(preset("MXFP4"), DEQUANTISED),
    "mxfp8-ct": by_llmcompressor(preset("MXFP8"), DEQUANTISED),
    # plainly, in float32, what isn't quantised stays in bfloat16
    "fp8-block": Format(block_fp8(), NONE, NONE, (DEQUANTISED,)),
    "fp8-block-kept": Format(
        block_fp8(modules_to_not_convert=["lm_head", *KEPT]), NONE, NONE, (DEQUANTISED,)
    ),
    "fp8-block-ue8m0": Format(block_fp8(scale_fmt="ue8m0"), NONE, NONE, (DEQUANTISED,)),
    "gptq": Format(gptqmodel(), OPTIMUM, OPTIMUM),
    "gptq-g128": Format(gptqmodel(group_size=128), OPTIMUM, OPTIMUM),
    # the kernel that is chosen plainly refuses groups over 256
    "gptq-channel": Format(
        gptqmodel(group_size=-1, act_group_aware=False), OPTIMUM, OPTIMUM, (DEQUANTISED,)
    ),
    "gptq-zero-points": Format(gptqmodel(sym=False), OPTIMUM, OPTIMUM),
    "gptq-act-order": Format(gptqmodel(desc_act=True), OPTIMUM, OPTIMUM),
    "gptq-8bit": Format(gptqmodel(bits=8), OPTIMUM, OPTIMUM),
    # optimum, by which transformers opens GPTQ, doesn't know `dynamic`
    "gptq-kept": Format(gptqmodel(dynamic=KEEP_DYNAMIC), OPTIMUM, opens=NONE),
    "gptq-autoround": Format(
        autoround("auto_gptq", layer_config=KEEP_DENSE), AUTOROUND, opens=NONE
    ),
    "gptq-optimum": Format(optimum_gptq(), OPTIMUM, OPTIMUM),
    "gptq-optimum-kept": Format(
        optimum_gptq(modules_in_block_to_quantize=KEEP_BLOCK), OPTIMUM, OPTIMUM
    ),
    "autoround": Format(autoround("auto_round"), AUTOROUND, AUTOROUND),
    # packed as AWQ where all have 4 bits
    "autoround-zero-points": Format(
        autoround("auto_round", sym=False), AUTOROUND, (*AUTOROUND, *AWQ)
    ),
    "autoround-kept": Format(
        autoround("auto_round", layer_config=KEEP_ROUNDED), AUTOROUND, AUTOROUND
    ),
    "autoround-zero-points-kept": Format(
        autoround("auto_round", sym=False, layer_config=KEEP_ROUNDED), AUTOROUND, AUTOROUND
    ),
    "awq": Format(gptqmodel(method="awq", format="gemm"), AWQ, AWQ),
    "awq-zero-points": Format(autoround("auto_awq", sym=False), AUTOROUND, AWQ),
    "awq-kept": Format(autoround("auto_awq", sym=False, layer_config=KEEP_DENSE), AUTOROUND, AWQ),
    # transformers doesn't know the method "modelopt": it passes scales over
    "nvfp4-modelopt": Format(modelopt("NVFP4_DEFAULT_CFG"), MODELOPT, opens=NONE),
    "nvfp4-modelopt-kept": Format(modelopt("NVFP4_DEFAULT_CFG", *KEPT), MODELOPT, opens=NONE),
    "fp8-modelopt": Format(modelopt("FP8_DEFAULT_CFG"), MODELOPT, opens=NONE),
    "mxfp4": Format(gpt_oss_mxfp4, MODELOPT, NONE, BOTH, "gpt_oss"),
}


def make(format_name: str, model: Any, directory: Path) -> Path:
    """A checkpoint of a format at `directory`, which is returned.

    `model` is a family of `FAMILIES`, a config, a model, or the folder of a dense checkpoint."""
    if isinstance(model, Path):
        source, directory = model.resolve(), directory.resolve()
        with tempfile.TemporaryDirectory() as logs, contextlib.chdir(logs):  # where tools log to
            FORMATS[format_name].make(source, directory)
        return directory
    with tempfile.TemporaryDirectory() as folder:
        return make(format_name, save_source(model, Path(folder) / "source"), directory)


DENSE = {"dequantize": True}
# By quantisation method: the config class, and its option for dense weights or arithmetic on them.
DEQUANTISING: dict[str, tuple[str, dict[str, Any]]] = {
    "compressed-tensors": ("CompressedTensorsConfig", DENSE),
    "fp8": ("FineGrainedFP8Config", DENSE),
    "mxfp4": ("Mxfp4Config", DENSE),
    "gptq": ("GPTQConfig", {"bits": 4, "backend": "torch"}),
}


def open_made(format_name: str, directory: Path, way: str | None = None, **options: Any) -> Any:
    """The checkpoint as transformers opens it on a CPU, by a way of its format's (the last of them
    unless one is named), with more of `from_pretrained`'s options; in float32 if they say none."""
    options = {"dtype": torch.float32, "device_map": "cpu", **options}
    if (way or FORMATS[format_name].opens[-1]) == PLAINLY:
        return AutoModelForCausalLM.from_pretrained(directory, **options)
    method = json.loads((directory / "config.json").read_text())["quantization_config"]
    name, option = DEQUANTISING[method["quant_method"]]
    options["quantization_config"] = getattr(transformers, name)(**option)
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    # block FP8's leaves what isn't quantised in the dtype of the file
    return model.to(options["dtype"]) if method["quant_method"] == "fp8" else model
