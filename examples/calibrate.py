"""Fits the estimator's constants to published rows, and shows the error on rows left out.

    python examples/calibrate.py            # refit; constants beside those in the package
    python examples/calibrate.py --rows     # every row: published, estimated, error

The shipped YAML files hold the constants that this prints, rounded to 3 digits. Needs scipy.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ptconvert.estimate.compare import Candidate, Setting
from ptconvert.estimate.hardware import Engine, Hardware, Link, read_engine, read_hardware
from ptconvert.estimate.model import Workload, estimate
from ptconvert.estimate.server import Load, scheduled, serve
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import PRESETS
from ptconvert.schedule.schedule import Schedule

DATA = Path(__file__).parent / "calibration"
FIT = "fit"  # in the files' column `use`, of what the fit sees; "test" of what it doesn't
Rows = Mapping[str, Any]  # hardware and engine rows by name
ENGINES = {  # as the Parallel Track paper's tables name them
    "tensorrt_llm": "tensorrt-llm",
    "vllm": "vllm-parallel-track-paper",
}
SERVERS = tuple(ENGINES.values())
# Every fitted constant: the files and the field that hold it.
H100 = ("h100-sxm", "h100-sxm-p2p-off")
FITTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (H100, "device.memory_reach"),
    (H100, "device.kernel_us"),
    (H100, "device.overlap_share"),
    (H100, "device.bulk_overlap_share"),
    (("h100-sxm",), "links.0.base_us"),
    (("h100-sxm",), "links.0.protocols.0.step_us"),
    (("h100-sxm",), "links.0.one_shot_us"),
    (("h100-sxm-p2p-off",), "links.0.base_us"),
    (("h100-sxm-p2p-off",), "links.1.protocols.0.step_us"),
    (("gpt-fast",), "matmul_reach"),
    (("gpt-fast",), "batched_kernels"),
    (("gpt-fast",), "prefill_launch_us"),
    (SERVERS, "sequence_us"),
    (SERVERS, "prompt_token_us"),
    *(
        ((server,), constant)
        for server in SERVERS
        for constant in (
            "matmul_reach",
            "step_us",
            "request_us",
            "kv_reach",
            "kv_head_reach",
        )
    ),
)
LL_TO_SIMPLE_US = 9.0  # between the network link's two protocols, as in NCCL's tuning.cc
CHUNK = 8192  # tokens of a step: vLLM's server on an H100, and trtllm-serve, unless told otherwise
NETWORK = "h100-sxm-p2p-off", "links.1.protocols"


@dataclass(frozen=True)
class Observation:
    """A published number: what was run, and whether the fit sees it."""

    source: str
    what: str
    hardware: str
    engine: str
    architecture: str
    ranks: int
    workload: Workload
    metric: str
    value: float
    fitted: bool
    server: bool = False


def shape(
    layers: int, width: int, heads: int, neurons: int, vocabulary: int, kv_heads: int = 8
) -> ModelShape:
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": neurons,
        "vocab_size": vocabulary,
        "tie_word_embeddings": vocabulary == 153600,
        "dtype": "bfloat16",
    }
    return ModelShape.from_config(config)


SHAPES = {
    "ladder 8B": shape(32, 4096, 32, 14336, 128256),
    "ladder 70B": shape(80, 8192, 64, 28672, 128256),
    "ladder 405B": shape(126, 16384, 128, 53248, 128256, kv_heads=16),
    "PT 30B": shape(48, 7168, 64, 22016, 153600),
}
ARCHITECTURES = {
    "standard": "tensor_parallel",
    "no_comm": "tensor_parallel",
    "parallel": "parallel_block",
    "ladder": "ladder",
    "dense": "tensor_parallel",
}


@functools.cache
def schedule(architecture: str, layers: int) -> Schedule:
    if architecture.startswith("pt_d"):
        return Schedule(PRESETS["parallel_track"](range(layers), depth=int(architecture[4:])))
    return Schedule(PRESETS[ARCHITECTURES[architecture]](range(layers)))


def read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def ladder_rows(name: str) -> Iterator[Observation]:
    """Those of the 70B and the 405B."""
    for row in read(name):
        peers, architecture = row["nccl_p2p"], row["architecture"]
        large = name == "ladder_405b.csv"
        hardware = "2x8-h100-sxm-ib400" if large else "h100-sxm"
        yield Observation(
            "ladder 405B" if large else "ladder 70B",
            f"batch {row['batch']}, {row['tp']} ranks, p2p {peers}",
            hardware if peers == "on" else "h100-sxm-p2p-off",
            "gpt-fast",
            architecture,
            int(row["tp"]),
            Workload(int(row["batch"]), 1024, 512),
            "speed_up" if large else "throughput",
            float(row["speed_up" if large else "tokens_per_second"]),
            row["use"] == FIT,
        )


def ladder_log_rows() -> Iterator[Observation]:
    """Those of the logs, with a prefill's time beside tokens/s."""
    for row in read("ladder_logs.csv"):
        values = {
            "throughput": (row["tokens_per_second"], row["use"]),
            "ttft": (row["prefill_ms"], row["prefill_use"]),
        }
        for metric, (value, use) in values.items():
            if value:
                yield Observation(
                    f"ladder {row['model']}",
                    f"{metric}, batch {row['batch']}, {row['tp']} ranks",
                    "h100-sxm",
                    "gpt-fast",
                    row["architecture"],
                    int(row["tp"]),
                    Workload(int(row["batch"]), 1024, 512),
                    metric,
                    float(value),
                    use == FIT,
                )


