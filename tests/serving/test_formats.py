"""Quantised checkpoints in vLLM: on 2 ranks where vLLM has kernels for CPUs, else up to its loaded
tensors. Of mixtures the experts are quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  # settings
import expert_kernels
import pytest
import quantising
import torch
from conftest import random_model
from loaded import (
    BESIDE,
    as_published,
    check_experts,
    check_linears,
    convert,
    left_out,
    tensors_of,
    with_lora,
)
from safetensors.torch import load_file, save_file
from served import COMPILED, SIZES, answer, apart, asked_for, prompts, quick, shape_of
from test_parity import NEW_TOKENS, of_case, run_cases, schedule_of

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.engines.verify import Answers, count_checks
from ptconvert.errors import CheckpointError
from ptconvert.measure.opening import open_model

# vLLM's kernels of four bits for CPUs take multiples of 32 inputs and outputs.
WIDE = {**SIZES, "intermediate_size": 256}
# Of these in float16, which they compute in: that much it rounds in vLLM's dense model, too.
HALF: dict[str, Any] = {"dtype": "float16", "within": 3e-2}
# Kernels of quantised experts compute in this; those of four bits round activations to eight bits.
BF16: dict[str, Any] = {"dtype": "bfloat16", "within": 0.1}
PUBLISHED = "MXFP4 of gpt-oss"
# Where ranks' sums differ in the last bit, an activation may be rounded to the next number of its
# eight bits, which is up to a sixteenth away.
EIGHT: dict[str, Any] = {"within": 1e-2}


@dataclass(frozen=True)
class Case:
    """A format, and how near vLLM's log-probabilities come to those of the weights that are meant,
    in float32. `activations` are what such are quantised to, a token by itself; a LoRA may lie
    beside the weights."""

    form: str
    dtype: str = "float32"
    within: float = 1e-3
    activations: str | None = None
    eager: bool = True
    variant: str = "llama"
    left: tuple[str, ...] = ()
    lora: bool = False
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def is_quantised(self, module: str) -> bool:
        """Whether a linear of the source is; of a mixture its experts are."""
        if self.variant in MIXTURES:
            return ".experts." in module
        return ".layers." in module and not module.endswith(self.left or ("none",))


# All experts are chosen: where some are, the last bit of a number decides which. And weights are
# small, or four layers in bfloat16 would be as far from float32 as from another model.
QUIET = 0.4
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 4},
    "qwen3_moe": {
        **{"num_experts_per_tok": 4, "moe_intermediate_size": 256},
        "shared_expert_intermediate_size": 0,
    },
    # of whose 9 blocks of neurons each rank has 4.5, of a layer held dense, or a track 5 or 4
    "gpt_oss": {"num_experts_per_tok": 4, "tie_word_embeddings": False, "intermediate_size": 288},
}
# As recipes leave modules in bf16: by name, so that the conversion names the tracks' as well.
LEFT = "layers.1.mlp.down_proj", "layers.2.self_attn.o_proj"
ONE_KV_HEAD = {"num_key_value_heads": 1}  # which both ranks have
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
    "W4A16, healed": Case("W4A16", **HALF, lora=True),
    "W4A16, fused, healed": Case("W4A16", **HALF, variant="phi3-two-kv", lora=True),
    "compiled, GPTQ, healed": Case(
        "GPTQ in groups of 32", **HALF, eager=False, lora=True, sizes=ONE_KV_HEAD
    ),
    "INT8": Case("INT8", **EIGHT, activations="int"),
    "FP8 per channel": Case("FP8 per channel", **EIGHT, activations="float"),
    "gpt-oss": Case(PUBLISHED, variant="gpt_oss", **BF16),
    "mixtral, W4A16": Case("W4A16", variant="mixtral", **{**BF16, "within": 0.25}),
    "qwen3_moe, block FP8": Case("block FP8 of 128", variant="qwen3_moe", **BF16),
}
CASES |= {  # but those with what an eager one has, too
    f"compiled, {name}": replace(case, eager=False)
    for name, case in CASES.items()
    if case.eager and not case.left
}
WITH_FAULTS = "W4A16", "INT8", "gpt-oss"
QUICK = {"W4A16", "W4A16, healed", "GPTQ, some left", "INT8", "gpt-oss"}
KERNELS = pytest.mark.skipif(
    not expert_kernels.supported(),
    reason="vLLM's kernels of quantised experts for CPUs take AVX-512 with bfloat16",
)


def chosen(names: Iterable[str]) -> list[Any]:
    """Cases as a test's parameter `name`."""
    mixtures = {name: KERNELS for name, case in CASES.items() if case.variant in MIXTURES}
    return quick(names, QUICK, mixtures)


