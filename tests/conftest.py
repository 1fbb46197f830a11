"""Shared fixtures: tiny random dense checkpoints of the real model classes, and conversions."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A test has one core of its own, and so has each process that it starts: threads of several that
# wait for each other by spinning take many times as long. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And nothing waits for a hub. Before huggingface_hub, which reads it when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
import transformers
from forking import Run, forking
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.runtime.launch import PRELOADED
from ptconvert.spec.document import parse_spec

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# What ranks are forked from imports this, too, and what heals: once, and not in each rank.
FORKED = ["conftest", "ptconvert.heal.run", "transformers.trainer"]
PRELOADED.extend(name for name in FORKED if name not in PRELOADED)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

# What serving engines are needed for, each in an environment of its own: `make test-vllm`, ...
APART = {"serving": "vllm", "serving_sglang": "sglang"}
collect_ignore = [name for name, needs in APART.items() if not importlib.util.find_spec(needs)]

FIXTURE = Path(__file__).parents[2] / "shared" / "fixtures" / "stdlib-llama"
LAYERS = 6
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HYBRID: dict[str, Any] = {
    **{"head_dim": 8, "linear_num_key_heads": 8, "linear_num_value_heads": 16},
    **{"linear_key_head_dim": 4, "linear_value_head_dim": 4},
}
EXPERTS: dict[str, Any] = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "shared_expert_intermediate_size": 32,
}
# Every supported family, and the variants that take another path through the conversion.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-rope-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-mha": ("Llama", {"num_key_value_heads": 8}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-two-kv-tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("Phi3", {"head_dim": 8}),
    "phi3-two-kv": ("Phi3", {"num_key_value_heads": 2, "sliding_window": 5}),
    "granite": (
        "Granite",
        {
            **{"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
            **{"attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True},
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True}),
    "ministral3": ("Ministral3", {"head_dim": 8}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8, "use_bias": True, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "glm": ("Glm", {"head_dim": 8}),
    "apertus": ("Apertus", {}),
    "nemotron": ("Nemotron", {"mlp_bias": True, "attention_bias": True}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 8}),
    "starcoder2": ("Starcoder2", {}),
    "cwm": ("Cwm", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "jais2": ("Jais2", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "attention_bias": True},
    ),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "attention_bias": True},
    ),
    "gemma4_text": (
        "Gemma4",
        {
            **{"head_dim": 8, "sliding_window": 5, "hidden_size_per_layer_input": 0},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 16},
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "gemma4_unified_text": (
        "Gemma4Unified",
        {
            **{"head_dim": 8, "sliding_window": 5, "attention_k_eq_v": True},
            **{"num_global_key_value_heads": 2, "global_head_dim": 16},
        },
    ),
    "gemma4-values-apart": (
        "Gemma4",
        {"head_dim": 8, "sliding_window": 5, "hidden_size_per_layer_input": 0},
    ),
    "glm4": ("Glm4", {"head_dim": 8}),
    "exaone4": ("Exaone4", {"sliding_window": 5}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            **{"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
            **{"head_dim": 8, "attention_bias": True, "mlp_bias": True},
        },
    ),
    "hyperclovax-no-norms-after": (
        "HyperCLOVAX",
        {"head_dim": 8, "use_post_norm": False, "residual_multiplier": 0.4, "mlp_bias": True},
    ),
    "cohere": ("Cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", {"sliding_window": 5, "logit_scale": 0.5}),
    "qwen3_5_text": ("Qwen3_5", HYBRID),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **EXPERTS,
            **{"n_routed_experts": 4, "n_shared_experts": 2, "head_dim": 8},
            **{"use_qk_norm": True, "attention_bias": True, "n_group": 1, "topk_group": 1},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **EXPERTS,
            **{"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1},
            **{"topk_group": 1, "num_key_value_heads": 8, "first_k_dense_replace": 1},
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8},
            **{"qk_nope_head_dim": 8, "attention_bias": True, "routed_scaling_factor": 1.5},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **{"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"head_dim": 8, "sliding_window": 5},
        },
    ),
    "qwen3_next": ("Qwen3Next", {**EXPERTS, **HYBRID, "decoder_sparse_step": 2}),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {**EXPERTS, **HYBRID}),
    "arcee": ("Arcee", {"head_dim": 8, "mlp_bias": True}),
}

# Where weights of the usual size make rounding grow to what is looked for: linear attention, and
# experts that are chosen by it.
SCALES = {"qwen3_next": 0.05, "qwen3_5_moe_text": 0.05}

# What a script begins with that is to run as where ptconvert isn't installed.
WITHOUT_PTCONVERT = """
import sys
assert "ptconvert" not in sys.modules
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ptconvert":
            raise ImportError("ptconvert is blocked")
