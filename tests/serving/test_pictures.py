"""Models that see, in vLLM on 2 ranks: what transformers' converted model says of a picture."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import engines  # noqa: F401  # settings
import pictured
import pytest
import quantising
import seeing
import served
import torch
from commands import serving, under_vllms_name, verify
from conftest import spec_text
from served import COMPILED, MIXED, ROPE, asked_for, quick, shape_of
from test_parity import ALTERNATING, NEW_TOKENS, OTHERS, of_case, run_cases, schedule_of
from transformers.models.gemma4_unified import modeling_gemma4_unified

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.engines.verify import TOLERANCE, count_checks
from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SEE_EACH_OTHER
from ptconvert.measure.opening import open_model
from ptconvert.schedule.presets import dense_schedule
from ptconvert.spec.document import parse_spec


@dataclass(frozen=True)
class Case:
    """A conversion, and how it is run."""

    model: str
    tracks: int
    schedule: str
    eager: bool = True
    text: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # vLLM's
    form: str | None = None  # of quantised weights
    within: float = TOLERANCE


# vLLM's attention on CPUs takes heads of 32 or more.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
SIZES |= {"num_key_value_heads": 4, "max_position_embeddings": 512}
HYBRID = {"rope_parameters": ROPE["qwen3_5_text"]}
FOUR = {"num_hidden_layers": 4}
THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
THREE_AXES |= {"mrope_section": [6, 5, 5]}
# As recipes for these name what they leave, and one more, which is called otherwise in vLLM.
NOT_QUANTISED = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
LEFT = "model.language_model.layers.1.mlp.down_proj"


# A picture's tokens see each other: all of them are in one pass, as vLLM has it on GPUs, where
# Gemma 4's are 64. Its window lets each see fewer of those before it.
GEMMA3 = {"rope_parameters": ROPE["gemma3_text"]}
GEMMA4 = {**FOUR, **OTHERS["gemma4_text"], "use_bidirectional_attention": "vision"}
TOGETHER: dict[str, Any] = {"disable_chunked_mm_input": True}
MORE_TOGETHER = {**TOGETHER, "max_num_batched_tokens": 96}
TOKEN_TYPES = "token_type_ids", "mm_token_type_ids"  # by which transformers knows

# In whose first layers, after which a tower's more joins the stream, all is in flight or waits.
EARLY = """  - {layers: 0-0, stages: "a0~1 m0^2"}
  - {layers: 1-2, use: parallel_track, depth: 2, overlap: 1}
  - {layers: 3-3, stages: "a3|m3!"}
  - {layers: 4-5, use: ladder}
"""


def is_quantised(module: str) -> bool:
    """Whether a linear of LLaVA's is, which has older names."""
    return module.startswith("language_model.model.layers.") and not module.endswith(
        ".layers.1.mlp.down_proj"
    )


CASES = {
    "llava": Case("llava", 4, MIXED),
    "mistral3": Case("mistral3", 2, MIXED),
    "internvl": Case("internvl", 2, MIXED),
    "qwen3_5": Case("qwen3_5", 2, COMPILED, text=HYBRID | FOUR),
    "qwen3_5_moe": Case("qwen3_5_moe", 2, COMPILED, text=HYBRID | FOUR),
    "qwen3_5, pictures shared out": Case(
        *("qwen3_5", 2, COMPILED),
        text=HYBRID | FOUR,
        arguments={"mm_encoder_tp_mode": "data"},
    ),
    # of four bits, which vLLM computes with in float16: see test_formats.py
    "llava, W4A16": Case(
        *("llava", 2, COMPILED),
        text={**FOUR, "intermediate_size": 256},
        arguments={"dtype": "float16"},
        form="W4A16",
        within=3e-2,
    ),
    "qwen3_vl": Case("qwen3_vl", 2, EARLY, text={"rope_parameters": THREE_AXES}),
    "gemma3": Case("gemma3", 2, MIXED, text=GEMMA3, arguments=TOGETHER),
    "gemma4": Case("gemma4", 2, COMPILED, text=GEMMA4, arguments=MORE_TOGETHER),
    "gemma4, whose tokens don't": Case(
        *("gemma4", 2, COMPILED),
        text={**GEMMA4, "use_bidirectional_attention": None},
        arguments={"max_num_batched_tokens": 96},
    ),
    "gemma4_unified": Case(
        *("gemma4_unified", 2, COMPILED),
        text={**FOUR, **OTHERS["gemma4_unified_text"]},
        arguments=MORE_TOGETHER,
    ),
}

# Each wrapper compiled, too; of Gemma 3's four layers else all have a window.
COMPILED_TEXT = {"gemma3": {"layer_types": ALTERNATING}}
COMPILED_WITHIN = {"gemma3": 4e-3}  # see test_parity.py
CASES |= {
    f"compiled, {name}": replace(
        CASES[name],
        tracks=2,
        schedule=COMPILED,
        eager=False,
        text={**CASES[name].text, **FOUR, **COMPILED_TEXT.get(name, {})},
        within=COMPILED_WITHIN.get(name, TOLERANCE),
    )
    for name in LANGUAGE_MODELS
}

