"""Sources as people have them: converted as transformers opens them, or refused with advice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import seeing
import torch
import transformers
from conftest import Convert, MakeDense, byte_level, load, spec_text
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.errors import PTConvertError
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.models.families import FAMILIES
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import is_around
from ptconvert.runtime.load import load_rank
from ptconvert.spec.document import parse_spec

TRACKED = "use: parallel_track, depth: 2"
DENSE = 1, "use: tensor_parallel"  # the source's own function
IDS = torch.tensor([[3, 4, 5, 6, 7]])
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP, BUFFER = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb."
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 497774208\n"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]
Changed = Callable[..., Path]


@pytest.fixture
def changed(make_dense: MakeDense, tmp_path: Path) -> Changed:
    """A copy of a dense checkpoint with changes."""

    def make(*changes: Change, variant: str = "llama", **options: Any) -> Path:
        path = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(make_dense(variant, **options), path)
        for change in changes:
            change(path)
        return path

    return make


def edited(*drop: str, **config: object) -> Change:
    """Changes keys of config.json."""

    def change(path: Path) -> None:
        found = read_json(path / "config.json")
        kept = {key: value for key, value in found.items() if key not in drop}
        (path / "config.json").write_text(json.dumps(kept | config))

    return change


def stored_as(new: Callable[[Tensors], Tensors]) -> Change:
    def change(path: Path) -> None:
        save_file(new(load_file(path / FILE)), path / FILE, {"format": "pt"})

    return change


def renamed(name: Callable[[str], str]) -> Change:
    return stored_as(lambda tensors: {name(n): t for n, t in tensors.items()})


def added(name: str, tensor: torch.Tensor) -> Change:
    return stored_as(lambda tensors: tensors | {name: tensor})


def indexed(change: Callable[[dict[str, str]], object]) -> Change:
    def run(path: Path) -> None:
        index = read_json(path / INDEX)
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return run


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def tensors(path: Path) -> Tensors:
    found: Tensors = {}
    for file in path.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def logits(path: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(path, **options)(IDS).logits
    return found


def back(converted: Path) -> Path:
    destination = converted.with_name(converted.name + "-back")
    execute(plan_to_dense(open_checkpoint(converted)), destination)
    return destination


def refusal(source: Path) -> str:
    """The one line by which a source is refused."""
    spec = parse_spec(spec_text(4, TRACKED), "s")
    with pytest.raises(PTConvertError) as error:
        plan_conversion(open_checkpoint(source), spec, source_name="x")
    assert "\n" not in str(error.value)
    return str(error.value)


def check_converted(source: Path, convert: Convert) -> None:
    """The result computes what transformers does with the source, and the way back is whole."""
    converted = convert(source, *DENSE)
    assert torch.equal(logits(converted), logits(source))
    again = back(convert(source, 4, TRACKED))
    assert read_json(again / "config.json") == read_json(source / "config.json")
    kept = [sorted((str(t.dtype), raw(t)) for t in tensors(p).values()) for p in (again, source)]
    assert kept[0] == kept[1]


OPENED: dict[str, tuple[str, Change]] = {
    "no prefix": ("llama", renamed(lambda n: n.removeprefix("model."))),
    "prefix twice": ("llama", renamed(lambda n: "model." + n)),
    "only a tied lm_head": ("llama3-rope-tied", renamed(lambda n: n.replace(EMBEDDING, HEAD))),
    "inv_freq of the model": ("llama", added("model.rotary_emb.inv_freq", torch.ones(2))),
    "inv_freq without prefix": ("llama", added("rotary_emb.inv_freq", torch.ones(2))),
    "cos_cached": ("llama", added(BUFFER + "cos_cached", torch.ones(1, 1, 8, 4))),
    "sin_cached": ("llama", added(BUFFER + "sin_cached", torch.ones(1, 1, 8, 4))),
    "no experts": ("llama", edited(num_local_experts=None, num_experts=0)),
    "dtype's short name": ("llama", edited("dtype", torch_dtype="float")),
    "two dtypes": ("llama", edited(torch_dtype="float16", dtype="float32")),
    "the first Llamas' class": ("llama", edited(architectures=["LLaMAForCausalLM"])),
    "saved without lm_head": (
        "qwen2-two-kv-tied",
        lambda path: transformers.AutoModel.from_pretrained(path).save_pretrained(path),
    ),
    "code of the config": ("llama", edited(auto_map={"AutoConfig": "configuration_x.X"})),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_transformers_opens_is_converted(
    name: str, changed: Changed, convert: Convert
) -> None:
    variant, change = OPENED[name]
    check_converted(changed(change, variant=variant), convert)


def test_the_class_default_of_kv_heads(changed: Changed, convert: Convert) -> None:
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
    check_converted(changed(edited("num_key_value_heads"), variant="mistral", **sizes), convert)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("given", ["missing", "null"])
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str, given: str, key: str) -> None:
    """Its model's own projections say what it makes of a key that is missing or null."""
    config: dict[str, Any] = {
        **{"model_type": family, "hidden_size": 128, "intermediate_size": 8, "vocab_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 16},
        **{"head_dim": 2, "pad_token_id": 0},
        **dict.fromkeys(FAMILIES[family].refused.keys() & FAMILIES[family].defaults, 0),
    }
    del config[key]
    if given == "null":
        config[key] = None
    arguments = {k: v for k, v in config.items() if k != "model_type"}
    if not FAMILIES[family].causal_lm:  # it is found in another
        config = {"model_type": "qwen3_vl", "text_config": config}
    try:
        alone = transformers.AutoConfig.for_model(family, **arguments)
        with torch.device("meta"):
            if FAMILIES[family].causal_lm:
                model = transformers.AutoModelForCausalLM.from_config(alone)
            else:
                whole = seeing.CONFIGS["qwen3_vl"]()
                whole.text_config = alone
                model = transformers.AutoModelForImageTextToText.from_config(whole)
    except (TypeError, StrictDataclassError):
        with pytest.raises(PTConvertError, match=f"{key} is "):
            ModelShape.from_config(config)
        return
    shape = ModelShape.from_config(config)
    own = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not is_around(name, shape.model_type)
    }
    assert own == dict(shape.tensors()) | ({HEAD: (8, 128)} if shape.tied else {})


