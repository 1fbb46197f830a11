"""Quantised checkpoints written out literally from the formats' definitions, and what they mean.

Values are random ones of the format, not those nearest to a model's: what is asked here is whether
cutting keeps each where it belongs. Checkpoints that real tools made are in tests/quantised.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # in which AWQ's kernels want the eight of an int32
# The values of FP4 (E2M1) by their four bits.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Format:
    """One: random tensors in place of a weight (O, I), by what ends their names, and the weight
    that such tensors mean."""

    config: Mapping[str, Any]
    draw: Callable[[int, int, torch.Generator], Tensors]
    means: Callable[[Tensors], torch.Tensor]
    outputs: int = 1  # that can't be parted
    inputs: int = 1


def packed(
    values: torch.Tensor, axis: int, bits: int = 4, order: Sequence[int] = ()
) -> torch.Tensor:
    """Unsigned values, those along an axis that share an int32 in it; a rest is padded with 0."""
    each = 32 // bits
    moved = values.movedim(axis, -1).long()
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % each))
    groups = moved.reshape(*moved.shape[:-1], -1, each)
    places = order or range(each)
    whole = torch.zeros_like(groups[..., 0])
    for place, source in enumerate(places):
        whole |= groups[..., source] << (bits * place)
    whole = torch.where(whole >= 2**31, whole - 2**32, whole)
    return whole.to(torch.int32).movedim(-1, axis).contiguous()


def unpacked(
    whole: torch.Tensor, axis: int, bits: int = 4, order: Sequence[int] = ()
) -> torch.Tensor:
    """The other way round."""
    each = 32 // bits
    moved = whole.movedim(axis, -1).long()
    out = torch.empty(*moved.shape, each, dtype=torch.long)
    for place, source in enumerate(order or range(each)):
        out[..., source] = (moved >> (bits * place)) & (2**bits - 1)
    return out.flatten(-2).movedim(-1, axis)


def fp4(nibbles: torch.Tensor) -> torch.Tensor:
    """Pairs of FP4 in bytes (..., n), the lower half first, as numbers (..., 2n)."""
    pairs = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2)
    return FP4[pairs.long()]


def repeated(scales: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """Scales of groups along an axis, once for each element."""
    each = -(-length // scales.shape[axis])
    return scales.double().repeat_interleave(each, axis).narrow(axis, 0, length)


def _ints(high: int, size: Sequence[int], rng: torch.Generator, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, tuple(size), generator=rng)


def _scales(size: Sequence[int], rng: torch.Generator) -> torch.Tensor:
    return torch.rand(tuple(size), generator=rng) / 64 + 1 / 64


def _fp8(size: Sequence[int], rng: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(size), generator=rng).to(torch.float8_e4m3fn)


def _compressed(bits: int, kind: str, strategy: str, what: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": what}
    return {
        "quant_method": "compressed-tensors",
        "format": what,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _channel(o: int, i: int, rng: torch.Generator) -> Tensors:
    return {"weight": _fp8((o, i), rng), "weight_scale": _scales((o, 1), rng)}


def _tensor(o: int, i: int, rng: torch.Generator) -> Tensors:
    one = {"weight_scale": _scales((1,), rng), "input_scale": _scales((1,), rng)}
    return {"weight": _fp8((o, i), rng), **one}


def _int8(o: int, i: int, rng: torch.Generator) -> Tensors:
    values = _ints(128, (o, i), rng, low=-128).to(torch.int8)
    return {"weight": values, "weight_scale": _scales((o, 1), rng)}


def _int8_zeros(o: int, i: int, rng: torch.Generator) -> Tensors:
    zeros = _ints(128, (o, 1), rng, low=-128).to(torch.int8)
    return {**_int8(o, i, rng), "weight_zero_point": zeros}


def _of_int8_zeros(found: Tensors) -> torch.Tensor:
    apart = found["weight"].double() - found["weight_zero_point"].double()
    return apart * found["weight_scale"].double()


def _scaled(found: Tensors) -> torch.Tensor:
    return found["weight"].double() * found["weight_scale"].double()


BLOCK, GROUP = 16, 16


def _block(
    name: str, size: int = BLOCK, times: float = 1.0
) -> Callable[[int, int, torch.Generator], Tensors]:
    def draw(o: int, i: int, rng: torch.Generator) -> Tensors:
        return {
            "weight": _fp8((o, i), rng),
            name: times * _scales((-(-o // size), -(-i // size)), rng),
        }

    return draw


def _blockwise(name: str, size: int = BLOCK) -> Callable[[Tensors], torch.Tensor]:
    def means(found: Tensors) -> torch.Tensor:
        o, i = found["weight"].shape
        scales = found[name].double().repeat_interleave(size, 0).repeat_interleave(size, 1)
        return found["weight"].double() * scales[:o, :i]

    return means


def _pack(bits: int, zeros: bool = False, act_order: bool = False) -> Any:
    def draw(o: int, i: int, rng: torch.Generator) -> Tensors:
        found = {
            "weight_packed": packed(_ints(2**bits, (o, i), rng), 1, bits),
            "weight_scale": _scales((o, i // GROUP), rng).bfloat16(),
            "weight_shape": torch.tensor([o, i]),
        }
        if zeros:
            found["weight_zero_point"] = packed(_ints(2**bits, (o, i // GROUP), rng), 0, bits)
        if act_order:
            found["weight_g_idx"] = (torch.randperm(i, generator=rng) // GROUP).int()
        return found

    return draw


def _unpack(bits: int) -> Callable[[Tensors], torch.Tensor]:
    def means(found: Tensors) -> torch.Tensor:
        o, i = found["weight_shape"].tolist()
        values = unpacked(found["weight_packed"], 1, bits)[:, :i].double()
        scales = found["weight_scale"].double()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if "weight_zero_point" in found:
            zeros = unpacked(found["weight_zero_point"], 0, bits)[:o].double()
        index = found.get("weight_g_idx", torch.arange(i) // GROUP).long()
        return (values - zeros[:, index]) * scales[:, index]

    return means


def _gptq(
    group: int = GROUP, zeros: bool = False, act_order: bool = False
) -> Callable[[int, int, torch.Generator], Tensors]:
    def draw(o: int, i: int, rng: torch.Generator) -> Tensors:
        index = torch.randperm(i, generator=rng) if act_order else torch.arange(i)
        size = (i // group, o)
        middle = torch.full(size, 7)  # kept less one, of values from 0 to 15
        return {
            "qweight": packed(_ints(16, (i, o), rng), 0),
            "qzeros": packed(_ints(16, size, rng) if zeros else middle, 1),
            "scales": _scales(size, rng).half(),
            "g_idx": (index // group).int(),
        }

    return draw


def _of_gptq(found: Tensors) -> torch.Tensor:
    index = found["g_idx"].long()
    # kept less one, eight at a time, so that what one borrows of the next is given back
    zeros = (found["qzeros"].long() % 2**32 + 0x11111111) % 2**32
    apart = unpacked(found["qweight"], 0) - unpacked(zeros, 1)[index]
    return (apart.double() * found["scales"].double()[index]).T


def _awq(group: int = GROUP) -> Callable[[int, int, torch.Generator], Tensors]:
    def draw(o: int, i: int, rng: torch.Generator) -> Tensors:
        return {
            "qweight": packed(_ints(16, (i, o), rng), 1, 4, AWQ_ORDER),
            "qzeros": packed(_ints(16, (i // group, o), rng), 1, 4, AWQ_ORDER),
            "scales": _scales((i // group, o), rng).half(),
        }

    return draw


def _of_awq(found: Tensors) -> torch.Tensor:
    values = unpacked(found["qweight"], 1, 4, AWQ_ORDER)
    zeros = unpacked(found["qzeros"], 1, 4, AWQ_ORDER)
    group = len(values) // len(zeros)
    apart = (values - zeros[torch.arange(len(values)) // group]).double()
    scales: torch.Tensor = found["scales"].double().repeat_interleave(group, 0)
    return (apart * scales).T


def _nvfp4(weight: str, whole: str, inputs: str, scalar: Sequence[int]) -> Any:
    def draw(o: int, i: int, rng: torch.Generator) -> Tensors:
        return {
            weight: _ints(256, (o, i // 2), rng).to(torch.uint8),
            "weight_scale": _scales((o, i // 16), rng).to(torch.float8_e4m3fn),
            whole: 64 * _scales(scalar, rng),
            inputs: _scales(scalar, rng),
        }

    return draw


def _of_nvfp4(weight: str, whole: str) -> Callable[[Tensors], torch.Tensor]:
    def means(found: Tensors) -> torch.Tensor:
        values = fp4(found[weight]).double()
        scales = repeated(found["weight_scale"].double(), 1, values.shape[1])
        one = found[whole].double()
        return values * scales * (one if whole == "weight_scale_2" else 1 / one)

    return means


def _mxfp4(o: int, i: int, rng: torch.Generator) -> Tensors:
    return {
        "weight_packed": _ints(256, (o, i // 2), rng).to(torch.uint8),
        "weight_scale": _ints(132, (o, i // 32), rng, low=122).to(torch.uint8),
    }


def _of_mxfp4(found: Tensors) -> torch.Tensor:
    values = fp4(found["weight_packed"]).double()
    return values * repeated(2.0 ** (found["weight_scale"].double() - 127), 1, values.shape[1])


def _method(name: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": name, **more}


_4_BIT = {"bits": 4, "group_size": GROUP}
_IN_32 = {"bits": 4, "group_size": 32}  # the least that vLLM takes of GPTQ
_FP8_BLOCK = _method("fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
_CT_BLOCK = _compressed(8, "float", "block", "float-quantized", block_structure=[BLOCK, BLOCK])
_W4 = _compressed(4, "int", "group", "pack-quantized", group_size=GROUP)
_W8 = _compressed(8, "int", "group", "pack-quantized", group_size=GROUP)
_W4_ZEROS = _compressed(4, "int", "group", "pack-quantized", group_size=GROUP, symmetric=False)
_W4_ACT = _compressed(4, "int", "group", "pack-quantized", group_size=GROUP, actorder="group")
_NVFP4 = _compressed(4, "float", "tensor_group", "nvfp4-pack-quantized", group_size=16)
_MODELOPT = _method("modelopt", quant_algo="NVFP4", ignore=["lm_head"])
_CT_MX = _compressed(4, "float", "group", "mxfp4-pack-quantized", group_size=32)
_FP8 = _compressed(8, "float", "channel", "float-quantized")
_FP8_TENSOR = _compressed(8, "float", "tensor", "float-quantized")
_INT8 = _compressed(8, "int", "channel", "int-quantized")
FORMATS: Mapping[str, Format] = {
    "FP8 per channel": Format(_FP8, _channel, _scaled),
    "FP8 per tensor": Format(_FP8_TENSOR, _tensor, _scaled),
    "INT8": Format(_INT8, _int8, _scaled),
    "INT8 with zero points": Format(
        _compressed(8, "int", "channel", "int-quantized", symmetric=False),
        *(_int8_zeros, _of_int8_zeros),
    ),
    "block FP8": Format(
        _FP8_BLOCK, _block("weight_scale_inv"), _blockwise("weight_scale_inv"), BLOCK, BLOCK
    ),
    "compressed block FP8": Format(
        _CT_BLOCK, _block("weight_scale"), _blockwise("weight_scale"), BLOCK, BLOCK
    ),
    "W4A16": Format(_W4, _pack(4), _unpack(4), 1, GROUP),
    "W4A16 with zero points": Format(_W4_ZEROS, _pack(4, zeros=True), _unpack(4), 8, GROUP),
    "W4A16 in act-order": Format(_W4_ACT, _pack(4, act_order=True), _unpack(4), 1, 8),
    "W8A16": Format(_W8, _pack(8), _unpack(8), 1, GROUP),
    "GPTQ": Format(
        _method("gptq", **_4_BIT, desc_act=False, sym=True), _gptq(), _of_gptq, 8, GROUP
    ),
    "GPTQ in groups of 32": Format(
        _method("gptq", **_IN_32, desc_act=False, sym=True), _gptq(32), _of_gptq, 8, 32
    ),
    "GPTQ with zero points": Format(
        _method("gptq", **_4_BIT, desc_act=False, sym=False),
        *(_gptq(zeros=True), _of_gptq, 8, GROUP),
    ),
    "GPTQ in act-order": Format(
        _method("gptq", **_4_BIT, desc_act=True, sym=False),
        *(_gptq(zeros=True, act_order=True), _of_gptq, 8, 8),
    ),
    "AutoRound": Format(
        _method("auto-round", **_IN_32, sym=True, packing_format="auto_round:auto_gptq"),
        *(_gptq(32), _of_gptq, 8, 32),
    ),
    "AutoRound with zero points": Format(
        _method("auto-round", **_4_BIT, sym=False, packing_format="auto_round:auto_gptq"),
        *(_gptq(zeros=True), _of_gptq, 8, GROUP),
    ),
    "AWQ": Format(_method("awq", **_4_BIT, zero_point=True), _awq(), _of_awq, 8, GROUP),
    "NVFP4": Format(
        _NVFP4,
        _nvfp4("weight_packed", "weight_global_scale", "input_global_scale", (1,)),
        *(_of_nvfp4("weight_packed", "weight_global_scale"), 1, 16),
    ),
    "NVFP4 of ModelOpt": Format(
        _MODELOPT,
        _nvfp4("weight", "weight_scale_2", "input_scale", ()),
        *(_of_nvfp4("weight", "weight_scale_2"), 1, 16),
    ),
    "MXFP4": Format(_CT_MX, _mxfp4, _of_mxfp4, 1, 32),
}
# As most publish them, in larger blocks and groups than most tests have weights.
LARGER: Mapping[str, Format] = {
    "AWQ in groups of 32": Format(
        _method("awq", **_IN_32, zero_point=True), _awq(32), _of_awq, 8, 32
    ),
    "block FP8 of 128": Format(
        _method("fp8", weight_block_size=[128, 128], activation_scheme="dynamic"),
        *(_block("weight_scale_inv", 128, 4.0), _blockwise("weight_scale_inv", 128), 128, 128),
    ),
}


def format_of(name: str) -> Format:
    return {**FORMATS, **LARGER}[name]


def quantise(
    dense: Path,
    destination: Path,
    name: str,
    chosen: Callable[[str], bool] = lambda module: ".layers." in module,
    **more: Any,
) -> Path:
    """A checkpoint with random quantised weights in place of the chosen linears' of a dense one.

    `more` goes into its quantization_config.
    """
    form, rng = format_of(name), torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for file in sorted(dense.glob("*.safetensors")):
        for tensor, value in load_file(file).items():
            module = tensor.removesuffix(".weight")
            if module == tensor or value.ndim != 2 or not chosen(module):
                tensors[tensor] = value
                continue
            outputs, inputs = value.shape
            kept = form.draw(outputs, inputs, rng)
            tensors |= {f"{module}.{end}": part for end, part in kept.items()}
    return write(dense, destination, tensors, {**form.config, **more})


@contextlib.contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    """A checkpoint's quantization_config, to be changed."""
    config = json.loads((path / "config.json").read_text())
    yield config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))


