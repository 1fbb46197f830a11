"""What a model card says of a healing."""

from __future__ import annotations

from ptconvert.heal.report import Healed


def healing_section(report: Healed, command: str) -> str:
    """The section of a card that records a healing."""
    settings = report.settings
    changed, rate = "the weights of the changed layers", "learning rate"
    stages = []
    if settings.blockwise:
        stages.append(f"block by block ({changed}; {rate} {settings.block_learning_rate:g})")
    if settings.kl:
        weights = "all weights" if settings.train == "all" else changed
        how = f"a LoRA of rank {settings.lora} on {weights}, merged" if settings.lora else weights
        over = f" over the source's {settings.top_k} likeliest tokens" if settings.top_k else ""
        stages.append(f"end to end by KL(source || healed){over} ({how}; {rate} {settings.rate:g})")
    names = ", ".join(report.data[:3])
    names += f" and {len(report.data) - 3} more" if len(report.data) > 3 else ""
    rows = "\n".join(f"| {row.name} | {row.loss:.4f} | {row.kl:.4f} |" for row in report.rows)
    kept = "training did not help, and the weights are as before"
    if report.kept != "before":
        kept = f"this checkpoint is the one after `{report.kept}`"
    return f"""## Healing

Distilled from `{report.teacher}`: {" and then ".join(stages)}.

- at most {report.tokens} tokens of {names}; sha256 of the windows: `{report.data_digest}`
- seed {settings.seed}
- `{command}`

On {report.held_out_tokens} tokens held out, in nats per token; {kept}:

| | loss | KL from `{report.teacher}` |
| --- | --- | --- |
{rows}
"""
