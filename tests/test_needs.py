"""What --dry-run says of memory and time: the arithmetic at real sizes, and the commands."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Convert, MakeDense, byte_level, load, spec_text
from test_cli import run
from torch import nn

import ptconvert
from ptconvert.calibrate import affinity, on_disk
from ptconvert.calibrate import needs as calibrating
from ptconvert.calibrate.needs import calibration_needs
from ptconvert.calibrate.stand_ins import StandIns, assigned_for
from ptconvert.checkpoint.calibration import Calibration
from ptconvert.checkpoint.config import converted_config
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.layout import dense_tensors
from ptconvert.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint
from ptconvert.convert.transform import plan_conversion
from ptconvert.heal import needs as healing
from ptconvert.heal.data import Data
from ptconvert.heal.needs import heal_needs
from ptconvert.heal.settings import Settings
from ptconvert.measure import dtype as dtypes
from ptconvert.measure import one_layer as one_layer_module
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.needs import Held, Needs, Phase, Place
from ptconvert.measure.one_layer import Step, forward_seconds, one_layer, step_of
from ptconvert.measure.windows import Windows
from ptconvert.models.shape import ModelShape
from ptconvert.plan import needs as planning
from ptconvert.plan.case import Case
from ptconvert.plan.needs import plan_needs
from ptconvert.plan.planner import waited_for
from ptconvert.runtime.load import shape_of
from ptconvert.spec.document import Spec, parse_spec

TEXT = Path(ptconvert.__file__).parent / "spec" / "document.py"
CONFIGS = Path(__file__).parents[1] / "specs" / "configs"
GB = 10**9
NUMBERS = 8_030_261_248
TRACKS = 8
TEXT_8B = spec_text(TRACKS, "").replace("0-5, ", "0-31, use: parallel_track, depth: 2")
STEP = Step(0.5, 1.5, 900 * 10**6, 100 * 10**6)  # what a window of 1,024 tokens may take


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture
def dense(tmp_path: Path) -> Checkpoint:
    """Llama-3.1-8B in bf16, of which there are no bytes."""
    return without_bytes("llama-3.1-8b", tmp_path)


def without_bytes(name: str, path: Path) -> Checkpoint:
    """A model of `specs/configs` in bf16, of which there are no bytes."""
    config = read_config(CONFIGS / f"{name}.json")
    (path / "config.json").write_text(json.dumps(config))
    entries = {
        tensor: TensorEntry(tensor, path / "none", "BF16", size, 0, 2 * math.prod(size))
        for tensor, size in ModelShape.from_config(config).tensors()
    }
    return Checkpoint(path, config, entries)


def spec_of(text: str) -> Spec:
    return parse_spec(text, "spec.yaml")


@pytest.fixture
def converted(dense: Checkpoint) -> Checkpoint:
    """Its conversion by TEXT_8B."""
    return as_tracks(dense, TEXT_8B)


def as_tracks(dense: Checkpoint, text: str) -> Checkpoint:
    """A conversion by such a spec, of which there are no bytes either."""
    spec = spec_of(text)
    entries = {}
    for tensor in dense_tensors(ModelShape.from_config(dense.config), spec.schedule(), TRACKS):
        for part in tensor.parts:
            size = tensor.part_shape(part)
            file = dense.path / "none"
            entries[part.name] = TensorEntry(part.name, file, "BF16", size, 0, 2 * math.prod(size))
    config = converted_config(dict(dense.config), spec, spec.schedule(), "8B", Calibration(), {})
    return Checkpoint(dense.path, config, entries)


@pytest.fixture(autouse=True)
def _fixed_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """At real sizes nothing is timed."""
    if {"dense", "converted", "nothing_timed"} & set(request.fixturenames):
        for module in (planning, calibrating, healing):
            nothing = nn.ModuleDict({"layers": nn.Module()})
            known = {"one_layer": nothing, "step_of": STEP, "head_seconds": 4.0}
            known |= {"forward_seconds": 0.5, "adapt": None}
            for name in known.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, lambda *_, value=known[name]: value)
        monkeypatch.setattr(calibrating, "_fit_seconds", lambda *_: 30.0)


@pytest.fixture
def nothing_timed() -> None:
    """Asks for fixed times without asking for the 8B model."""


def held(needs: Needs, phase: str) -> dict[str, int]:
    (found,) = (p for p in needs.phases if p.name == phase)
    return {h.what: h.nbytes for h in found.held}


def data(windows: int, held_out: int) -> Data:
    ids = torch.zeros(1, 1025, dtype=torch.int64)
    apart = Windows(ids.expand(held_out, -1), 1024, 1024 * held_out)
    return Data(("text",), ids.expand(windows, -1), apart)


# The arithmetic


def test_the_8b_model_is_planned_on_24_gb(dense: Checkpoint) -> None:
    ids = torch.zeros(1, 1025, dtype=torch.int64).expand(64, -1)
    windows, batch = Windows(ids, 1024, 65536), BatchSize(1, "cuda")
    case = Case(dense, TRACKS, windows, "bfloat16", "cuda", batch)
    shape, found = case.shape, plan_needs(case, waited_for(True), None, None)
    weighing = held(found, "weighing segments")
    norms = 2 * shape.layers * shape.width * (TRACKS - 1)  # which each track has for itself
    assert weighing["weights, as tracks"] == 2 * (NUMBERS + norms)
    assert weighing["streams, 64 windows, 4 layers"] == 5 * 64 * 1024 * 4096 * 2
    peaks = found.peaks()
    assert 17 * GB < peaks["cuda"] < 19 * GB and 3 * GB < peaks["memory"] < 5 * GB
    assert peaks["disk"] == 2 * (NUMBERS + norms)
    source, weighed, measured = (phase.seconds for phase in found.phases)
    layers, heads = 64 * 32 * 0.5, 64 * 4  # of a pass
    assert source == layers
    # each of 32 layers begins with two sublayers, deferred to the next or hidden, and one layer or
    # two side by side; on 4 of 64 windows. Of 64 parts on 4 more. Kept are streams before each 8th.
    begun = [1 - 8 * (layer // 8) / 32 for layer in range(32)]
    screened = sum(begun) * (2 + 2 + 1 + 1) - begun[-1] * (1 + 1 + 1)
    passes = 4 / 64 * screened + 4 / 64 * 2 * sum(begun)
    runs = 4 / 64 * (32 * 6 - 3) + 4 / 64 * 64
    assert weighed == pytest.approx(passes * layers + runs * heads)
    wholes = 8 / 64 * 2 * (16 + 10 * 2) + 56 / 64 * (7 + 3)
    assert measured == pytest.approx(wholes * (layers + heads))
    assert f"{1 + passes + wholes:.0f} forward passes" in found.notes[0]


def test_what_a_plan_of_the_8b_model_weighs_with(dense: Checkpoint) -> None:
    """As much of a text as is fitted on, from the sublayers' inputs only."""
    ids = torch.zeros(1, 1025, dtype=torch.int64).expand(64, -1)
    windows, batch = Windows(ids, 1024, 65536), BatchSize(1, "cuda")
    wanted = {"assignment": "affinity", "guess": 64}
    plain = Case(dense, TRACKS, windows, "bfloat16", "cuda", batch)
    case = replace(plain, in_place=StandIns(wanted, ids[:16], apart=True))
    found, without = (plan_needs(c, waited_for(True), None, None) for c in (case, plain))
    names = [phase.name for phase in found.phases]
    assert names[:3] == ["the source's predictions", "affinity", "guesses"]
    guesses = held(found, "guesses")
    assert guesses["one track's regression"] == 5 * (4096 + 4096) ** 2 * 8
    assert guesses["the tracks' factors"] == 4 * 8 * 64 * 2 * 4096 * 8
    assert guesses["streams, 16 windows"] == (1 + 9) * 16 * 1024 * 4096 * 2
    # 63 sublayers' on 8 tracks, in bf16: of rank 64 from the input, from the partial and back
    weighing = held(found, "weighing segments")
    assert weighing["guesses"] == 63 * 8 * (3 * 64 * 4096 + 4096) * 2
    assert "guesses" not in held(without, "weighing segments")
    # what the source gave is kept meanwhile
    for phase in ("affinity", "guesses"):
        assert {"the source's head", "streams, 64 windows, 4 layers"} <= held(found, phase).keys()
    assert found.peaks()["cuda"] < 24 * GB and found.peaks()["memory"] < 8 * GB
    assert "beside those of the fits" in found.notes[0]
    assert found.notes[0].replace(", beside those of the fits", "") == without.notes[0]


