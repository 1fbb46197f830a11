"""What the terminal shows of a verification."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ptconvert.report.terminal import figures_table
from ptconvert.shorten import counted
from ptconvert.verify.run import Report


def print_report(console: Console, report: Report) -> None:
    """A verification: failures if any, checks, and the schedule against tensor parallelism."""
    for failure in report.failures:
        console.print(Text(f"rank {failure.rank}: {failure.why}", style="bold red"))
        if failure.trace:
            console.print(Text(failure.trace, style="dim"))
    checks = Table(box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        mark = Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        checks.add_row(mark, check.name, Text(check.seen, style="" if check.ok else "bold"))
    if report.checks:
        console.print(checks)
    if "comparison" in report.figures:
        console.print()
        console.print(_comparison_table(report.figures))
    elif "engine" in report.figures:
        console.print()
        console.print(_engine_line(report.figures))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    other = report.figures.get("other_communication")
    if other:
        console.print(Text(f"other communication in the steps: {other}", style="yellow"))
    verdict = Text("all checks hold", "bold green") if report.ok else Text("FAILED", "bold red")
    console.print(verdict)


def _engine_line(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['engine']}, {figures['mode']}, {counted(figures['ranks'], 'rank')}, "
        f"{figures['dtype']}, "
        f"batch {figures['batch']}, {figures['prompt_tokens']} + {figures['new_tokens']} tokens"
    )


def _comparison_table(figures: Mapping[str, Any]) -> RenderableType:
    compared = figures["comparison"]
    ours, base = compared["schedule"], compared["baseline"]
    title = (
        f"{counted(figures['ranks'], 'rank')}, {figures['backend']}, {figures['dtype']}, batch "
        f"{figures['batch']}, {figures['prompt_tokens']} + {figures['new_tokens']} tokens"
    )
    table = figures_table(
        *("", "tensor parallel", "this schedule", "fewer / faster"),
        title=title,
        title_justify="left",
    )
    for label, key in (
        ("all-reduces per forward pass", "all_reduces"),
        ("bytes all-reduced per token", "bytes_per_token"),
    ):
        table.add_row(
            label,
            f"{base[key]:,}",
            f"{ours[key]:,}",
            f"{base[key] / ours[key]:.1f}" if ours[key] else "-",
        )
    for label, kind in (("prefill, ms", "prefill"), ("decode step, ms", "decode")):
        spread = compared["speed_up"][kind]
        before, after = (
            f"{statistics.median(x['seconds'][kind]) * 1000:.2f}" for x in (base, ours)
        )
        ratio = f"{spread['median']:.2f} ({spread['least']:.2f}-{spread['most']:.2f})"
        table.add_row(label, before, after, ratio)
    return table
