"""The model card of a converted checkpoint: what it was made from, and how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ptconvert.presets import dense_schedule
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape
from ptconvert.spec import Spec

if TYPE_CHECKING:  # it imports torch
    from ptconvert.healing.run import Healed

_LICENCE_KEYS = ("license", "license_name", "license_link")
_WITHOUT_TRAINING = """without training: the same weights under another schedule, which changes
what the model computes. Measure its quality before you use it, and heal it (`ptconvert heal`) where
the loss matters."""
_AFTER_TRAINING = """and trained since to give the same predictions under another schedule (below).
Measure its quality before you use it."""
_SCHEDULE = "## Schedule\n"


def model_card(
    source: Path,
    source_name: str,
    name: str,
    spec: Spec,
    schedule: Schedule,
    shape: ModelShape,
    guessing: int = 0,
) -> str:
    """The text of README.md: source, schedule, all-reduces before and after, and the spec.

    `guessing` counts the sublayers after which tracks guess each other's partials.

    The licence is the source card's; `source_name` and `name`, of the result, are hub ids or
    directories' names.
    """
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ptconvert"],
        **_licence(source / "README.md"),
    }
    if "/" in source_name:
        metadata["base_model"] = source_name
    before, after = dense_schedule(shape.layers).counts, schedule.counts
    carries = shape.bytes_per_token
    guesses = (
        f" After {guessing} sublayers each guesses the others' partials until they are merged, by "
        "low-rank maps\nfitted on a text."
    )
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).rstrip()}
---

# {source_name.split("/")[-1]}, converted by ptconvert

Made from `{source_name}` {_WITHOUT_TRAINING}

| | {source_name.split("/")[-1]} | this model |
| --- | --- | --- |
| all-reduces per forward pass | {before.all_reduces} | {after.all_reduces} |
| of them waited for | {before.waited_for} | {after.waited_for} |
| bytes per token per all-reduce | {carries} | {carries} |

{spec.tracks} tracks.{guesses if guessing else ""}
Open it with transformers, with ptconvert installed and imported or with `trust_remote_code=True`:

```python
import ptconvert
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

{_SCHEDULE}
```
{schedule}
```

## Spec

```yaml
{spec.text.rstrip()}
```
"""


def healed_card(converted: Path, name: str, report: Healed, command: str) -> str:
    """The card of a converted checkpoint with how it was healed put before its schedule.

    `converted` is the checkpoint's directory, `name` that of the result.
    """
    try:
        card = (converted / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        card = f"# {name}\n"
    card = card.replace(_WITHOUT_TRAINING, _AFTER_TRAINING).replace(
        f'from_pretrained("{converted.name}")', f'from_pretrained("{name}")'
    )
    start, mark, end = card.partition(_SCHEDULE)
    return f"{start.rstrip()}\n\n{_healing(report, command)}\n{mark}{end}"


def _healing(report: Healed, command: str) -> str:
    """The section of a card that records a healing."""
    settings = report.settings
    changed, rate = "the weights of the changed layers", "learning rate"
    stages = []
    if settings.blockwise:
        stages.append(f"block by block ({changed}; {rate} {settings.block_learning_rate:g})")
    if settings.kl:
        weights = "all weights" if settings.train == "all" else changed
        how = f"a LoRA of rank {settings.lora} on {weights}, merged" if settings.lora else weights
        stages.append(f"end to end by KL(source || healed) ({how}; {rate} {settings.rate:g})")
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


def _licence(card: Path) -> dict[str, str]:
    """The licence fields of the source's model card, if it has one that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    found = metadata if isinstance(metadata, dict) else {}
    return {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}
