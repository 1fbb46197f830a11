"""Prints docs/scale.md: what `estimate` says of four boxes that are not here.

python docs/scale.py > docs/scale.md
"""

from __future__ import annotations

import re
import shlex

from click.testing import CliRunner

from ptconvert.cli import main

# A line that begins with $ stands for itself and what the command prints, in a block of code.
TEXT = """\
# Scale, on paper

`python docs/scale.py > docs/scale.md` writes this page: every block is what its command prints,
and a test compares them. No GPU was at hand for any of it, and nobody has run these schedules
there. It is the [roofline and the cost of all-reduces](estimate.md) on numbers of others; the line
that begins with `measured` or `data sheet` says which numbers those are, and
[`ptconvert/estimate/rows/hardware`](../ptconvert/estimate/rows/hardware) where each comes from.
What a schedule costs in quality is not in it.

## 70B on 8 PCIe GPUs

$ ptconvert estimate --model llama-3.1-70b --hardware rtx-pro-6000-pcie

Worth trying: `gentle`, which rewrites no tensor, gains a third of what `aggressive` does. A
prefill gains the most, as its all-reduces wait for the bytes that PCIe moves. The row has NCCL's
times behind PCIe switches. Kernels that others wrote for these cards make tensor parallelism
faster without a conversion; where you can have them, take them first:

$ ptconvert estimate --model llama-3.1-70b --hardware rtx-pro-6000-pcie-one-shot

Without peer-to-peer there is more to gain:

$ ptconvert estimate --model llama-3.1-70b --hardware rtx-pro-6000-p2p-off

On two of the same cards, which hold the model as well, don't: there is little left to save.

$ ptconvert estimate --model llama-3.1-70b --hardware rtx-pro-6000-pcie --ranks 2

## 405B on two nodes

$ ptconvert estimate --model llama-3.1-405b --hardware 2x8-h100-sxm-ib400

All-reduces of 16 ranks cross InfiniBand, and that is what a schedule saves. The usual way around
them, two stages of 8 ranks, is slower even than tensor parallelism over both nodes, for one request
and for 16: a token goes through one node after the other. Of the 12 published speed-ups on two such
nodes 11 are higher than estimated here, by up to 4%.

## A 35B mixture on two DGX Spark

$ ptconvert estimate --model qwen3.6-35b-a3b --hardware 2-dgx-spark

A Spark holds the model alone; two that split it decode one request faster, as each reads half of
the weights. Its all-reduces are small and take the latency of NCCL over RoCE. Before converting
anything, take the [one-shot kernels](https://github.com/local-inference-lab/b12x/pull/295) that
others wrote for it. For eight requests at once they leave too little to gain, so don't:

$ ptconvert estimate --model qwen3.6-35b-a3b --hardware 2-dgx-spark-one-shot --batch 8

Much hangs on how NCCL is set up: [3 GB/s as it
comes](https://github.com/NVIDIA/dgx-spark-playbooks/issues/102), and with a model of 27B [two
Sparks have been slower than one](https://al-engr.com/qwen3.6-tp2-result.html). No mixture was ever
compared with a published run.

## A 27B hybrid on four RTX 3090

$ ptconvert estimate --model qwen3.6-27b --hardware rtx-3090-p2p-off --ranks 4

With NVIDIA's own driver data goes through host memory, and even `gentle` gains. A driver patched
for peer-to-peer gains as much without a conversion, and leaves less to it. Its times are those of
other cards, as the answer says:

$ ptconvert estimate --model qwen3.6-27b --hardware rtx-3090-pcie --ranks 4

Cards of 24 GB hold the model in bf16 only as four. In 4 bits one holds it: then the answer is
another, so estimate the checkpoint that you serve, by its own config.json.
"""


def ran(command: str) -> str:
    """A command and what it prints, as a block of code."""
    program, *arguments = shlex.split(command)
    assert program == "ptconvert", command
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    printed = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    return f"```\n$ {command}\n{printed}\n```"


def page() -> str:
    """The whole page."""
    return re.sub(r"^\$ (.*)$", lambda found: ran(found[1]), TEXT, flags=re.MULTILINE)


if __name__ == "__main__":
    print(page(), end="")
