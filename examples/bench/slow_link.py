"""Decode step times of converted models over a slow link between 2 ranks on one machine.

    python examples/bench/slow_link.py [--source DIR] [--delays 0 200 1000] [--csv FILE]

Two network namespaces, a TUN device in each, and a thread here that holds every packet back for
the one-way delay (microseconds) stand for the network; one rank runs in each namespace under
`ptconvert verify`, float32, one thread. Needs root, `ip` (Debian: iproute2) and /dev/net/tun, and
no network of its own; nothing leaves the namespaces. DIR is a dense checkpoint (default: a Llama
with random weights, made here); its conversions take five times its size in the temporary
directory.

Times are of a decode step, the slower rank's, over verify's timed passes. "speed-up" is
over the same weights under tensor parallelism, which verify alternates with the schedule in the
same run. "overlap" is the part of the asynchronous all-reduces' transfer time that ran under
computation in verify's profiled pass, "exposed" those of which less than half did. "compute" is
the same step, measured the same way with both ranks at work, but with a communicator that returns
its input: all computation, nothing sent and nothing waited for. The link's thread takes its
processor time from the same cores as the ranks, so on two cores it slows them a little.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_conversion
from ptconvert.errors import PTConvertError
from ptconvert.modeling.executor import OneProcess
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.schedule import Counts
from ptconvert.spec.document import parse_spec
from ptconvert.verify.run import Settings, verify

RANKS = 2
PRESETS = {
    "tensor_parallel": "tensor_parallel",
    "ladder": "ladder",
    "parallel_track, depth 4": "parallel_track, depth: 4",
    "parallel_track, depth 4, overlap 1": "parallel_track, depth: 4, overlap: 1",
    "delayed, delay 2": "delayed, delay: 2",
}
PROMPT_TOKENS, NEW_TOKENS = 16, 8
LIMIT_SECONDS = 180.0  # of one run on 2 ranks
TABLE_WIDTH = 150  # where there is no terminal
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PR_SET_TIMERSLACK = 29


class Missing(Exception):  # noqa: N818  # it reads as what happened
    """Something that this machine would need for the link; exit code 2."""


class Failed(Exception):  # noqa: N818
    """A run that did not end well; exit code 1."""


@dataclass(frozen=True)
class Row:
    """A schedule at a delay, in milliseconds where it says ms."""

    delay_us: int
    schedule: str
    all_reduces: int
    waited_for: int
    decode_ms: float
    decode_ms_least: float
    decode_ms_most: float
    compute_ms: float
    speed_up: float
    speed_up_least: float
    speed_up_most: float
    asynchronous: int
    overlap_share: float
    exposed: int


def ip(*arguments: str, check: bool = True) -> None:
    """Runs `ip`; raises Missing, with what it said, where it can't do what was asked."""
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and ran.returncode:
        raise Missing(f"`ip {' '.join(arguments)}` failed: {ran.stderr.strip()}")


class Link:
    """Two namespaces and the link between them, for as long as the `with` block lasts."""

    def __init__(self, delay_us: int) -> None:
        self._seconds = delay_us / 1e6
        self.names = [f"ptconvert-{os.getpid()}-{end}" for end in range(RANKS)]
        self.devices = [f"pt{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.0.0.1", "10.0.0.2"]
        self._stack = contextlib.ExitStack()

    def prefix(self, rank: int) -> list[str]:
        """What makes a command run at a rank's end of the link."""
        return ["ip", "netns", "exec", self.names[rank]]

    def __enter__(self) -> Link:
        with self._stack:  # what exists is removed where the rest can't be made
            tuns = [self._end(index) for index in range(RANKS)]
            stop, stopper = os.pipe()
            self._stack.callback(os.close, stop)
            thread = threading.Thread(target=forward, args=(tuns, stop, self._seconds), daemon=True)
            thread.start()
            self._stack.callback(thread.join, 5)
            self._stack.callback(os.close, stopper)  # runs first: ends the thread
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self, index: int) -> int:
        """One end: a namespace with a TUN device in it; returns the device's file descriptor."""
        name, device, address = self.names[index], self.devices[index], self.addresses[index]
        self._stack.callback(ip, "netns", "del", name, check=False)
        ip("netns", "add", name)
        try:
            tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
            self._stack.callback(os.close, tun)  # the device goes with it
            request = struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI)
            fcntl.ioctl(tun, TUNSETIFF, request)
        except OSError as error:
            raise Missing(f"{TUN} can't be used: {error}") from None
        ip("link", "set", device, "netns", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "addr", "add", address, "peer", self.addresses[1 - index], "dev", device)
        # Large packets: what is emulated is latency, and each packet costs this process time.
        ip("-n", name, "link", "set", device, "mtu", "9000", "up")
        return tun


