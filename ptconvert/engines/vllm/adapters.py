"""A LoRA beside quantised weights in vLLM: what `heal --lora` trained, added by the linears that it
is beside.

Shapes: T tokens; of a linear I inputs and O outputs, of adapters beside it R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.functional import linear as multiplied
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)

from ptconvert.checkpoint.reader import Adapter
from ptconvert.checkpoint.section import ADAPTER_FOLDER
from ptconvert.engines.base import is_for_others
from ptconvert.errors import ConfigError
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.load import read_whole

_QKV: dict[Any, int] = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of a QKVParallelLinear


@dataclass(frozen=True)
class Factors:
    """A (R, I) and B (O, R) beside one of a linear's parts, or beside all of them (`part` None)."""

    part: int | None
    first: torch.Tensor
    second: torch.Tensor


def adapter_folder(vllm_config: Any) -> Path:
    """Where a checkpoint's LoRA lies on this machine, of a hub id after its download to where vLLM
    has its own."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if not (path := Path(model.model)).is_dir():
        path = Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                token=model.hf_token,
                allow_patterns=f"{ADAPTER_FOLDER}/*",
            )
        )
    return path / ADAPTER_FOLDER


def add_adapter(
    model: nn.Module,
    adapter: Adapter,
    mapper: Any,
    local_tracks: range,
    shape: ModelShape,
    dtype: torch.dtype,
) -> None:
    """Puts this rank's factors beside the linears of a model whose weights are loaded: each of them
    gives B A x more from then on, computed in `dtype`. `mapper` is vLLM's, from a checkpoint's
    names to the model's. Raises ConfigError where there is no such linear."""
    found: dict[str, list[Factors]] = {}
    for module, (a_RI, b_OR) in adapter.factors.items():
        weight = f"{module}.weight"
        if is_for_others(weight, local_tracks, shape):
            continue
        scaled_OR = adapter.scale * read_whole(b_OR).float()
        for name, own_OR in mapper.apply([(weight, scaled_OR)]):
            part = getattr(own_OR, "shard_id", None)
            one = Factors(_QKV.get(part, part), read_whole(a_RI).float(), own_OR)
            found.setdefault(name.removesuffix(".weight"), []).append(one)
    modules = dict(model.named_modules())
    for name, beside in found.items():
        linear: Any = modules.get(name)
        if not isinstance(linear, LinearBase):
            raise ConfigError(
                f"{name}: vLLM has no linear there for the LoRA; transformers runs it"
            )
        factors = joined(linear, name, beside)
        if hasattr(linear, "adapter_a"):  # weights are loaded again, and graphs may read these
            for kept, factor in zip((linear.adapter_a, linear.adapter_b), factors, strict=True):
                kept.copy_(factor)
            continue
        device = next(linear.parameters()).device
        for which, factor in zip("ab", factors, strict=True):
            linear.register_buffer(f"adapter_{which}", factor.to(device, dtype), persistent=False)
        linear.register_forward_hook(_added)


def joined(linear: Any, name: str, beside: Iterable[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, I) and B (O, R) of all that is beside a linear, of this rank's inputs and outputs; in B
    each part's outputs have ranks of their own."""
    own = [piece for one in beside for piece in _own(linear, name, one)]
    sizes = linear.output_partition_sizes
    b_OR, column = torch.zeros(sum(sizes), sum(len(one.first) for one in own)), 0
    for one in own:
        first, ranks = sum(sizes[: one.part]), len(one.first)
        b_OR[first : first + len(one.second), column : column + ranks] = one.second
        column += ranks
    return torch.cat([one.first for one in own]), b_OR


def _own(linear: Any, name: str, factors: Factors) -> Iterator[Factors]:
    """This rank's of some factors, for each part of the linear that they are beside."""
    inputs, a_RI = linear.input_size, factors.first
    sizes, copies = linear.output_partition_sizes, [1] * len(linear.output_partition_sizes)
    ranks, rank = linear.tp_size, linear.tp_rank
    if isinstance(linear, RowParallelLinear):
        of_rank = linear.input_size_per_partition
        a_RI = a_RI[:, rank * of_rank : (rank + 1) * of_rank]
    if not isinstance(linear, ColumnParallelLinear):
        ranks, rank = 1, 0  # which has all outputs
    elif isinstance(linear, QKVParallelLinear):
        copies[1:] = [linear.num_kv_head_replicas] * 2
    parts = range(len(sizes)) if factors.part is None else [factors.part]
    whole = [sizes[part] * ranks // copies[part] for part in parts]
    if (sum(whole), inputs) != (len(factors.second), factors.first.shape[1]):
        raise ConfigError(
            f"{name}: the LoRA is of {factors.first.shape[1]} inputs and {len(factors.second)} "
            f"outputs, and vLLM's linear has {inputs} and {sum(whole)}; transformers runs it"
        )
    for part, of_part_OR in zip(parts, torch.split(factors.second, whole), strict=True):
        first = rank // copies[part] * sizes[part]
        yield Factors(part, a_RI, of_part_OR[first : first + sizes[part]])


def _added(linear: Any, given: tuple[torch.Tensor, ...], output: Any) -> Any:
    """A linear's output, beside which vLLM may give its bias, and what its adapters add."""
    added_TO = multiplied(multiplied(given[0], linear.adapter_a), linear.adapter_b)
    if isinstance(output, tuple):
        return output[0] + added_TO, *output[1:]
    return output + added_TO