WITHOUT_TOWERS = {
    f"{name}, blind": Case(name, 2, COMPILED, text=text, arguments={"language_model_only": True})
    for name, text in (
        ("gemma3", {**FOUR, "rope_parameters": ROPE["gemma3_text"]}),
        ("gemma4", {**FOUR, **OTHERS["gemma4_text"]}),
        ("gemma4_unified", {**FOUR, **OTHERS["gemma4_unified_text"]}),
        ("qwen3_vl", {**FOUR, "rope_parameters": THREE_AXES}),
        ("qwen3_5", {**FOUR, **HYBRID}),
    )
}


QUICK = {"llava", "qwen3_vl", "gemma3"}


def make(directory: Path, case: Case) -> Path:
    """A random model, converted, with its processor."""
    source = seeing.save(case.model, directory / "dense", **SIZES, **case.text)
    if case.form is not None:
        given = source, directory / "source", case.form, is_quantised
        source = quantising.quantise(*given, ignore=[*NOT_QUANTISED, LEFT])
    spec = parse_spec(spec_text(case.tracks, case.schedule), "spec.yaml")
    plan = plan_conversion(open_checkpoint(source), spec, source_name="dense")
    execute(plan, directory / "converted")
    return directory / "converted"


@pytest.fixture(scope="session")
def paths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return {
        name: seeing.with_processor(case.model, make(tmp_path_factory.mktemp("model"), case))
        for name, case in asked_for(request, __file__, CASES, ["llava"]).items()
    }


@pytest.fixture(scope="session")
def blind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    cases = asked_for(request, __file__, WITHOUT_TOWERS)
    return {name: make(tmp_path_factory.mktemp("model"), case) for name, case in cases.items()}


@pytest.fixture(scope="session")
def found(
    tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path], blind: dict[str, Path]
) -> Any:
    def run(name: str, case: Case, path: Path) -> dict[str, Any]:
        return {
            **{"name": name, "path": str(path), "device": "cpu", "eager": case.eager},
            **{"arguments": dict(case.arguments), "alone": None, "faults": False, "drawn": []},
        }

    cases = [run(n, CASES[n], path) | {"model": CASES[n].model} for n, path in paths.items()]
    cases += [run(name, WITHOUT_TOWERS[name], path) for name, path in blind.items()]
    return run_cases(tmp_path_factory.mktemp("ranks"), cases, 2)


@pytest.fixture(scope="session")
def expected(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: answers_by_transformers(CASES[name].model, p) for name, p in paths.items()}


