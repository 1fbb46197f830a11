"""What `--dry-run` says of memory and time, against what the commands then take.

    python examples/bench/memory.py --width 2048 --layers 4 --text FILE
    python examples/bench/memory.py --only-said specs/configs/llama-3.1-8b.json --text FILE

Makes a Llama of this size with random weights, runs plan, transform (an assignment by affinity and
guesses) and heal (block by block, and end to end) on the CPU, each with --dry-run first, and prints
in Markdown both figures: the most memory at once (the process's largest resident set), and seconds.
Or makes files of zeros that take no room, of a model with this config.json, and prints what
--dry-run says of it: the most at once, and in which phase.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.layout import place
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.checkpoint.writer import Target, lay_out
from ptconvert.convert.transform import plan_conversion
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.quiet import quiet_libraries
from ptconvert.spec.document import parse_spec

TRACKS, VOCABULARY = 4, 8192
# What of a command's line names it in the table.
NAMED = (
    *("plan", "transform", "heal", "--blockwise", "--no-kl", "--lora"),
    "--gradient-checkpointing",
)
SPEC = """format: 1
tracks: {tracks}
assignment: affinity
guess: {{rank: 16}}
schedule:
  - {{layers: 0-{last}, use: parallel_track, depth: 2}}
"""


def main() -> None:
    """Parses, makes the model, runs the commands, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only-said", type=Path, metavar="CONFIG")
    parser.add_argument("--dtype", default="bfloat16", help="of --only-said")
    given = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="ptconvert-memory-") as name:
        folder = Path(name)
        if given.only_said is None:
            make_model(folder / "source", given.width, given.layers)
            print("| | memory said | taken | seconds said | taken |")
            print("| --- | --- | --- | --- | --- |")
        else:
            lengths = {"max_position_embeddings": given.window}  # which `specs/configs` don't say
            make_zeros(folder, lengths | read_config(given.only_said))
            print("| | memory said | in | free disk needed |\n| --- | --- | --- | --- |")
        for command in commands(folder, given):
            print(row(command, given.only_said is None), flush=True)


def commands(folder: Path, given: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """All of them, for `folder`/source; heal's for what transform makes of it."""
    source, spec, converted = folder / "source", folder / "spec.yaml", folder / "converted"
    layers = read_config(source)["num_hidden_layers"]
    assert isinstance(layers, int)
    spec.write_text(SPEC.format(tracks=TRACKS, last=layers - 1))
    dtype = () if given.only_said is None else ("--dtype", given.dtype)
    text = ("--text", given.text, "--window", given.window, *dtype)
    windows = ("--windows", given.windows)
    tokens = ("--tokens", given.window * given.windows)
    size = ("--batch-size", given.batch_size)
    cache = ("--cache", folder / "cache")
    yield ("plan", source, "--tracks", TRACKS, *text, *windows, *size, "--max-syncs", 2, *cache)
    yield ("transform", source, converted, "--spec", spec, *text, *windows, "--overwrite")
    heal = ("heal", converted, folder / "healed", "--teacher", source, *text, *tokens)
    heal += (*size, "--evaluations", 1, "--overwrite")
    yield (*heal, "--blockwise", "--no-kl")
    yield heal
    yield (*heal, "--lora", 16, "--gradient-checkpointing")


def row(command: tuple[object, ...], runs: bool) -> str:
    """A command's row of the table."""
    told = json.loads(ptconvert(*command, "--dry-run", "--json")[0])
    told = told.get("needs", told)
    name = " ".join(part for part in map(str, command) if part in NAMED)
    cells = [f"`{name}`", decimal(told["peak"]["cpu"])]
    if runs:
        _, nbytes, seconds = ptconvert(*command, "--json")
        cells += [decimal(nbytes), f"{told['seconds']:.0f}", f"{seconds:.0f}"]
    else:
        sums = {
            phase["name"]: sum(h["bytes"] for h in phase["held"] if h["place"] == "cpu")
            for phase in told["phases"]
        }
        cells += [max(sums, key=lambda phase: sums[phase]), decimal(told["peak"].get("disk", 0))]
    return f"| {' | '.join(cells)} |"


def make_zeros(folder: Path, config: dict[str, object]) -> None:
    """`folder`/source of a config, and its conversion, in files without a byte on disk."""
    source, converted = folder / "source", folder / "converted"
    shape = ModelShape.from_config(config)
    sizes = list(shape.tensors())
    write_zeros(source, config, [Target(n, "model", shape.dtype or "BF16", s) for n, s in sizes])
    spec = parse_spec(SPEC.format(tracks=TRACKS, last=shape.layers - 1), "spec.yaml")
    plan = plan_conversion(open_checkpoint(source), spec, source_name="zeros")
    write_zeros(converted, plan.config, plan.targets)


def write_zeros(path: Path, config: Mapping[str, object], targets: Iterable[Target]) -> None:
    """A checkpoint whose tensors are all zero, with a tokenizer."""
    path.mkdir()
    files = lay_out(path, place(list(targets), 5 * 10**9))
    names = {name: entry.file.name for name, entry in files.items()}
    index = {"metadata": {}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(dict(config)))
    byte_tokenizer().save_pretrained(path)


def make_model(path: Path, width: int, layers: int) -> None:
    """A random Llama in fp32, with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(TRACKS, width // 512),
        vocab_size=VOCABULARY,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {"<|endoftext|>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    bytes_only = Tokenizer(models.BPE(known, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def ptconvert(*arguments: Any) -> tuple[str, int, float]:
    """What a command prints, the largest resident set of its process in bytes, and its seconds."""
    command = [sys.executable, "-m", "ptconvert", *map(str, arguments)]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{errors.read()}{' '.join(command)} ended with code {process.returncode}")
        output.seek(0)
        return output.read(), 1024 * usage.ru_maxrss, seconds


if __name__ == "__main__":
    main()
