"""What a model card says of a healing."""

from __future__ import annotations

from ptconvert.heal.report import Healed, Measured
from ptconvert.shorten import few


def healing_section(report: Healed, command: str) -> str:
    """The section of a card that records a healing."""
    settings = report.settings
    changed, rate = "the weights of the changed layers", "learning rate"
    stages = []
    if settings.blockwise:
        stages.append(f"block by block ({changed}; {rate} {settings.block_learning_rate:g})")
    if settings.kl:
        weights = "all weights" if settings.train == "all" else changed
        how = weights
        if settings.lora and report.quantised:
            how = f"what isn't quantised, and a LoRA of rank {settings.lora} beside the quantised "
            how += "weights, in a folder of its own"
        elif settings.lora:
            how = f"a LoRA of rank {settings.lora} on {weights}, merged"
        over = f" over the source's {settings.top_k} likeliest tokens" if settings.top_k else ""
        stages.append(f"end to end by KL(source || healed){over} ({how}; {rate} {settings.rate:g})")
    if settings.mtp:
        own = f"{rate} {settings.of_head.rate:g}"
        stages.append(f"its head for further tokens by KL(healed || head) ({own})")
    texts = few(report.data)
    judged = next((row.score.metric for row in report.rows if row.score is not None), None)
    head = ["", "loss", f"KL from `{report.teacher}`", *([judged] if judged else [])]
    lines = [head, ["---"] * len(head), *(_cells(row)[: len(head)] for row in report.rows)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    kept = "the model's weights are as before"
    if settings.blockwise or settings.kl:
        kept = "training did not help, and the weights are as before"
    if report.kept != "before":
        kept = f"this checkpoint is the one after `{report.kept}`"
    return f"""## Healing

Distilled from `{report.teacher}`: {" and then ".join(stages)}.

- at most {report.tokens} tokens of {texts}; sha256 of the windows: `{report.data_digest}`
- seed {settings.seed}
- `{command}`

On {report.held_out_tokens} tokens held out, in nats per token; {kept}:

{rows}
{_of_head(report)}"""


def _of_head(report: Healed) -> str:
    if report.head is None:
        return ""
    before, after = (measured.kl for measured in report.head)
    return f"""
Its head for further tokens (MTP): KL from this model {before:.4f} before, {after:.4f} after.
"""


def _cells(row: Measured) -> list[str]:
    score = "" if row.score is None else f"{row.score.value:.4f}"
    return [row.name, f"{row.loss:.4f}", f"{row.kl:.4f}", score]