def forward(tuns: list[int], stop: int, seconds: float) -> None:
    """Carries packets between two TUN devices, each `seconds` late, until `stop` is closed."""
    with contextlib.suppress(OSError):  # before the ranks, so that the delay is what was asked for
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # the default adds 50 us to a wait
    other = {tuns[0]: tuns[1], tuns[1]: tuns[0]}
    held: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, held[0][0] - time.perf_counter()) if held else None
        ready, _, _ = select.select([*tuns, stop], [], [], wait)
        if stop in ready:
            return
        for tun in ready:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(tun, 1 << 16)
                    held.append((time.perf_counter() + seconds, other[tun], packet))
        while held and held[0][0] <= time.perf_counter():
            _, tun, packet = held.popleft()
            with contextlib.suppress(OSError):  # a full queue drops, as networks do; TCP resends
                os.write(tun, packet)


def on_ranks(
    link: Link,
    what: str,
    arguments: Sequence[str | Path],
    directory: Path,
    limit: float = LIMIT_SECONDS,
    ranks: int = RANKS,
) -> None:
    """Runs this Python with arguments as all ranks; raises Failed unless all exit with 0."""
    outputs = [directory / f"output.{rank}" for rank in range(ranks)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank, output in enumerate(outputs):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": link.addresses[0],
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": link.devices[rank],
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",  # a rank has one core, and importing torch reads this
            }
            command = [*link.prefix(rank), sys.executable, *map(str, arguments)]
            with output.open("wb") as stream:
                running.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | variables,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        codes = wait_for(running, limit)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if any(code != 0 for code in codes):
        raise Failed("\n".join([what, *map(how_it_ended, outputs, codes)]))


def how_it_ended(output: Path, code: int | None) -> str:
    """A rank's exit code and the last that it said."""
    ended = "was still running" if code is None else f"exit code {code}"
    return f"rank {output.suffix[1:]}: {ended}\n{output.read_text(errors='replace')[-2000:]}"


def wait_for(running: list[subprocess.Popen[bytes]], limit: float) -> list[int | None]:
    """Exit codes once all have ended, or one has failed (and 5 s passed), or time is up."""
    deadline = time.monotonic() + limit
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        if any(process.poll() for process in running):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.1)
    return [process.poll() for process in running]


def on_rank_alone(checkpoint: Path, file: Path, repeats: int) -> None:
    """A rank's part of the "compute" measurement: verify, but nothing is ever sent in a step."""
    settings = Settings(
        RANKS,
        dtype="float32",
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        repeats=repeats,
        timeout=LIMIT_SECONDS,
    )
    # Its checks can't hold, as the ranks never meet; only the times are of use.
    report = verify(checkpoint, settings, wrap=lambda *_: OneProcess())
    if report is not None:
        file.write_text(json.dumps(report.to_json()))


