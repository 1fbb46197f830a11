"""Quantised checkpoints in vLLM: on 2 ranks where vLLM has kernels for CPUs, else up to its loaded
tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines  # noqa: F401  # settings
import pytest
import quantising
import torch
from conftest import random_model, spec_text
from safetensors.torch import load_file
from served import COMPILED, SIZES, answer, apart, prompts, shape_of
from test_parity import NEW_TOKENS, of_case, run_cases, schedule_of

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.engines.verify import Answers, count_checks
from ptconvert.measure.opening import open_model
from ptconvert.spec.document import parse_spec

# vLLM's kernels of four bits for CPUs take multiples of 32 inputs and outputs.
WIDE = {**SIZES, "intermediate_size": 256}
# Of these in float16, which they compute in: that much it rounds in vLLM's dense model, too.
HALF: dict[str, Any] = {"dtype": "float16", "within": 3e-2}
# Where ranks' sums differ in the last bit, an activation may be rounded to the next number of its
# eight bits, which is up to a sixteenth away.
EIGHT: dict[str, Any] = {"within": 1e-2}


@dataclass(frozen=True)
class Case:
    """A format, and how near vLLM's log-probabilities come to those of the weights that are meant,
    in float32. `activations` are what such are quantised to, a token by itself."""

    form: str
    dtype: str = "float32"
    within: float = 1e-3
    activations: str | None = None
    eager: bool = True
    variant: str = "llama"
    left: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def is_quantised(self, module: str) -> bool:
        """Whether a linear of the source is."""
        return ".layers." in module and not module.endswith(self.left or ("none",))


# As recipes leave modules in bf16: by name, so that the conversion names the tracks' as well.
LEFT = "layers.1.mlp.down_proj", "layers.2.self_attn.o_proj"
CASES = {
    "W4A16": Case("W4A16", **HALF),
    "W4A16 with zero points": Case("W4A16 with zero points", **HALF),
    "W4A16, some left": Case("W4A16", **HALF, left=LEFT),
    "W4A16, fused": Case("W4A16", **HALF, variant="phi3-two-kv"),
    "AWQ": Case("AWQ", **HALF),
    "AWQ, some left": Case("AWQ", **HALF, left=LEFT),
    "GPTQ": Case("GPTQ in groups of 32", **HALF),
    "GPTQ, some left": Case("GPTQ in groups of 32", **HALF, left=LEFT),
    "AutoRound": Case("AutoRound", **HALF),
    "INT8": Case("INT8", **EIGHT, activations="int"),
    "FP8 per channel": Case("FP8 per channel", **EIGHT, activations="float"),
    "compiled, W4A16": Case("W4A16", **HALF, eager=False),
    "compiled, INT8": Case("INT8", **EIGHT, activations="int", eager=False),
}
WITH_FAULTS = "W4A16", "INT8"


def quantised(case: Case, directory: Path) -> Path:
    """A checkpoint of a case, as it is before it is converted."""
    dense = directory / "dense"
    random_model(case.variant, **{**WIDE, **case.sizes}, num_hidden_layers=4).save_pretrained(dense)
    names = [f"model.{name}" for name in case.left]
    key = "ignore" if "W4A16" in case.form else "modules_to_not_convert"
    left = {key: ["lm_head", *names]} if case.left and "GPTQ" not in case.form else {}
    source = quantising.quantise(dense, directory / "source", case.form, case.is_quantised, **left)
    if case.activations is not None:
        with quantising.changed(source) as quantization:
            for group in quantization["config_groups"].values():
                taken = {"num_bits": 8, "type": case.activations, "strategy": "token"}
                group["input_activations"] = {**taken, "symmetric": True, "dynamic": True}
    return source


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def convert(source: Path, destination: Path, schedule: str) -> Path:
    spec = parse_spec(spec_text(2, schedule), "spec.yaml")
    execute(plan_conversion(open_checkpoint(source), spec, source_name="source"), destination)
    return destination


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, case in CASES.items():
        directory = tmp_path_factory.mktemp("model")
        found[name] = convert(quantised(case, directory), directory / "converted", COMPILED)
    return found


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Any:
    cases = [
        {
            **{"device": "cpu", "arguments": {"dtype": case.dtype}, "name": name},
            **{"path": str(paths[name]), "eager": case.eager, "faults": name in WITH_FAULTS},
            **{"drawn": [], "alone": None},
        }
        for name, case in CASES.items()
    ]
    return run_cases(tmp_path_factory.mktemp("ranks"), cases, 2)


def rounded(activations: str, x_TD: torch.Tensor) -> torch.Tensor:
    """Each token's channels in eight bits, by a scale of its own: what compressed-tensors says of
    `strategy: token`, `dynamic: true`."""
    most = 127 if activations == "int" else torch.finfo(torch.float8_e4m3fn).max
    scales_T1 = x_TD.abs().amax(-1, keepdim=True) / most
    in_scale_TD = (x_TD / scales_T1).clamp(-most, most)
    if activations == "int":
        return in_scale_TD.round() * scales_T1
    return in_scale_TD.to(torch.float8_e4m3fn).float() * scales_T1


def round_activations(model: Any, activations: str) -> None:
    """Rounds what a model's linears are given, as 2 ranks do: of layers held dense each has half of
    what output projections are given, and rounds it by itself."""

    def of(parts: int) -> Callable[..., Any]:
        def before(_: Any, given: tuple[torch.Tensor, ...]) -> Any:
            halves = given[0].chunk(parts, -1)
            return (torch.cat([rounded(activations, x_TD) for x_TD in halves], -1), *given[1:])

        return before

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
            shared = ".tracks." not in name and name.endswith(("o_proj", "down_proj"))
            module.register_forward_pre_hook(of(2 if shared else 1))


@pytest.fixture(scope="session")
def references(paths: dict[str, Path]) -> dict[str, Answers]:
    """What the single-process model of the weights that are meant answers, in float32, by
    transformers."""
    found = {}
    for name, path in paths.items():
        model = open_model(open_checkpoint(path), "float32", "cpu")
        if (activations := CASES[name].activations) is not None:
            round_activations(model, activations)
        found[name] = [answer(model, prompt, NEW_TOKENS) for prompt in prompts()]
    return found


@pytest.mark.parametrize("name", CASES)
def test_answers_of_the_weights_that_are_meant(
    name: str, found: Any, references: dict[str, Answers]
) -> None:
    for rank in of_case(found, name):
        assert apart(rank["answers"], references[name]) <= CASES[name].within
        assert apart(rank["again"], references[name]) <= CASES[name].within


@pytest.mark.parametrize("name", CASES)
def test_all_reduces_are_the_schedules(name: str, found: Any, paths: dict[str, Path]) -> None:
    passes = [rank["passes"] for rank in of_case(found, name)]
    checks = count_checks(passes, schedule_of(paths[name]), shape_of(paths[name]), new_tokens=3)
    assert all(check.ok for check in checks), checks


@pytest.mark.parametrize("name", WITH_FAULTS)
def test_faults_are_seen(name: str, found: Any, references: dict[str, Answers]) -> None:
    for rank in of_case(found, name):
        for fault, answers in rank["faults"].items():
            assert apart(answers, references[name]) > CASES[name].within, fault


# Formats that vLLM 0.32 has no kernel for on CPUs, or none without AMX; and what else their
# published quantization_config says.
_LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
_GROUP = {**_STATIC, "strategy": "group", "group_size": 16, "dynamic": True}
LOADED: dict[str, dict[str, Any] | None] = {
    "block FP8": None,
    "compressed block FP8": _GROUP,
    "FP8 per tensor": {**_STATIC, "dynamic": False},
    "W8A16": None,
    "NVFP4": {**_LOCAL, "symmetric": True, "dynamic": "local"},
    "NVFP4 of ModelOpt": None,
    "MXFP4": None,
}
LINEARS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class NoKernel:
    """Stands for a kernel for as long as only tensors are looked at."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def is_supported(cls, *_: Any) -> tuple[bool, str]:
        return True, ""

    can_implement = is_supported

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def input_quant_key(self) -> None:
        pass


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import current_platform

    for name in ("", "_FP8", "_FP8_BLOCK", "_WFP8A16", "_NVFP4", "_MXFP4"):
        kernels = getattr(linear, f"_POSSIBLE{name}_KERNELS")
        monkeypatch.setitem(kernels, current_platform._enum, [NoKernel])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[[Path], Any]]:
    """Builds a checkpoint's model as the only rank and loads its tensors, no more."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def load(path: Path) -> Any:
        config = EngineArgs(
            str(path), dtype="bfloat16", enforce_eager=True, skip_tokenizer_init=True
        ).create_engine_config()
        with set_current_vllm_config(config):
            meeting = f"file://{tmp_path / 'meeting'}"
            parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
            parallel_state.initialize_model_parallel(1)
            with set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(config)
            model.load_weights(tensors_of(path).items())
        return model

    yield load
    parallel_state.cleanup_dist_env_and_memory()


def side_by_side(parts: list[torch.Tensor], size: torch.Size) -> torch.Tensor:
    """What projections are kept as, as vLLM fuses them: numbers one for each, the others along
    their outputs, whichever axis that is."""
    if parts[0].numel() == 1:
        return torch.cat([part.flatten() for part in parts]).view(size)
    whole = (torch.cat(parts, axis) for axis in range(parts[0].ndim))
    return next(tensor for tensor in whole if tensor.shape == size)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("form", LOADED)
def test_tensors_of_formats_without_a_kernel(
    form: str, alone: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Each parameter of vLLM's is the tracks' tensors, byte for byte."""
    source = quantised(Case(form, sizes={"dtype": torch.bfloat16}), tmp_path)
    with quantising.changed(source) as quantization:
        if LOADED[form] is not None:
            quantization["config_groups"]["group_0"]["input_activations"] = LOADED[form]
        if form == "NVFP4 of ModelOpt":
            quantization |= {"group_size": 16, "exclude_modules": ["lm_head"]}
    path = convert(source, tmp_path / "converted", COMPILED)
    model, given, seen = alone(path), tensors_of(path), 0
    for index, layer in enumerate(model.model.layers):
        for name, part in layer.parts.items():
            track = "" if name == "whole" else f"tracks.{name}."
            before, parameters = f"model.layers.{index}.{track}", dict(part.named_parameters())
            for linear, modules in LINEARS.items():
                first = f"{before}{modules[0]}."
                ends = [n.removeprefix(first) for n in given if n.startswith(first)]
                assert len(ends) > 1
                for end in set(ends) - {"weight_shape"}:
                    parameter = parameters[f"{linear}.{end}"].data
                    parts = [given[f"{before}{module}.{end}"] for module in modules]
                    expected = side_by_side(parts, parameter.shape)
                    assert parameter.dtype == expected.dtype, f"{linear}.{end}"
                    assert torch.equal(
                        parameter.view(torch.uint8), expected.contiguous().view(torch.uint8)
                    )
                    seen += 1
    assert seen >= 4 * 2 * (2 + 2 * 2)  # of two dense layers, and two of two tracks each