sys.meta_path.insert(0, Blocked())
"""

# What opening a model imports of them.
TRANSFORMERS = [
    *("torch", "torch._dynamo", "transformers.modeling_utils", "transformers.generation.utils"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
]

MakeDense = Callable[..., Path]
Convert = Callable[..., Path]


def pytest_collection_finish() -> None:
    """What is imported by now stays; no collection of garbage needs to look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def run_without_ptconvert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a script that begins with WITHOUT_PTCONVERT in a process that has transformers."""
    with forking(*TRANSFORMERS, HF_HOME=str(tmp_path_factory.mktemp("home"))) as run:
        yield run


def random_model(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A dense model whose weights are large enough for schedules to matter."""
    model_class = getattr(transformers, f"{VARIANTS[variant][0]}ForCausalLM")
    config = small_config(variant, **overrides)
    torch.manual_seed(0)
    return randomised(model_class(config), dtype, SCALES.get(variant, 0.25))


def small_config(variant: str, **overrides: Any) -> Any:
    """The config of such a model."""
    family, settings = VARIANTS[variant]
    config_class = getattr(transformers, f"{family}ForCausalLM").config_class
    return config_class(**{**SIZES, **settings, **overrides})


def randomised(model: Any, dtype: torch.dtype, scale: float = 0.25) -> Any:
    """A model with such weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(scale * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
            elif name.endswith("e_score_correction_bias"):  # which chooses experts
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def make_dense(tmp_path_factory: pytest.TempPathFactory) -> MakeDense:
    """Writes a dense checkpoint of a variant, once per session and settings."""
    made: dict[str, Path] = {}

    def make(
        variant: str = "llama",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **overrides: Any,
    ) -> Path:
        key = f"{variant} {dtype} {max_shard_size} {sorted(overrides.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(variant)
            model = random_model(variant, dtype, **overrides)
            model.save_pretrained(path, max_shard_size=max_shard_size)
            made[key] = path
        return made[key]

    return make


def bytes_as_tokens(more: dict[str, int]) -> Tokenizer:
    """A tokenizer of bytes, whose ids follow that of the end of a text, and more tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {c: i for i, c in enumerate(alphabet, 1)} | more
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def byte_level(make_dense: MakeDense, path: Path) -> Path:
    """A random dense model with a tokenizer of bytes, at `path`."""
    shutil.copytree(make_dense(vocab_size=260, max_position_embeddings=256, eos_token_id=0), path)
    with_bytes(path)
    return path


def with_bytes(path: Path) -> None:
    """Puts a tokenizer of bytes beside a model."""
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_tokens({}), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(path)


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Converts a dense checkpoint: items of a schedule in YAML flow form, or all layers' use."""

    def run(source: Path, tracks: int, schedule: str, top: str = "", **options: Any) -> Path:
        destination = tmp_path / f"converted-{len(list(tmp_path.iterdir()))}"
        execute(
            plan_conversion(
                open_checkpoint(source),
                parse_spec(spec_text(tracks, schedule, top), "spec.yaml"),
                source_name=source.name,
                **options,
            ),
            destination,
        )
        return destination

    return run


def spec_text(tracks: int, schedule: str, top: str = "") -> str:
    """A spec: `schedule` is one item's keys for all LAYERS layers, or whole items."""
    items = schedule
    if "layers:" not in schedule:
        items = f"  - {{layers: 0-{LAYERS - 1}, {schedule}}}\n"
    return f"format: 1\ntracks: {tracks}\n{top}schedule:\n{items}"


def load(path: Path, **options: Any) -> Any:
    """Opens a checkpoint in fp32 as a user would."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()
