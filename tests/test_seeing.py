"""Vision-language models: converted in their language model, and they see as they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
import transformers
from conftest import WITHOUT_PTCONVERT, Convert, load, randomised, spec_text
from forking import Run
from reference import reference_logits
from safetensors.torch import load_file, save_file
from test_families import check_table
from test_modeling import SCHEDULES, TOLERANCE
from test_transform import back, same, tensors

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import plan_conversion
from ptconvert.errors import CheckpointError, ConfigError
from ptconvert.measure.opening import open_model, section_of
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.modeling.model import MODELS
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import WRAPPERS, by_older_name, language_config
from ptconvert.runtime.load import load_rank
from ptconvert.spec.document import parse_spec

SOURCES: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _sources(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in WRAPPERS:
        SOURCES[name] = seeing.save(name, tmp_path_factory.mktemp(name))


def opened(path: Path, **options: Any) -> Any:
    options = {"dtype": torch.float32, "attn_implementation": "eager", **options}
    return transformers.AutoModelForImageTextToText.from_pretrained(path, **options).eval()


@torch.no_grad()
def logits(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = opened(path)(**inputs).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor, inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference where there is no padding."""
    return float((a - b)[inputs["attention_mask"].bool()].abs().max())


def looking(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return seeing.looking(name, seeing.pictures(seed))


def test_every_wrapper_is_here() -> None:
    assert set(seeing.CONFIGS) == set(WRAPPERS)


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_table_cuts_what_the_classes_do(name: str, tracks: int) -> None:
    """As for the families that are there alone (tests/test_families.py)."""
    whole = seeing.CONFIGS[name]()
    check_table(ModelShape.from_config(whole.to_dict()), whole.text_config, tracks)


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_answers_about_a_picture_as_the_source_does(name: str, convert: Convert) -> None:
    """Under tensor parallelism, and held as one track: logits of two pictures with padding, and the
    tokens of an answer, by the cache."""
    inputs = looking(name)
    source = logits(SOURCES[name], inputs)
    assert apart(source, logits(SOURCES[name], looking(name, 1)), inputs) > 1  # it does see
    chosen = opened(SOURCES[name]).generate(**inputs, max_new_tokens=6, do_sample=False)
    for tracks, use in ((2, "use: tensor_parallel"), (1, "use: parallel_track, depth: 2")):
        path = convert(SOURCES[name], tracks, use)
        assert apart(logits(path, inputs), source, inputs) < TOLERANCE
        answered = opened(path).generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(answered, chosen)
        shape = ModelShape.from_config(read_config(SOURCES[name]))
        assert type(opened(path)) is MODELS[shape.model_type]


@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("name", WRAPPERS)
def test_tracks_see_as_the_literal_reference(name: str, tracks: int, convert: Convert) -> None:
    inputs = looking(name)
    path = convert(SOURCES[name], tracks, SCHEDULES["track-2-rest"])
    schedule = str(section_of(open_checkpoint(path)).schedule)
    dense = opened(SOURCES[name])
    expected = reference_logits(dense, schedule, tracks, inputs["input_ids"], inputs=inputs)
    found = logits(path, inputs)
    assert apart(found, expected, inputs) < TOLERANCE
    assert apart(found, logits(path, looking(name, 1)), inputs) > 1


def test_what_is_seen_between_layers_is_seen_by_all_tracks(
    convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-VL adds what its tower's first layers gave after the first decoder layers."""
    inputs = looking("qwen3_vl")
    path = convert(SOURCES["qwen3_vl"], 2, SCHEDULES["track-2-rest"])
    found = logits(path, inputs)
    text = "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel._deepstack_process"
    monkeypatch.setattr(text, lambda _, hidden, *__: hidden)
    assert apart(logits(path, inputs), found, inputs) > 0.1


@pytest.mark.parametrize("name", WRAPPERS)
def test_ladder_is_the_same_for_any_number_of_tracks(name: str, convert: Convert) -> None:
    inputs = looking(name)
    one, two = (logits(convert(SOURCES[name], n, "use: ladder"), inputs) for n in (1, 2))
    assert apart(one, two, inputs) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma4_unified", "llava", "qwen3_vl"])
def test_names_of_today_go_back_to_those_of_an_older_layout(name: str) -> None:
    published, older = tensors(SOURCES[name]), WRAPPERS[name].older
    todays = seeing.under_todays_names(published)
    assert {by_older_name(n, older) for n in todays} == set(published)
    assert (set(todays) == set(published)) == (not older)


@pytest.mark.parametrize("tracks", [2, 8])
@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_around_comes_along_and_all_comes_back(
    name: str, tracks: int, convert: Convert, tmp_path: Path
) -> None:
    source = seeing.under_todays_names(tensors(SOURCES[name]))
    path = convert(SOURCES[name], tracks, SCHEDULES["track-2-rest"])
    around = {n: t for n, t in source.items() if n.startswith(WRAPPERS[name].around)}
    assert len(around) > (5 if name == "gemma4_unified" else 20)  # which has no tower
    converted = tensors(path)
    assert same(around, {n: converted[n] for n in around})
    assert same(tensors(back(path, tmp_path / "back")), source)
    original, undone = read_config(SOURCES[name]), read_config(tmp_path / "back")
    assert original == undone
    inputs = looking(name)
    assert torch.equal(logits(tmp_path / "back", inputs), logits(SOURCES[name], inputs))


def test_what_makes_pixels_of_pictures_comes_along(convert: Convert) -> None:
    for name, source in SOURCES.items():
        path = convert(source, 2, "use: ladder")
        for file in source.glob("*processor*.json"):
            assert (path / file.name).read_bytes() == file.read_bytes()
        ours, theirs = (
            transformers.AutoImageProcessor.from_pretrained(p, backend="pil")
            for p in (path, source)
        )
        assert type(ours) is type(theirs) and ours.to_dict() == theirs.to_dict(), name
    path = convert(SOURCES["llava"], 2, "use: tensor_parallel")
    asked = {"text": "What is in <image>?", "images": seeing.pictures()[0], "return_tensors": "pt"}
    answers = []
    for each in (SOURCES["llava"], path):
        inputs = transformers.AutoProcessor.from_pretrained(each, backend="pil")(**asked)
        assert int((inputs["input_ids"] == seeing.PICTURE).sum()) == 16
        with torch.no_grad():
            answers.append(opened(each).generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_5", "llava", "gemma4"])
def test_it_opens_without_ptconvert(
    name: str, convert: Convert, run_without_ptconvert: Run, tmp_path: Path
) -> None:
    path, inputs = convert(SOURCES[name], 2, SCHEDULES["track-2-rest"]), looking(name)
    expected = logits(path, inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = f"""{WITHOUT_PTCONVERT}
import torch, transformers
options = dict(trust_remote_code=True, dtype=torch.float32, attn_implementation="eager")
for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
    model = getattr(transformers, auto).from_pretrained({str(path)!r}, **options).eval()
with torch.no_grad():
    logits = model(**torch.load({str(tmp_path / "inputs.pt")!r})).logits
model.save_pretrained({str(tmp_path / "again")!r})
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    done = run_without_ptconvert(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert apart(torch.load(tmp_path / "logits.pt"), expected, inputs) < TOLERANCE
    assert apart(logits(tmp_path / "again", inputs), expected, inputs) < TOLERANCE


def test_as_a_causal_language_model_and_without_lm_head(convert: Convert) -> None:
    for name, source in SOURCES.items():
        path, inputs = convert(source, 2, SCHEDULES["track-2-rest"]), looking(name)
        as_causal_lm = load(path)
        decoder = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
        with torch.no_grad():
            hidden = decoder(**inputs).last_hidden_state
            assert torch.equal(as_causal_lm.lm_head(hidden), as_causal_lm(**inputs).logits), name


def test_the_models_own_tensors_beside_the_language_model(convert: Convert, tmp_path: Path) -> None:
    """Qwen3.5 has a head that predicts further tokens, which transformers leaves out."""
    source = tmp_path / "source"
    seeing.save("qwen3_5", source)
    more = {f"mtp.layers.0.{n}.weight": torch.randn(8, 4, dtype=torch.float32) for n in "ab"}
    file = source / "model.safetensors"
    save_file(load_file(file) | more, file)
    path = convert(source, 2, SCHEDULES["track-2-rest"])
    assert same({n: tensors(path)[n] for n in more}, more)
    open_model(open_checkpoint(path), "float32", "cpu")  # nothing of it is unexpected
    assert same(tensors(back(path, tmp_path / "back")), tensors(source))


def test_experts_within_a_wrapper_that_may_have_others(convert: Convert, tmp_path: Path) -> None:
    """As InternVL 3.5's largest have Qwen3's."""
    config = seeing.CONFIGS["internvl"]().to_dict()
    config["text_config"] = seeing.text_config("qwen3_moe")
    whole = transformers.InternVLConfig.from_dict(config)
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(whole)
    randomised(model, torch.float32).save_pretrained(tmp_path / "source")
    source, inputs = tmp_path / "source", looking("internvl")
    assert any(".experts.0." in name for name in tensors(source))
    path = convert(source, 2, SCHEDULES["track-2-rest"])
    expected = reference_logits(
        opened(source),
        str(section_of(open_checkpoint(path)).schedule),
        2,
        inputs["input_ids"],
        inputs=inputs,
    )
    assert apart(logits(path, inputs), expected, inputs) < TOLERANCE
    opened(path).save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(path))
    assert same(tensors(back(path, tmp_path / "back")), seeing.under_todays_names(tensors(source)))


@pytest.mark.parametrize("name", ["qwen3_5", "llava"])
def test_tied_embeddings(name: str, convert: Convert, tmp_path: Path) -> None:
    """Whether they are says the whole model's config; LLaVA's language model's, too."""
    model = seeing.seeing_model(name)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    assert not any("lm_head" in name for name in tensors(tmp_path / "source"))
    path, inputs = convert(tmp_path / "source", 2, "use: tensor_parallel"), looking(name)
    assert apart(logits(path, inputs), logits(tmp_path / "source", inputs), inputs) < TOLERANCE
    undone = tensors(back(path, tmp_path / "back"))
    assert same(undone, seeing.under_todays_names(tensors(tmp_path / "source")))


def renamed(name: str, path: Path, change: Any) -> Path:
    """A source with its tensors changed."""
    seeing.save(name, path)
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return path


def test_older_towers_have_one_more_level_in_their_names(convert: Convert, tmp_path: Path) -> None:
    def older(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        begins = "vision_tower.", "vision_tower.vision_model."
        return {n.replace(*begins): t for n, t in found.items()}

    source, inputs = renamed("llava", tmp_path / "source", older), looking("llava")
    path = convert(source, 2, SCHEDULES["track-2-rest"])
    assert any(".vision_model." in name for name in tensors(path))
    expected = logits(convert(SOURCES["llava"], 2, SCHEDULES["track-2-rest"]), inputs)
    assert apart(logits(path, inputs), expected, inputs) < TOLERANCE
    with torch.no_grad():
        on_a_rank = load_rank(path, Placement(), OneProcess())(**inputs).logits
    assert apart(on_a_rank, expected, inputs) < TOLERANCE


def test_tensors_of_any_dtype_come_along(convert: Convert, tmp_path: Path) -> None:
    more = {"vision_tower.embeddings.position_ids": torch.arange(17)[None]}
    more["vision_tower.scale"] = torch.ones(4).to(torch.float8_e4m3fn)
    source = renamed("llava", tmp_path / "source", lambda found: found | more)
    path = convert(source, 2, "use: ladder")
    found = tensors(path)
    for name, tensor in more.items():
        kept = found[f"model.{name}"]
        assert kept.dtype == tensor.dtype and torch.equal(kept.float(), tensor.float())


def test_without_its_tower_it_is_refused(convert: Convert, tmp_path: Path) -> None:
    def blind(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: t for n, t in found.items() if "visual" not in n}

    with pytest.raises(CheckpointError, match=r"model\.visual\.\* is missing"):
        convert(renamed("qwen3_5", tmp_path / "source", blind), 2, "use: ladder")


def test_a_tower_that_was_changed_has_no_way_back(convert: Convert, tmp_path: Path) -> None:
    path = convert(SOURCES["qwen3_5"], 2, "use: ladder")
    file = path / "shared.safetensors"
    found = load_file(file)
    found["model.visual.patch_embed.proj.bias"] += 1
    save_file(found, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the source's"):
        back(path, tmp_path / "back")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_sizes_that_a_config_leaves_out(family: str) -> None:
    """As LLaVA 1.5's does: transformers takes its config class's."""
    given = {"model_type": "llava", "text_config": {"model_type": family}}
    shape = ModelShape.from_config(given)
    theirs = transformers.LlavaConfig(**given).text_config
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(theirs)
    sizes = dict(shape.tensors())
    own = {f"model.language_model.{n}": tuple(t.shape) for n, t in model.state_dict().items()}
    assert own == {n: s for n, s in sizes.items() if n != "lm_head.weight"}
    assert language_config(given)["max_position_embeddings"] == theirs.max_position_embeddings


@pytest.mark.parametrize("word", ["whole", "text", "neither"])
def test_who_says_that_llavas_embeddings_are_tied(word: str) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    if word == "whole":
        config["tie_word_embeddings"] = True  # type: ignore[assignment]
    if word == "text":
        config["text_config"]["tie_word_embeddings"] = True  # type: ignore[index]
    theirs = transformers.LlavaConfig(**config).tie_word_embeddings
    assert ModelShape.from_config(config).tied == theirs == (word != "neither")


def test_the_dtype_of_the_whole_counts() -> None:
    text = {"model_type": "llama", "dtype": "float32"}
    for key in ("dtype", "torch_dtype"):
        config = {"model_type": "llava", "text_config": text, key: "bfloat16"}
        assert ModelShape.from_config(config).dtype == "BF16"
    assert ModelShape.from_config({"model_type": "llava", "text_config": text}).dtype == "F32"


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_rank_has_what_is_around_too(name: str, convert: Convert) -> None:
    path = convert(SOURCES[name], 2, SCHEDULES["track-2-rest"])
    model = load_rank(path, Placement(), OneProcess())
    inputs = looking(name)
    with torch.no_grad():
        expected = opened(path, attn_implementation="sdpa")(**inputs).logits
        assert apart(model(**inputs).logits, expected, inputs) < TOLERANCE


def changed(name: str, change: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SOURCES[name] / "config.json").read_text())
    change(config)
    return config


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "llava",
            lambda c: c["text_config"].update(model_type="olmo2"),
            "llava with olmo2 can't be converted: it norms the queries",
        ),
        (
            "llava",
            lambda c: c["text_config"].update(model_type="opt"),
            "llava with model_type 'opt' is not supported; supported are llama, mistral",
        ),
        (
            "llava",
            lambda c: c.update(model_type="idefics3", architectures=None),
            "model_type 'idefics3' is not supported; .*, and around them qwen3_5, qwen3_5_moe",
        ),
        (
            "qwen3_vl",
            lambda c: c.update(c["text_config"], architectures=None),
            "qwen3_vl_text is the language model of another, and transformers has no class for it",
        ),
        ("internvl", lambda c: c.pop("text_config"), "hidden_size is missing|num_hidden_layers is"),
        (
            "qwen3_5",
            lambda c: c.update(architectures=["Qwen3_5ForCausalLM"]),
            "only Qwen3_5ForConditionalGeneration can be converted for qwen3_5",
        ),
        (
            "qwen3_5",
            lambda c: c.update(quantization_config={"quant_method": "hqq"}),
            "what 'hqq' has quantised can't be cut",
        ),
        (
            "qwen3_5",
            lambda c: c["text_config"].update(quantization_config={"quant_method": "hqq"}),
            "what 'hqq' has quantised can't be cut",
        ),
        (
            "qwen3_5",
            lambda c: c["text_config"].update(auto_map={"AutoModel": "x.Y"}),
            "runs its own code",
        ),
        ("llava", lambda c: c.update(model_type="ptconvert_llava"), "section is gone"),
    ],
)
def test_refused_by_name(name: str, change: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ModelShape.from_config(changed(name, change))


def test_a_tensor_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    seeing.save("qwen3_5", source)
    file = source / "model.safetensors"
    save_file(load_file(file) | {"model.audio.weight": torch.zeros(2)}, file)
    spec = parse_spec(spec_text(2, "use: ladder"), "spec.yaml")
    with pytest.raises(CheckpointError, match=r"model\.audio\.weight is not a tensor of qwen3_5"):
        plan_conversion(open_checkpoint(source), spec, source_name="source")