def write(dense: Path, destination: Path, tensors: Tensors, quantization: Any) -> Path:
    """A checkpoint with these tensors in place of a dense one's."""
    shutil.copytree(dense, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = quantization
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def mxfp4_experts(dense: Path, destination: Path) -> Path:
    """A gpt-oss checkpoint whose experts are MXFP4, as it is published."""
    rng, tensors = torch.Generator().manual_seed(0), Tensors()
    for name, value in load_file(dense / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        experts, inputs, outputs = value.shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = _ints(256, (*size, 16), rng).to(torch.uint8)
        tensors[f"{name}_scales"] = _ints(124, size, rng, low=117).to(torch.uint8)
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    left = [*names, "lm_head"]
    return write(dense, destination, tensors, _method("mxfp4", modules_to_not_convert=left))


def meant_of_experts(tensors: Tensors, name: str) -> torch.Tensor:
    """The weights (E, I, O) that all experts' tensors mean."""
    values = fp4(tensors[f"{name}_blocks"]).double()
    scales = 2.0 ** (tensors[f"{name}_scales"].double() - 127)
    return (values * scales[..., None]).flatten(-2).transpose(1, 2)


def meant(tensors: Tensors, name: str, module: str) -> torch.Tensor:
    """The weight (O, I) that a module's tensors mean."""
    ends = {
        t.removeprefix(f"{module}."): v for t, v in tensors.items() if t.startswith(f"{module}.")
    }
    return format_of(name).means(ends)
