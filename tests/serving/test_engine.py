"""The plugin in vLLM as users start it: refusals, verify, the server, lm-eval, bytes per rank."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines  # noqa: F401  # settings
import pytest
import quantising
import seeing
from commands import CACHE, LIMIT_SECONDS, serving, under_vllms_name, verify
from conftest import spec_text
from refused import in_table
from served import MIXED, WORDS, check_chat, make_model, with_rope, with_words

from ptconvert.checkpoint import section
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.engines.verify import TOLERANCE
from ptconvert.engines.vllm import checkpoints
from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SERVED
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.lower import lower
from ptconvert.spec.document import parse_spec
from ptconvert.verify.run import Settings


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with 4 tracks and, so that text can go in and out, a tokenizer of words."""
    return with_words(make_model(tmp_path_factory.mktemp("model"), "llama-biases", 4, MIXED))


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """What runs within is refused, in lines of docs/refusals.md, with these words among them."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        yield
    found = re.search(r"Value error, (.*?) \[type=", str(error.value), re.DOTALL)
    said = found[1] if found else str(error.value)
    assert all(word in said for word in words) and in_table("vllm", said), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tensor_parallel_size": 3}, ["4 tracks", "1, 2, 4 ranks"]),
        ({"quantization": "fp8"}, ["quantization fp8", "aren't quantised; leave it out"]),
        ({"enable_lora": True}, ["enable_lora", "merge"]),
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size 2", "tensor_parallel_size"]),
        (
            {"additional_config": {"ptconvert": {"lm_head": "whole"}}},
            ["lm_head 'whole'", "sharded"],
        ),
        ({"additional_config": {"ptconvert": "replicated"}}, ["'replicated'", "a mapping"]),
        ({"additional_config": {"ptconvert": {"head": 1}}}, ["ptconvert head 1", '"lm_head"']),
        ({"enable_dbo": True}, ["enable_dbo", "the schedule says what runs beside"]),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    checkpoint: Path, arguments: dict[str, Any], words: list[str]
) -> None:
    from vllm import EngineArgs

    with refused(*words):
        EngineArgs(str(checkpoint), **arguments).create_engine_config()


def seeing_model(source: Path, path: Path) -> str:
    """A source that sees, converted."""
    spec = parse_spec(spec_text(2, "use: parallel_track, depth: 2"), "spec.yaml")
    execute(plan_conversion(open_checkpoint(source), spec, source_name="source"), path)
    return str(path)


def test_what_sees_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has said by what vLLM's class makes its language model."""
    from vllm import EngineArgs

    monkeypatch.setattr(checkpoints, "LANGUAGE_MODELS", {"llava": LANGUAGE_MODELS["llava"]})
    path = seeing_model(seeing.save("gemma4", tmp_path / "source"), tmp_path / "model")
    with refused("a converted gemma4 isn't served in vLLM"):
        EngineArgs(path).create_engine_config()


ON_CPUS = "a picture's tokens see each other there, which vLLM's attention on CPUs can't do"
BOTH_WAYS = {"use_bidirectional_attention": "vision"}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gemma3", {}, ON_CPUS),
        (
            "gemma3",
            {"sliding_window": 3},
            "mm_tokens_per_image 4: of a picture that is longer than the window of 3",
        ),
        ("gemma4", BOTH_WAYS, ON_CPUS),
        ("gemma4_unified", BOTH_WAYS, ON_CPUS),
        ("gemma4", {"use_bidirectional_attention": None}, None),
    ],
)
def test_pictures_whose_tokens_see_each_other_are_refused_on_cpus(
    name: str, text: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    path = seeing_model(seeing.save(name, tmp_path / "source", **text), tmp_path / "model")
    with refused(why) if why else contextlib.nullcontext():
        EngineArgs(path).create_engine_config()
    EngineArgs(path, language_model_only=True).create_engine_config()


@pytest.mark.parametrize(
    ("quantised", "arguments", "why"),
    [
        (True, {}, "quantization_config in text_config: vLLM would take it for the tower's too"),
        (False, {"quantization": "fp8"}, "quantization fp8: converted models are served as their"),
        (False, {"mm_encoder_only": True}, "mm_encoder_only: the language model is what was"),
        (False, {"tensor_parallel_size": 3}, "2 tracks"),
        (
            False,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config: not tried with models with pictures",
        ),
    ],
)
def test_what_a_model_that_sees_is_not_is_refused(
    quantised: bool, arguments: dict[str, Any], why: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    source = seeing.save("llava", tmp_path / "source")
    if quantised:
        within = re.compile(r"language_model\..*\.mlp\.").search
        given = source, tmp_path / "quantised", "FP8 per channel", lambda name: bool(within(name))
        source = quantising.quantise(*given)
        config = json.loads((source / "config.json").read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        (source / "config.json").write_text(json.dumps(config))
    path = seeing_model(source, tmp_path / "model")
    with refused(why):
        EngineArgs(path, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"enable_expert_parallel": True}, "enable_expert_parallel: each track has a share of"),
        ({"data_parallel_size": 2}, "data_parallel_size 2: vLLM would cut experts over all"),
    ],
)
def test_other_cuts_of_experts_are_refused(
    arguments: dict[str, Any], why: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, "mixtral", 2, "use: ladder")
    with refused(why):
        EngineArgs(str(path), tensor_parallel_size=2, **arguments).create_engine_config()


