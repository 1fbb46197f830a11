"""A trained 12-layer model: the loss on its dev split under the schedules of its README."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import FIXTURE, Convert, load
from transformers import AutoTokenizer

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.writer import same_bytes
from ptconvert.transform import execute, plan_to_dense

pytestmark = pytest.mark.skipif(
    not FIXTURE.is_dir(), reason="shared/fixtures/stdlib-llama is not beside this checkout"
)
WINDOWS, LENGTH = 24, 256


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """The README's protocol: WINDOWS windows of LENGTH + 1 tokens, evenly over the dev files."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "model")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    ids: list[int] = []
    for name in json.loads((FIXTURE / "splits.json").read_text())["dev"]:
        text = (stdlib / name).read_text(encoding="utf-8")
        ids += [0, *tokenizer.backend_tokenizer.encode(text).ids]
    step = (len(ids) - LENGTH - 1) // WINDOWS
    return torch.tensor([ids[i * step : i * step + LENGTH + 1] for i in range(WINDOWS)])


@torch.no_grad()
def dev_loss(path: Path, windows: torch.Tensor) -> float:
    """Mean loss in nats per token, in fp32."""
    torch.set_num_threads(2)
    model = load(path, attn_implementation="sdpa")
    total = 0.0
    for batch in torch.split(windows, 6):
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        total += float(loss) * len(batch) / WINDOWS
    torch.set_num_threads(1)
    return total


def layers(first: int, use: str) -> str:
    rest = f"  - {{layers: {first}-11, use: {use}}}\n"
    return f"  - {{layers: 0-{first - 1}, use: tensor_parallel}}\n{rest}" if first else rest


@pytest.mark.parametrize(
    ("first", "use", "two", "four"),
    [
        (0, "tensor_parallel", 2.7025, 2.7025),
        (0, "ladder", 4.6996, 4.6996),
        (1, "ladder", 3.4633, 3.4633),
        (6, "ladder", 2.7220, 2.7220),
        (1, "parallel_block", 2.7807, 2.7807),
        (2, "layer_parallel", 2.7345, 2.7345),
        (1, "sync_point_drop", 2.7291, 2.7494),
        (1, "delayed, delay: 2", 2.7586, 2.8069),
        (0, "parallel_track, depth: 4", 3.8716, 5.8716),
        (1, "parallel_track, depth: 2", 2.7663, 2.8142),
        (1, "parallel_track, depth: 4", 2.8499, 2.9826),
        (1, "parallel_track, depth: 2, overlap: 1", 2.7826, 2.8534),
    ],
)
def test_dev_loss_agrees_with_the_readme(
    first: int, use: str, two: float, four: float, windows: torch.Tensor, convert: Convert
) -> None:
    for tracks, expected in ((2, two), (4, four)):
        converted = convert(FIXTURE / "model", tracks, layers(first, use))
        assert dev_loss(converted, windows) == pytest.approx(expected, abs=1e-4)


def test_round_trip_bit_for_bit(convert: Convert, tmp_path: Path) -> None:
    converted = convert(FIXTURE / "model", 4, layers(0, "parallel_track, depth: 4"))
    execute(plan_to_dense(open_checkpoint(converted)), tmp_path / "back")
    a, b = open_checkpoint(FIXTURE / "model"), open_checkpoint(tmp_path / "back")
    assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
    assert all(same_bytes(a.tensors[name], b.tensors[name]) for name in a.tensors)
