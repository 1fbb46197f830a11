"""The transform: what it writes, its way back, and that it leaves all or nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, VARIANTS, Convert, MakeDense, load, spec_text
from safetensors.torch import load_file, save_file

from ptconvert.checkpoint.atomic import new_directory
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import ADAPTER_FOLDER
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.errors import CheckpointError, ConfigError, PTConvertError, SpecError
from ptconvert.spec.document import parse_spec

TRACKED = "use: parallel_track, depth: 2"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, by the index if there is one."""
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().view(-1).view(torch.uint8)

    def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(raw(a), raw(b))

    return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)


def back(path: Path, destination: Path, **options: Any) -> Path:
    execute(plan_to_dense(open_checkpoint(path), **options), destination)
    return destination


@pytest.mark.parametrize("tracks", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_bit_for_bit(
    variant: str, tracks: int, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = make_dense(variant, torch.bfloat16)
    converted = convert(source, tracks, TRACKED)
    again = back(converted, tmp_path / "back")
    assert same(tensors(again), tensors(source))
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_in_and_out_and_dtype_kept(
    dtype: torch.dtype, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = make_dense("qwen2", dtype, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    converted = convert(source, 4, TRACKED, shard_bytes=10_000)
    files = {p.name for p in converted.glob("*.safetensors")}
    assert any(f.startswith("track-00-of-04-00002-of-0000") for f in files)
    assert all(t.dtype == dtype for t in tensors(converted).values())
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    again = back(converted, tmp_path / "back", shard_bytes=30_000)
    assert same(tensors(again), tensors(source))
    assert torch.equal(
        load(again)(torch.tensor([[3, 4, 5]])).logits,
        load(source)(torch.tensor([[3, 4, 5]])).logits,
    )


def test_tracks_reassemble_to_the_source(make_dense: MakeDense, convert: Convert) -> None:
    """Without the transform's own code: concatenation along each tensor's axis."""
    source = tensors(make_dense("llama-biases"))
    found = tensors(convert(make_dense("llama-biases"), 4, TRACKED))
    for layer in range(LAYERS):
        for name in [n for n in source if n.startswith(f"model.layers.{layer}.")]:
            rest = name.removeprefix(f"model.layers.{layer}.")
            if rest in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
                common = "_".join(rest.split(".")[1:])
                assert torch.equal(found[f"model.layers.{layer}.common.{common}"], source[name])
                continue
            parts = [found[f"model.layers.{layer}.tracks.{t}.{rest}"] for t in range(4)]
            if "norm" in rest:
                assert all(torch.equal(p, source[name]) for p in parts)
            else:
                axis = 1 if rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight") else 0
                assert torch.equal(torch.cat(parts, axis), source[name])
    dense = {n for n in source if "layers" not in n}
    assert dense <= found.keys() and all(torch.equal(found[n], source[n]) for n in dense)


def test_each_tracks_tensors_lie_in_its_own_file(make_dense: MakeDense, convert: Convert) -> None:
    converted = convert(make_dense("llama"), 4, TRACKED)
    for t in range(4):
        names = load_file(converted / f"track-{t:02}-of-04.safetensors").keys()
        assert names and all(f".tracks.{t}." in n for n in names)
    assert not any(".tracks." in n for n in load_file(converted / "shared.safetensors"))


def test_layers_that_never_diverge_keep_names_and_bytes(
    make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama")
    for use in ("use: ladder", "use: parallel_block", "use: layer_parallel"):
        converted = convert(source, 4, use)
        assert [p.name for p in converted.glob("*.safetensors")] == ["shared.safetensors"]
        assert same(tensors(converted), tensors(source))


def test_config_keeps_every_field_and_adds_the_section(
    make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("llama3-rope-tied")
    converted = convert(source, 4, TRACKED)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((converted / "config.json").read_text())
    changed = {k for k in before if after[k] != before[k]}
    assert changed == {"architectures", "model_type"}
    assert after.keys() - before.keys() == {"auto_map", "ptconvert"}
    section = after["ptconvert"]
    assert section["schedule"].startswith("a0. m0. a1. m1! a2.")
    assert (section["tracks"], section["format"], section["deferred"]) == (4, 1, "sum")
    spec = parse_spec((converted / "ptconvert.yaml").read_text(), "again")
    assert section["spec_digest"] == spec.digest


def test_files_that_go_along_untouched(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = tmp_path / "with-files"
    shutil.copytree(make_dense("llama"), source)
    carried = ["tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "LICENSE"]
    carried.append("additional_chat_templates/tools.jinja")
    (source / "additional_chat_templates").mkdir()
    for name in carried:
        (source / name).write_bytes(name.encode())
    for name in ("train.py", "optimizer.bin"):
        (source / name).write_bytes(b"x")
    (source / "README.md").write_text("---\nlicense: llama3.1\n---\n# Model\n")
    converted = convert(source, 4, TRACKED)
    assert all((converted / n).read_bytes() == n.encode() for n in carried)
    assert not (converted / "train.py").exists() and not (converted / "optimizer.bin").exists()
    card = (converted / "README.md").read_text()
    assert "license: llama3.1" in card and "a0. m0." in card and "| 12 | 3 |" in card


def test_old_buffers_and_tied_copies_are_carried(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    source = tmp_path / "old"
    shutil.copytree(make_dense("llama3-rope-tied"), source)
    all_tensors = tensors(source)
    all_tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(2)
    all_tensors["lm_head.weight"] = all_tensors["model.embed_tokens.weight"].clone()
    save_file(all_tensors, source / "model.safetensors", {"format": "pt"})
    converted = convert(source, 4, TRACKED)
    assert same(tensors(back(converted, tmp_path / "back")), all_tensors)
    load(converted)


def test_ladder_authors_format(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    theirs = make_dense("llama", ladder_layers=[4, 5])
    plan = plan_conversion(open_checkpoint(theirs), None, source_name="theirs")
    assert str(plan.schedule).endswith("a3! m3~1 a4~1 m4~1 a5~1 m5!")
    execute(plan, tmp_path / "out")
    with pytest.raises(SpecError, match="leave --spec out"):
        convert(theirs, 4, TRACKED)
    with pytest.raises(SpecError, match="--spec FILE"):
        plan_conversion(open_checkpoint(make_dense("llama")), None, source_name="x")
    items = "  - {layers: 0-2, use: tensor_parallel}\n  - {layers: 3-5, use: ladder}\n"
    ours = convert(make_dense("llama"), 4, items, ladder_layers_config=True)
    config = json.loads((ours / "config.json").read_text())
    assert config["ladder_layers"] == 3
    again = json.loads((back(ours, tmp_path / "back") / "config.json").read_text())
    assert "ladder_layers" not in again
    with pytest.raises(SpecError, match="knows only ladder"):
        convert(make_dense("llama"), 4, TRACKED, ladder_layers_config=True)


def test_trained_tracks_have_no_way_back(
    make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    converted = convert(make_dense("llama"), 4, TRACKED)
    file = converted / "track-02-of-04.safetensors"
    changed = load_file(file)
    changed["model.layers.1.tracks.2.input_layernorm.weight"] += 1
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="tracks were trained"):
        back(converted, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ConfigError, match="has no ptconvert section"):
        plan_to_dense(open_checkpoint(make_dense("llama")))


def with_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        all_tensors = tensors(source)
        all_tensors.pop(name, None)
        if tensor is not None:
            all_tensors[name] = tensor
        save_file(all_tensors, source / "model.safetensors", {"format": "pt"})

    return change


def with_index(weight_map: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / "model.safetensors").rename(source / "part.safetensors")
        index = {"weight_map": weight_map}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def only_pickle(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def cut_file(source: Path) -> None:
    os.truncate(source / "model.safetensors", 1000)


def no_config(source: Path) -> None:
    (source / "config.json").unlink()


NORM = "model.norm.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_tensor(NORM, None), "model.norm.weight is missing"),
        (with_tensor(NORM, torch.ones(7)), r"has shape \[7\], not \[32\]"),
        (with_tensor(NORM, torch.ones(32, dtype=torch.int8)), "is I8, not BF16 or F16 or F32"),
        (with_tensor("score.weight", torch.ones(2)), "score.weight is not a tensor of llama"),
        (with_tensor("a\nb", torch.ones(2)), r"a\\nb is not a tensor of llama"),
        (with_tensor(BUFFER, torch.tensor(1.0)), "inv_freq is not a tensor"),
        (with_tensor(BUFFER, torch.ones(0)), "inv_freq is not a tensor"),
        (with_tensor("lm_head.weight", torch.ones(3, 32)), "has shape"),
        (with_index({NORM: "../../etc/x.safetensors"}), "must be the name of a"),
        (with_index({NORM: "/etc/x.safetensors"}), "must be the name of a"),
        (with_index({NORM: "x.bin"}), "must be the name of a"),
        (with_index({NORM: 3}), "must be the name of a"),
        (with_index([]), "has no weight_map"),
        (with_index({NORM: "gone.safetensors"}), "is missing; model.safetensors.index.json"),
        (only_pickle, "pickle weights .*safetensors"),
        (cut_file, "is not a readable safetensors file"),
        (no_config, "is missing; a checkpoint directory has"),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    change: Callable[[Path], None], says: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(make_dense("llama"), source)
    change(source)
    spec = parse_spec(spec_text(4, TRACKED), "s")
    with pytest.raises(PTConvertError, match=says) as error:
        plan_conversion(open_checkpoint(source), spec, source_name="x")
    assert "\n" not in str(error.value)


def test_without_atomic_exchange_a_failed_rename_restores_the_old(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = conversion(make_dense("llama")), tmp_path / "out"
    out.mkdir()
    for name, content in OLD.items():
        (out / name).write_bytes(content)
    monkeypatch.setattr("ptconvert.checkpoint.atomic._exchange", lambda *_: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.ptconvert-"):
            raise OSError(errno.EBUSY, "busy", str(target))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match="busy"):
            execute(plan, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == OLD
    execute(plan, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and len(list(out.iterdir())) > 5


def conversion(source: Path) -> Any:
    spec = parse_spec(spec_text(4, TRACKED), "s")
    return plan_conversion(open_checkpoint(source), spec, source_name="x")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_link_to_nothing_is_said(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    """As in the hub's cache after a download that was cut short."""
    source = shutil.copytree(make_dense("llama"), tmp_path / "source")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is a link to a file that isn't"):
        execute(conversion(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_destinations(make_dense: MakeDense, tmp_path: Path) -> None:
    plan = conversion(make_dense("llama"))
    execute(plan, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        execute(plan, tmp_path / "out")
    old = tmp_path / "out" / "model-00002-of-00002.safetensors"
    old.write_text("x")
    (tmp_path / "out" / ADAPTER_FOLDER).mkdir()
    execute(plan, tmp_path / "out", overwrite=True)
    assert not old.exists() and not (tmp_path / "out" / ADAPTER_FOLDER).exists()
    for name in ("recipe.yaml", "quant_log.csv", "adapter_config.json", "LICENSE", "merges.txt"):
        (tmp_path / "out" / name).write_text("x")
    execute(plan, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / ADAPTER_FOLDER).mkdir()
    (tmp_path / "out" / ADAPTER_FOLDER / "mine.csv").write_text("x")
    with pytest.raises(CheckpointError, match=rf"holds {ADAPTER_FOLDER}/mine\.csv beside a checkp"):
        execute(plan, tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out" / ADAPTER_FOLDER)
    (tmp_path / "out" / "thesis.md").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"holds thesis\.md beside a checkpoint, which --over"
    ):
        execute(plan, tmp_path / "out", overwrite=True)
    (tmp_path / "precious").mkdir()
    for name in ("thesis.txt", "config.json"):
        (tmp_path / "precious" / name).write_text("{}")
        with pytest.raises(CheckpointError, match="replaces only checkpoints"):
            execute(plan, tmp_path / "precious", overwrite=True)
    (tmp_path / "precious" / "model.safetensors").write_text("x")
    (tmp_path / "precious" / "checkpoint-100").mkdir()
    with pytest.raises(CheckpointError, match="replaces only checkpoints"):
        execute(plan, tmp_path / "precious", overwrite=True)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="--overwrite"):
        execute(plan, tmp_path / "loop")
    (tmp_path / "loop").unlink()
    with pytest.raises(CheckpointError, match="must not contain each other"):
        execute(plan, plan.source.path, overwrite=True)
    with pytest.raises(CheckpointError, match="must not contain each other"):
        execute(plan, plan.source.path / "inside")
    with pytest.raises(CheckpointError, match="does not exist"):
        execute(plan, tmp_path / "no" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")],
)
def test_a_failing_disk_leaves_nothing(
    code: int, says: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    pwrite = os.pwrite

    def failing(handle: int, block: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(code, os.strerror(code))
        return pwrite(handle, block, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(CheckpointError, match=says) as error:
        execute(conversion(make_dense("llama")), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_found_before_writing(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptconvert.convert.transform.free_bytes", lambda _: 1000)
    with pytest.raises(CheckpointError, match="bytes are needed and 1000 were free"):
        execute(conversion(make_dense("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk(make_dense: MakeDense, tmp_path: Path) -> None:
    """A file system of 64 KiB; the check for free space is misled, so that writing hits the end."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)],
        check=False,
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ptconvert.convert.transform.free_bytes", lambda _: 10**12)
            with pytest.raises(CheckpointError, match="the disk is full"):
                execute(conversion(make_dense("llama")), mount / "out")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.spec.document import read_spec
from ptconvert.convert.transform import execute, plan_conversion

source, spec, destination, stop, overwrite = sys.argv[1:]
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("pwrite", "fsync", "rename", "truncate", "chmod", "open", "mkdir", "close"):
    setattr(os, name, counted(getattr(os, name)))
import ptconvert.checkpoint.atomic as atomic
atomic._exchange = counted(atomic._exchange)
plan = plan_conversion(open_checkpoint(Path(source)), read_spec(Path(spec)), source_name="x")
calls = 0
execute(plan, Path(destination), overwrite=overwrite == "1")
print(calls)
"""


OLD = {"config.json": b"old", "model.safetensors": b"old"}


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment_it_leaves_all_or_nothing(
    overwrite: bool, make_dense: MakeDense, tmp_path: Path
) -> None:
    source = make_dense("llama", num_hidden_layers=2)
    spec, destination = tmp_path / "s.yaml", tmp_path / "out"
    text = "format: 1\ntracks: 2\nschedule:\n  - {layers: 0-1, use: parallel_track, depth: 1}\n"
    spec.write_text(text)

    def run(stop: int) -> subprocess.CompletedProcess[str]:
        arguments = [source, spec, destination, stop, int(overwrite)]
        command = [sys.executable, "-c", KILLED, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def old() -> None:
        destination.mkdir()
        for name in OLD:
            (destination / name).write_bytes(OLD[name])

    if overwrite:
        old()
    complete = run(0)
    steps = int(complete.stdout)
    expected = {p.name: p.read_bytes() for p in destination.iterdir()}
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    assert steps > 60
    ends = range(steps - 8, steps + 1)  # around the rename every step, before that every few
    for stop in [*range(1, steps - 8, max(1, steps // 14)), *ends]:
        shutil.rmtree(destination, ignore_errors=True)
        if overwrite:
            old()
        assert run(stop).returncode == -signal.SIGKILL
        if destination.exists():
            found = {p.name: p.read_bytes() for p in destination.iterdir()}
            assert found == expected or (overwrite and found == OLD)
        else:
            assert not overwrite
        assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    shutil.rmtree(destination, ignore_errors=True)
    if overwrite:
        old()
    run(0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s.yaml"]


def test_a_run_at_work_keeps_its_directory(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", overwrite=False) as first:
        (first / "a").write_text("a")
        with pytest.raises(RuntimeError), new_directory(tmp_path / "out", overwrite=False):
            raise RuntimeError
        assert (first / "a").exists()
    assert (tmp_path / "out" / "a").read_text() == "a"


@pytest.mark.parametrize("before", ["open", "flock"])
def test_a_run_that_starts_before_the_lock_is_held(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run takes the first's directory for a killed run's and removes it."""
    owner, others = (os if before == "open" else fcntl), list[str]()
    function = getattr(owner, before)

    def second_run_first(*arguments: Any, **options: Any) -> Any:
        mine = before == "flock" or ".out.ptconvert-" in str(arguments[0])
        if mine and not others:
            others.append(before)
            with pytest.raises(RuntimeError), new_directory(tmp_path / "out", overwrite=False):
                raise RuntimeError
        return function(*arguments, **options)

    monkeypatch.setattr(owner, before, second_run_first)
    with new_directory(tmp_path / "out", overwrite=False) as first:
        (first / "a").write_text("a")
    assert others and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_progress_counts_every_byte(make_dense: MakeDense, tmp_path: Path) -> None:
    plan = conversion(make_dense("llama"))
    seen: list[int] = []
    execute(plan, tmp_path / "out", progress=seen.append)
    assert sum(seen) == plan.nbytes == sum(plan.summary()["files"].values())
    files = (tmp_path / "out").iterdir()
    assert sum(p.stat().st_size for p in files) <= plan.needed_bytes
