"""Numbers as reports write them."""

from __future__ import annotations

import math

from ptconvert.measure.statistics import SIGNIFICANT, Estimate


def number(value: float) -> str:
    """A score with as many decimals as its size makes worth reading."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1e4:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}"


def perplexity_of(loss: float) -> str:
    """exp of a loss in nats."""
    return number(math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss)


def signed(value: float) -> str:
    """The same, always with its sign."""
    if not math.isfinite(value):
        return number(value)
    return f"{'+' if value >= 0 else '-'}{number(abs(value))}"


def between(found: Estimate, form: object) -> str:
    """An interval, or a dash where a single document gives none."""
    assert callable(form)
    return (
        "-" if found.interval is None else f"{form(found.interval[0])} … {form(found.interval[1])}"
    )


def p_value(value: float | None) -> str:
    """A p-value, marked where it is below 5%."""
    if value is None:
        return "-"
    text = "<0.001" if value < 0.001 else f"{value:.3f}"
    return f"{text} *" if value < SIGNIFICANT else f"{text}  "
