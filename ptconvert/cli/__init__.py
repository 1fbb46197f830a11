"""The command line: parse, call, print. One module for each command."""

from __future__ import annotations

import click

from ptconvert import __version__
from ptconvert.cli.common import Commands
from ptconvert.cli.estimate import estimate
from ptconvert.cli.evaluate import evaluate
from ptconvert.cli.heal import heal
from ptconvert.cli.plan import plan
from ptconvert.cli.show import show
from ptconvert.cli.transform import transform
from ptconvert.cli.verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ptconvert")
def main() -> None:
    """Convert dense transformer checkpoints into architectures that wait for far fewer all-reduces.

    \b
    ptconvert estimate --model SRC --hardware NAME  what it would gain there, and whether to convert
    ptconvert plan SRC --tracks N --text FILE  find the schedule that costs it least
    ptconvert show SPEC --model SRC            look at a schedule and what it saves
    ptconvert transform SRC DST --spec SPEC    write the converted checkpoint
    ptconvert heal DST OUT --teacher SRC --text FILE  train it towards its source
    ptconvert verify DST --ranks R             run it on R ranks and check what it promises
    ptconvert eval DST --baseline SRC          score both, and say whether the difference is real
    ptconvert transform DST BACK --to-dense    undo it, bit for bit

    Exit codes: 0 done, 1 a check failed, 2 the input is wrong.
    """


for command in (show, plan, estimate, transform, heal, verify, evaluate):
    main.add_command(command)