@pytest.mark.parametrize(
    ("variant", "sizes", "why"),
    [
        ("ernie4_5", {}, "use_bias True: vLLM's layers for it have no biases"),
        ("qwen3_moe", {}, "shared_expert_intermediate_size 32: vLLM would add experts"),
        ("glm4", {}, "float16: it overflows there, as vLLM says; use bfloat16 or float32"),
        ("glm4_moe", {}, "float16: it overflows there, as vLLM says; use bfloat16 or float32"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0: vLLM's layers for it have 7.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0: vLLM's layers for it have 1.702"),
        ("gpt_oss", {"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06: vLLM's layers for it have 1e-05"),
        ("deepseek_v3", {}, "attention_bias True: vLLM's layers for it have no biases"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False: vLLM's layers for it"),
        (
            "deepseek_v3",
            {},
            "tensor_parallel_size 1: vLLM plans attention to latents (MLA) for one",
        ),
        ("cohere", {}, "attention_bias True: vLLM's layers for it have no biases"),
        ("cohere2", {"attention_bias": True}, "attention_bias True: vLLM's layers for it have no"),
    ],
)
def test_what_vllms_layers_are_not_is_refused_by_name(
    variant: str, sizes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, variant, 2, "use: ladder", **sizes)
    with refused(why):
        EngineArgs(str(path), dtype="float16").create_engine_config()


def test_what_drafts_is_made_by_the_sources_config_where_it_is_a_head(tmp_path: Path) -> None:
    """A converted model that is to draft as a whole stays what it is, as does any other."""
    from transformers import AutoConfig
    from vllm.config import SpeculativeConfig

    from ptconvert.engines.vllm import register
    from ptconvert.engines.vllm.drafts import config_of_draft

    register()
    assert SpeculativeConfig.hf_config_override is config_of_draft
    paths = {v: make_model(tmp_path / v, v, 2, "use: ladder") for v in ("glm4_moe", "llama")}

    def drafts(path: Path) -> Any:
        return config_of_draft(AutoConfig.from_pretrained(path))

    head = drafts(paths["glm4_moe"])
    assert (head.model_type, head.architectures) == ("glm4_moe_mtp", ["Glm4MoeMTPModel"])
    assert head.n_predict == 1
    assert drafts(paths["llama"]).architectures == ["PTConvertLlamaForCausalLM"]
    assert drafts(paths["llama"].parent / "dense").architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("changed", "arguments", "why"),
    [
        ({}, {"dtype": "float32"}, "float32: vLLM's linear attention on CPUs takes bfloat16 only"),
        ({"hidden_act": "gelu"}, {}, "hidden_act gelu: vLLM's linear attention knows silu only"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config: not tried where layers have linear attention",
        ),
    ],
)
def test_what_linear_attention_does_not_is_refused(
    changed: dict[str, Any], arguments: dict[str, Any], why: str, tmp_path: Path
) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, "qwen3_next", 2, "use: ladder", **changed)
    with refused(why):
        EngineArgs(str(path), **{"dtype": "bfloat16", **arguments}).create_engine_config()


@pytest.mark.parametrize(
    ("schedule", "heads", "channels"),
    [
        ("use: parallel_track, depth: 2", 4, 2 * 2 * 4 + 4 * 4),  # a track's, 4 on 2 ranks
        ("use: ladder", 8, 2 * 4 * 4 + 8 * 4),  # a rank's
        (MIXED, 8, 2 * 4 * 4 + 8 * 4),  # both; the larger
    ],
)
def test_states_of_linear_attention_are_those_that_a_rank_holds(
    schedule: str, heads: int, channels: int, tmp_path: Path
) -> None:
    """Of 8 key heads and 16 value heads of 4 channels, with 4 taps."""
    from vllm import EngineArgs

    from ptconvert.engines.vllm.hybrid import PTConvertHybridForCausalLM

    path = make_model(tmp_path, "qwen3_next", 4, schedule)
    arguments = EngineArgs(str(path), dtype="bfloat16", tensor_parallel_size=2)
    config = arguments.create_engine_config()
    assert config.model_config.is_hybrid
    shapes = PTConvertHybridForCausalLM.get_mamba_state_shape_from_config(config)
    assert shapes == ((3, channels), (heads, 4, 4))


def test_the_cache_of_verify_has_room_for_states() -> None:
    """Of Qwen3.6-27B each of 48 value heads of 64 layers' pages has 128 * 128 numbers of 4 bytes,
    which for 4 requests on one rank is more than all that other models are given."""
    from ptconvert.engines.vllm.verify import _cache_bytes

    settings = Settings(ranks=1, batch=4, prompt_tokens=16, new_tokens=8)
    configs = Path(__file__).parents[2] / "specs" / "configs"
    shapes = (
        ModelShape.from_config(read_config(configs / f"{name}.json"))
        for name in ("qwen3.6-27b", "qwen3-8b")
    )
    hybrid, plain = (_cache_bytes(shape, 1, settings) for shape in shapes)
    states = 4 * 64 * 48 * 128 * 128 * 4
    assert hybrid > states > plain


def test_an_activation_that_experts_have_not_is_refused(tmp_path: Path) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, "mixtral", 2, "use: ladder", hidden_act="gelu")
    with refused("hidden_act gelu: vLLM's experts would be activated by"):
        EngineArgs(str(path)).create_engine_config()


