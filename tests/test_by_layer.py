"""What verify holds where: each device its ranks, and then the single-process model by layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, load
from test_modeling import SCHEDULES, TOLERANCE, left_padded

from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.config import converted_config
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.layout import dense_tensors
from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint
from ptconvert.errors import CheckpointError
from ptconvert.heal.blockwise import Pieces
from ptconvert.measure.opening import open_model
from ptconvert.modeling.executor import OneProcess
from ptconvert.modeling.layers import Placement
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.by_layer import by_layer_bytes, opened_by_layer
from ptconvert.runtime.load import load_rank, open_dequantised
from ptconvert.spec.document import read_spec
from ptconvert.verify.run import Settings, check_ranks, needed_bytes

SPECS = Path(__file__).parents[1] / "specs"
GB = 10**9


@pytest.fixture(scope="module")
def llama_70b() -> Checkpoint:
    """A converted checkpoint of Llama-3.1-70B's sizes in bf16, of which there are no bytes."""
    config = read_config(SPECS / "configs" / "llama-3.1-70b.json")
    shape, spec = ModelShape.from_config(config), read_spec(SPECS / "llama-3.1-70b-aggressive.yaml")
    schedule = spec.schedule()
    entries = {}
    for tensor in dense_tensors(shape, schedule, spec.tracks):
        for part in tensor.parts:
            size = tensor.part_shape(part)
            nbytes = 2 * math.prod(size)
            entries[part.name] = TensorEntry(part.name, Path("none"), "BF16", size, 0, nbytes)
    converted = converted_config(config, spec, schedule, "70B", Calibration(), {})
    return Checkpoint(Path("none"), converted, entries)


def test_70b_on_eight_gpus_of_80_gb(llama_70b: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are 141 GB, which no single one of them holds."""
    assert llama_70b.nbytes > 141 * GB
    needed = needed_bytes(llama_70b, 8, 8, torch.bfloat16)
    assert all(17.5 * GB < one < 24 * GB for one in needed)
    settings = Settings(ranks=8, device="cuda")
    monkeypatch.setattr("ptconvert.verify.run.available_bytes", lambda _: [79 * GB] * 8)
    check_ranks(llama_70b, settings, torch.bfloat16)
    # plenty in all, too little on one
    monkeypatch.setattr(
        "ptconvert.verify.run.available_bytes", lambda _: [79 * GB] * 5 + [9 * GB] * 3
    )
    with pytest.raises(CheckpointError, match=r"memory on GPU 5, 9\.0 GB are available"):
        check_ranks(llama_70b, settings, torch.bfloat16)
    # all ranks in turn on two, or on this machine
    assert needed_bytes(llama_70b, 8, 2, torch.bfloat16)[1] == sum(needed[1::2])
    assert needed_bytes(llama_70b, 8, 1, torch.float32)[0] > 280 * GB


def test_the_single_process_model_takes_a_layer_and_what_is_outside(llama_70b: Checkpoint) -> None:
    """Two vocabularies of 2.1 GB, and a layer of 1.7 GB with its tracks' norms."""
    assert 5.9 * GB < by_layer_bytes(llama_70b) < 6.1 * GB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["llama-biases", "llama3-rope-tied", "gpt_oss", "gemma2"])
def test_by_layer_is_the_model(
    variant: str, dtype: torch.dtype, make_dense: MakeDense, convert: Convert
) -> None:
    """What is computed beside weights is in that dtype, too, whichever is stored: Gemma's factor
    of embeddings is the root of 32 here, which bf16 rounds."""
    path = convert(make_dense(variant, torch.bfloat16), 4, SCHEDULES["mixed"])
    ids_BS, _ = left_padded()
    model = opened_by_layer(path, dtype, "cpu")
    with torch.inference_mode():
        found = model(ids_BS).logits
        assert all(p.is_meta for p in model.model.layers.parameters())
        attention = model.config._attn_implementation
        expected = load(path, dtype=dtype, attn_implementation=attention)(ids_BS).logits
        assert torch.equal(found, expected)


OPENED: dict[str, Callable[[Path], Any]] = {
    "to measure": lambda path: open_model(open_checkpoint(path), "float32", "cpu"),
    "by layer": lambda path: opened_by_layer(path, torch.float32, "cpu"),
    "dequantised": lambda path: open_dequantised(open_checkpoint(path), torch.float32),
    "a rank": lambda path: load_rank(path, Placement(), OneProcess(), torch.float32),
}


@pytest.mark.parametrize("how", OPENED)
def test_attention_caps_its_scores(how: str, make_dense: MakeDense, convert: Convert) -> None:
    """As config.json says, whatever attention transformers would choose (5.19: one without)."""
    path = convert(make_dense("gemma2", attn_logit_softcapping=2.0), 4, SCHEDULES["mixed"])
    ids_BS, _ = left_padded()
    with torch.inference_mode():
        expected = load(path)(ids_BS).logits
        without = load(path, attn_logit_softcapping=None)(ids_BS).logits
        found = OPENED[how](path)(ids_BS).logits
    assert (found - expected).abs().max() < TOLERANCE
    assert (found - without).abs().max() > 20 * TOLERANCE


def test_blocks_learn_with_it(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("gemma2"), 4, SCHEDULES["mixed"])
    pieces = Pieces(open_checkpoint(path), torch.float32, "cpu")
    assert pieces.model.config._attn_implementation == "eager"


def test_the_needed_bytes_are_of_what_is_read(make_dense: MakeDense, convert: Convert) -> None:
    checkpoint = open_checkpoint(convert(make_dense("llama"), 2, SCHEDULES["track-4"]))
    outside = 4 * (2 * 96 * 32 + 32)
    layer = sum(e.nbytes for n, e in checkpoint.tensors.items() if n.startswith("model.layers.0."))
    assert by_layer_bytes(checkpoint) == outside + layer