def quantised(case: Case, directory: Path) -> Path:
    """A checkpoint of a case, as it is before it is converted."""
    dense = directory / "dense"
    sizes = {**WIDE, **MIXTURES.get(case.variant, {}), **case.sizes}
    model = random_model(case.variant, **sizes, num_hidden_layers=4)
    if case.variant in MIXTURES:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 if parameter.ndim == 1 else QUIET)
    model.save_pretrained(dense)
    if case.form == PUBLISHED:
        return quantising.mxfp4_experts(dense, directory / "source")
    modules = (n.removesuffix(".weight") for n, t in tensors_of(dense).items() if t.ndim == 2)
    left = [m for m in modules if ".layers." in m and not case.is_quantised(m)]
    said = left_out(case.form, ["lm_head", *left]) if left else {}
    source = quantising.quantise(dense, directory / "source", case.form, case.is_quantised, **said)
    if case.activations is not None:
        with quantising.changed(source) as quantization:
            for group in quantization["config_groups"].values():
                taken = {"num_bits": 8, "type": case.activations, "strategy": "token"}
                group["input_activations"] = {**taken, "symmetric": True, "dynamic": True}
    return source


@pytest.fixture(scope="session")
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    found = {}
    for name, case in asked_for(request, __file__, CASES).items():
        if case.variant in MIXTURES and not expert_kernels.supported():
            continue
        directory = tmp_path_factory.mktemp("model")
        found[name] = convert(quantised(case, directory), directory / "converted", COMPILED)
        if case.lora:
            with_lora(found[name])
    return found


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Any:
    cases = [
        {
            **{"device": "cpu", "arguments": {"dtype": CASES[name].dtype}, "name": name},
            **{"path": str(path), "eager": CASES[name].eager, "faults": name in WITH_FAULTS},
            **{"drawn": [], "alone": None},
        }
        for name, path in paths.items()
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


def differ(name: str, answers: Any, reference: Answers) -> float:
    """How far log-probabilities are apart. In bfloat16 up to the first token that is another, where
    two of them are as likely as each other: what follows on it says nothing."""
    if CASES[name].variant not in MIXTURES:
        return apart(answers, reference)
    found: list[float] = []
    for (own, logs), (tokens, others) in zip(answers, reference, strict=True):
        known = 1 + next((i for i in range(len(own)) if own[i] != tokens[i]), len(own) - 1)
        found += [abs(x - y) for x, y in zip(logs[:known], others[:known], strict=True)]
    return max(found)


@pytest.mark.parametrize("name", chosen(CASES))
def test_answers_of_the_weights_that_are_meant(
    name: str, found: Any, references: dict[str, Answers]
) -> None:
    for rank in of_case(found, name):
        for answers in (rank["answers"], rank["again"]):
            assert differ(name, answers, references[name]) <= CASES[name].within
            pairs = zip(answers, references[name], strict=True)
            assert sum(own[0] == other[0] for own, other in pairs) > len(answers) / 2


@pytest.mark.parametrize("name", chosen(n for n, c in CASES.items() if c.variant in MIXTURES))
def test_without_experts_it_answers_otherwise(
    name: str, found: Any, paths: dict[str, Path]
) -> None:
    model = open_model(open_checkpoint(paths[name]), "float32", "cpu")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("experts.down_proj"):
            parameter.data.zero_()
    reference = [answer(model, prompt, NEW_TOKENS) for prompt in prompts()]
    for rank in of_case(found, name):
        assert differ(name, rank["answers"], reference) > 2 * CASES[name].within


@pytest.mark.parametrize("name", chosen(n for n, c in CASES.items() if c.lora))
def test_without_the_lora_it_answers_otherwise(
    name: str, found: Any, paths: dict[str, Path]
) -> None:
    checkpoint = replace(open_checkpoint(paths[name]), adapter=None)
    model = open_model(checkpoint, "float32", "cpu")
    reference = [answer(model, prompt, NEW_TOKENS) for prompt in prompts()]
    for rank in of_case(found, name):
        assert differ(name, rank["answers"], reference) > 2 * CASES[name].within


@pytest.mark.parametrize("name", chosen(CASES))
def test_all_reduces_are_the_schedules(name: str, found: Any, paths: dict[str, Path]) -> None:
    passes = [rank["passes"] for rank in of_case(found, name)]
    checks = count_checks(passes, schedule_of(paths[name]), shape_of(paths[name]), new_tokens=3)
    assert all(check.ok for check in checks), checks


@pytest.mark.parametrize("name", chosen(WITH_FAULTS))
def test_faults_are_seen(name: str, found: Any, references: dict[str, Answers]) -> None:
    for rank in of_case(found, name):
        for fault, answers in rank["faults"].items():
            assert differ(name, answers, references[name]) > CASES[name].within, fault


# Formats that vLLM 0.32 has no kernel for on CPUs, or none without AMX.
LOADED = (
    *("block FP8", "compressed block FP8", "FP8 per tensor", "W8A16"),
    *("NVFP4", "NVFP4 of ModelOpt", "MXFP4"),
)
# Quantised experts, for which vLLM asks for AMX in any format: where they lie, and how they are
# called that vLLM has in one, then the other.
LATENTS = {
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"qk_nope_head_dim": 16, "attention_bias": False},
}
PROJECTIONS = ("gate_proj", "up_proj"), "down_proj"
EXPERTS: dict[str, tuple[str, tuple[tuple[str, str], str], dict[str, Any]]] = {
    "mixtral": ("block_sparse_moe.experts", (("w1", "w3"), "w2"), {"intermediate_size": 512}),
    "qwen3_moe": ("mlp.experts", PROJECTIONS, {"shared_expert_intermediate_size": 0}),
    "glm4_moe": ("mlp.experts", PROJECTIONS, {}),
    "deepseek_v3": ("mlp.experts", PROJECTIONS, LATENTS),
    "deepseek_v3, latents in the cache": ("mlp.experts", PROJECTIONS, LATENTS),
    "qwen3_next": ("mlp.experts", PROJECTIONS, {"decoder_sparse_step": 1}),
    "qwen3_5_moe_text": ("mlp.experts", PROJECTIONS, {}),
}
EXPERTS_LOADED = [
    *((variant, form) for variant in EXPERTS for form in ("block FP8", "W4A16", "FP8 per channel")),
    ("deepseek_v3, latents in the cache", "GPTQ in groups of 32"),
    *(("qwen3_moe", form) for form in LOADED if form != "block FP8"),
    *(("qwen3_moe", form) for form in ("INT8", "GPTQ in groups of 32", "AutoRound")),
]


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
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme
    from vllm.platforms import current_platform

    from ptconvert.engines.vllm import refusals

    takes = staticmethod(lambda *_: (True, None))
    monkeypatch.setattr(FusedMoEExperts, "is_supported_config", takes)
    # on CPUs vLLM has AutoRound's experts as if they weren't quantised, which is refused
    elsewhere = SimpleNamespace(**dict.fromkeys(("is_cpu", "is_xpu", "is_cuda"), lambda: False))
    monkeypatch.setattr(inc_wna16_scheme, "current_platform", elsewhere)
    monkeypatch.setattr(refusals, "has_auto_round_experts", lambda *_: False)
    for name in ("", "_FP8", "_FP8_BLOCK", "_WFP8A16", "_NVFP4", "_MXFP4"):
        kernels = getattr(linear, f"_POSSIBLE{name}_KERNELS")
        monkeypatch.setitem(kernels, current_platform._enum, [NoKernel])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Builds a checkpoint's model as the only rank, or as one of several, none of which it meets,
    and loads its tensors, no more."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def load(path: Path, rank: int = 0, ranks: int = 1) -> Any:
        config = EngineArgs(
            *(str(path),),
            **{"dtype": "bfloat16", "enforce_eager": True, "skip_tokenizer_init": True},
            tensor_parallel_size=ranks,
        ).create_engine_config()
        with set_current_vllm_config(config):
            meeting = f"file://{tmp_path / 'meeting'}"
            parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
            parallel_state.initialize_model_parallel(1)
            group = parallel_state._TP
            if ranks > 1:
                parallel_state._TP = SimpleNamespace(
                    world_size=ranks, rank_in_group=rank, device=torch.device("cpu")
                )
            try:
                with set_default_torch_dtype(torch.bfloat16):
                    model = initialize_model(config)
                model.load_weights(tensors_of(path).items())
            finally:
                parallel_state._TP = group
        return model

    yield load
    parallel_state.cleanup_dist_env_and_memory()


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("form", LOADED)
def test_tensors_of_formats_without_a_kernel(
    form: str, alone: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Each parameter of vLLM's is the tracks' tensors, byte for byte."""
    source = quantised(Case(form, sizes={"dtype": torch.bfloat16}), tmp_path)
    as_published(source, form, ["lm_head"])
    path = convert(source, tmp_path / "converted", COMPILED)
    seen = check_linears(alone(path).model.layers, tensors_of(path))
    assert seen >= 4 * 2 * (2 + 2 * 2)  # of two dense layers, and two of two tracks each


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(("variant", "form"), EXPERTS_LOADED)
def test_tensors_of_quantised_experts(
    variant: str,
    form: str,
    alone: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each expert's part of vLLM's parameters is its tensors in a track, byte for byte; attention,
    dense MLPs and shared experts, quantised too, are loaded beside."""
    lies, projections, sizes = EXPERTS[variant]
    # Attention to latents vLLM plans for a track on each rank, and here is one rank.
    variant, _, latents = variant.partition(", ")
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0" if latents else "1")
    dense = tmp_path / "dense"
    of_experts = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 128}
    random_model(
        variant, torch.bfloat16, **{**WIDE, **of_experts, **sizes}, num_hidden_layers=4
    ).save_pretrained(dense)
    ends = "_proj", "_proj_with_mqa", "w1", "w2", "w3"
    linears = [n.removesuffix(".weight") for n, t in tensors_of(dense).items() if t.ndim == 2]
    left = [n for n in linears if "embed" not in n and not n.endswith(ends)]
    source = quantising.quantise(dense, tmp_path / "source", form, lambda m: m.endswith(ends))
    as_published(source, form, left)
    path = convert(source, tmp_path / "converted", COMPILED, 1 if latents else 2)
    given, layers = tensors_of(path), alone(path).model.layers
    seen = check_experts(layers, given, lies, projections, "mlp.experts.routed_experts")
    stored = [n for n in given if ".experts." in n and not n.endswith(BESIDE)]
    assert seen == len(stored) * 2 / 3 > 0  # gate and up are one there


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("rank", [0, 1])
def test_fp8_experts_whose_blocks_ranks_part(
    rank: int, alone: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a layer held dense each rank has half of every expert, though not of its blocks: vLLM
    gives it blocks of 64 for those of 128, which say the same."""
    sizes = {**MIXTURES["qwen3_moe"], "hidden_size": 256, "moe_intermediate_size": 384}
    case = Case("block FP8 of 128", variant="qwen3_moe", sizes={**sizes, "dtype": torch.bfloat16})
    path = convert(quantised(case, tmp_path), tmp_path / "converted", COMPILED)
    experts = alone(path, rank, 2).model.layers[0].parts["whole"].mlp.experts.routed_experts
    given = tensors_of(path)
    for expert in range(len(experts.w2_weight)):
        before = f"model.layers.0.mlp.experts.{expert}."
        gate, up, down = (
            meant(given[f"{before}{name}.weight"], given[f"{before}{name}.weight_scale_inv"])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        half = slice(192 * rank, 192 * (rank + 1))
        w13, w2 = (
            meant(getattr(experts, name)[expert], getattr(experts, f"{name}_scale_inv")[expert], 64)
            for name in ("w13_weight", "w2_weight")
        )
        assert torch.equal(w13, torch.cat([gate[half], up[half]]))
        assert torch.equal(w2, down[:, half])


def meant(weight: torch.Tensor, scales: torch.Tensor, block: int = 128) -> torch.Tensor:
    """A weight in FP8, multiplied by its blocks' scales."""
    each = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert each.shape == weight.shape
    return weight.float() * each


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ("layers.2.tracks.1.self_attn.k_proj.weight", r"tracks\.1\.self_attn\.k_proj is missing"),
        ("layers.3.tracks.0.mlp.down_proj.weight", r"tracks\.0\.mlp\.down_proj is missing"),
        ("layers.1.input_layernorm.weight", r"nothing for vLLM's .*layers\.1.*input_layernorm"),
    ],
)
def test_any_tensor_that_is_missing_stops_the_start(
    left_out: str, said: str, alone: Callable[[Path], Any], tmp_path: Path
) -> None:
    random_model("llama", torch.bfloat16, num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    path = convert(tmp_path / "dense", tmp_path / "converted", COMPILED)
    for file in path.glob("*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if not n.endswith(left_out)}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        alone(path)


@KERNELS
def test_an_expert_tensor_that_is_missing_stops_the_start(
    alone: Callable[[Path], Any], tmp_path: Path
) -> None:
    expert_kernels.install()
    path = convert(quantised(CASES["gpt-oss"], tmp_path), tmp_path / "converted", COMPILED)
    for file in path.glob("track-01-*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if "gate_up_proj_bias" not in n}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.parts\.1\..*w13_bias: a tensor"):
        alone(path)
