"""heal: training towards the source, what it writes, and going on after a kill."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import Convert, MakeDense, byte_level, load, spec_text
from safetensors.torch import load_file, save_file
from test_cli import run

import ptconvert
from ptconvert.checkpoint.reader import Checkpoint, open_checkpoint, same_bytes
from ptconvert.checkpoint.section import Section
from ptconvert.cli import main
from ptconvert.cli.heal import command_line
from ptconvert.errors import HealError
from ptconvert.heal import run as healing
from ptconvert.heal.blockwise import Pieces, blocks_of
from ptconvert.heal.data import Data, _windows, read_data
from ptconvert.heal.distill import Distillation, distill
from ptconvert.heal.loss import compare
from ptconvert.heal.models import changed_layers, freeze_but, share, trainable
from ptconvert.heal.settings import Settings
from ptconvert.measure import divergence
from ptconvert.measure.batch import BatchSize
from ptconvert.measure.opening import open_model, open_tokenizer, section_of
from ptconvert.measure.windows import token_ids
from ptconvert.runtime.launch import _context, _end, _wait
from ptconvert.schedule.schedule import Schedule

pytest.importorskip("peft", reason="peft is not installed")
# Of few windows, which are measured after each part of a training.
TEXT = Path(ptconvert.__file__).parent / "spec" / "strict_yaml.py"
SIZE = ("--window", 32, "--tokens", 2560, "--batch-size", 4, "--evaluations", 4)
QUICK = (*SIZE, "--learning-rate", 1e-3, "--block-learning-rate", 1e-3)
FEW = ("--window", 32, "--tokens", 1280, "--evaluations", 2, "--learning-rate", 1e-3)
SCHEDULE = "use: parallel_track, depth: 2"
# Dense layers before and after, so that some parameters stay frozen.
MIDDLE = (
    "  - {layers: 0-1, use: tensor_parallel}\n  - {layers: 2-3, use: parallel_track, depth: 2}\n"
    "  - {layers: 4-5, use: tensor_parallel}\n"
)


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model with a tokenizer of bytes."""
    return byte_level(make_dense, tmp_path_factory.mktemp("heal") / "source")


def heal(converted: Path, out: Path, source: Path, *options: object, code: int = 0) -> Any:
    """Runs `heal --json`; returns its figures, or the error's text."""
    arguments = ("heal", converted, out, "--teacher", source, "--json", *options)
    stdout, stderr = run(*arguments, code=code)
    return json.loads(stdout) if code == 0 else stderr


def kls(figures: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["kl"] for row in figures["rows"]}


def differing(a: Path, b: Path) -> set[str]:
    """The tensors whose bytes differ."""
    one, other = (open_checkpoint(path).tensors for path in (a, b))
    assert one.keys() == other.keys()
    return {name for name in one if not same_bytes(one[name], other[name])}


def data_of(checkpoint: Checkpoint) -> Data:
    return read_data(checkpoint, (TEXT,), None, (), 32, None, quiet)


# The whole command


