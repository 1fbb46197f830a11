"""The spec reader: what it accepts, and every fault with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptconvert.errors import SpecError
from ptconvert.models.shape import ModelShape
from ptconvert.spec.document import parse_spec, read_spec
from ptconvert.spec.strict_yaml import MAX_BYTES

GOOD = """\
format: 1
tracks: 4                 # a comment
deferred: mean
assignment: contiguous
schedule:
  - layers: 0-1
    use: tensor_parallel
  - layers: 2 - 4
    use: parallel_track
    depth: 2
    overlap: 1
  - layers: 5
    stages: "a5|m5!"
"""


def faults(text: str) -> list[str]:
    with pytest.raises(SpecError) as error:
        parse_spec(text, "s.yaml")
    assert error.value.faults == tuple(str(error.value).splitlines())
    return list(error.value.faults)


def shape(**sizes: object) -> ModelShape:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 10,
        **sizes,
    }
    return ModelShape.from_config(config)


def test_a_good_spec() -> None:
    spec = parse_spec(GOOD, "s.yaml")
    assert (spec.tracks, spec.deferred, spec.layers) == (4, "mean", 6)
    text = "a0! m0! a1! m1! a2. m2. a3. m3^1 a4. m4! a5|m5!"
    assert str(spec.schedule()) == text
    assert spec.digest.startswith("sha256:") and len(spec.digest) == 71
    spec.check(shape())


ITEM = "format: 1\ntracks: 4\nschedule:\n"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "the file is empty"),
        ("format: 1\ntracks: [", 2, "not valid YAML"),
        ("- a", 1, "must be a mapping"),
        (GOOD.replace("format: 1", "format: 7"), 1, "this version reads format 1"),
        (GOOD.replace("format: 1\n", ""), 1, "format is missing"),
        (GOOD.replace("tracks: 4", "tracks: 4.0"), 2, "must be a whole number"),
        (GOOD.replace("tracks: 4", 'tracks: "4"'), 2, "must be a whole number"),
        (GOOD.replace("tracks: 4", "tracks: 0"), 2, "must be a whole number"),
        (GOOD.replace("tracks: 4", "trakcs: 4"), 2, "unknown key 'trakcs'"),
        (GOOD.replace("deferred: mean", "deferred: median"), 3, "must be sum or mean"),
        (GOOD.replace("contiguous", "[random]"), 4, "must be contiguous"),
        (GOOD.replace("use: tensor_parallel", "use: tp"), 7, "unknown preset tp"),
        (GOOD.replace("    use: tensor_parallel\n", ""), 6, "use is missing"),
        (
            GOOD.replace("    depth: 2\n", ""),
            8,
            "depth is missing; it must be a whole number, 1 to 4096",
        ),
        (GOOD.replace("depth: 2", "depth: -2"), 10, "depth is -2"),
        (GOOD.replace("depth: 2", "deep: 2"), 10, "unknown key 'deep'"),
        (GOOD.replace("overlap: 1", "overlap: 1\n    overlap: 2"), 12, "overlap stands twice"),
        (GOOD.replace("layers: 0-1", "layers: 1-0"), 6, "must run upwards"),
        (GOOD.replace("layers: 0-1", "layers: all"), 6, "must be a layer or a range"),
        (GOOD.replace("layers: 0-1", "layers: 0-2"), 8, "come again or out of order"),
        (GOOD.replace("layers: 0-1", "layers: 0"), 8, "layers 1 are left out"),
        (GOOD.replace("a5|m5!", "a5 m5!"), 13, ">>a5<<"),
        (GOOD.replace("a5|m5!", "a5! m6!"), 13, "its item has 5"),
        (GOOD.replace("a5|m5!", "a5!"), 6, "m5 is missing"),
        (GOOD.replace("a5|m5!", "a5! m5."), 6, ">>m5.<<"),
        ("a: &x 1\nb: *x", 1, "anchors and aliases are not allowed"),
        ("a: 1\nb: !!python/object:os.system x", 2, "is not allowed; write a plain value"),
        ("a: !!int 1", 1, "is not allowed"),
        ("? [a]\n: 1", 1, "a key must be a plain word"),
        ("[" * 5000, 1, "nested deeper"),
        ("#" * (MAX_BYTES + 1), 1, "larger than"),
        (ITEM, 3, "schedule is empty"),
        (ITEM + "  - ladder", 4, "this item is ladder"),
        (ITEM + "  - {layers: 0, use: ladder, stages: a0}", 4, "unknown key 'stages'"),
        ("format: 1\ntracks: 4\nschedule: {}", 3, "must be a list"),
    ],
)
def test_each_fault_has_its_line(text: str, line: int, says: str) -> None:
    found = faults(text)
    assert any(f.startswith(f"s.yaml:{line}: ") and says in f for f in found), found


def test_all_faults_are_reported_at_once() -> None:
    text = GOOD.replace("tracks: 4", "tracks: x").replace("depth: 2", "depth: y")
    text = text.replace("deferred", "defered").replace("a5|m5!", "?")
    assert [f.split(":")[1] for f in faults(text)] == ["2", "3", "10", "13"]


def test_gaps_are_reported_beside_other_faults() -> None:
    text = GOOD.replace("tracks: 4", "tracks: x").replace("layers: 0-1", "layers: 0")
    assert [f.split(":")[1] for f in faults(text)] == ["2", "8"]


def test_control_characters_are_escaped() -> None:
    (found,) = faults(GOOD.replace("deferred: mean", 'deferred: "sum\\nerror: \\e[31m"'))
    assert "\\x1b[31m" in found and found.isprintable()


def test_alias_bombs_are_refused_quickly() -> None:
    bomb = "a: &a [x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)
    )
    assert len(faults(bomb)) == 1


def test_presets_mean_the_stages_of_the_model_itself() -> None:
    text = "a0|m0! a1|m1! a2|m2. a3|m3^1 a4|m4! a5|m5!"
    assert str(parse_spec(GOOD, "s.yaml").schedule(parallel=True)) == text


def test_what_can_change_nothing_in_parallel_layers() -> None:
    """Where attention and MLP share an all-reduce anyway, no track goes on without the others."""
    text = "format: 1\ntracks: 2\nassignment: affinity\nguess: {rank: 4}\nschedule:\n"
    spec = parse_spec(text + "  - {layers: 0-1, use: sync_point_drop}\n", "s.yaml")
    spec.check(shape(num_hidden_layers=2))
    with pytest.raises(SpecError, match="no track goes on without") as error:
        spec.check(shape(num_hidden_layers=2, model_type="cohere"))
    assert [f.split(":")[1] for f in error.value.faults] == ["3", "4"]


def test_what_does_not_fit_the_model() -> None:
    spec = parse_spec(GOOD.replace("tracks: 4", "tracks: 3"), "s.yaml")
    with pytest.raises(SpecError) as error:
        spec.check(shape(num_hidden_layers=5))
    assert [f.split(":")[1] for f in error.value.faults] == ["2", "12"]
    assert "possible are 1, 2, 4, 8" in error.value.faults[0]
    with pytest.raises(SpecError, match="layers 6-7 of the model are not in the schedule"):
        parse_spec(GOOD, "s.yaml").check(shape(num_hidden_layers=8))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        read_spec(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="is a directory; it must be a file"):
        read_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"format: \xff")
    with pytest.raises(SpecError, match="can't be read"):
        read_spec(tmp_path / "latin.yaml")