def on_rank_probe(file: Path, width: int) -> None:
    """Times all-reduces of one token's size over the link, with nothing else going on."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_SECONDS / 2))
    seconds = []
    for _ in range(60):
        started = time.perf_counter()
        dist.all_reduce(torch.zeros(1, 1, width))
        seconds.append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(statistics.median(seconds[10:])))
    dist.barrier()
    dist.destroy_process_group()


def make_model(directory: Path) -> Path:
    """A Llama with random weights: a decode step computes about as long as a slow link delays."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def convert(source: Path, destination: Path, preset: str, tracks: int = RANKS) -> Counts:
    """Converts all layers to a preset; returns what its schedule promises."""
    checkpoint = open_checkpoint(source)
    layers = ModelShape.from_config(checkpoint.config).layers
    text = (
        f"format: 1\ntracks: {tracks}\nschedule:\n  - {{layers: 0-{layers - 1}, use: {preset}}}\n"
    )
    plan = plan_conversion(checkpoint, parse_spec(text, preset), source_name=source.name)
    execute(plan, destination)
    return plan.schedule.counts


class Bench:
    """The conversions of one source, and the runs on them."""

    def __init__(self, source: Path, directory: Path, repeats: int) -> None:
        self._directory, self._repeats = directory, repeats
        self._width = ModelShape.from_config(open_checkpoint(source).config).width
        self._paths = {name: directory / f"converted-{i}" for i, name in enumerate(PRESETS)}
        self._counts = {n: convert(source, p, PRESETS[n]) for n, p in self._paths.items()}
        self._compute_ms: dict[str, float] = {}

    def measure_compute(self, name: str) -> None:
        """The decode step's computation alone, which no delay changes."""
        arguments: list[str | Path] = [Path(__file__), "--on-rank", "alone"]
        arguments += [self._paths[name], str(self._repeats)]
        with Link(0) as link:
            report = self._run(link, f"{name}, compute alone", arguments, 4)
        seconds = report["comparison"]["schedule"]["seconds"]["decode"]
        self._compute_ms[name] = 1e3 * statistics.median(seconds)

    def all_reduce_ms(self, delay: int) -> float:
        """An all-reduce of one token's size, with nothing else going on."""
        arguments: list[str | Path] = [Path(__file__), "--on-rank", "probe", str(self._width)]
        with Link(delay) as link:
            return 1e3 * float(self._run(link, f"{delay} us, one all-reduce", arguments, 3))

    def row(self, delay: int, name: str) -> Row:
        """verify's figures for a schedule at a delay."""
        arguments: list[str | Path] = ["-m", "ptconvert", "verify", self._paths[name]]
        arguments += ["--device", "cpu", "--dtype", "float32", "--repeats", str(self._repeats)]
        arguments += ["--prompt", str(PROMPT_TOKENS), "--new", str(NEW_TOKENS)]
        arguments += ["--timeout", str(LIMIT_SECONDS), "--report"]
        with Link(delay) as link:
            report = self._run(link, f"{delay} us, {name}", arguments, len(arguments))
        milliseconds = [1e3 * s for s in report["comparison"]["schedule"]["seconds"]["decode"]]
        speed_up, overlap = report["comparison"]["speed_up"]["decode"], report["overlap"]
        return Row(
            delay,
            name,
            self._counts[name].all_reduces,
            self._counts[name].waited_for,
            statistics.median(milliseconds),
            min(milliseconds),
            max(milliseconds),
            self._compute_ms[name],
            speed_up["median"],
            speed_up["least"],
            speed_up["most"],
            overlap["asynchronous"],
            overlap["share"],
            overlap["exposed"],
        )

    def _run(self, link: Link, what: str, arguments: Sequence[str | Path], at: int) -> Any:
        """Runs on both ranks; returns the JSON that rank 0 wrote to the file put in at `at`."""
        file = self._directory / "result.json"
        file.unlink(missing_ok=True)
        on_ranks(link, what, [*arguments[:at], file, *arguments[at:]], self._directory)
        if not file.exists():
            raise Failed(f"{what}: rank 0 left no result")
        return json.loads(file.read_text())