def test_a_parallel_models_units_are_paired_in_every_second_layer(make_dense: MakeDense) -> None:
    """Not all at once, in the arithmetic as in the fit."""
    source = open_checkpoint(make_dense("cohere"))
    given = (2, 8, 24, "float32", "cpu")
    (phase,) = calibrating.stand_in_phases(source, {"assignment": "affinity"}, *given)
    pairs = {h.what: h.nbytes for h in phase.held}["all pairs of a run"]
    schedule = assigned_for(shape_of(source))
    assert [str(stage.ending) for stage in schedule.stages] == [".", "!"] * 3
    heads, neurons = 4, 48
    assert pairs == 4 * (heads + neurons) ** 2


def test_what_a_text_decides_of_the_8b_model(dense: Checkpoint) -> None:
    spec = spec_of(f"{TEXT_8B}assignment: affinity\nguess: {{rank: 64}}\n")
    plan = plan_conversion(dense, spec, source_name="8B")
    found = calibration_needs(plan, spec, 64, 1024, "bfloat16", "cuda")
    guesses = held(found, "guesses")
    assert guesses["one track's regression"] == 5 * (8192 + 4096) ** 2 * 8
    assert guesses["streams, 64 windows"] == (2 * 8 + 1 + 9) * 64 * 1024 * 4096 * 2
    assert found.peaks()["cuda"] < 24 * GB and found.peaks()["memory"] < 5 * GB
    assert held(found, "affinity")["all pairs of a run"] == pytest.approx(4 * 14336**2, rel=0.1)