def test_experts_that_vllm_leaves_as_they_are_on_cpus_are_refused(tmp_path: Path) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, "mixtral", 2, "use: ladder")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True},
        "packing_format": "auto_round:auto_gptq",
    }
    (path / "config.json").write_text(json.dumps(config))
    with refused("quantization_config: AutoRound's experts: vLLM has no"):
        EngineArgs(str(path)).create_engine_config()


@pytest.mark.parametrize(("longest", "says"), [(256, False), (512, True)])
def test_factors_for_long_prompts_are_told_of(
    longest: int, says: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm import EngineArgs

    path = make_model(tmp_path, "phi3-two-kv", 2, "use: ladder", **with_rope("phi3-two-kv"))
    with caplog.at_level("WARNING", logger="ptconvert"):
        EngineArgs(str(path), max_model_len=longest).create_engine_config()
    assert ("takes the factors for long prompts for all" in caplog.text) == says


def test_compiled_graphs_are_kept_by_the_program_and_the_code_they_are_of(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same config.json lowered in another way, and an upgrade, compile anew."""
    from vllm import EngineArgs

    import ptconvert
    from ptconvert.schedule import schedule

    def key() -> str:
        found: str = EngineArgs(str(checkpoint)).create_engine_config().compute_hash()
        return found

    def late(stages: Any) -> Any:
        return tuple(replace(step, completes=()) for step in lower(stages))

    keys = [key(), key()]
    with monkeypatch.context() as lowered:
        section._parse.cache_clear()
        lowered.setattr(schedule, "lower", late)
        keys.append(key())
    section._parse.cache_clear()
    package = shutil.copytree(Path(ptconvert.__file__).parent, tmp_path / "ptconvert")
    monkeypatch.setattr(ptconvert, "__file__", str(package / "__init__.py"))
    keys.append(key())
    with (package / "schedule" / "lower.py").open("a") as file:
        file.write("# mended")
    keys.append(key())
    assert [keys.index(one) for one in keys] == [0, 0, 2, 0, 4]


def test_vllms_second_model_runner_finds_what_it_calls() -> None:
    """By its source, as it needs Triton. It samples in another way where a model can't give a
    rank's own logits, and asks for tensors between pipeline stages where there are such."""
    import vllm

    from ptconvert.engines.vllm.model import PTConvertForCausalLM

    source = Path(vllm.__file__).with_name("v1") / "worker" / "gpu" / "model_runner.py"
    text = source.read_text(encoding="utf-8")
    called = set(re.findall(r"\bself\.model\.(\w+)\(", text))
    others = {"compute_logits_local", "make_empty_intermediate_tensors"}
    assert "compute_logits" in called and "def get_model(" in text  # which the counting asks
    assert [name for name in called - others if not hasattr(PTConvertForCausalLM, name)] == []


def test_context_parallelism_is_refused(tmp_path: Path) -> None:
    """vLLM would take it where KV heads are repeated on its ranks, as if they were the same."""
    from vllm import EngineArgs

    arguments = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}
    path = make_model(tmp_path, "llama-mqa", 4, MIXED)
    with refused("decode_context_parallel_size 2: ranks would share keys"):
        EngineArgs(str(path), **arguments).create_engine_config()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_verify_counts_inside_the_workers(dtype: str, checkpoint: Path) -> None:
    code, report = verify(checkpoint, "--enforce-eager", "--batch", "3", "--dtype", dtype)
    assert code == 0 and report["ok"], report["checks"]
    assert [check["name"] for check in report["checks"]] == [
        "schedule as converted",
        "all-reduces in prefill",
        "all-reduces in decode",
        *(["greedy tokens"] if dtype == "float32" else []),
        "their log-probabilities",
    ]
    assert len(report["seen_by_rank"]) == 2 and len(report["seen_by_rank"][0]) == 8
    assert report["other_communication"] == {"all_gather": 8}


@pytest.fixture(scope="session")
def named_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return under_vllms_name(tmp_path_factory.mktemp("named"))


def test_server_streams_a_chat_completion(
    checkpoint: Path, named_vllm: dict[str, str], tmp_path: Path
) -> None:
    with serving(checkpoint, named_vllm, tmp_path / "log") as server:
        check_chat(server, checkpoint)


TASK = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_lm_eval_scores_as_with_the_transformers_model(
    checkpoint: Path, named_vllm: dict[str, str], tmp_path: Path
) -> None:
    from random import Random

    random = Random(0)
    rows = [
        {
            "text": " ".join(random.choices(WORDS, k=random.randrange(3, 30))),
            "choices": random.sample(WORDS, 4),
            "answer": random.randrange(4),
        }
        for _ in range(40)
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))
    scores, samples, cache = {}, {}, f"kv_cache_memory_bytes={CACHE}"
    with contextlib.ExitStack() as running:
        processes = {}
        for model, more in (
            ("hf", "trust_remote_code=True"),
            ("vllm", f"tensor_parallel_size=2,enforce_eager=True,max_model_len=256,{cache}"),
        ):
            command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", "words"]
            command += ["--model_args", f"pretrained={checkpoint},dtype=float32,{more}"]
            command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / model)]
            command += ["--log_samples", "--batch_size", "8"]
            command += ["--device", "cpu"] if model == "hf" else []
            env = named_vllm | {"HF_DATASETS_CACHE": str(tmp_path / f"cache-{model}")}
            log = running.enter_context((tmp_path / f"{model}.log").open("wb"))
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            processes[model] = running.enter_context(process)
            running.callback(process.kill)
        for model, process in processes.items():
            code = process.wait(LIMIT_SECONDS)
            assert code == 0, (tmp_path / f"{model}.log").read_text()[-3000:]
    for model in processes:
        out = tmp_path / model
        (results,) = out.rglob("results_*.json")
        scores[model] = json.loads(results.read_text())["results"]["words"]
        (file,) = out.rglob("samples_*.jsonl")
        samples[model] = {
            s["doc_id"]: [float(r[0][0]) for r in s["resps"]]
            for s in map(json.loads, file.read_text().splitlines())
        }
    error = scores["hf"]["acc_stderr,none"]
    assert abs(scores["vllm"]["acc,none"] - scores["hf"]["acc,none"]) <= error
    assert samples["hf"].keys() == samples["vllm"].keys() and len(samples["hf"]) == len(rows)
    assert len({value for values in samples["hf"].values() for value in values}) > len(rows)
    for document, values in samples["hf"].items():
        assert samples["vllm"][document] == pytest.approx(values, abs=TOLERANCE)


