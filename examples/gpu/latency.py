"""Time to the first token and per token on several GPUs, by way of all-reducing, batch and prompt.

    python examples/gpu/latency.py --ranks 4 [--runtime torch] [--row here.yaml] [--json]
    python examples/gpu/latency.py --ranks 4 --runtime vllm --all-reduces nccl custom fused p2p-off

`torch` is ptconvert's own ranks: each row's times are of `verify`, over tensor parallelism of the
same weights in the same run. In `vllm` they are over the dense model in vLLM's own class, in the
same processes. All-reduces:

- nccl: NCCL's; vLLM's own kernels off
- custom (vLLM): its own kernels where it picks them, not fused
- fused (vLLM): one kernel with the norm after it, where FlashInfer and the GPUs allow that
- p2p-off: NCCL's without peer-to-peer, as on GPUs of consumers (NCCL_P2P_DISABLE=1)

--row FILE also writes what `estimate --measure` finds on these ranks, as a row of hardware that
`estimate --hardware FILE` takes; without peer-to-peer FILE's name ends in -p2p-off. (None of it has
been run on a GPU; gloo takes NCCL's place with --device cpu.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import measuring
import serve
from slow_link import Failed, Missing

from ptconvert.engines import own_all_reduces
from ptconvert.estimate.hardware import to_yaml
from ptconvert.estimate.measure import measure
from ptconvert.verify.run import Settings, verify

NEW_TOKENS = 9
PRESETS = ["parallel_track, depth 4", "ladder"]
P2P_OFF = "p2p-off"
_NCCL: dict[str, Any] = {"disable_custom_all_reduce": True}


def _fusing(on: bool) -> dict[str, Any]:
    return {"compilation_config": {"pass_config": {"fuse_allreduce_rms": on}}}


# vLLM's arguments for each way; ptconvert's own ranks know NCCL's.
WAYS = {
    "nccl": _NCCL | _fusing(False),
    "custom": _fusing(False),
    "fused": _fusing(True),
    P2P_OFF: _NCCL | _fusing(False),
}
IN_TORCH = ("nccl", P2P_OFF)


@contextmanager
def under(way: str) -> Iterator[None]:
    """The environment that ranks inherit."""
    with mock.patch.dict("os.environ", {"NCCL_P2P_DISABLE": "1"} if way == P2P_OFF else {}):
        yield


def in_torch(
    paths: dict[str, Path], given: argparse.Namespace
) -> tuple[measuring.Found, dict[str, str]]:
    """Times of `verify`'s passes, by name, and what each is over. Raises Failed."""
    converted = {name: path for name, path in paths.items() if name != measuring.DENSE}
    bases = {name: f"{name}: tensor parallel" for name in converted}
    found = []
    for batch, prompt in measuring.works_of(given):
        times: dict[str, Any] = {phase: {} for phase in serve.PHASES}
        for name, path in converted.items():
            settings = Settings(
                given.ranks,
                given.device,
                dtype="bfloat16" if given.device == "cuda" else "float32",
                prompt_tokens=prompt,
                new_tokens=NEW_TOKENS,
                batch=batch,
                repeats=given.repeats,
            )
            report = verify(path, settings)
            if report is None or not report.ok:
                failed = [] if report is None else [c.seen for c in report.checks if not c.ok]
                failed += [] if report is None else [f.why for f in report.failures]
                raise Failed(f"{name}, batch {batch}, prompt {prompt}: {'; '.join(failed)}")
            for one, key in ((bases[name], "baseline"), (name, "schedule")):
                seconds = report.figures["comparison"][key]["seconds"]
                for phase in serve.PHASES:
                    times[phase][one] = [1e3 * s for s in seconds[phase]]
        found.append({"batch": batch, "prompt": prompt, "times": times})
    return found, {one: base for name, base in bases.items() for one in (base, name)}


def work(given: argparse.Namespace, directory: Path) -> None:
    """Makes the models, measures them and the hardware under each way, shows the rows."""
    ways = given.all_reduces or ["nccl"]
    if given.runtime == "torch" and (others := set(ways) - set(IN_TORCH)):
        raise Missing(f"--all-reduces {' '.join(sorted(others))}: vLLM's, so --runtime vllm")
    if given.runtime == "vllm":
        measuring.need_vllm()
    if given.row is not None and not given.row.resolve().parent.is_dir():
        raise Missing(f"--row {given.row}: there is no folder {given.row.resolve().parent}")
    presets = {name: serve.PRESETS[name] for name in given.presets}
    paths = measuring.make_models(given, given.ranks, presets, directory)
    for way in ways:
        with under(way):
            if given.runtime == "torch":
                found, over = in_torch(paths, given)
            else:
                over = dict.fromkeys(paths, measuring.DENSE)
                engines = {name: (path, WAYS[way]) for name, path in paths.items()}
                found = measuring.in_vllm(engines, given, given.ranks, directory, way)
            title = f"TTFT and TPOT on {given.ranks} ranks, {way}, {given.runtime}"
            measuring.show(title, list(measuring.rows_of(found, over)), given.as_json)
            if given.row is not None and way in IN_TORCH:
                _write_row(given.row, way, given.ranks)


def _write_row(file: Path, way: str, ranks: int) -> None:
    found = measure(ranks, own_all_reduces())
    assert found is not None, "this isn't run under torchrun"
    if way == P2P_OFF:
        file = file.with_stem(f"{file.stem}-{P2P_OFF}")
    file.write_text(to_yaml(found.hardware), encoding="utf-8")


if __name__ == "__main__":
    arguments = measuring.parser(__doc__)
    arguments.add_argument("--ranks", type=measuring.count, default=2, help="and tracks")
    arguments.add_argument(
        "--presets", choices=list(serve.PRESETS), nargs="+", default=PRESETS, help="to convert to"
    )
    arguments.add_argument("--runtime", choices=["torch", "vllm"], default="torch")
    arguments.add_argument("--all-reduces", choices=list(WAYS), nargs="+", help="default: nccl")
    arguments.add_argument("--row", type=Path, metavar="FILE.yaml")
    measuring.run("latency", arguments, work, gpus=lambda given: given.ranks)