def test_kl_falls_and_the_result_is_a_checkpoint_like_the_one_given(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted, out = convert(source, 4, SCHEDULE), tmp_path / "out"
    figures = heal(converted, out, source, "--text", TEXT, *QUICK)
    assert figures["kept"] == "KL" and kls(figures)["KL"] < 0.9 * kls(figures)["before"]
    assert not (tmp_path / "out.healing").exists()
    a, b = open_checkpoint(converted), open_checkpoint(out)
    for name, entry in a.tensors.items():
        other = b.tensors[name]
        assert (entry.file.name, entry.dtype, entry.shape, entry.offset) == (
            *(other.file.name, other.dtype, other.shape, other.offset),
        )
    moved = differing(converted, out)
    assert moved and all(name.startswith("model.layers.") for name in moved)
    files = {p.name for p in converted.iterdir()}
    assert files == {p.name for p in out.iterdir()}
    for name in files:
        if name != "config.json" and not name.endswith((".safetensors", ".md")):
            assert (converted / name).read_bytes() == (out / name).read_bytes()
    before, after = (json.loads((p / "config.json").read_text()) for p in (converted, out))
    assert after == {**before, "ptconvert": {**before["ptconvert"], "trained": True}}
    # eval's own divergence of what was written is what heal reports
    windows, batch = data_of(b).held_out, BatchSize(4, "cpu")
    models = [open_model(open_checkpoint(p), "float32", "cpu") for p in (source, out)]
    reference = divergence.reference(models[0], windows, batch, quiet)
    tokens = divergence.measure(models[1], reference, windows, batch, quiet)
    assert tokens.kl.mean() == pytest.approx(kls(figures)["KL"], rel=1e-4)
    assert load(out)(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    card = (out / "README.md").read_text()
    assert "(the weights of the changed layers; learning rate 0.001)" in card
    assert "## Healing" in card and figures["data_digest"] in card
    assert f"| KL | {figures['rows'][-1]['loss']:.4f} |" in card and "without training" not in card


@pytest.mark.slow
def test_guesses_are_healed_too_and_the_assignment_stays(source: Path, tmp_path: Path) -> None:
    spec, converted, out = (tmp_path / name for name in ("spec.yaml", "converted", "out"))
    spec.write_text(spec_text(4, SCHEDULE, "assignment: affinity\nguess: {rank: 4}\n"))
    size = ("--window", 32, "--tokens", 1024)
    run("transform", source, converted, "--spec", spec, "--text", TEXT, *size)
    figures = heal(converted, out, source, "--text", TEXT, *QUICK)
    assert figures["kept"] == "KL" and kls(figures)["KL"] < 0.95 * kls(figures)["before"]
    moved = differing(converted, out)
    assert any(".guess." in name for name in moved)
    assert not any(".assignment." in name for name in moved)


@pytest.mark.slow
def test_16_bits_on_a_cpu(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    given = ("--text", TEXT, *QUICK, "--dtype", "bfloat16", "--blockwise")
    figures = heal(converted, out, source, *given)
    assert figures["kept"] == "KL" and kls(figures)["KL"] < 0.9 * kls(figures)["before"]


def test_it_computes_in_what_the_cpu_has_instructions_for(
    make_dense: MakeDense, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are stored in float32 stay so; others come in bfloat16 where it isn't emulated,
    and what is trained is in float32 all the same."""
    whole = byte_level(make_dense, tmp_path / "whole")
    half = tmp_path / "half"
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    model.save_pretrained(half)
    for file in whole.glob("tokenizer*"):
        shutil.copy(file, half)
    for source, has, dtype in (
        (half, {"avx512_bf16": True}, "bfloat16"),
        (half, {"avx512_bf16": False, "avx2": True}, "float32"),
        (whole, {"avx512_bf16": True}, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        converted, out = convert(source, 2, "use: ladder"), tmp_path / f"{source.name}-{dtype}"
        figures = heal(converted, out, source, "--text", TEXT, *QUICK)
        assert figures["settings"]["dtype"] == dtype
        assert kls(figures)["KL"] < 0.9 * kls(figures)["before"]


@pytest.mark.slow
def test_verify_and_eval_take_it_and_to_dense_refuses(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted, out = convert(source, 2, SCHEDULE), tmp_path / "out"
    heal(converted, out, source, "--text", TEXT, *QUICK)
    run("verify", out, "--ranks", 2, "--prompt", 4, "--new", 3)
    size = ("--window", 32, "--windows", 8)
    run("eval", out, "--baseline", source, "--text", TEXT, *size, "--cache", tmp_path)
    _, error = run("transform", out, tmp_path / "back", "--to-dense", code=2)
    assert "config.json: healed since the conversion" in error and error.count("\n") == 1


@pytest.mark.slow
def test_two_runs_are_equal_and_another_seed_is_not(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted = convert(source, 4, MIDDLE)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        heal(converted, tmp_path / name, source, "--text", TEXT, *QUICK, "--seed", seed)
    assert not differing(tmp_path / "a", tmp_path / "b")
    assert differing(tmp_path / "a", tmp_path / "c")


def test_never_worse_than_before(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    rates = ("--learning-rate", 3, "--block-learning-rate", 3)
    figures = heal(converted, out, source, "--text", TEXT, *SIZE, "--blockwise", *rates)
    assert figures["kept"] == "before" and not differing(converted, out)
    assert (out / "config.json").read_bytes() == (converted / "config.json").read_bytes()
    assert "training did not help" in (out / "README.md").read_text()


def test_a_gentle_schedule_of_layers_held_dense_is_healed_too(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    """Ladder holds nothing in tracks; the layers it changes are trained."""
    items = "  - {layers: 0-2, use: tensor_parallel}\n  - {layers: 3-5, use: ladder}\n"
    converted, out = convert(source, 4, items), tmp_path / "out"
    figures = heal(converted, out, source, "--text", TEXT, *QUICK)
    assert kls(figures)["KL"] < kls(figures)["before"]
    # m2 is overlapped too, as layer 3's attention doesn't see it
    assert {int(name.split(".")[2]) for name in differing(converted, out)} == {2, 3, 4, 5}
    # nothing but the config tells that these are not the source's weights
    run("transform", converted, tmp_path / "back", "--to-dense")
    _, error = run("transform", out, tmp_path / "again", "--to-dense", code=2)
    assert "config.json: healed since the conversion" in error


# Block by block


@pytest.mark.parametrize(
    "stages",
    [
        "a0! m0! a1. m1. a2. m2! a3~1 m3~1 a4^1 m4! a5|m5!",
        "a0! m0. a1! m1! a2^1 m2. a3! m3! a4! m4! a5. m5!",
    ],
)
def test_blocks_one_after_the_other_are_the_model(
    stages: str, source: Path, convert: Convert
) -> None:
    """Also where a block begins inside a layer; and one block's layers at a time are in memory."""
    checkpoint = open_checkpoint(convert(source, 4, f"  - {{layers: 0-5, stages: '{stages}'}}\n"))
    ids_BT = torch.arange(24).view(2, 12)
    pieces = Pieces(checkpoint, torch.float32, "cpu")
    streams = {}
    for skipped in (None, 1):
        stream_BTD = torch.stack(list(pieces.entered(ids_BT)))
        for number, block in enumerate(blocks_of(section_of(checkpoint))):
            loaded = pieces.load(block.layers, block.stages)
            layers = enumerate(loaded.model.layers.children())
            held = {i for i, layer in layers if not next(layer.parameters()).is_meta}
            assert held == set(block.layers)
            if number != skipped:
                stream_BTD = loaded(stream_BTD)
        streams[skipped] = stream_BTD
    whole = open_model(checkpoint, "float32", "cpu")
    expected = whole.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    assert torch.allclose(whole.model.norm(streams[None]), expected, atol=1e-5)
    assert not torch.allclose(whole.model.norm(streams[1]), expected, atol=1e-2)


def test_blockwise_moves_one_block_only_and_helps(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    figures = heal(converted, out, source, "--text", TEXT, *QUICK, "--blockwise", "--no-kl")
    assert kls(figures).keys() == {"source", "before", "blockwise"}
    assert kls(figures)["blockwise"] < kls(figures)["before"]
    assert {int(name.split(".")[2]) for name in differing(converted, out)} == {2, 3}


def test_which_layers_a_schedule_changes() -> None:
    mixed = "a0! m0! a1! m1~1 a2! m2! a3. m3! a4! m4! a5! m5!"
    dense, parallel = "a0! m0! a1! m1!", "a0|m0! a1|m1!"
    assert changed_layers(as_section(mixed)) == {1, 2, 3}
    assert changed_layers(as_section(dense)) == frozenset() != changed_layers(as_section(parallel))
    assert changed_layers(as_section(parallel, parallel=True)) == frozenset()
    assert changed_layers(as_section("a0|m0! a1! m1!", parallel=True)) == {1}


def as_section(schedule: str, parallel: bool = False) -> Section:
    return Section(Schedule.parse(schedule), 2, "sum", {}, parallel=parallel)


def test_the_model_cards_command_shows_three_of_many_texts() -> None:
    few = ["heal", "in", "out", "--text", "a 1.txt", "--text", "b.txt", "--seed", "1"]
    assert command_line(few) == "ptconvert heal in out --text 'a 1.txt' --text b.txt --seed 1"
    many = ["heal", *(part for name in "abcde" for part in ("--text", name)), "--seed", "1"]
    shown = "ptconvert heal --text a --text b --text c --text ... --seed 1"
    assert command_line(many) == shown


# Going on


def into(*files: Path) -> None:
    """From now on this process prints into these files: its standard output, and its errors."""
    for stream, path in enumerate(files, 1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream)


def heal_into(log: Path, arguments: list[str]) -> None:
    """Runs heal, all of whose output goes into a file."""
    into(log, log)
    command(arguments)


def killed(arguments: Sequence[object], line: str, log: Path) -> None:
    """Runs heal in a process of its own and kills it when it has printed a line that begins so."""
    process = _context("cpu").Process(target=heal_into, args=(log, [str(a) for a in arguments]))
    process.start()
    while process.is_alive():
        printed = log.read_text().splitlines() if log.exists() else []
        if any(p.startswith(line) for p in printed):
            process.kill()
        time.sleep(0.005)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(source: Path, convert: Convert, tmp_path: Path) -> None:
    """One kill between blocks, one in the end-to-end stage."""
    converted, out = convert(source, 4, SCHEDULE), tmp_path / "out"
    options = ("--text", TEXT, *QUICK, "--blockwise")
    heal(converted, tmp_path / "whole", source, *options)
    arguments = (converted, out, "--teacher", source, *options)
    killed(arguments, "block 2 of 3", tmp_path / "first.log")
    assert not out.exists() and (tmp_path / "out.healing" / "block-0.safetensors").exists()
    killed(arguments, "step 15 of", tmp_path / "second.log")
    states = sorted(p.name for p in (tmp_path / "out.healing" / "kl").iterdir())
    assert not out.exists() and "checkpoint-10" in states
    result = CliRunner().invoke(main, ["heal", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "block 1" not in result.stderr and "step 5 of" not in result.stderr
    assert not differing(tmp_path / "whole", out)


@pytest.mark.parametrize(
    "given",
    ["dataloader_num_workers=-1"],
)
def test_nothing_trained_is_nothing_to_go_on_from(
    given: str, source: Path, convert: Convert, tmp_path: Path
) -> None:
    """After a failure before the first state, which some settings show only when training begins,
    others may follow."""
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    options = ("--text", TEXT, *QUICK)
    error = heal(converted, out, source, *options, "--set", given, code=2)
    assert error.splitlines()[-1].startswith("error: --set: ")
    assert (tmp_path / "out.healing" / "key.json").is_file()
    heal(converted, out, source, *options)
    assert out.is_dir() and not (tmp_path / "out.healing").exists()


def test_the_work_folder_may_be_a_link(source: Path, convert: Convert, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "scratch")
    converted, work = convert(source, 4, MIDDLE), tmp_path / "work"
    heal(converted, tmp_path / "out", source, "--text", TEXT, *QUICK, "--work", work)
    assert not (tmp_path / "scratch").exists()


def test_other_settings_dont_go_on_from_it(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted, out, work = convert(source, 4, MIDDLE), tmp_path / "out", tmp_path / "out.healing"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    error = heal(converted, out, source, "--text", TEXT, *QUICK, code=2)
    assert "is no healing's work folder" in error
    (work / "mine.txt").unlink()
    (work / "key.json").write_text(json.dumps({"learning_rate": 0.5}))
    (work / "block-0.safetensors").touch()
    error = heal(converted, out, source, "--text", TEXT, *QUICK, code=2)
    assert "learning_rate was 0.5, is 0.001" in error and error.count("\n") == 1
    assert not out.exists()


# Training


@pytest.mark.parametrize("at_once", [50 * 6, 50 * 4, 1])  # all six tokens, four and two, each one
def test_the_loss_is_kl_and_its_gradient(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptconvert.measure.divergence.LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden, target = torch.randn(2, 3, 8), torch.randint(50, (2, 3))
    logits = torch.randn(2, 3, 50, requires_grad=True)
    loss, kl = compare(logits, hidden, head, target)
    p, q = head(hidden).softmax(-1), logits.softmax(-1)
    assert torch.allclose(kl, (p * (p / q).log()).sum(-1), atol=1e-5)
    assert not torch.allclose(kl, (q * (q / p).log()).sum(-1), atol=1e-2)
    expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    assert torch.allclose(loss, expected, atol=1e-5)
    torch.autograd.backward(kl.mean())
    assert logits.grad is not None
    assert torch.allclose(logits.grad, (q - p) / 6, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_teacher_and_student_share_what_is_the_same(
    lora: bool, source: Path, convert: Convert
) -> None:
    checkpoint = open_checkpoint(convert(source, 4, MIDDLE))
    student, teacher = (
        open_model(c, "float32", "cpu") for c in (checkpoint, open_checkpoint(source))
    )
    names = trainable(dict(student.named_parameters()), checkpoint, "changed")
    freeze_but(student, () if lora else names)
    ids = torch.arange(12).view(1, 12)
    before = student(input_ids=ids).logits
    saved = share(student, teacher, columns=lora)
    assert torch.equal(student(input_ids=ids).logits, before)
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    frozen = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
    for name in frozen:
        assert ours[name].data_ptr() == theirs[name].data_ptr()
    both = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in theirs.values()}
    alone = sum(
        {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in ours.values()
            if p.untyped_storage().data_ptr() not in both
        }.values()
    )
    assert alone == sum(p.nbytes for p in ours.values()) - saved
    part = ours["model.layers.2.tracks.1.mlp.up_proj.weight"]
    whole = theirs["model.layers.2.mlp.up_proj.weight"]
    assert (part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == lora


def trained(source: Path, converted: Path, work: Path, settings: Settings) -> Any:
    """The KL stage alone: its tensors."""
    checkpoint, teacher = open_checkpoint(converted), open_checkpoint(source)
    student = open_model(checkpoint, "float32", "cpu")
    names = trainable(dict(student.named_parameters()), checkpoint, "changed")
    return distill(
        student,
        open_model(teacher, "float32", "cpu"),
        names,
        data_of(checkpoint),
        settings,
        work,
        quiet,
        quiet,
    ), student


SETTINGS = Settings(tokens=1280, batch_size=4, evaluations=2, learning_rate=1e-2)


def test_adapters_are_merged_as_peft_merges_them(
    source: Path, convert: Convert, tmp_path: Path
) -> None:
    """`student` has become the base of peft's model, whose merge gives the expected weights."""
    settings = replace(SETTINGS, lora=4)
    moved, student = trained(source, convert(source, 4, MIDDLE), tmp_path / "w", settings)
    assert len(moved) == 2 * 4 * 7
    for name, tensor in moved.items():
        layer = student.get_submodule(name.removesuffix(".weight"))
        assert not torch.allclose(layer.base_layer.weight, tensor, atol=1e-4)
        layer.merge()
        assert torch.allclose(layer.base_layer.weight, tensor, atol=1e-6)


def test_a_lora_heals(source: Path, convert: Convert, tmp_path: Path) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    figures = heal(
        converted, out, source, "--text", TEXT, *SIZE, "--lora", 4, "--learning-rate", 1e-2
    )
    assert kls(figures)["KL"] < kls(figures)["before"]
    assert all("_proj.weight" in name for name in differing(converted, out))


def test_the_yardstick_trains_the_source_on_the_text_itself(source: Path, tmp_path: Path) -> None:
    """The same data, steps and layers, with cross-entropy in place of KL."""
    checkpoint = open_checkpoint(source)
    model, teacher = (open_model(checkpoint, "float32", "cpu") for _ in range(2))
    said: list[str] = []
    names = [n for n, _ in model.named_parameters() if n.startswith("model.layers.")]
    moved = distill(
        *(model, teacher, names, data_of(checkpoint)),
        *(replace(SETTINGS, objective="cross_entropy"), tmp_path / "w", quiet, said.append),
    )
    losses = [float(line.split("loss ")[-1].split(",")[0]) for line in said if "step" in line]
    assert moved.keys() == set(names) and losses[-1] < losses[0] - 0.1


def command(arguments: list[str]) -> None:
    """heal, as its user calls it."""
    main(["heal", *arguments])


def as_rank(
    work: Callable[[list[str]], None], arguments: list[str], rank: int, port: int, folder: Path
) -> None:
    """Runs `work` where torchrun's variables say that it is one of two processes."""
    into(folder / "stdout.txt", folder / "stderr.txt")
    of_all = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    told = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", **of_all}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)  # as torchrun has it, too
    work(arguments)


def in_two(
    work: Callable[[list[str]], None], arguments: Sequence[object], folder: Path
) -> tuple[str, str]:
    """What two processes print that are started as by torchrun, but forked."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = [str(a) for a in arguments]
    context = _context("cpu")
    started = [
        context.Process(target=as_rank, args=(work, given, rank, port, folder), daemon=True)
        for rank in range(2)
    ]
    try:
        for process in started:
            process.start()
        _wait(started, time.monotonic() + 300)
    finally:
        _end(started)
    out, err = ((folder / f"{name}.txt").read_text() for name in ("stdout", "stderr"))
    assert [process.exitcode for process in started] == [0, 0], err
    return out, err


def torchrun(work: Callable[[list[str]], None], arguments: Sequence[object]) -> list[str]:
    """A command that does `work` in two processes, by torchrun itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = ["-m", "ptconvert", "heal"]
    if work is not command:
        begun = f"import sys; from test_heal import {work.__name__} as work; work(sys.argv[1:])"
        ours = ["--no-python", sys.executable, "-c", begun]
    return [sys.executable, *launcher, *ours, *map(str, arguments)]


def by_torchrun(
    work: Callable[[list[str]], None], arguments: Sequence[object], _: Path
) -> tuple[str, str]:
    """What is printed under torchrun itself."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    given = torchrun(work, arguments)
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, env=found)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("started", "top_k"), [(by_torchrun, None), (in_two, 16)])
def test_two_processes(
    source: Path, convert: Convert, tmp_path: Path, started: Any, top_k: int | None
) -> None:
    """On gloo; blocks by the first process, the teacher's answers by both."""
    converted, out, cache = convert(source, 4, MIDDLE), tmp_path / "out", tmp_path / "cache"
    arguments = (converted, out, "--teacher", source, "--text", TEXT, *QUICK, "--blockwise")
    kept = () if top_k is None else ("--top-k", top_k, "--cache", cache)
    printed, said = started(command, (*arguments, *kept, "--json"), tmp_path)
    figures = json.loads(printed)  # so only one process printed it
    assert kls(figures)["KL"] < kls(figures)["blockwise"] < kls(figures)["before"]
    assert "step 10 of 10" in said  # half as many steps as one process takes
    assert differing(converted, out)


def sharded(arguments: list[str]) -> None:
    """heal, after whose training it is looked at that this process holds a half of all."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import Trainer

    train = Trainer.train

    def watched(trainer: Any, *given: Any, **options: Any) -> Any:
        done = train(trainer, *given, **options)
        models = [trainer.model_wrapped]
        if trainer.teacher is not None:
            models.append(trainer.teacher.get_decoder().layers)
        assert (len(models) == 1) == ("--top-k" in arguments)
        for model in models:
            for parameter in model.parameters():
                assert isinstance(parameter, DTensor)
                assert parameter.to_local().numel() * 2 == parameter.numel()
        for model in filter(None, (trainer.model_wrapped, trainer.teacher)):
            assert all(isinstance(layer, FSDPModule) for layer in model.get_decoder().layers)
        moments = [s["exp_avg"] for s in trainer.optimizer.state.values()]
        assert moments and all(isinstance(moment, DTensor) for moment in moments)
        print(f"rank {os.environ['RANK']} held a half", file=sys.stderr)
        return done

    Trainer.train = watched  # of this process, which ends with it
    command(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("started", "schedule", "top_k"),
    [(by_torchrun, MIDDLE, None), (in_two, SCHEDULE, None), (in_two, MIDDLE, 16)],
)
def test_fsdp(
    source: Path, convert: Convert, tmp_path: Path, started: Any, schedule: str, top_k: int | None
) -> None:
    """Each of two processes holds a half of student, teacher and optimizer; the result is that of
    one process. In the second schedule no layer is dense; at last there is no teacher."""
    converted, out = convert(source, 4, schedule), tmp_path / "out"
    kept = () if top_k is None else ("--top-k", top_k, "--cache", tmp_path / "cache")
    options = ("--text", TEXT, *FEW, *kept)
    one = heal(converted, tmp_path / "one", source, *options, "--batch-size", 4)
    arguments = (converted, out, "--teacher", source, "--json", "--fsdp", "--batch-size", 2)
    printed, said = started(sharded, (*arguments, *options), tmp_path)
    assert all(f"rank {rank} held a half" in said for rank in (0, 1))
    assert kls(json.loads(printed)) == pytest.approx(kls(one), abs=1e-5)
    assert alike(out, tmp_path / "one") and differing(converted, out)


def alike(a: Path, b: Path) -> bool:
    """Whether two models' weights are nearly the same."""
    ours, theirs = (open_model(open_checkpoint(p), "float32", "cpu") for p in (a, b))
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), ("--lora", 4)])
def test_fsdp_goes_on_after_a_kill(
    source: Path, convert: Convert, tmp_path: Path, adapters: tuple[object, ...]
) -> None:
    """Of both processes, after a state that was kept, under torchrun as its user calls it."""
    converted, out, log = convert(source, 4, MIDDLE), tmp_path / "out", tmp_path / "log"
    options = ("--teacher", source, "--text", TEXT, *FEW, "--evaluations", 4, *adapters)
    run("heal", converted, tmp_path / "one", *options, "--batch-size", 4)
    halves = (*options, "--batch-size", 2, "--fsdp")
    in_two(command, (converted, tmp_path / "whole", *halves), tmp_path)
    with log.open("w") as file:
        given = torchrun(command, (converted, out, *halves))
        launcher = psutil.Popen(given, stdout=file, stderr=file)
    while launcher.poll() is None:
        if "step 6 of 10" in log.read_text():
            for rank in launcher.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
        time.sleep(0.005)
    assert launcher.returncode and not out.exists(), log.read_text()[-2000:]
    assert (tmp_path / "out.healing" / "kl" / "checkpoint-3" / "trainer_state.json").is_file()
    _, said = by_torchrun(command, (converted, out, *halves), tmp_path)
    assert "step 10 of 10" in said and "step 3 of 10" not in said
    assert not differing(tmp_path / "whole", out)
    assert alike(out, tmp_path / "one") and differing(converted, out)


def test_fsdp_needs_several_processes(source: Path, convert: Convert, tmp_path: Path) -> None:
    error = heal(convert(source, 4, MIDDLE), tmp_path / "out", source, "--text", TEXT, *QUICK,
                 "--fsdp", code=2)  # fmt: skip
    assert "--fsdp: there is one process; torchrun" in error and not (tmp_path / "out").exists()


def test_a_later_process_takes_no_start_of_another_healing(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may look before the first process has cleaned up what an earlier one left."""
    converted, awaited = convert(source, 4, MIDDLE), list[Path]()

    def waiting(file: Path) -> None:
        awaited.append(file)
        raise HealError("waited")

    monkeypatch.setattr(healing, "wait_for", waiting)
    monkeypatch.setenv("RANK", "1")
    for options in (QUICK, (*QUICK, "--seed", 1), QUICK):
        heal(converted, tmp_path / "out", source, "--text", TEXT, *options, code=2)
    first, other, again = awaited
    assert first == again != other


# Data


def test_windows_cover_the_text_once_and_none_is_in_both(source: Path) -> None:
    data = data_of(open_checkpoint(source))
    rows = {tuple(row.tolist()) for row in data.train}
    held = {tuple(row.tolist()) for row in data.held_out.ids}
    assert held and not rows & held
    order = data.order(3 * 32 * len(data.train), seed=0)
    passes = order.view(3, -1)
    assert all(torch.equal(p.sort().values, torch.arange(len(data.train))) for p in passes)
    assert not torch.equal(passes[0], passes[1])


def test_documents_are_joined_after_a_token_of_their_own(source: Path) -> None:
    """The beginning of a sequence, or its end where the tokenizer has no beginning; nothing is
    padded, and what fills no window is left out."""
    tokenizer = open_tokenizer(open_checkpoint(source))
    a, b, c = (tokenizer(text)["input_ids"] for text in ("one text", "another", "a third one"))
    tokenizer.add_special_tokens({"bos_token": "b", "eos_token": "o"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert begin != end
    for first, bos in ((begin, tokenizer.bos_token), (end, None)):
        tokenizer.bos_token = bos
        pieces = token_ids(("one text", "another", "a third one"), tokenizer, 260)
        joined = [first, *a, first, *b, first, *c]
        windows_NS = _windows(pieces, 7, None, quiet)
        assert windows_NS.flatten().tolist() == joined[: len(joined) // 8 * 8]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets isn't here")
def test_a_local_dataset(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "rows.jsonl"
    pieces = TEXT.read_text().split("\n\n")
    file.write_text("\n".join(json.dumps({"content": piece}) for piece in pieces))
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    given = ("--dataset", file, "--column", "content")
    figures = heal(converted, out, source, *given, *QUICK)
    assert kls(figures)["KL"] < kls(figures)["before"]
    error = heal(converted, tmp_path / "o", source, "--dataset", file, *QUICK, code=2)
    assert "--column can name one of content" in error and error.count("\n") == 1
    error = heal(converted, tmp_path / "o", source, "--dataset", "no/such", *QUICK, code=2)
    assert error.startswith("error: --dataset no/such: ") and error.count("\n") == 1


# What is refused


def test_what_fails_in_training_is_not_said_of_a_setting(
    source: Path, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a fault of ours nor what a user caused otherwise, beside a setting that is right."""
    options = (convert(source, 4, MIDDLE), tmp_path / "out", "--teacher", source, "--text", TEXT)
    given = ["heal", *map(str, (*options, *QUICK, "--set", "weight_decay=0.1"))]

    def failing(error: Exception) -> Any:
        def compute(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Distillation, "compute_loss", compute)
        return CliRunner().invoke(main, given)

    assert isinstance(failing(RuntimeError("a fault")).exception, RuntimeError)
    assert failing(HealError("a cause")).stderr.splitlines()[-1] == "error: a cause"


@pytest.mark.parametrize("which", ["source", "converted"])
def test_what_is_not_finite_is_not_healed(
    which: str, source: Path, convert: Convert, tmp_path: Path
) -> None:
    paths = {"source": source, "converted": convert(source, 4, MIDDLE)}
    ruined = shutil.copytree(paths[which], tmp_path / "ruined")
    for file in ruined.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight"):
                tensor[0, 0] = math.nan
        save_file(tensors, file, {"format": "pt"})
    paths[which] = ruined
    out, options = tmp_path / "out", ("--text", TEXT, *QUICK)
    error = heal(paths["converted"], out, paths["source"], *options, code=2)
    assert f"{ruined}: its outputs are not all finite in float32" in error.splitlines()[-1]
    assert not out.exists()


def test_errors_are_one_line(
    source: Path, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    converted, out = convert(source, 4, MIDDLE), tmp_path / "out"
    plain = convert(source, 4, "use: tensor_parallel")
    text = ("--text", TEXT)

    def refused(what: str, checkpoint: Path, teacher: Path, *options: object) -> None:
        error = heal(checkpoint, out, teacher, *options, code=2)
        assert what in error.splitlines()[-1], error
        if "Usage" not in error:
            assert error.count("\n") == 1
        assert not out.exists() and not (tmp_path / "out.healing" / "kl").exists()

    refused("one of --text FILE and --dataset ID", converted, source, *QUICK)
    refused("one of --text FILE and --dataset", converted, source, *text, "--dataset", "x", *QUICK)
    refused("isn't converted", source, source, *text, *QUICK)
    refused("it must be a dense checkpoint", converted, converted, *text, *QUICK)
    other = make_dense("llama", vocab_size=260, intermediate_size=64)
    refused("of the source's shape", converted, other, *text, *QUICK)
    refused("changes no layer", plain, source, *text, *QUICK)
    refused("nothing to do", converted, source, *text, *QUICK, "--no-kl")
    refused("passes over", converted, source, *text, *QUICK, "--tokens", 10**8)
    refused("less than one window", converted, source, *text, *QUICK, "--tokens", 5)
    refused("of one step", converted, source, *text, *QUICK, "--batch-size", 500)
    refused("the model has 256 positions", converted, source, *text, *QUICK, "--window", 600)
    refused("no such field", converted, source, *text, *QUICK, "--set", "speed=9")
    for given, told in (
        ("speed", "must be KEY=VALUE"),
        ("weight_decay=much", "weight_decay"),
        ("weight_decay=nan", "weight_decay: it must be a number"),
        ("learning_rate=1", "use --learning-rate"),
        ("save_strategy=no", "keeping the best state depends on it"),
        ("push_to_hub=true", "push the result instead"),
        ("label_smoothing_factor=0.1", "loss and judging are heal's own"),
        ("logging_steps=-1", "--set: evaluation strategy"),
        ("deepspeed=no.json", "--set: "),
        ("adam_beta1=2", "--set: Invalid beta parameter"),
        ("report_to=wandb", "--set: WandbCallback requires wandb"),
        ('lr_scheduler_kwargs={"x": 1}', "--set: "),
    ):
        refused(told, converted, source, *text, *QUICK, "--set", given)
    assert not (tmp_path / "out.healing").exists()
    for option in ("--learning-rate", "--block-learning-rate", "--warmup"):
        refused("isn't a finite number", converted, source, *text, *QUICK, option, "nan")
    refused("4294967296 is not in the range", converted, source, *text, *QUICK, "--seed", 2**32)
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    refused("less than one window", converted, source, *text, *QUICK, "--held-out", short)
    refused("given to train on and", converted, source, *text, *QUICK, "--held-out", TEXT)
    refused("--split: for --dataset only", converted, source, *text, *QUICK, "--split", "x")
    no_kl = ("--blockwise", "--no-kl", "--lora", 4)
    refused("--lora: for the end-to-end stage", converted, source, *text, *QUICK, *no_kl)
    refused("have at most rank 12; take a smaller", converted, source, *text, *QUICK, "--lora", 13)
    for work in (out, out / "state", tmp_path):
        refused("may not lie in DST", converted, source, *text, *QUICK, "--work", work)
    out.mkdir()
    error = heal(converted, out, source, *text, *QUICK, code=2)
    assert "exists; name another, or use --overwrite" in error