def pt_rows() -> Iterator[Observation]:
    """Those of Parallel Track; its throughputs are a server's, of as many requests at a time."""
    for row in read("pt_30b.csv"):
        prompt, metric = int(row["input_tokens"]), row["metric"]
        new = 1 if row["output_tokens"] == "-" else int(row["output_tokens"])
        for architecture in ("dense", "pt_d2"):
            yield Observation(
                "PT 30B",
                f"{row['engine']} {metric}, {prompt} + {row['output_tokens']}",
                "h100-sxm",
                ENGINES[row["engine"]],
                architecture,
                8,
                Workload(256 if metric == "throughput" else 1, prompt, new),
                metric,
                float(row[architecture]),
                row["use"] == FIT,
                server=metric == "throughput",
            )


@functools.cache
def observations() -> tuple[Observation, ...]:
    """Every published row."""
    names = ("ladder_70b.csv", "ladder_70b_more.csv", "ladder_405b.csv")
    return (*(o for name in names for o in ladder_rows(name)), *ladder_log_rows(), *pt_rows())


def silent(row: Hardware) -> Hardware:
    """The hardware with links that cost nothing, for `no_comm`."""

    def free(link: Link) -> Link:
        protocols = tuple(replace(p, step_us=0.0, gb_s=1e9) for p in link.protocols)
        return replace(link, base_us=0.0, switch_us=0.0, switch_gb_s=0.0, protocols=protocols)

    return replace(row, links=tuple(map(free, row.links)))


def estimated(one: Observation, rows: Rows, architecture: str | None = None) -> float:
    """What the model says in the units of the row: tokens/s, ms, or the speed-up."""
    architecture = architecture or one.architecture
    if one.metric == "speed_up" and architecture == one.architecture:
        throughput = replace(one, metric="throughput")
        return estimated(throughput, rows) / estimated(throughput, rows, "standard")
    hardware: Hardware = rows[one.hardware]
    engine: Engine = rows[one.engine]
    shape = SHAPES[one.source]
    if one.server:
        return served(one, architecture, hardware, engine)
    found = estimate(
        schedule(architecture, shape.layers),
        shape,
        silent(hardware) if architecture == "no_comm" else hardware,
        engine,
        one.ranks,
        one.workload,
    )
    times = {"ttft": found.ttft * 1e3, "tpot": found.tpot * 1e3}
    return times.get(one.metric, found.tokens_per_second)


def served(one: Observation, architecture: str, hardware: Hardware, engine: Engine) -> float:
    """Tokens/s of a server whose steps have prompts in chunks beside as many requests at a time as
    the batch."""
    shape, ranks = SHAPES[one.source], one.ranks
    candidate = Candidate(architecture, schedule(architecture, shape.layers), ranks)
    setting = Setting(shape, hardware, engine, one.engine, ranks, one.workload)
    load = Load(math.inf, CHUNK, one.workload.batch)
    return serve(scheduled(candidate, setting), setting, load).most * one.workload.new


