"""A converted checkpoint's tokenizer is its source's: the class, the ids, everything said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seeing
from conftest import WITHOUT_PTCONVERT, MakeDense, spec_text
from forking import Run
from lm_eval.models.huggingface import HFLM
from tokenizing import CLASSES, TEXTS, facts, put, trained
from transformers import AutoTokenizer

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.modeling.config import CONFIGS
from ptconvert.models.families import FAMILIES
from ptconvert.models.wrappers import WRAPPERS
from ptconvert.spec.document import parse_spec

REMOTE = (
    WITHOUT_PTCONVERT
    + """import functools, json
from pathlib import Path
from transformers import AutoTokenizer, dynamic_module_utils
# parsed anew each time it is opened, which takes ten times as long as all else
dynamic_module_utils.get_imports = functools.cache(dynamic_module_utils.get_imports)
from tokenizing import CLASSES, facts, put, trained
bpe, found = trained(), {}
for converted in map(Path, sys.argv[2:]):
    for name in CLASSES:
        put(converted, bpe, name)
        tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
        found[f"{converted.parent.name} {name}"] = facts(tokenizer)
Path(sys.argv[1]).write_text(json.dumps(found))
"""
)
SPEC = parse_spec(spec_text(2, "use: parallel_track, depth: 2"), "s")


@pytest.fixture(scope="module")
def pairs(
    make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Source and converted checkpoint of every family."""
    found = {}
    sources = {n: make_dense(n, vocab_size=340) for n, f in FAMILIES.items() if f.causal_lm}
    sources |= {n: seeing.save(n, tmp_path_factory.mktemp(n), vocab_size=340) for n in WRAPPERS}
    for name, source in sources.items():
        converted = tmp_path_factory.mktemp("converted") / name / "model"
        converted.parent.mkdir()
        execute(plan_conversion(open_checkpoint(source), SPEC, source_name="x"), converted)
        found[name] = source, converted
    return found


def test_every_family_is_here() -> None:
    known = {f"ptconvert_{name}" for name in (*FAMILIES, *WRAPPERS)}
    assert known == {c.model_type for c in CONFIGS.values()}


def test_classes_differ() -> None:
    """Control: the ids depend on the class, so that a wrong one is seen."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    bpe = trained()
    as_it_is = PreTrainedTokenizerFast(tokenizer_object=bpe)
    vocabulary, merges = bpe.get_vocab(), json.loads(bpe.to_str())["model"]["merges"]
    qwen = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(m) for m in merges])
    assert [as_it_is.encode(t) for t in TEXTS] != [qwen.encode(t) for t in TEXTS]


@pytest.mark.slow
def test_with_ptconvert_imported(pairs: dict[str, tuple[Path, Path]]) -> None:
    bpe = trained()
    for source, converted in pairs.values():
        for name in CLASSES:
            for path in (source, converted):
                put(path, bpe, name)
            expected = facts(AutoTokenizer.from_pretrained(source))
            assert facts(AutoTokenizer.from_pretrained(converted)) == expected, (source, name)


@pytest.mark.slow
def test_by_remote_code(
    pairs: dict[str, tuple[Path, Path]], run_without_ptconvert: Run, tmp_path: Path
) -> None:
    """Where ptconvert isn't installed."""
    told = tmp_path / "found.json"
    paths = [converted for _, converted in pairs.values()]
    done = run_without_ptconvert(REMOTE, told, *paths, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, bpe = json.loads(told.read_text()), trained()
    for family, (source, _) in pairs.items():
        for name in CLASSES:
            put(source, bpe, name)
            expected = facts(AutoTokenizer.from_pretrained(source))
            assert found[f"{family} {name}"] == expected, (family, name)


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "PreTrainedTokenizerFast"), ("mistral", "Qwen2Tokenizer")]
)
def test_in_lm_eval(family: str, name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    """As `lm_eval --model hf` opens it, by its path alone."""
    bpe, found = trained(), []
    for path in pairs[family]:
        put(path, bpe, name)
        lm = HFLM(pretrained=str(path), device="cpu")
        found.append([lm.tok_encode(text) for text in TEXTS])
    assert found[0] == found[1]
