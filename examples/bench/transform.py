"""Throughput and memory of `ptconvert transform` against `cp`, on a checkpoint it makes.

    python examples/bench/transform.py [--gigabytes 2 10] [--quantised] [--repeats 3]

Makes a synthetic Llama checkpoint (random bytes in bf16, sharded; with --quantised one as large in
compressed-tensors' W4A16 in groups of 128 beside it), then alternates, in one run: `cp -r` followed
by `sync`, a pure reroute (ladder in all layers) and tracks in all layers. All are timed until the
bytes are on disk, since the transform flushes what it writes. Prints, for each size, seconds, bytes
per second, the ratio to `cp` and to bf16, and the peak resident memory above a bare interpreter's,
the package's imports included ("peak MB", from a run of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ptconvert.checkpoint.layout import place
from ptconvert.checkpoint.writer import Target, lay_out, write_arrays
from ptconvert.models.shape import ModelShape

WIDTH, NEURONS, HEADS, KV_HEADS, VOCABULARY, TRACKS = 4096, 14336, 32, 8, 32768, 8
GROUP = 128  # of 4-bit weights
BF16, W4A16 = "bf16", "W4A16"
SHARD_BYTES = 2 * 10**9


def make_checkpoint(directory: Path, gigabytes: float, quantised: bool) -> ModelShape:
    """A sharded checkpoint of Llama-3.1-8B's layer shape, with as many layers as fit the size."""
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
        "num_hidden_layers": 1,
    }
    per_layer = (0.5 + 2 / GROUP if quantised else 2) * (
        WIDTH * (2 * WIDTH + 2 * KV_HEADS * WIDTH // HEADS) + 3 * WIDTH * NEURONS
    )
    embeddings = 2 * 2 * VOCABULARY * WIDTH
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - embeddings) / per_layer))
    if quantised:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
        group = {"targets": ["Linear"], "weights": {**weights, "symmetric": True}}
        config["quantization_config"] = {
            **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
            **{"config_groups": {"group_0": group}, "ignore": ["lm_head"]},
        }
    shape = ModelShape.from_config(config)
    directory.mkdir()
    stored = [one for name, size in shape.tensors() for one in tensors(name, size, quantised)]
    targets = place(stored, SHARD_BYTES)
    placed = lay_out(directory, targets)
    block = np.random.default_rng(0).bytes(1 << 20)
    for file in sorted({t.file for t in targets}):
        with (directory / file).open("r+b") as stream:
            start = stream.seek(int.from_bytes(stream.read(8), "little") + 8)
            left = (directory / file).stat().st_size - start
            while left > 0:
                left -= stream.write(block[:left])
    sizes = dict(shape.tensors())
    told = {
        t.name: np.array(sizes[t.name.removesuffix("_shape")])
        for t in targets
        if t.name.endswith("_shape")
    }
    write_arrays(placed, told, lambda _: None)
    weight_map = {t.name: t.file for t in targets}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    subprocess.run(["sync"], check=True)
    return shape


