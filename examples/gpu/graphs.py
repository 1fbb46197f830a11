"""CUDA graphs against eager in vLLM, for the dense model and converted ones, on one GPU.

    python examples/gpu/graphs.py [--source DIR] [--modes eager graphs] [--tracks 4] [--json]

Needs vLLM. One rank that holds all tracks. `graphs` is vLLM's own choice (full graphs in decoding,
where its attention allows that), `piecewise` has graphs end at attention and where an all-reduce is
in flight, `compiled` is torch.compile without graphs, which is all that there is on a CPU. (None of
it has been run on a GPU.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measuring
import serve

EAGER = "eager"
MODES: dict[str, dict[str, Any]] = {
    EAGER: {},
    "compiled": {"compilation_config": {"cudagraph_mode": "NONE"}},
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "graphs": {},
}


def work(given: argparse.Namespace, directory: Path) -> None:
    """Makes the models, times each in each mode, shows the rows."""
    measuring.need_vllm()
    wanted = given.modes or (["graphs"] if given.device == "cuda" else ["compiled"])
    modes = [EAGER, *(mode for mode in wanted if mode != EAGER)]
    presets = {name: serve.PRESETS[name] for name in given.presets}
    paths = measuring.make_models(given, given.tracks, presets, directory)
    engines: dict[str, tuple[Path, dict[str, Any]]] = {}
    over = {}
    for name, path in paths.items():
        for mode in modes:
            engines[f"{name}, {mode}"] = path, {**MODES[mode], "enforce_eager": mode == EAGER}
            over[f"{name}, {mode}"] = f"{name}, {EAGER}"
    found = measuring.in_vllm(engines, given, 1, directory, "graphs")
    rows = list(measuring.rows_of(found, over))
    title = f"Graphs and eager in vLLM, {given.tracks} tracks on one rank"
    measuring.show(title, rows, given.as_json)


if __name__ == "__main__":
    arguments = measuring.parser(__doc__)
    arguments.add_argument("--tracks", type=measuring.count, default=4)
    arguments.add_argument("--modes", choices=list(MODES), nargs="+", help="beside eager")
    arguments.add_argument(
        "--presets", choices=list(serve.PRESETS), nargs="*", default=["parallel_track, depth 4"]
    )
    measuring.run("graphs", arguments, work)