def test_block_by_block_the_8b_model_is_healed_on_24_gb(
    dense: Checkpoint, converted: Checkpoint
) -> None:
    settings = Settings(blockwise=True, kl=False, batch_size=1, dtype="bfloat16", device="cuda")
    found = heal_needs(converted, dense, data(256, 16), settings)
    layer = (NUMBERS - 2 * 128256 * 4096 - 4096) // 32
    blocks = held(found, "block by block")
    norms = 2 * 4096 * (TRACKS - 1)
    assert blocks["layers 0-1, with AdamW's state"] == 20 * 2 * (layer + norms)
    assert "the teacher's" not in blocks  # whose streams are moved on before
    assert blocks["activations, 1 window"] == 2 * (STEP.kept + STEP.fixed)
    for whose in ("its", "the teacher's"):
        assert blocks[f"{whose} streams, 256 windows"] == 256 * 1024 * 4096 * 2
    assert blocks["blocks, each and all, in fp32"] == 3 * 4 * 32 * (layer + norms)
    assert found.peaks()["cuda"] < 24 * GB
    # 256 windows through 32 layers, forward and back; those held out twice; all past both's layers
    assert found.phases[1].seconds == 256 * 32 * 1.5 + 32 * 32 * 0.5 + 272 * 32 * (0.5 + 0.5)