def to_table(delay: int, all_reduce_ms: float, repeats: int, rows: list[Row]) -> Table:
    title = f"{delay} us one way; an all-reduce by itself takes {all_reduce_ms:.2f} ms\n"
    table = Table(title=title + f"median of {repeats} (range)")
    columns = ["all-reduces", "waited for", "decode step ms", "compute ms", "speed-up"]
    for column in ("", *columns, "overlap", "exposed"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        asynchronous = row.asynchronous > 0
        table.add_row(
            row.schedule,
            str(row.all_reduces),
            str(row.waited_for),
            f"{row.decode_ms:.1f} ({row.decode_ms_least:.1f}-{row.decode_ms_most:.1f})",
            f"{row.compute_ms:.1f}",
            f"{row.speed_up:.2f} ({row.speed_up_least:.2f}-{row.speed_up_most:.2f})",
            f"{row.overlap_share:.0%}" if asynchronous else "",
            f"{row.exposed} of {row.asynchronous}" if asynchronous else "",
        )
    return table


def check_machine() -> None:
    """Raises Missing where the link can't be made here."""
    if shutil.which("ip") is None:
        raise Missing("there is no `ip` command; Debian's package is iproute2")
    if not TUN.exists():
        raise Missing(f"there is no {TUN}; load the kernel's tun module")
    if os.geteuid() != 0:
        raise Missing("making network namespaces and TUN devices needs root")


@contextlib.contextmanager
def csv_rows(file: Path | None) -> Iterator[list[Row]]:
    """A list of which whatever it holds in the end is written, even where a later run fails."""
    rows: list[Row] = []
    if file is None:
        yield rows
        return
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        try:
            yield rows
        finally:
            writer.writerows(asdict(row) for row in rows)


def bench(arguments: argparse.Namespace, directory: Path) -> None:
    errors = Console(stderr=True)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    with csv_rows(arguments.csv) as rows, errors.status("converting") as status:
        source = arguments.source or make_model(directory / "source")
        runs = Bench(source, directory, arguments.repeats)
        for name in PRESETS:
            status.update(f"compute alone: {name}")
            runs.measure_compute(name)
        for delay in arguments.delays:
            status.update(f"{delay} us: one all-reduce")
            all_reduce_ms = runs.all_reduce_ms(delay)
            for name in PRESETS:
                status.update(f"{delay} us: {name}")
                rows.append(runs.row(delay, name))
            own = rows[-len(PRESETS) :]
            console.print(to_table(delay, all_reduce_ms, arguments.repeats, own))


def delay_us(text: str) -> int:
    """A delay from 0 to 100 ms, above which TCP and the time limit get in the way."""
    if not 0 <= (delay := int(text)) <= 100_000:
        raise ValueError
    return delay


def end(*_: object) -> None:
    """Ends by an exception, so that namespaces and ranks are removed on the way out."""
    raise SystemExit(128 + signal.SIGTERM)


def main() -> None:
    if sys.argv[1:3] == ["--on-rank", "alone"]:  # this script again, in a namespace
        return on_rank_alone(Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    if sys.argv[1:3] == ["--on-rank", "probe"]:
        return on_rank_probe(Path(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description="Decode step times over an emulated slow link.")
    parser.add_argument("--source", type=Path, help="a dense checkpoint (default: one made here)")
    parser.add_argument(
        "--delays", type=delay_us, nargs="+", default=[0, 200, 1000], help="one way, microseconds"
    )
    parser.add_argument("--repeats", type=int, choices=range(1, 100), metavar="N", default=3)
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    try:
        check_machine()
        with tempfile.TemporaryDirectory(prefix="ptconvert-link-") as directory:
            bench(arguments, Path(directory))
    except (Missing, Failed, PTConvertError, OSError) as error:
        print(f"slow_link: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, Failed) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    return None


if __name__ == "__main__":
    main()
