"""verify on real ranks: counts, answers, faults, and that nothing is ever left hanging."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from conftest import FIXTURE, Convert, MakeDense, spec_text
from test_modeling import SCHEDULES

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.section import read_section
from ptconvert.cli import main
from ptconvert.errors import CheckpointError
from ptconvert.modeling.executor import Communicator
from ptconvert.modeling.layers import Placement
from ptconvert.runtime.counters import Profile
from ptconvert.runtime.launch import Rank, _context, _device, launch
from ptconvert.runtime.load import load_rank, rank_bytes, shape_of
from ptconvert.verify import session
from ptconvert.verify.expected import Expected
from ptconvert.verify.run import Report, Settings, _backend, _checks, verify
from ptconvert.verify.session import Job, first_choices, run_rank

PROMPT, NEW, BATCH = 5, 2, 2
SETTINGS = Settings(
    ranks=2,
    repeats=1,
    timeout=120,  # a busy machine is no failure
    dtype="float32",
    prompt_tokens=PROMPT,
    new_tokens=NEW,
    batch=BATCH,
)


def job(path: Path) -> Job:
    """What is timed is no matter here."""
    return Job(path, torch.float32, PROMPT, NEW, BATCH, seed=0, repeats=0)


def run_many(jobs: list[Job], rank: Rank) -> dict[str, Any]:
    """Several verifications in the same processes, since starting them takes longest."""
    return {"results": [run_rank(one, rank) for one in jobs]}


def expected_of(path: Path) -> Expected:
    checkpoint = open_checkpoint(path)
    schedule = read_section(checkpoint.config).schedule
    return Expected(schedule, shape_of(checkpoint), torch.float32, BATCH, PROMPT, NEW)


@pytest.mark.slow
@pytest.mark.parametrize(("tracks", "ranks"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_every_schedule_on_every_number_of_ranks(
    tracks: int, ranks: int, make_dense: MakeDense, convert: Convert
) -> None:
    paths = {
        name: convert(make_dense("llama-biases"), tracks, schedule)
        for name, schedule in SCHEDULES.items()
    }
    paths["qwen3"] = convert(make_dense("qwen3"), tracks, SCHEDULES["mixed"])
    paths["tied"] = convert(make_dense("llama3-rope-tied"), tracks, SCHEDULES["mixed"])
    paths["mqa"] = convert(make_dense("llama-mqa"), tracks, SCHEDULES["mixed"])
    jobs = [job(path) for path in paths.values()]
    by_rank = launch(run_many, jobs, ranks, "gloo", "cpu", 300)
    for index, (name, path) in enumerate(paths.items()):
        expected, results = expected_of(path), [r["results"][index] for r in by_rank]
        failed = [c for c in _checks(results, expected) if not c.ok]
        assert not failed, (name, failed)
        counts = expected.schedule.counts
        for result in results:
            assert list(result["counted"]) == ["prefill", "decode 1"]
            assert len(result["counted"]["prefill"]) == counts.all_reduces
            assert len(result["profiled"]["decode 1"]) == counts.all_reduces
            launched = [c["asynchronous"] for c in result["profiled"]["prefill"]]
            assert launched == [overlapped for _, overlapped, _ in expected.all_reduces()]
            assert len(result["baseline"]["prefill"]) == 2 * expected.schedule.layers
            assert len(result["transfers"]) == 2 * sum(launched)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def load_and_measure(path: Path, rank: Rank) -> dict[str, Any]:
    from ptconvert.runtime.communicator import ProcessGroupCommunicator

    communicator = ProcessGroupCommunicator(None, rank.journal)
    load_rank(path, Placement(rank.rank, rank.ranks), communicator)  # imports what it needs
    before = bytes_read()
    load_rank(path, Placement(rank.rank, rank.ranks), communicator)
    return {"bytes": bytes_read() - before}


def test_each_rank_reads_only_its_own_bytes(make_dense: MakeDense, convert: Convert) -> None:
    source = make_dense("llama", hidden_size=256, intermediate_size=512, head_dim=32)
    path = convert(source, 4, SCHEDULES["track-2-rest"])
    checkpoint = open_checkpoint(path)
    headers = 40_000  # config.json, the index and the files' headers, read to find the tensors
    for ranks in (2, 4):
        read = [r["bytes"] for r in launch(load_and_measure, path, ranks, "gloo", "cpu", 200)]
        for rank, count in enumerate(read):
            own = rank_bytes(checkpoint, Placement(rank, ranks))
            assert own <= count < own + headers + 80_000
        assert own < checkpoint.nbytes * 1.2 / ranks


def _level(_job: None, _rank: Rank) -> dict[str, Any]:
    return {"level": logging.getLogger("torchao").level}


def test_other_libraries_say_nothing_in_ranks() -> None:
    """These are forked from a process that imports them before it hears of anything else."""
    assert launch(_level, None, 1, "gloo", "cpu", 60.0) == [{"level": logging.ERROR}]


def test_ranks_on_gpus_are_not_forked() -> None:
    assert _context("cuda").get_start_method() == "spawn"
    assert _context("cpu").get_start_method() == "forkserver"


@pytest.mark.parametrize(
    ("gpus", "ranks", "backend", "devices"),
    [
        (1, 1, "nccl", [0]),
        (1, 2, "gloo", [0, 0]),
        (2, 4, "gloo", [0, 1, 0, 1]),
        (2, 2, "nccl", [0, 1]),
    ],
)
def test_ranks_share_out_the_gpus(
    gpus: int, ranks: int, backend: str, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL where there is one for each, else gloo, and then times are said to mean nothing."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    found, notes = _backend(replace(SETTINGS, ranks=ranks, device="cuda"))
    assert found == backend and bool(notes) == (backend == "gloo")
    assert [_device("cuda", rank).index for rank in range(ranks)] == devices
    assert [device.index for device in chosen] == devices
    if backend == "gloo":
        with pytest.raises(CheckpointError, match="nccl needs a GPU per rank"):
            _backend(replace(SETTINGS, ranks=ranks, device="cuda", backend="nccl"))


def held_at_the_end(job: Job, rank: Rank) -> dict[str, Any]:
    """Whether a rank's layers are in memory while the single-process model runs."""
    layers: list[Any] = []
    reference = session._against_one_process

    def loading(*arguments: Any) -> Any:
        model = load_rank(*arguments)
        layers.append(weakref.ref(model.get_decoder().layers))
        return model

    def asked(*arguments: Any) -> dict[str, Any]:
        return reference(*arguments) | {"held": layers[0]() is not None}

    with (
        mock.patch.object(session, "load_rank", loading),
        mock.patch.object(session, "_against_one_process", asked),
    ):
        found: dict[str, Any] = run_rank(job, rank)["reference"]
    return found