def packaged() -> dict[str, Any]:
    """The rows and engines as they are shipped."""
    hardware = {name: read_hardware(name) for name in (*H100, "2x8-h100-sxm-ib400")}
    return {**hardware, **{n: read_engine(n) for n in ("gpt-fast", *ENGINES.values())}}


def get(row: Any, path: str) -> Any:
    for key in path.split("."):
        row = row[int(key)] if isinstance(row, tuple) else getattr(row, key)
    return row


def put(row: Any, path: str, value: float) -> Any:
    """The row with the number at a path replaced."""
    key, _, rest = path.partition(".")
    if isinstance(row, tuple):
        index = int(key)
        return (*row[:index], put(row[index], rest, value), *row[index + 1 :])
    assert is_dataclass(row)
    return replace(row, **{key: put(getattr(row, key), rest, value) if rest else value})  # type: ignore[type-var]


def with_constants(rows: Rows, constants: Iterable[float]) -> dict[str, Any]:
    """The rows with the fitted constants replaced, in the order of FITTED."""
    new = dict(rows)
    for (files, path), value in zip(FITTED, constants, strict=True):
        for file in files:
            new[file] = put(new[file], path, value)
    file, protocols = NETWORK
    step = get(new[file], f"{protocols}.0.step_us")
    new[file] = put(new[file], f"{protocols}.1.step_us", step + LL_TO_SIMPLE_US)
    cluster = new["2x8-h100-sxm-ib400"]
    inner = (new["h100-sxm"].links[0], *cluster.links[1:])
    new["2x8-h100-sxm-ib400"] = replace(cluster, device=new["h100-sxm"].device, links=inner)
    return new


def constants(rows: Rows) -> list[float]:
    return [float(get(rows[files[0]], path)) for files, path in FITTED]


def residuals(
    values: Iterable[float], rows: Rows, seen: dict[object, float] | None = None
) -> list[float]:
    """Logarithms of estimated over published, for the rows that the fit sees; `seen` are those of
    before, by the constants that a row depends on."""
    values, seen = list(values), {} if seen is None else seen
    changed, found = with_constants(rows, values), []
    for o in observations():
        if o.fitted:
            own = (o.hardware, o.engine)
            held = [v for (files, _), v in zip(FITTED, values, strict=True) if {*files} & {*own}]
            if (key := (o, *held)) not in seen:
                seen[key] = math.log(estimated(o, changed) / o.value)
            found.append(seen[key])
    return found


def fit(rows: Rows) -> list[float]:
    """The constants that least squares finds, from those given."""
    from scipy.optimize import least_squares

    start, seen = constants(rows), dict[object, float]()
    bounds = ([0.0] * len(start), [1.0 if "reach" in p or "share" in p else 1e6 for _, p in FITTED])
    found = least_squares(residuals, start, x_scale=start, bounds=bounds, args=(rows, seen))
    return [float(value) for value in found.x]


@dataclass(frozen=True)
class Row:
    """A row with its errors: of the value, and of its ratio to the baseline's."""

    one: Observation
    estimate: float
    error: float
    ratio_error: float | None


def errors(rows: Rows) -> list[Row]:
    """Every row; ratios are to `standard` or `dense` of the same run."""
    values = {id(o): estimated(o, rows) for o in observations()}
    base = {
        (o.source, o.what): (o.value, values[id(o)])
        for o in observations()
        if o.architecture in ("standard", "dense")
    }
    found = []
    for o in observations():
        error = values[id(o)] / o.value - 1
        ratio = error if o.metric == "speed_up" else None
        if o.architecture not in ("standard", "dense") and o.metric != "speed_up":
            published, expected = base[o.source, o.what]
            ratio = (values[id(o)] / expected) / (o.value / published) - 1
        found.append(Row(o, values[id(o)], error, ratio))
    return found


def is_batch(one: Observation, batch: int) -> bool:
    return one.workload.batch == batch and one.metric in ("throughput", "speed_up")


def is_method(one: Observation, architecture: str) -> bool:
    return one.architecture == architecture and one.metric in ("throughput", "speed_up")