def with_duplicate(difference: float) -> Change:
    def change(path: Path) -> None:
        files = read_json(path / INDEX)["weight_map"]
        other = next(file for file in files.values() if file != files[UP])
        copy = load_file(path / files[UP])[UP] + difference
        save_file(load_file(path / other) | {UP: copy}, path / other, {"format": "pt"})

    return change


def renamed_files(weight_map: dict[str, str]) -> None:
    weight_map.update({name: f"./{file}" for name, file in weight_map.items()})


def moved(weight_map: dict[str, str]) -> None:
    weight_map[UP] = next(file for file in weight_map.values() if file != weight_map[UP])


@pytest.mark.parametrize(
    "change",
    [
        indexed(renamed_files),
        indexed(moved),
        indexed(lambda weight_map: weight_map.pop(UP)),
        indexed(lambda weight_map: weight_map.update({"gone": weight_map[UP]})),
        with_duplicate(0.0),
    ],
)
def test_an_index_says_which_files_there_are(
    change: Change, changed: Changed, convert: Convert
) -> None:
    source = changed(change, max_shard_size="30KB")
    assert torch.equal(logits(convert(source, *DENSE)), logits(source))


def test_a_tensor_in_two_files_that_differ(changed: Changed) -> None:
    said = refusal(changed(with_duplicate(1.0), max_shard_size="30KB"))
    assert f"{UP} lies in model-0" in said and "the two differ; keep the one" in said


def norms_in_fp32(found: Tensors) -> Tensors:
    return {n: t.float() * 1.001 if "norm" in n else t for n, t in found.items()}


def test_each_tensor_keeps_its_dtype(changed: Changed, convert: Convert) -> None:
    source = changed(stored_as(norms_in_fp32), dtype=torch.bfloat16)
    check_converted(source, convert)
    for name, tensor in tensors(convert(source, 4, TRACKED)).items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    # transformers casts to config.json's dtype on load, and so do ranks.
    converted = convert(source, *DENSE)
    rank = load_rank(converted, Placement(0, 1), OneProcess())
    assert {p.dtype for p in rank.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = rank(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, logits(source, dtype="auto", attn_implementation="sdpa"))


def test_config_names_another_dtype_than_the_tensors(changed: Changed, convert: Convert) -> None:
    source = changed(edited(dtype="float32"), dtype=torch.bfloat16)
    check_converted(source, convert)
    converted = convert(source, *DENSE)
    assert load(converted, dtype="auto").dtype == torch.float32
    assert load_rank(converted, Placement(0, 1), OneProcess()).dtype == torch.float32


def test_config_names_no_dtype(changed: Changed, convert: Convert) -> None:
    """Where only an old buffer is of another dtype, the weights' decides; else nothing does."""
    old = changed(edited("dtype"), added(BUFFER + "inv_freq", torch.ones(2)), dtype=torch.bfloat16)
    check_converted(old, convert)
    opened = [load(p, dtype="auto").dtype for p in (old, convert(old, 4, TRACKED))]
    assert opened == [torch.bfloat16] * 2
    said = refusal(changed(edited("dtype"), stored_as(norms_in_fp32), dtype=torch.bfloat16))
    assert "no dtype" in said and "BF16" in said and "F32" in said and '"dtype": "bfloat16"' in said


PREFIXES = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "peft",
    "language_model.": "a multimodal",
    "_forward_module.": "Lightning",
    "student.": "",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_that_transformers_does_not_know(prefix: str, changed: Changed) -> None:
    source = changed(renamed(lambda name: prefix + name))
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert len(loading["missing_keys"]) == len(tensors(source))
    said = refusal(source)
    assert f"{prefix}{EMBEDDING} is there, but not {EMBEDDING}: the names begin with " in said
    assert f"{prefix}, which {PREFIXES[prefix]}" in said or not PREFIXES[prefix]
    assert "rename them without it" in said


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        ("layers.0.", "layers.0._orig_mod.", "have _orig_mod., which torch.compile leaves"),
        ("mlp.", "_checkpoint_wrapped_module.mlp.", "have _checkpoint_wrapped_module., which act"),
        ("model.", "_orig_mod.module.model.", "begin with _orig_mod.module., which torch.compile "),
    ],
)
def test_wrappers_names_anywhere(was: str, becomes: str, says: str, changed: Changed) -> None:
    said = refusal(changed(renamed(lambda name: name.replace(was, becomes, 1))))
    assert says in said and becomes in said and "\n" not in said


