"""What healing on more tokens would give: a power law through what fewer gave.

    python examples/bench/curve.py WORK... --waits 20 --at 2e6

Each WORK is the --work directory of a run of heal.py with its own --tokens, all from one start. On
each report text KL(source || healed) and the rise of the loss, both in nats per token, are fitted
as c * tokens^-b, which is a line in the logarithms of both, and followed to --at tokens, with that
line's 95% interval there. The interval says how well the line is known; that the law holds so far
is an assumption.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats


def main() -> None:
    """Reads the cells of all runs; prints a table for each report text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="+")
    parser.add_argument("--waits", type=int, required=True)
    parser.add_argument("--at", type=float, required=True, help="tokens to follow the law to")
    given = parser.parse_args()
    runs = [run for work in given.work for run in healed(work, given.waits)]
    runs.sort(key=lambda run: run["of"]["tokens"])
    if len(runs) < 3:
        parser.error(f"{len(runs)} healed models: a line and its error take 3 or more")
    tokens = [run["of"]["tokens"] for run in runs]
    for number, files in enumerate(runs[0]["of"]["report"]):
        cells = [run["cells"][number] for run in runs]
        print(f"\n{' '.join(files)}: {given.waits} waited for\n")
        print("| tokens | KL | loss |\n| --- | --- | --- |")
        for count, cell in zip(tokens, cells, strict=True):
            half = f" ± {cell['loss_half']:.4f}"
            print(f"| {count:,} | {cell['kl']:.4f} | {cell['loss']:+.4f}{half} |")
        ends = (followed(tokens, [c[key] for c in cells], given.at) for key in ("kl", "loss"))
        said = (f"{at:.3f} ({low:.3f} … {high:.3f})" for at, low, high in ends)
        print(f"| {given.at:,.0f}, by the law | {' | '.join(said)} |")


def healed(work: Path, waits: int) -> list[dict[str, Any]]:
    """What a run of heal.py measured of a model after its last step, and what it was told."""
    return [json.loads(f.read_text()) for f in sorted(work.glob(f"n*-w{waits}-*+KL.json"))]


def followed(
    tokens: Sequence[float], values: Sequence[float], at: float
) -> tuple[float, float, float]:
    """A value at so many tokens, by the line through all of them in logarithms, and its 95%
    interval: Student's, of a regression's mean."""
    x, y = np.log(tokens), np.log(values)
    line = stats.linregress(x, y)
    spread, apart = ((x - x.mean()) ** 2).sum(), math.log(at) - x.mean()
    error = line.stderr * math.sqrt(spread / len(x) + apart**2)
    middle = line.intercept + line.slope * math.log(at)
    half = stats.t.ppf(0.975, len(x) - 2) * error
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


if __name__ == "__main__":
    main()
