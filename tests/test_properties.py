"""Bad input of every kind: never a traceback, never a write outside DST, never half a DST."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense, spec_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion, plan_to_dense
from ptconvert.errors import PTConvertError
from ptconvert.spec.document import parse_spec

GOOD_SPEC = spec_text(4, "use: parallel_track, depth: 2")
HOSTILE = st.sampled_from(
    ["../x.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "", "\0", "x" * 300, "ü",
     "model.safetensors", "gone.safetensors", "..\\x.safetensors", "./model.safetensors",
     "\ud800", "a\nb", "\x1b[31m"]
)  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def sharded(make_dense: MakeDense) -> Path:
    return make_dense("qwen2", max_shard_size="30KB", num_hidden_layers=6)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@contextmanager
def copy_of(checkpoint: Path) -> Iterator[Path]:
    """A copy alone in a directory, to be spoiled."""
    with tempfile.TemporaryDirectory() as directory:
        yield shutil.copytree(checkpoint, Path(directory) / "source")


def attempt(source: Path, spec: str, to_dense: bool = False) -> None:
    """Converts `source` inside a directory of its own; checks what is left there afterwards."""
    root = source.parent
    before = snapshot(root)
    try:
        checkpoint = open_checkpoint(source)
        plan = (
            plan_to_dense(checkpoint)
            if to_dense
            else plan_conversion(checkpoint, parse_spec(spec, "s"), source_name="x")
        )
        execute(plan, root / "out")
    except PTConvertError as error:
        assert str(error).strip() and str(error).isprintable()
        assert snapshot(root) == before
        assert not (root / "out").exists()
    else:
        after = snapshot(root)
        assert {k: v for k, v in after.items() if not k.startswith("out/")} == before
        open_checkpoint(root / "out")
    assert {p.name for p in root.iterdir()} <= {"source", "out"}


def mutate(text: str, draw: Any) -> str:
    """A few characters removed, doubled or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(text) - 1, 0)))
        upto = at + draw(st.integers(0, 12))
        put = draw(st.sampled_from(["", "0", "-", ":", "\n", " ", "&a ", "*a", "!!x ", "[", "99"]))
        text = text[:at] + put + text[upto:]
    return text


@FEW
@given(st.data())
def test_mutated_specs(data: st.DataObject) -> None:
    text = mutate(GOOD_SPEC, data.draw)
    try:
        parse_spec(text, "s.yaml")
    except PTConvertError as error:
        assert all(line.startswith("s.yaml:") for line in str(error).splitlines())


@FEW
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_arbitrary_specs(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    try:
        parse_spec(text, "s.yaml")
    except PTConvertError as error:
        assert "s.yaml:" in str(error)


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_mutated_configs(sharded: Path, data: st.DataObject) -> None:
    with copy_of(sharded) as source:
        config = json.loads((source / "config.json").read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
            if data.draw(st.booleans()):
                config.pop(key, None)
            else:
                config[key] = data.draw(JUNK)
        (source / "config.json").write_text(json.dumps(config))
        attempt(source, GOOD_SPEC)


@pytest.fixture(scope="module")
def converted(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "checkpoint"
    spec = parse_spec(GOOD_SPEC, "s")
    execute(plan_conversion(open_checkpoint(sharded), spec, source_name="x"), path)
    return path


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_mutated_converted_configs(converted: Path, data: st.DataObject) -> None:
    with copy_of(converted) as source:
        config = json.loads((source / "config.json").read_text())
        section = config["ptconvert"]
        key = data.draw(st.sampled_from(sorted(section)))
        section[key] = data.draw(JUNK)
        (source / "config.json").write_text(json.dumps(config))
        attempt(source, "", to_dense=True)


@pytest.mark.slow
@FEW
@given(data=st.data())
def test_mutated_indexes(sharded: Path, data: st.DataObject) -> None:
    with copy_of(sharded) as source:
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        names = sorted(index["weight_map"])
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2)):
            what = data.draw(st.sampled_from(["drop", "move", "junk", "extra", "whole"]))
            if what == "drop":
                index["weight_map"].pop(name, None)
            elif what == "move":
                index["weight_map"][name] = data.draw(HOSTILE)
            elif what == "junk":
                index["weight_map"][name] = data.draw(JUNK)
            elif what == "extra":
                index["weight_map"][data.draw(st.text(max_size=9))] = data.draw(HOSTILE)
            else:
                index = {"weight_map": data.draw(JUNK)}
                break
        path.write_text(json.dumps(index))
        attempt(source, GOOD_SPEC)


def rewritten_header(content: bytes, draw: Any) -> bytes:
    """A safetensors file with its header damaged: offsets, shapes, dtypes, names, length."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    tensors = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(tensors))
    what = draw(st.sampled_from(["offsets", "shape", "dtype", "rename", "drop", "extra", "junk"]))
    numbers = st.integers(-3, 10**6) | st.integers(2**60, 2**66)
    if what == "offsets":
        header[name]["data_offsets"] = draw(st.lists(numbers, max_size=3))
    elif what == "shape":
        header[name]["shape"] = draw(st.lists(numbers, max_size=3))
    elif what == "dtype":
        header[name]["dtype"] = draw(st.sampled_from(["F16", "I8", "F8_E4M3", "X", ""]))
    elif what == "rename":
        header[draw(st.text(max_size=30))] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "extra":
        header["extra"] = header[name]
    else:
        header[name] = draw(JUNK)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@FEW
@given(data=st.data())
def test_damaged_safetensors(sharded: Path, data: st.DataObject) -> None:
    with copy_of(sharded) as source:
        path = data.draw(st.sampled_from(sorted(source.glob("*.safetensors"))))
        content = path.read_bytes()
        what = data.draw(st.sampled_from(["cut", "grow", "length", "byte", "header", "empty"]))
        if what == "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        elif what == "grow":
            content += b"\0" * data.draw(st.integers(1, 64))
        elif what == "length":
            content = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + content[8:]
        elif what == "byte":
            at = data.draw(st.integers(0, min(len(content) - 1, 3000)))
            content = content[:at] + data.draw(st.binary(min_size=1, max_size=3)) + content[at:]
        elif what == "header":
            content = rewritten_header(content, data.draw)
        else:
            content = b""
        path.write_bytes(content)
        attempt(source, GOOD_SPEC)