def test_a_prefix_inside_of_transformers_own(changed: Changed) -> None:
    source = changed(renamed(lambda name: name.replace("model.", "model.language_model.", 1)))
    assert "the names have language_model., which a multimodal model leaves" in refusal(source)


def as_pointer(name: str) -> Change:
    return lambda path: (path / name).write_text(POINTER)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git(name: str, changed: Changed) -> None:
    said = refusal(changed(as_pointer(name)))
    assert f"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`" in said
    assert f"{INDEX} is a Git LFS" in refusal(changed(as_pointer(INDEX), max_shard_size="30KB"))


without_head = stored_as(lambda t: {n: x for n, x in t.items() if n != HEAD})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (added("v_head.weight", torch.ones(1, 32)), "v_head.weight is not a tensor of llama"),
        (added("lm_head.bias", torch.ones(96)), "save_pretrained it, and convert that"),
        (edited("dtype", torch_dtype="torch.bfloat16"), "torch_dtype is 'torch.bfloat16'; the"),
        (edited(num_local_experts=8), "with experts"),
        (edited(tie_word_embeddings=None), "tie_word_embeddings is None; it must be true or fal"),
        (
            stored_as(lambda t: t | {EMBEDDING[6:]: t[EMBEDDING] + 1}),
            "are the same tensor of",
        ),
        (without_head, f'{HEAD} is missing; if it is the embedding, write "tie_word_embeddings"'),
    ],
)
def test_what_is_refused_is_told_what_to_do(change: Change, says: str, changed: Changed) -> None:
    assert says in refusal(changed(change))


def test_adapters_are_merged_first(changed: Changed, convert: Convert, tmp_path: Path) -> None:
    """transformers opens a directory with its adapter; converted without it, it would differ."""
    source = changed()
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted: Any = peft.get_peft_model(load(source), settings)
    adapted.peft_config["default"].base_model_name_or_path = str(source)
    adapted.save_pretrained(tmp_path / "adapter")
    alone = f"is an adapter (LORA of {source}), not a model; merge it"
    assert alone in refusal(tmp_path / "adapter")
    shutil.copy(source / "config.json", tmp_path / "adapter")
    assert alone in refusal(tmp_path / "adapter")
    plain = logits(source)
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype="auto")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    converted = convert(tmp_path / "merged", *DENSE)
    adapted.save_pretrained(source)
    beside = refusal(source)
    assert "has an adapter (adapter_config.json) beside its weights" in beside and "merge" in beside
    assert not torch.allclose(logits(source), plain, atol=1e-3)
    assert torch.allclose(logits(converted), logits(source), atol=1e-4)


CODE = {
    "tokenization_tiny.py": "from .base_tiny import Base\n\nclass TinyTokenizer(Base):\n    pass\n",
    "base_tiny.py": "from transformers import PreTrainedTokenizerFast as Base\n",
}


@pytest.mark.parametrize("listed", [False, True])
def test_a_tokenizer_with_code_of_its_own(
    listed: bool,
    make_dense: MakeDense,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = byte_level(make_dense, tmp_path / "tiny")
    code = [None, "tokenization_tiny.TinyTokenizer"]
    changes = {"auto_map": code if listed else {"AutoTokenizer": code}}
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(read_json(file) | changes | {"tokenizer_class": "TinyTokenizer"}))
    for name, text in {**CODE, "train.py": "raise SystemExit\n"}.items():
        (source / name).write_text(text)
    converted = convert(source, 4, TRACKED)
    assert {p.name for p in converted.glob("*.py")} == {*CODE, "modeling_ptconvert.py"}
    assert (converted / file.name).read_bytes() == file.read_bytes()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    for path in (source, converted, back(converted)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        assert type(tokenizer).__name__ == "TinyTokenizer"
        assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"


def test_which_small_files_go_along(changed: Changed, convert: Convert) -> None:
    along = ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "NOTICE"]
    along += ["added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"]
    others = ["params.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json"]
    others += ["consolidated.safetensors", "train.py", "optimizer.pt"]
    source = changed(*(lambda p, name=name: (p / name).write_text(name) for name in along + others))
    for path in (converted := convert(source, 4, TRACKED), back(converted)):
        assert all((path / name).read_text() == name for name in along)
        assert not any((path / name).exists() for name in others)