def answers_by_transformers(name: str, path: Path, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Of each request its ids, and what the single-process model answers without some inputs."""
    model = open_model(open_checkpoint(path), "float32", "cpu")
    model.set_attn_implementation("eager")
    processor, found = seeing.processor(name), dict[str, Any]()
    for request, (text, pictures) in pictured.requests(name).items():
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        for unused in left_out:
            inputs.pop(unused, None)
        found[request] = {
            "prompt": inputs["input_ids"][0].tolist(),
            "answer": greedy(model.eval(), inputs, pictured.NEW_TOKENS),
        }
    return found


def greedy(model: Any, inputs: Any, new_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    with torch.no_grad(), as_gemma4():
        said = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    pairs = zip(said.logits, tokens, strict=True)
    return tokens, [float(logits[0].log_softmax(-1)[token]) for logits, token in pairs]


def as_gemma4() -> Any:
    """Gives Gemma 4 Unified in transformers Gemma 4's mask, as vLLM has it: it has this one, too,
    but its forward makes another, in which windows and full attention don't bound a picture."""
    module = modeling_gemma4_unified
    masks = module.create_masks_for_vision_model
    return mock.patch.object(module, "create_masks_for_generate", masks)


def check(answered: dict[str, Any], expected: dict[str, Any], within: float) -> None:
    tokens, log_probabilities = answered["answer"]
    assert answered["prompt"] == expected["prompt"]
    assert tokens == expected["answer"][0]
    assert log_probabilities == pytest.approx(expected["answer"][1], abs=within)


def test_every_wrapper_that_is_served_is_here() -> None:
    assert set(LANGUAGE_MODELS) == {c.model for c in CASES.values()}
    assert set(SEE_EACH_OTHER) <= {c.model for c in WITHOUT_TOWERS.values()}
    assert set(CASES) >= QUICK


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_answers_about_pictures(name: str, found: Any, expected: dict[str, Any]) -> None:
    """Those of the single-process model, in a chat too, and out of vLLM's caches of prompts."""
    within = CASES[name].within
    for rank in of_case(found, name):
        for request, answered in rank["answers"].items():
            check(answered, expected[name][request], within)
        for request, answered in rank["again"].items():
            check(answered, expected[name][request], within)
        check(rank["chat"], expected[name]["seeing"], within)
        assert rank["again"]["long"]["cached"] > 0
        answers = [tuple(rank["answers"][n]["answer"][0]) for n in ("seeing", "another picture")]
        assert len(set(answers)) == 2  # what is seen counts


@pytest.mark.parametrize("name", quick(["qwen3_vl", "compiled, qwen3_vl"], QUICK))
def test_what_joins_after_the_first_layers_counts(
    name: str, found: Any, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel"
    monkeypatch.setattr(f"{model}._deepstack_process", lambda _, stream_BSD, *__: stream_BSD)
    without = answers_by_transformers(CASES[name].model, paths[name])
    for rank in of_case(found, name):
        check(rank["answers"]["text"], without["text"], CASES[name].within)
        for request in ("seeing", "another picture", "two", "long"):
            with pytest.raises(AssertionError):
                check(rank["answers"][request], without[request], CASES[name].within)


@pytest.mark.parametrize(
    "name", quick([*SEE_EACH_OTHER, *(f"compiled, {n}" for n in SEE_EACH_OTHER)], QUICK)
)
def test_a_pictures_tokens_see_each_other(name: str, found: Any, paths: dict[str, Path]) -> None:
    one_way = answers_by_transformers(CASES[name].model, paths[name], TOKEN_TYPES)
    for rank in of_case(found, name):
        check(rank["answers"]["text"], one_way["text"], CASES[name].within)
        for request in ("seeing", "another picture", "two", "long"):
            with pytest.raises(AssertionError):
                check(rank["answers"][request], one_way[request], CASES[name].within)


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_all_reduces_are_the_language_models(name: str, found: Any, paths: dict[str, Path]) -> None:
    """As scheduled, and none for pictures: of two requests the second has one, whose tower runs
    before its first pass, and so within the first request's last."""
    ranks = [rank["passes"] for rank in of_case(found, name)]
    shape, schedule, new = shape_of(paths[name]), schedule_of(paths[name]), pictured.NEW_TOKENS
    for start in (0, new):
        passes = [rank[start : start + new] for rank in ranks]
        checks = count_checks(passes, schedule, shape, new)
        assert all(check.ok for check in checks), checks
        wrong = count_checks(passes, dense_schedule(shape.layers), shape, new)
        assert not all(check.ok for check in wrong)
    assert ranks[0][new]["tokens"] > ranks[0][0]["tokens"]
    assert {len(rank) for rank in ranks} == {2 * new}
    before, beside = ([len(rank[n]["collectives"]) for rank in ranks] for n in (new - 2, new - 1))
    assert (before == beside) == ("mm_encoder_tp_mode" not in CASES[name].arguments)


@pytest.mark.parametrize("name", quick(WITHOUT_TOWERS, QUICK))
def test_texts_without_the_tower(name: str, found: Any, blind: dict[str, Path]) -> None:
    ranks, path = of_case(found, name), blind[name]
    reference = served.greedy(path, served.prompts(), NEW_TOKENS)
    for rank in ranks:
        assert served.apart(rank["answers"], reference) <= TOLERANCE
        assert served.apart(rank["again"], reference) <= TOLERANCE
    passes = [rank["passes"] for rank in ranks]
    checks = count_checks(passes, schedule_of(path), shape_of(path), new_tokens=3)
    assert all(check.ok for check in checks), checks


@pytest.mark.slow
def test_verify_runs_the_language_model(paths: dict[str, Path]) -> None:
    """Prompts are texts there, and the tower isn't loaded."""
    code, report = verify(paths["llava"], "--enforce-eager", "--batch", "2", "--dtype", "float32")
    assert code == 0 and report["ok"] and len(report["checks"]) == 5, report


@pytest.mark.slow
def test_server_answers_about_a_picture(
    paths: dict[str, Path], expected: Any, tmp_path: Path
) -> None:
    import openai

    _, (picture, *_) = pictured.requests("llava")["seeing"]
    stream = io.BytesIO()
    picture.save(stream, "png")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    content = [
        {"type": "text", "text": "What is in "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "?"},
    ]
    options = "--mm-processor-kwargs", json.dumps({"backend": "pil"}), "--max-model-len", "256"
    named = under_vllms_name(tmp_path)
    with serving(paths["llava"], named, tmp_path / "log", *options) as server:
        client = openai.OpenAI(base_url=server, api_key="none", max_retries=10)
        said = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=pictured.NEW_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    tokens, _ = expected["llava"]["seeing"]["answer"]
    assert said.choices[0].token_ids == tokens
    assert said.usage.prompt_tokens == len(expected["llava"]["seeing"]["prompt"])
