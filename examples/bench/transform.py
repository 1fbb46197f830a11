"""Throughput and memory of `ptconvert transform` against `cp`, on a checkpoint it makes.

    python examples/bench/transform.py [--gigabytes 2 10] [--quantised] [--repeats 3]

Makes a synthetic Llama checkpoint (bf16, or with --quantised compressed-tensors' W4A16 in groups of
128; random bytes, sharded), then alternates, in one run:
`cp -r` followed by `sync`, a pure reroute (ladder in all layers) and tracks in all layers. All are
timed until the bytes are on disk, since the transform flushes what it writes. Prints, for each
size, seconds, bytes per second, the ratio to `cp`, and the peak resident memory above a bare
interpreter's, the package's imports included ("peak MB", from a run of its own).
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ptconvert.checkpoint.layout import place
from ptconvert.checkpoint.writer import Target, lay_out, write_arrays
from ptconvert.models.shape import ModelShape

WIDTH, NEURONS, HEADS, KV_HEADS, VOCABULARY, TRACKS = 4096, 14336, 32, 8, 32768, 8
GROUP = 128  # of 4-bit weights
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


def bench(directory: Path, gigabytes: float, repeats: int, quantised: bool) -> Table:
    source = directory / "source"
    shape = make_checkpoint(source, gigabytes, quantised)
    ladder = write_spec(directory / "ladder.yaml", shape, "ladder")
    tracks = write_spec(directory / "tracks.yaml", shape, "parallel_track, depth: 4")
    outputs = {name: directory / name for name in ("cp", "reroute", "tracks")}
    transforms: dict[str, list[str | Path]] = {
        name: ["transform", source, outputs[name], "--spec", spec, "--json"]
        for name, spec in (("reroute", ladder), ("tracks", tracks))
    }
    commands: dict[str, list[str | Path]] = {"cp": ["cp", "-r", source, outputs["cp"]]}
    for name, arguments in transforms.items():
        commands[name] = [sys.executable, "-m", "ptconvert", *arguments]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            seconds[name].append(measure(command, outputs[name]))
            shutil.rmtree(outputs[name])
    bare = peak_bytes(directory)
    above = {name: peak_bytes(directory, *args) - bare for name, args in transforms.items()}
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    table = Table(title=f"{size / 1e9:.1f} GB, {shape.layers} layers, median of {repeats}")
    for column in ("", "seconds", "GB/s", "of cp's rate", "range", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name in commands:
        ratios = [c / t for c, t in zip(seconds["cp"], seconds[name], strict=True)]
        median = statistics.median(seconds[name])
        table.add_row(
            name,
            f"{median:.1f}",
            f"{size / median / 1e9:.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
            f"{above[name] / 1e6:.0f}" if name in above else "",
        )
    shutil.rmtree(source)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of transform against cp.")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 10])
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantised", action="store_true", help="4-bit weights instead of bf16")
    arguments = parser.parse_args()
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            asked = (gigabytes, arguments.repeats, arguments.quantised)
            Console().print(bench(Path(directory), *asked))


if __name__ == "__main__":
    main()
