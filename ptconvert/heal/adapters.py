"""LoRA beside quantised weights: what is trained, what it adds, and how it is written.

Quantised weights can't take what an adapter adds, so it stays one: an ordinary adapter of peft's in
a folder of the checkpoint. Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ptconvert.checkpoint.files import ADAPTER_WEIGHTS
from ptconvert.checkpoint.reader import PEFT_PREFIX
from ptconvert.heal.settings import LORA_ALPHA
from ptconvert.heal.work import Tensors

_A, _B = ".lora_A.weight", ".lora_B.weight"
_NAMED = ".default"  # of peft's in a model, by the adapter's name
_WRAPPED = ".base_layer"  # of what it puts adapters beside


def lora_config(targets: list[str], rank: int) -> Any:
    """peft's config of adapters on these modules."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA * rank, target_modules=targets, task_type="CAUSAL_LM"
    )


def linears(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The linear layers of a model whose weights are among some parameters."""
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [owner for owner in (n.removesuffix(".weight") for n in names) if owner in linear]


def put_beside(model: nn.Module, modules: list[str], rank: int) -> list[str]:
    """Puts adapters beside some linear layers; what their parameters are called."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(modules, rank), model)
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def wrapped(names: Iterable[str], modules: Container[str]) -> list[str]:
    """What parameters are called once adapters are beside some modules: peft wraps these."""
    apart = (name.rpartition(".") for name in names)
    return [
        f"{owner}{_WRAPPED}.{own}" if owner in modules else f"{owner}.{own}"
        for owner, _, own in apart
    ]


def taken(state: Tensors, names: Iterable[str]) -> Tensors:
    """These parameters of a trained model's state, by the names that they have in a checkpoint."""

    def stored(name: str) -> str:
        return name.replace(f"{_NAMED}.weight", ".weight").replace(f"{_WRAPPED}.", ".")

    return {stored(name): state[name] for name in names}


def is_of_adapter(name: str) -> bool:
    """Whether a tensor is an adapter's, and no parameter of the model's."""
    return name.endswith((_A, _B))


def apart(healed: Tensors) -> tuple[Tensors, Tensors]:
    """What was healed: of the model itself, and of adapters beside it."""
    own = {name: tensor for name, tensor in healed.items() if not is_of_adapter(name)}
    return own, {name: healed[name] for name in healed.keys() - own.keys()}


@torch.no_grad()
def add(model: nn.Module, adapters: Tensors) -> None:
    """Adds to a model's weights what adapters beside them do."""
    parameters = dict(model.named_parameters())
    for name in adapters:
        if name.endswith(_A):
            module = name.removesuffix(_A)
            a_RI, b_OR = (adapters[module + end].float() for end in (_A, _B))
            weight = parameters[f"{module}.weight"]
            added_OI = LORA_ALPHA * (b_OR @ a_RI)
            weight.copy_(weight.float() + added_OI.to(weight.device))


def write_adapter(folder: Path, adapters: Tensors) -> None:
    """Writes adapters of one rank as peft does."""
    modules = sorted(name.removesuffix(_A) for name in adapters if name.endswith(_A))
    rank = len(adapters[modules[0] + _A])
    folder.mkdir(exist_ok=True)
    lora_config(modules, rank).save_pretrained(folder)
    named = {PEFT_PREFIX + name: t.contiguous() for name, t in sorted(adapters.items())}
    save_file(named, folder / ADAPTER_WEIGHTS, {"format": "pt"})