def tensors(name: str, size: tuple[int, ...], quantised: bool) -> list[Target]:
    """What a weight is kept as."""
    if not quantised or ".layers." not in name or len(size) < 2:
        return [Target(name, "model", "BF16", size)]
    outputs, inputs = size
    return [
        Target(f"{name}_packed", "model", "I32", (outputs, inputs // 8)),
        Target(f"{name}_scale", "model", "BF16", (outputs, inputs // GROUP)),
        Target(f"{name}_shape", "model", "I64", (2,)),
    ]


def write_spec(path: Path, shape: ModelShape, use: str) -> Path:
    path.write_text(
        f"format: 1\ntracks: {TRACKS}\nschedule:\n"
        f"  - {{layers: 0-{shape.layers - 1}, use: {use}}}\n"
    )
    return path


def measure(command: Sequence[str | Path], output: Path) -> float:
    """Seconds until the command's output is on disk."""
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    started = time.monotonic()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    for path in output.iterdir():  # a no-op for what has been flushed
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.monotonic() - started


# Peak resident memory of this process alone: ru_maxrss would count the parent's before exec, too.
PEAK = """
import atexit, sys
def peak():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    with open(sys.argv[1], "w") as out:
        out.write(str(int(line.split()[1]) * 1024))
atexit.register(peak)
"""
COMMAND = "from ptconvert.cli import main\nmain(sys.argv[2:])"


def peak_bytes(directory: Path, *arguments: str | Path) -> int:
    """Peak resident bytes of a command, imports included; of a bare interpreter without one."""
    code = PEAK + (COMMAND if arguments else "")
    out = directory / "peak"
    command = [sys.executable, "-c", code, str(out), *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return int(out.read_text())


@dataclass(frozen=True)
class Case:
    """One checkpoint and what is done with it, by name; `runs` are the seconds of each."""

    weights: str
    source: Path
    layers: int
    transforms: Mapping[str, list[str | Path]]
    runs: Mapping[str, list[float]]

    @property
    def nbytes(self) -> int:
        """Of its tensors and their headers."""
        return sum(p.stat().st_size for p in self.source.glob("*.safetensors"))

    def command(self, name: str) -> list[str | Path]:
        if name == "cp":
            return ["cp", "-r", self.source, self.output(name)]
        return [sys.executable, "-m", "ptconvert", *self.transforms[name]]

    def output(self, name: str) -> Path:
        return self.source.parent / name

    def rates(self, name: str) -> list[float]:
        """Bytes per second, in turn."""
        return [self.nbytes / seconds for seconds in self.runs[name]]


def make_case(directory: Path, gigabytes: float, weights: str) -> Case:
    directory.mkdir()
    source = directory / "source"
    shape = make_checkpoint(source, gigabytes, weights != BF16)
    specs = {
        "reroute": write_spec(directory / "ladder.yaml", shape, "ladder"),
        "tracks": write_spec(directory / "tracks.yaml", shape, "parallel_track, depth: 4"),
    }
    transforms: dict[str, list[str | Path]] = {
        name: ["transform", source, directory / name, "--spec", spec, "--json"]
        for name, spec in specs.items()
    }
    return Case(weights, source, shape.layers, transforms, {name: [] for name in ("cp", *specs)})


def bench(directory: Path, gigabytes: float, repeats: int, quantised: bool) -> Table:
    formats = [BF16, W4A16] if quantised else [BF16]
    cases = [make_case(directory / weights, gigabytes, weights) for weights in formats]
    for _ in range(repeats):
        for name in cases[0].runs:
            for case in cases:
                case.runs[name].append(measure(case.command(name), case.output(name)))
                shutil.rmtree(case.output(name))
    bare = peak_bytes(directory)
    layers = " and ".join(str(case.layers) for case in cases)
    table = Table(title=f"{cases[0].nbytes / 1e9:.1f} GB, {layers} layers, median of {repeats}")
    columns = ["weights", "", "seconds", "GB/s", "of cp's rate", "range", "peak MB"]
    for column in (*columns, *(["of bf16's rate", "range"] if quantised else [])):
        table.add_column(column, justify="left" if column in ("weights", "") else "right")
    for case in cases:
        for name, seconds in case.runs.items():
            peak = ""
            if arguments := case.transforms.get(name):
                peak = f"{(peak_bytes(directory, *arguments) - bare) / 1e6:.0f}"
            table.add_row(
                case.weights,
                name,
                f"{statistics.median(seconds):.1f}",
                f"{statistics.median(case.rates(name)) / 1e9:.2f}",
                *ratios(case.rates(name), case.rates("cp")),
                peak,
                *(ratios(case.rates(name), cases[0].rates(name)) if quantised else ()),
            )
    return table


def ratios(rates: Sequence[float], others: Sequence[float]) -> tuple[str, str]:
    """The median of what one is of the other, in turn, and its range."""
    found = [a / b for a, b in zip(rates, others, strict=True)]
    return f"{statistics.median(found):.2f}", f"{min(found):.2f}-{max(found):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of transform against cp.")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 10])
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantised", action="store_true", help="4-bit weights beside bf16")
    arguments = parser.parse_args()
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            asked = (gigabytes, arguments.repeats, arguments.quantised)
            Console().print(bench(Path(directory), *asked))


if __name__ == "__main__":
    main()