def test_end_to_end_it_is_not(
    dense: Checkpoint, converted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(batch_size=1, dtype="bfloat16", device="cuda")

    def end_to_end(**options: Any) -> tuple[Needs, dict[str, int]]:
        needs = heal_needs(converted, dense, data(256, 16), replace(settings, **options))
        return needs, held(needs, "end to end")

    needs, whole = end_to_end()
    layers = NUMBERS - 2 * 128256 * 4096 - 4096
    tracks = layers + 32 * 2 * 4096 * (TRACKS - 1)
    moved = next(nbytes for what, nbytes in whole.items() if "trained" in what)
    assert moved == 16 * tracks
    assert whole["weights to train, in fp32"] == 4 * tracks  # in this machine's memory at first
    assert needs.lacking({"cuda": 80 * GB, "memory": 64 * GB}) == ["cuda"]
    # adapters are small, and contiguous tracks are slices of the teacher's matrices
    needs, adapters = end_to_end(lora=64, gradient_checkpointing=True)
    assert adapters["the student's frozen ones"] == 0
    assert adapters["the teacher's weights"] == 2 * NUMBERS
    # each pair of layers: the first attention reads one stream, what follows one for each track
    views = 16 * (1 + 3 * TRACKS)
    kept = views * 1024 * 4096 * 2 + STEP.kept + STEP.fixed
    assert adapters["activations, 1 window"] == kept
    assert not needs.lacking({"cuda": 80 * GB, "memory": 64 * GB})
    # but what was trained block by block before is not
    _, both = end_to_end(lora=64, blockwise=True)
    assert both["the student's frozen ones"] == 2 * tracks
    # the teacher's answers are made before, and then it isn't there: the student's own weights are
    needs, answers = end_to_end(lora=64, top_k=64)
    assert answers["the teacher's weights"] == 0
    assert answers["the student's frozen ones"] == 2 * sum(
        e.count for e in converted.tensors.values()
    )
    made = held(needs, "the teacher's answers")
    assert made["the teacher's weights"] == 2 * NUMBERS
    assert made["answers, 256 windows"] == 256 * 1024 * (64 * (4 + 2) + 4)
    monkeypatch.setenv("WORLD_SIZE", "8")
    _, cut = end_to_end(fsdp=True)
    assert next(nbytes for what, nbytes in cut.items() if "trained" in what) == moved // 8
    # its layers are sharded, and one of each model gathered at a time
    assert cut["the teacher's weights"] == 2 * (NUMBERS - layers + layers // 8 + 2 * layers // 32)
    _, each = end_to_end()
    assert next(nbytes for what, nbytes in each.items() if "trained" in what) == 20 * tracks


def test_the_8b_model_in_32_gb_of_memory(dense: Checkpoint, converted: Checkpoint) -> None:
    """All on the CPU is held at once in one place, in GB: to plan, weights 16.07, the head 1.05,
    streams of 64 windows before 4 layers and the last 2.68, of two more of them 1.07, and at most 2
    of what a layer and its comparisons take. Block by block, measuring, which holds weights, head,
    a process, and at most 3.3 besides, is more than two layers at 16 bytes for each of 218 M
    numbers (6.98), their activations (2.0) and streams (4.57). End to end all layers are trained,
    16 x 6.98 beside the source's weights."""
    ids = torch.zeros(1, 1025, dtype=torch.int64).expand(64, -1)
    windows, batch = Windows(ids, 1024, 65536), BatchSize(1, "cpu")
    case = Case(dense, TRACKS, windows, "bfloat16", "cpu", batch)
    planned = plan_needs(case, waited_for(True), None, None).peaks()
    assert planned.keys() == {"cpu", "disk"} and 20.8 * GB < planned["cpu"] < 22.9 * GB
    given = Settings(batch_size=1, dtype="bfloat16", device="cpu")
    blocks = heal_needs(converted, dense, data(256, 16), replace(given, blockwise=True, kl=False))
    by_phase = {p.name: sum(held(blocks, p.name).values()) for p in blocks.phases}
    disk = held(blocks, "block by block")["blocks, each and all, in fp32"]
    assert 15 * GB < by_phase["block by block"] - disk < 16 * GB
    assert 17.7 * GB < blocks.peaks()["cpu"] == by_phase["measuring on held-out text"] < 21 * GB
    whole = heal_needs(converted, dense, data(256, 16), given).peaks()["cpu"]
    assert whole > 16 * 6.97 * GB + 2 * NUMBERS


@pytest.mark.usefixtures("nothing_timed")
def test_the_70b_model_on_8_gpus_of_80_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """70,553,706,496 numbers, of which 80 layers have 855,654,400 each, and embeddings and head
    1,050,673,152 each. Two layers are trained at 20 bytes a number on one GPU, 34.2 GB. With FSDP
    and adapters a GPU holds an eighth of the student (17.6 GB), and of the teacher's layers, two of
    which are gathered at a time, beside its embeddings and head (24.7). Without adapters an eighth
    of 16 bytes a number is 137 GB. What holds all weights on one GPU, 141 GB, doesn't fit: a plan,
    guesses, and what heal measures with before and after, so that none of it fits as a whole."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    dense = without_bytes("llama-3.1-70b", tmp_path)
    layer, ends, numbers = 855_654_400, 2 * 1_050_673_152 + 8192, 70_553_706_496
    assert sum(entry.count for entry in dense.tensors.values()) == 80 * layer + ends == numbers
    text = TEXT_8B.replace("0-31, ", "0-79, ")
    converted = as_tracks(dense, text)
    given = Settings(batch_size=1, dtype="bfloat16", device="cuda", blockwise=True)

    def of(phase: str, settings: Settings) -> int:
        (found,) = (
            p
            for p in heal_needs(converted, dense, data(256, 16), settings).phases
            if p.name == phase
        )
        return Needs("cuda", (found,)).peaks()["cuda"]

    assert 34.2 * GB < of("block by block", given) < 45 * GB
    norms = 80 * 2 * 8192 * (TRACKS - 1)
    sharded = replace(given, fsdp=True, lora=64, gradient_checkpointing=True, blockwise=False)
    adapters = of("end to end", sharded)
    frozen = 2 * (numbers + norms) // 8
    taught = 2 * (ends + 80 * layer // 8 + 2 * layer)
    assert frozen + taught + 2 * GB < adapters < 80 * GB
    assert of("end to end", replace(sharded, lora=None)) > 137 * GB
    assert of("measuring on held-out text", sharded) > 2 * numbers > 80 * GB
    ids = torch.zeros(1, 1025, dtype=torch.int64).expand(64, -1)
    case = Case(dense, TRACKS, Windows(ids, 1024, 65536), "bfloat16", "cuda", BatchSize(1, "cuda"))
    assert plan_needs(case, waited_for(True), None, None).peaks()["cuda"] > 2 * numbers
    spec = spec_of(f"{text}assignment: affinity\nguess: {{rank: 64}}\n")
    fitted = calibration_needs(
        plan_conversion(dense, spec, source_name="70B"), spec, 64, 1024, "bfloat16", "cuda"
    )
    assert fitted.peaks()["cuda"] > 2 * numbers


def test_adapters_alone_are_timed_where_they_alone_are_trained(
    dense: Checkpoint, converted: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's whole weights, their gradients and activations in fp32 may not fit."""
    timed = list[tuple[int, str]]()

    def layer(_: object, tracks: int, __: str, dtype: str) -> nn.Module:
        timed.append((tracks, dtype))
        return nn.ModuleDict({"layers": nn.Module()})

    monkeypatch.setattr(healing, "one_layer", layer)
    settings = Settings(batch_size=1, dtype="bfloat16", device="cuda", lora=64)
    heal_needs(converted, dense, data(256, 16), settings)
    assert set(timed) == {(1, "bfloat16"), (TRACKS, "bfloat16")}
    judged = replace(settings, blockwise=True, stop_on="gsm8k")
    assert heal_needs(converted, dense, data(256, 16), judged).notes == (
        "scoring gsm8k is not counted",
    )
    assert not heal_needs(converted, dense, data(256, 16), settings).notes
    assert (TRACKS, "float32") in timed


def test_peaks_are_of_what_is_held_at_once() -> None:
    phases = (
        Phase("one", (Held("a", 5, Place.DEVICE), Held("b", 3, Place.MEMORY)), 1.0),
        Phase("two", (Held("c", 4, Place.DEVICE), Held("d", 9, Place.DISK)), 2.0),
    )
    assert Needs("cuda", phases).peaks() == {"cuda": 5, "memory": 3, "disk": 9}
    assert Needs("cpu", phases).peaks() == {"cpu": 8, "disk": 9}
    assert Needs("cpu", phases).lacking({"cpu": 7, "disk": 9}) == ["cpu"]
    assert Needs("cpu", phases).seconds == 3


# What it rests on


def kept_by(model: nn.Module, stream: torch.Tensor, dtype: str) -> int:
    """Bytes that a forward pass keeps for the way back, less the model's parameters."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(inputs_embeds=stream, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "qwen3", "qwen2"])
def test_a_model_keeps_what_its_layers_are_said_to(
    variant: str,
    dtype: str,
    lora: int | None,
    checkpoints: bool,
    make_dense: MakeDense,
    convert: Convert,
) -> None:
    """Of a batch of two windows, as heal trains it."""
    source, own = make_dense(variant), getattr(torch, dtype)
    path = convert(source, 4, "use: parallel_track, depth: 2")
    model = load(path, dtype=own, attn_implementation="sdpa").model.requires_grad_(False)
    layer = one_layer(read_config(source), 4, "cpu", "float32" if lora is None else dtype)
    for one in (model, layer):
        if lora is None:
            one.layers.float().requires_grad_(True)
        else:
            healing.adapt(one, lora)
    step = step_of(layer, dtype, 32)
    assert step.forward > 0 and step.both > 0
    cast = 2 * sum(p.numel() for p in layer.parameters() if p.ndim == 2 and p.requires_grad)
    assert (step.fixed >= cast) == (dtype == "bfloat16")
    if checkpoints:
        model.train().gradient_checkpointing_enable()
    ids = torch.zeros(1, 33, dtype=torch.int64)
    few = Data(("text",), ids.expand(8, -1), Windows(ids.expand(4, -1), 32, 128))
    settings = Settings(batch_size=2, dtype=dtype, lora=lora, gradient_checkpointing=checkpoints)
    needs = heal_needs(open_checkpoint(path), open_checkpoint(source), few, settings)
    said = held(needs, "end to end")["activations, 2 windows"]
    if checkpoints:  # the layer whose turn it is keeps its own on the way back
        said -= 2 * step.kept + step.fixed
    stream = torch.randn(2, 32, 32, dtype=own, requires_grad=True)
    assert said == pytest.approx(kept_by(model, stream, dtype), rel=0.1)


def test_affinities_on_disk_give_the_same_assignment(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_dense("llama")
    shape = ModelShape.from_config(read_config(source))
    schedule = spec_of(spec_text(4, "use: parallel_track, depth: 2")).schedule()
    ids_NT = torch.randint(3, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    mapped, folders, found = on_disk.mapped, list[Path | None](), []

    def seen(folder: Path | None, tensor: torch.Tensor) -> torch.Tensor:
        folders.append(folder)
        return mapped(folder, tensor)

    monkeypatch.setattr(affinity, "mapped", seen)
    for limit in (4 << 30, 0):
        assert not folders
        monkeypatch.setattr(affinity, "MEMORY_BYTES", limit)
        given = load(source), shape, schedule, 4, ids_NT, quiet, tmp_path
        orders, lost = affinity.assignments(*given)
        found.append(({k: (list(o.kv_heads), list(o.neurons)) for k, o in orders.items()}, lost))
    assert set(folders) == {tmp_path}
    assert found[0] == found[1] and not list(tmp_path.iterdir())


def test_float32_is_not_taken_where_it_does_not_fit(
    make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, said = open_checkpoint(make_dense("llama", torch.bfloat16)), list[str]()
    monkeypatch.setattr(
        dtypes, "_product_seconds", lambda _, __, dtype: {"float32": 1.0, "bfloat16": 7.0}[dtype]
    )
    monkeypatch.setattr(dtypes, "free_memory", lambda _: 5 * 10**8)
    assert dtypes.fastest_dtype(stored, "cpu", said.append) == "bfloat16"
    assert said == [
        "computing in bfloat16, which is stored and is 7.0 times slower on cpu than float32: in "
        "that the weights would take 0.6 GB of 0.5"
    ]


# The commands


@pytest.fixture
def source(make_dense: MakeDense, tmp_path: Path) -> Path:
    return byte_level(make_dense, tmp_path / "source")


def commands(source: Path, convert: Convert, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """Each command that has something to work out, without its --dry-run."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"{spec_text(4, 'use: parallel_track, depth: 2')}guess: {{rank: 4}}\n")
    converted, out = convert(source, 4, "use: parallel_track, depth: 2"), tmp_path / "out"
    size = ("--text", TEXT, "--window", 32)
    return {
        "plan": ("plan", source, "--tracks", 4, *size, "--max-syncs", 4, "--cache", out),
        "transform": ("transform", source, out, "--spec", spec),
        "heal": ("heal", converted, out, "--teacher", source, *size, "--blockwise"),
    }


@pytest.mark.parametrize("name", ["plan", "transform", "heal"])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    name: str,
    source: Path,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = commands(source, convert, tmp_path)[name]
    before = sorted(tmp_path.rglob("*"))
    shown, _ = run(*command, "--dry-run")
    assert "at once, at most" in shown and "NOT ENOUGH" not in shown
    assert shown.endswith("Nothing was written (--dry-run).\n")
    told = json.loads(run(*command, "--dry-run", "--json")[0])
    told = told.get("needs", told)
    assert told["fits"] and told["peak"].keys() <= told["free"].keys() == {"cpu", "disk"}
    assert all(phase["seconds"] > 0 and phase["held"] for phase in told["phases"])
    assert told["seconds"] == pytest.approx(sum(phase["seconds"] for phase in told["phases"]))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    assert "NOT ENOUGH on cpu" in run(*command, "--dry-run")[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ("use: tensor_parallel", (), "the schedule changes no layer"),
        ("use: parallel_track, depth: 2", ("--no-kl",), "nothing to do"),
        ("use: parallel_track, depth: 2", ("--batch-size", 4096), "windows to train on are less"),
        ("use: parallel_track, depth: 2", ("--fsdp",), "there is one process"),
    ],
)
def test_what_heal_refuses_its_dry_run_refuses(
    schedule: str,
    options: tuple[object, ...],
    said: str,
    source: Path,
    convert: Convert,
    tmp_path: Path,
) -> None:
    command = ("heal", convert(source, 4, schedule), tmp_path / "out", "--teacher", source)
    _, error = run(*command, "--text", TEXT, "--window", 32, *options, "--dry-run", code=2)
    assert said in error.splitlines()[-1]


def test_blocks_that_change_nothing_take_nothing(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    command = ("heal", convert(source, 4, "use: tensor_parallel"), tmp_path / "out")
    options = ("--teacher", source, "--text", TEXT, "--window", 32, "--train", "all")
    told = json.loads(run(*command, *options, "--blockwise", "--dry-run", "--json")[0])
    names = [phase["name"] for phase in told["phases"]]
    assert names == ["measuring on held-out text", "end to end"]


@pytest.mark.parametrize(
    ("options", "said"), [(("--windows", 3), "at least 5"), (("--window", 4096), "256 positions")]
)
def test_what_calibration_refuses_its_dry_run_refuses(
    options: tuple[object, ...], said: str, source: Path, convert: Convert, tmp_path: Path
) -> None:
    command = commands(source, convert, tmp_path)["transform"]
    assert said in run(*command, *options, "--dry-run", code=2)[1]


KINDS = ["llama", "cohere2", "qwen3_moe", "glm4_moe", "qwen3_next", "gemma4_text", "gemma4-values-apart"]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("variant", KINDS)
def test_what_is_measured_are_layers_of_each_kind(
    variant: str, make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counts as often as the model has it; nothing else has memory."""
    config = read_config(make_dense(variant))
    shape = ModelShape.from_config(config)

    def tensors(index: int) -> dict[str, tuple[int, ...]]:
        return {r.name: shape.share(r, 0, 2) for r in shape.rules_of(index) if not r.common}

    model = one_layer(config, 2, "cpu", "float32")
    for index, share in model.shares.items():
        track = model.layers[index].tracks["0"].state_dict()
        own = {name: tuple(tensor.shape) for name, tensor in track.items()}
        assert own == tensors(index) or len(model.shares) > 1
        kind = shape.kinds[index]
        alike = [i for i in range(shape.layers) if shape.kinds[i] == kind and tensors(i) == own]
        assert share == len(alike) / shape.layers
    assert sum(model.shares.values()) == pytest.approx(1)
    there = {i for i, la in enumerate(model.layers) if not next(la.parameters()).is_meta}
    assert there == set(model.shares) and forward_seconds(model, "float32", 8) > 0
    times = {index: 10.0**number for number, index in enumerate(model.shares)}
    monkeypatch.setattr(one_layer_module, "_forward", lambda _, index, *__: times[index])
    wanted = sum(share * times[index] for index, share in model.shares.items())
    assert forward_seconds(model, "float32", 8) == pytest.approx(wanted)


def test_a_layer_that_does_not_fit_is_one_line(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(planning, "forward_seconds", full)
    _, error = run(*commands(source, convert, tmp_path)["plan"], "--dry-run", code=2)
    assert "error: --dry-run: not even a layer" in error.splitlines()[-1]
