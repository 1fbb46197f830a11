"""What an engine holds of a quantised checkpoint, against the checkpoint's own tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import quantising
import torch
from conftest import spec_text
from safetensors.torch import load_file, save_file

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import ADAPTER_FOLDER, trained_config
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.heal.adapters import write_adapter
from ptconvert.measure.opening import open_model
from ptconvert.spec.document import parse_spec

# What published quantization_configs say beside what `quantising` writes.
_LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
_GROUP = {**_STATIC, "strategy": "group", "group_size": 16, "dynamic": True}
_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
TAKEN: dict[str, dict[str, Any]] = {
    "compressed block FP8": _GROUP,
    "FP8 per tensor": {**_STATIC, "dynamic": False},
    "FP8 per channel": {**_TOKEN, "type": "float"},
    "INT8": {**_TOKEN, "type": "int"},
    "NVFP4": {**_LOCAL, "symmetric": True, "dynamic": "local"},
}
# What engines have in one of a layer's linears.
LINEARS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
# DeepSeek-V3's, but for its routed experts.
LATENT = {
    "self_attn.fused_qkv_a_proj_with_mqa": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    **{f"self_attn.{one}_proj": (f"self_attn.{one}_proj",) for one in ("q_b", "kv_b", "o")},
    **{
        f"mlp.{where}{whole}": tuple(f"mlp.{where}{one}" for one in parts)
        for where in ("", "shared_experts.")
        for whole, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        )
    },
}
# Scales of what is read, and NVFP4's of all of a weight.
IN_COMMON = "input_scale", "input_global_scale", "weight_global_scale", "weight_scale_2"
# Of groups that lie in order; and what a packed tensor's size was.
BESIDE = "g_idx", "weight_shape"


def convert(source: Path, destination: Path, schedule: str, tracks: int = 2) -> Path:
    spec = parse_spec(spec_text(tracks, schedule), "spec.yaml")
    execute(plan_conversion(open_checkpoint(source), spec, source_name="source"), destination)
    return destination


def with_lora(path: Path, scale: float = 0.05) -> Path:
    """A converted checkpoint with a random LoRA beside its linears from now on."""
    model, rng = open_model(open_checkpoint(path), "float32", "cpu"), torch.Generator()
    rng.manual_seed(0)
    adapters = {
        f"{name}.lora_{which}.weight": scale * torch.randn(*size, generator=rng)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
        for which, size in (("A", (4, module.in_features)), ("B", (module.out_features, 4)))
    }
    write_adapter(path / ADAPTER_FOLDER, adapters)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(trained_config(config, adapter=True)))
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def left_out(form: str, modules: list[str]) -> dict[str, Any]:
    """How a format's quantization_config says which linears aren't quantised; of GPTQ vLLM sees it
    by the tensors that they are kept as."""
    method = quantising.format_of(form).config["quant_method"]
    if method == "auto-round":
        return {"extra_config": {module: {"bits": 16} for module in modules}}
    keys = {"compressed-tensors": "ignore", "modelopt": "ignore", "gptq": None}
    key = keys.get(method, "modules_to_not_convert")
    return {} if key is None else {key: modules}


def as_published(source: Path, form: str, left: list[str]) -> None:
    """Writes what a format's quantization_config says in published checkpoints, and what linears
    that read the same have in common there."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(IN_COMMON):
                first = re.sub(r"\.[kv]_proj\.", ".q_proj.", name).replace(".w3.", ".w1.")
                tensors[name] = tensors[first.replace(".up_proj.", ".gate_proj.")].clone()
        save_file(tensors, file, {"format": "pt"})
    with quantising.changed(source) as quantization:
        if form in TAKEN:
            quantization["config_groups"]["group_0"]["input_activations"] = TAKEN[form]
        if form == "NVFP4 of ModelOpt":
            quantization["group_size"] = 16
        quantization |= left_out(form, left)


def check_linears(
    layers: Iterable[Any],
    given: Mapping[str, torch.Tensor],
    rank: int = 0,
    ranks: int = 1,
    linears: Mapping[str, tuple[str, ...]] = LINEARS,
) -> int:
    """Asserts that each parameter of layers' linears is the checkpoint's tensors, byte for byte, of
    layers held dense this rank's part; returns how many were looked at."""
    seen = 0
    for index, layer in enumerate(layers):
        for name, part in layer.parts.items():
            track = "" if name == "whole" else f"tracks.{name}."
            before, parameters = f"model.layers.{index}.{track}", dict(part.named_parameters())
            for linear, modules in linears.items():
                first = f"{before}{modules[0]}."
                ends = {n.removeprefix(first) for n in given if n.startswith(first)}
                assert ends or not any(n.startswith(f"{linear}.") for n in parameters)
                for end in ends - set(BESIDE):
                    parts = [given[f"{before}{module}.{end}"] for module in modules]
                    own = parameters[f"{linear}.{end}"].data
                    assert holds(own, parts, rank, 1 if track else ranks), f"{before}{linear}.{end}"
                    seen += 1
    return seen


def check_experts(
    layers: Iterable[Any],
    given: Mapping[str, torch.Tensor],
    lies: str,
    projections: tuple[tuple[str, str], str],
    experts: str,
    rank: int = 0,
    ranks: int = 1,
) -> int:
    """The same of each expert's part of a mixture's parameters, which lie in `experts` of an
    engine's layer and in `lies` of the checkpoint's, as gate and up, and down, of `projections`."""
    seen = 0
    for index, layer in enumerate(layers):
        for name, part in layer.parts.items():
            track = "" if name == "whole" else f"tracks.{name}."
            before = f"model.layers.{index}.{track}{lies}."
            parameters = dict(part.named_parameters())
            first = f"{before}0.{projections[0][0]}."
            for end in {n.removeprefix(first) for n in given if n.startswith(first)} - set(BESIDE):
                for kept, modules in (("w13", projections[0]), ("w2", (projections[1],))):
                    for expert, own in enumerate(parameters[f"{experts}.{kept}_{end}"].data):
                        parts = [given[f"{before}{expert}.{module}.{end}"] for module in modules]
                        assert holds(own, parts, rank, 1 if track else ranks), (kept, end, before)
                        seen += 1
    return seen


def holds(own: torch.Tensor, parts: list[torch.Tensor], rank: int, ranks: int) -> bool:
    """Whether a parameter is the projections' tensors, or of each this rank's part."""
    if parts[0].dtype == torch.float16:  # which engines compute with as the rest
        parts = [part.to(own.dtype) for part in parts]
    return own.dtype == parts[0].dtype and any(
        same_bytes(own, whole) for shards in _shards(parts, rank, ranks) for whole in _fused(shards)
    )


def _shards(parts: list[torch.Tensor], rank: int, ranks: int) -> Iterator[list[torch.Tensor]]:
    yield parts
    if ranks > 1:
        for axis in range(parts[0].ndim):
            if all(part.shape[axis] >= ranks for part in parts):
                yield [part.chunk(ranks, axis)[rank] for part in parts]


def _fused(parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """How an engine may have projections in one: side by side along either axis, and turned round;
    numbers one for each."""
    if parts[0].numel() == 1:
        numbers = [part.squeeze() for part in parts]
        whole = torch.stack(numbers)
        yield from (whole, whole[:, None])
        if (whole == whole[0]).all():
            yield whole[0]
        return
    for axis in range(parts[0].ndim):
        if len({(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) == 1:
            whole = torch.cat(parts, axis)
            yield from (whole, whole.t())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    pair = (x.clone(memory_format=torch.contiguous_format).flatten() for x in (one, other))
    return torch.equal(*(x.view(torch.uint8) for x in pair))