def test_a_rank_lets_go_of_its_layers(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama"), 2, "use: ladder")
    (found,) = launch(held_at_the_end, job(path), 1, "gloo", "cpu", 120)
    assert not found["held"]


@dataclass
class Faulty:
    """A communicator with a fault on rank 1, at its third all-reduce."""

    inner: Communicator
    fault: Callable[[Communicator, torch.Tensor], torch.Tensor]
    calls: int = 0

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            return self.fault(self.inner, partial_BSD)
        return self.inner.all_reduce(partial_BSD)

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        return self.inner.start_all_reduce(partial_BSD)


def raises(_: Communicator, __: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of luck")


def is_killed(_: Communicator, x: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def stops_answering(_: Communicator, x: torch.Tensor) -> torch.Tensor:
    time.sleep(1000)
    return x


def skips_one(_: Communicator, x: torch.Tensor) -> torch.Tensor:
    return x


def adds_one(inner: Communicator, x: torch.Tensor) -> torch.Tensor:
    return inner.all_reduce(inner.all_reduce(x))


def other_shape(inner: Communicator, x: torch.Tensor) -> torch.Tensor:
    return inner.all_reduce(x[..., :-1])


def other_dtype(inner: Communicator, x: torch.Tensor) -> torch.Tensor:
    return inner.all_reduce(x.to(torch.int32)).to(x.dtype)


@dataclass(frozen=True)
class OnRankOne:
    """Puts a fault into rank 1; a class, because it travels to the ranks."""

    fault: Callable[[Communicator, torch.Tensor], torch.Tensor]

    def __call__(self, inner: Communicator, rank: int) -> Communicator:
        return Faulty(inner, self.fault) if rank == 1 else inner


def rank_processes() -> list[str]:
    """Processes of this test that run ranks, by their command line."""
    found, server = [], forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert server is not None
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = (path.parent / "cmdline").read_bytes().decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == server and fields[0] != "Z":
            found.append(command)
    return found


def tell(report: Report | None) -> str:
    assert report is not None and not report.ok
    lines = [f"rank {f.rank}: {f.why}\n{f.trace}" for f in report.failures]
    lines += [f"{c.name}: {c.seen}" for c in report.checks if not c.ok]
    text = "\n".join(lines)
    assert len(text.splitlines()) <= 60
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (raises, ["rank 1: RuntimeError: out of luck; stood at counted prefill, stage 3 a1!"]),
        (is_killed, ["rank 1: killed by SIGKILL; stood at counted prefill, stage 3 a1!"]),
        (stops_answering, ["rank 1: did not finish in time", "stage 3 a1!", "in stops_answering"]),
        (skips_one, ["rank 1: left the schedule: counted prefill, stage 3 a1!", "nothing, the"]),
        (adds_one, ["rank 1: left the schedule: counted prefill, stage 3 a1!"]),
        (other_shape, ["rank 1: left the schedule: counted prefill, stage 3 a1!", "2x5x31"]),
        (other_dtype, ["rank 1", "prefill, stage 3 a1!", "int"]),
    ],
)
def test_faults_are_found_and_named_in_time(
    fault: Any, told: list[str], make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama"), 2, "use: tensor_parallel")
    started = time.monotonic()
    # all but one are found at once; that one takes half of the time
    settings = replace(SETTINGS, timeout=30 if fault is stops_answering else 60)
    report = verify(path, settings, OnRankOne(fault))
    assert time.monotonic() - started < settings.timeout + 10
    text = tell(report)
    assert all(part in text for part in told), text
    assert report is not None and all(f.rank == 1 for f in report.failures[:1])
    assert rank_processes() == []


@dataclass
class Dropping:
    """A communicator that drops the third all-reduce, on every rank: nothing hangs, all agree."""

    inner: Communicator
    calls: int = 0

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return partial_BSD if self.calls % 12 == 3 else self.inner.all_reduce(partial_BSD)

    def start_all_reduce(self, partial_BSD: torch.Tensor) -> Callable[[], torch.Tensor]:
        waited = self.inner.all_reduce(partial_BSD)
        return lambda: waited


def dropping(inner: Communicator, _: int) -> Communicator:
    return Dropping(inner)


def test_negative_control_a_sync_dropped_by_all(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama"), 2, "use: tensor_parallel")
    text = tell(verify(path, SETTINGS, dropping))
    assert (
        "all-reduces by the flight recorder: rank 0, prefill, stage 12 m5!: no all-reduce" in text
    )
    assert "by the profiler: rank 0, prefill, stage 3 a1!: 0 all-reduces, not 1" in text
    assert "logits of the single-process model: difference" in text


def test_negative_control_an_overlapped_reduce_that_blocks(
    make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama"), 2, "use: ladder")
    text = tell(verify(path, SETTINGS, dropping))
    assert "rank 0, prefill, stage 1 a0~1: the all-reduce was blocking" in text


@pytest.mark.parametrize(
    ("was", "becomes"), [("m1! a2.", "m1. a2."), ("m1! a2.", "m1^1 a2."), ("m1! a2.", "m1~2 a2.")]
)
def test_negative_control_a_schedule_changed_after_conversion(
    was: str, becomes: str, make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama"), 2, "use: parallel_track, depth: 2")
    config = json.loads((path / "config.json").read_text())
    text = config["ptconvert"]["schedule"]
    assert was in text
    config["ptconvert"]["schedule"] = text.replace(was, becomes)
    (path / "config.json").write_text(json.dumps(config))
    assert "schedule as converted: config.json and ptconvert.yaml differ" in tell(
        verify(path, replace(SETTINGS, ranks=1))
    )


class LateFault(Faulty):
    """The same fault in a timed pass, long after what is counted."""

    def all_reduce(self, partial_BSD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 80:  # 12 in each of 6 counted and profiled steps
            return self.fault(self.inner, partial_BSD)
        return self.inner.all_reduce(partial_BSD)


def late_on_rank_one(inner: Communicator, rank: int) -> Communicator:
    return LateFault(inner, raises) if rank == 1 else inner


def test_a_fault_in_a_timed_pass_blames_nobody_else(
    make_dense: MakeDense, convert: Convert
) -> None:
    path = convert(make_dense("llama"), 2, "use: tensor_parallel")
    report = verify(path, SETTINGS, late_on_rank_one)
    assert tell(report).startswith("rank 1: RuntimeError: out of luck; stood at timed schedule")
    assert report is not None and "left the schedule" not in tell(report)


def test_a_damaged_checkpoint_is_wrong_input(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama"), 2, "use: parallel_track, depth: 2")
    config = json.loads((path / "config.json").read_text())
    config["intermediate_size"] //= 2
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has shape") as error:
        verify(path, SETTINGS)
    assert "\n" not in str(error.value)


def test_bf16_is_held_to_what_it_rounds_away(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama", torch.bfloat16), 2, "use: parallel_block")
    report = verify(path, replace(SETTINGS, dtype="bfloat16", prompt_tokens=40))
    assert report is not None and report.ok, report
    reference = report.figures["reference"]
    assert 0 < reference["difference"] <= 4 * reference["noise"]
    assert report.figures["comparison"]["schedule"]["bytes_per_token"] == 6 * 32 * 2


def test_what_is_not_a_number_is_no_choice() -> None:
    """argmax takes it for the largest, on ranks as in the model that they are compared with."""
    logits_BNV = torch.tensor([[[1.0, 2.0, 0.0], [1.0, torch.nan, 0.0]]])
    assert first_choices(logits_BNV).tolist() == [[1, -1]]


def test_a_model_whose_tokens_see_later_ones_is_not_verified(
    make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(CheckpointError, match="use_bidirectional_attention True: tokens see"):
        verify(convert(source, 2, "use: tensor_parallel"), SETTINGS)


def test_wrong_input(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama"), 4, "use: parallel_track, depth: 2")
    for changes, says in (
        ({"ranks": 3}, "it runs on 1, 2, 4 ranks"),
        ({"ranks": 8}, "it runs on 1, 2, 4 ranks"),
        ({"device": "cuda"}, "no GPU is available"),
        ({"backend": "nccl"}, "nccl"),
        ({"prompt_tokens": 200}, "more than the model's 128 positions"),
    ):
        if changes.get("device") == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(CheckpointError) as error:
            verify(path, replace(SETTINGS, **changes))
        assert says in str(error.value)
    with pytest.raises(CheckpointError, match="is not converted"):
        verify(make_dense("llama"), SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptconvert.verify.run.available_bytes", lambda _: [10**9])
        with pytest.raises(
            CheckpointError, match=r"needs about 2\.2 GB of memory on this machine, 1\.0 GB"
        ):
            verify(path, replace(SETTINGS, ranks=4))


def test_command_line(make_dense: MakeDense, convert: Convert, tmp_path: Path) -> None:
    path = convert(make_dense("llama"), 2, "use: ladder")
    trace, report = tmp_path / "trace.json", tmp_path / "report.json"
    arguments = ["--ranks", "2", "--repeats", "2", "--trace", trace, "--report", report]
    result = CliRunner().invoke(main, ["verify", str(path), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "all checks hold" in result.stdout and "1.0" in result.stdout
    figures = json.loads(report.read_text())
    assert figures["ok"] and figures["overlap"]["asynchronous"] == 2 * 8 * 11
    names = {e.get("name", "") for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"step prefill", "stage 1 a0~1", "stage 12 m5!"} <= names
    assert Profile(trace).transfers()[0].stage == "1 a0~1"
    result = CliRunner().invoke(main, ["verify", str(path), "--ranks", "3"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 2
    for files, told in (
        (("--trace", tmp_path), "must be a writable file"),
        (("--report", tmp_path / "none" / "a.json"), "in a directory that exists"),
        (("--report", Path(__file__) / "a.json"), "in a directory that exists"),
        (("--trace", trace, "--report", trace), "it is --trace, too"),
    ):
        wrong = ["verify", path, "--ranks", 2, *files]
        result = CliRunner().invoke(main, list(map(str, wrong)))
        assert result.exit_code == 2 and told in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_under_torchrun(make_dense: MakeDense, convert: Convert) -> None:
    path = convert(make_dense("llama"), 2, "use: parallel_track, depth: 2")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "ptconvert", "verify", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    start = done.stdout.index("{")
    figures, _ = json.JSONDecoder().raw_decode(done.stdout[start:])
    assert figures["ok"] and figures["ranks"] == 2 and done.stdout.count('"ok": true,') > 1


@pytest.mark.slow
@pytest.mark.skipif(
    not FIXTURE.is_dir(), reason="shared/fixtures/stdlib-llama is not beside this checkout"
)
def test_depth_4_on_the_fixture_is_8_times_fewer(convert: Convert) -> None:
    items = "  - {layers: 0-11, use: parallel_track, depth: 4}\n"
    path = convert(FIXTURE / "model", 4, items)
    arguments = ["verify", str(path), "--ranks", "2", "--repeats", "2"]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    line = next(x for x in result.stdout.splitlines() if x.startswith("all-reduces per forward"))
    assert line.split()[-3:] == ["24", "3", "8.0"]
    assert spec_text(4, items) == (path / "ptconvert.yaml").read_text()
