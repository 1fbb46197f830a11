"""The model card of a converted checkpoint: what it was made from, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from ptconvert.checkpoint.compensations import COMPENSATIONS
from ptconvert.models.shape import ModelShape
from ptconvert.models.wrappers import opened_by
from ptconvert.schedule.schedule import Schedule
from ptconvert.spec.document import Spec

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
    values: Mapping[str, object],
) -> str:
    """The text of README.md: source, schedule, all-reduces before and after, and the spec.

    `values` are those of the compensations.

    The licence is the source card's; `source_name` and `name`, of the result, are hub ids or
    directories' names.
    """
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if shape.wrapper else "text-generation",
        "tags": ["ptconvert"],
        **_licence(source / "README.md"),
    }
    if "/" in source_name:
        metadata["base_model"] = source_name
    before, after = shape.dense.counts, schedule.counts
    sent, sends = shape.bytes_all_reduced(shape.dense), shape.bytes_all_reduced(schedule)
    auto = opened_by(shape.model_type)
    added = "".join(c.card(values[c.key]) for c in COMPENSATIONS if values.get(c.key))
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).rstrip()}
---

# {source_name.split("/")[-1]}, converted by ptconvert

Made from `{source_name}` {_WITHOUT_TRAINING}

| | {source_name.split("/")[-1]} | this model |
| --- | --- | --- |
| all-reduces per forward pass | {before.all_reduces} | {after.all_reduces} |
| of them waited for | {before.waited_for} | {after.waited_for} |
| bytes all-reduced per token | {sent} | {sends} |

{spec.tracks} tracks.{added}
Open it with transformers, by the code that comes along, or with ptconvert imported in its place
(which is not the package of this name on the package index):

```python
from transformers import {auto}

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
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


def healed_card(converted: Path, name: str, healing: str) -> str:
    """The card of a converted checkpoint with how it was healed put before its schedule.

    `converted` is the checkpoint's directory, `name` that of the result, `healing` the section.
    """
    try:
        card = (converted / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        card = f"# {name}\n"
    card = card.replace(_WITHOUT_TRAINING, _AFTER_TRAINING).replace(
        f'from_pretrained("{converted.name}")', f'from_pretrained("{name}")'
    )
    start, mark, end = card.partition(_SCHEDULE)
    return f"{start.rstrip()}\n\n{healing}\n{mark}{end}"


def _licence(card: Path) -> dict[str, str]:
    """The licence fields of the source's model card, if it has one that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    found = metadata if isinstance(metadata, dict) else {}
    return {key: found[key] for key in _LICENCE_KEYS if isinstance(found.get(key), str)}