PLUGIN = """
import json, sys
from pathlib import Path
from vllm.plugins import load_general_plugins
load_general_plugins()
import ptconvert.engines.vllm
ptconvert.engines.vllm.register()
import torch
from vllm import ModelRegistry
assert "PTConvertQwen3ForCausalLM" in ModelRegistry.get_supported_archs()
assert not torch.cuda.is_initialized()
assert "ptconvert.engines.vllm.model" not in sys.modules

sys.path.insert(0, sys.argv[1])
from tokenizing import CLASSES, facts, put, trained
from vllm.tokenizers import get_tokenizer
bpe, apart = trained(), []
for pair in Path(sys.argv[2]).iterdir():
    for name in CLASSES:
        found = []
        for path in (pair / "dense", pair / "converted"):
            put(path, bpe, name)
            found.append(facts(get_tokenizer(str(path))))
        if found[0] != found[1]:
            apart.append([pair.name, name, *found])
print(json.dumps(apart))
"""


@pytest.mark.slow
def test_the_plugin_in_a_process_of_its_own(tmp_path: Path) -> None:
    """It can run twice and touches no device; with it, and nothing else of ptconvert imported,
    vLLM opens tokenizers as the sources'."""
    for family in SERVED:
        (tmp_path / family).mkdir()
        make_model(tmp_path / family, family, 2, "use: parallel_track, depth: 2")
    tests = str(Path(__file__).parents[1])
    script = [sys.executable, "-c", PLUGIN, tests, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
