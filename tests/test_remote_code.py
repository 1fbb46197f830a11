"""Opening a converted checkpoint: with ptconvert imported, and without it by trust_remote_code."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from calibrating import TOP, random_calibration
from conftest import WITHOUT_PTCONVERT, Convert, MakeDense, load, spec_text
from forking import Run, forking

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import check_unchanged, plan_to_dense
from ptconvert.modeling.export import modeling_source
from ptconvert.spec.document import parse_spec

OLD = Path(__file__).parent / "golden" / "checkpoint-0.1.0.zip"
IDS = [[3, 4, 5, 6, 7]]
# Prints the class's module and saves logits.
REMOTE = (
    WITHOUT_PTCONVERT
    + """import torch
from transformers import AutoModelForCausalLM
source, saved, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    source, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager")
ids = torch.tensor([[3, 4, 5, 6, 7]])
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(
    saved, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager")
assert torch.equal(model(ids).logits, again(ids).logits)
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 8)
torch.save(model(ids).logits, logits)
print(type(model).__module__)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
def test_opens_without_ptconvert(
    variant: str,
    make_dense: MakeDense,
    convert: Convert,
    run_without_ptconvert: Run,
    tmp_path: Path,
) -> None:
    source, use = make_dense(variant), "use: parallel_track, depth: 2"
    schedule = parse_spec(spec_text(4, use), "s").schedule()
    calibration = random_calibration(source, schedule, 4)
    converted = convert(source, 4, use, TOP, calibration=calibration)
    arguments = [converted, tmp_path / "saved", tmp_path / "logits.pt"]
    done = run_without_ptconvert(REMOTE, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers_modules" in done.stdout
    with torch.no_grad():
        expected = load(converted)(torch.tensor(IDS)).logits
        for found in (
            torch.load(tmp_path / "logits.pt"),
            load(tmp_path / "saved")(torch.tensor(IDS)).logits,
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_checkpoint_written_by_an_earlier_version_opens_as_it_did(
    run_without_ptconvert: Run, tmp_path: Path
) -> None:
    """Written on 2026-11-28: dense and tracks, overlapped endings, an assignment and guesses."""
    path, logits = tmp_path / "old", tmp_path / "logits.pt"
    shutil.unpack_archive(OLD, path)
    told = json.loads((path / "logits.json").read_text())
    ids, expected = torch.tensor(told["ids"]), torch.tensor(told["logits"])
    with torch.no_grad():
        torch.testing.assert_close(load(path)(ids).logits[0, -1], expected, atol=1e-4, rtol=0)
    arguments = [path, tmp_path / "saved", logits]
    done = run_without_ptconvert(REMOTE, *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(logits)[0, -1], expected, atol=1e-4, rtol=0)
    check_unchanged(plan_to_dense(open_checkpoint(path)))  # its tensors are still its source's


UNDER_TRANSFORMERS = [
    *("torch", "torch._dynamo", "torch.distributed.tensor", "torchao", "scipy.optimize"),
    *("huggingface_hub", "tokenizers", "safetensors.torch", "accelerate"),
]
ORDERS = [
    "import ptconvert; from transformers import AutoModelForCausalLM as Auto",
    "import ptconvert, transformers; Auto = transformers.AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM as Auto; import ptconvert",
    "import transformers.modeling_utils, ptconvert; "
    "from transformers import AutoModelForCausalLM as Auto",
    "import ptconvert; from transformers import AutoConfig; AutoConfig.from_pretrained(path); "
    "from transformers import AutoModelForCausalLM as Auto",
    "import ptconvert; from transformers import LlamaForCausalLM, AutoModelForCausalLM as Auto",
    "import ptconvert.modeling.model; from transformers import AutoModelForCausalLM as Auto",
]


@pytest.fixture(scope="module")
def run_with_torch() -> Iterator[Run]:
    """Runs a script in a process that has what transformers imports, and not itself."""
    with forking(*UNDER_TRANSFORMERS) as run:
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_opens_whatever_is_imported_first(
    order: str, make_dense: MakeDense, convert: Convert, run_with_torch: Run, tmp_path: Path
) -> None:
    path = convert(make_dense("llama"), 4, "use: parallel_track, depth: 2")
    code = (
        "import sys\nassert not {'transformers', 'ptconvert'} & {*sys.modules}\n"
        f"path = {str(path)!r}\n{order}\n"
        "assert type(Auto.from_pretrained(path)).__module__ == 'ptconvert.modeling.model'"
    )
    done = run_with_torch(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_one_file_form_defines_each_name_once() -> None:
    tree = ast.parse(modeling_source())
    kinds = (ast.ClassDef, ast.FunctionDef)
    names = [n.name for n in tree.body if isinstance(n, kinds)]
    names += [
        t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
        if isinstance(t, ast.Name)
    ]  # fmt: skip
    assert len(names) == len(set(names))
    assert "from ptconvert" not in modeling_source()