Group = tuple[str, Callable[[Observation], bool]]
GROUPS: tuple[Group, ...] = (
    (
        "ladder 70B: tokens/s at batch 1 and 16",
        lambda o: is_ladder(o, "70B", "throughput") and o.workload.batch in (1, 16),
    ),
    (
        "ladder 70B: tokens/s at other batches",
        lambda o: is_ladder(o, "70B", "throughput") and o.workload.batch not in (1, 16),
    ),
    ("ladder 70B: prefills", lambda o: is_ladder(o, "70B", "ttft")),
    ("ladder 8B: tokens/s", lambda o: is_ladder(o, "8B", "throughput")),
    ("ladder 8B: prefills", lambda o: is_ladder(o, "8B", "ttft")),
    (
        "ladder 405B, two nodes: speed-ups",
        lambda o: is_ladder(o, "405B", "speed_up") and o.hardware.startswith("2x8"),
    ),
    (
        "the same, peer-to-peer off",
        lambda o: is_ladder(o, "405B", "speed_up") and not o.hardware.startswith("2x8"),
    ),
    ("all of ladder", lambda o: o.source.startswith("ladder")),
    (
        "Parallel Track 30B: TTFT, TPOT",
        lambda o: o.source == "PT 30B" and o.metric != "throughput",
    ),
    (
        "Parallel Track 30B: tokens/s",
        lambda o: o.source == "PT 30B" and o.metric == "throughput",
    ),
    *(
        (f"batch {batch}: tokens/s", functools.partial(is_batch, batch=batch))
        for batch in (1, 4, 16, 64, 256)
    ),
    *(
        (f"{name}: tokens/s", functools.partial(is_method, architecture=architecture))
        for name, architecture in (
            ("ladder", "ladder"),
            ("parallel attention and MLP", "parallel"),
            ("Parallel Track", "pt_d2"),
            ("no communication", "no_comm"),
        )
    ),
    ("all: tokens/s", lambda o: o.metric == "throughput"),
    ("all: times", lambda o: o.metric in ("ttft", "tpot")),
    ("all", lambda o: bool(o)),
)


def is_ladder(one: Observation, size: str, metric: str) -> bool:
    return (one.source, one.metric) == (f"ladder {size}", metric)


def mean(values: Iterable[float]) -> float | None:
    """Of absolute values; None where there are none."""
    found = [abs(v) for v in values]
    return sum(found) / len(found) if found else None


def summary(rows: list[Row], fitted: bool) -> tuple[int, float | None, float | None]:
    """(rows, mean absolute error of values, of their ratios) of those fitted, or left out."""
    own = [r for r in rows if r.one.fitted == fitted]
    values = mean(r.error for r in own if r.one.metric != "speed_up")
    return len(own), values, mean(r.ratio_error for r in own if r.ratio_error is not None)


def show(console: Console, rows: list[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("mean absolute errors")
    for name in (
        "in the\nfit",
        "\nerror",
        "of speed-\nups",
        "left\nout",
        "\nerror",
        "of speed-\nups",
    ):
        table.add_column(name, justify="right")
    for name, chosen in GROUPS:
        own = [r for r in rows if chosen(r.one)]
        cells: list[str] = []
        for fitted in (True, False):
            number, *means = summary(own, fitted)
            cells += [str(number), *("" if x is None else f"{x:.1%}" for x in means)]
        table.add_row(name, *cells)
    console.print(table, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the estimator to published rows.")
    parser.add_argument("--rows", action="store_true", help="print every row, without refitting")
    arguments = parser.parse_args()
    console, rows = Console(width=110), packaged()
    if arguments.rows:
        for r in errors(rows):
            ratio = "" if r.ratio_error is None else f"{r.ratio_error:+.1%}"
            mark = "fit" if r.one.fitted else "   "
            console.print(
                f"{mark} {r.one.source:11} {r.one.what:38} {r.one.architecture:8} "
                f"{r.one.value:9.2f} {r.estimate:9.2f} {r.error:+7.1%} {ratio:>7}",
                highlight=False,
            )
    else:
        table = Table("file", "constant", "packaged", "refitted")
        refitted = fit(rows)
        for (files, path), old, new in zip(FITTED, constants(rows), refitted, strict=True):
            table.add_row(" and ".join(files), path, f"{old:g}", f"{new:.3g}")
        console.print(table)
        console.print("With the refitted constants:")
        show(console, errors(with_constants(rows, refitted)))
        console.print("As packaged:")
    show(console, errors(rows))


if __name__ == "__main__":
    main()
