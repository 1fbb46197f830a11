"""The model card of a converted checkpoint: what it was made from, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

from ptconvert.presets import tensor_parallel
from ptconvert.schedule import Schedule
from ptconvert.shape import ModelShape
from ptconvert.spec import Spec

_LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(
    source: Path,
    source_name: str,
    name: str,
    spec: Spec,
    schedule: Schedule,
    shape: ModelShape,
) -> str:
    """The text of README.md: source, schedule, all-reduces before and after, and the spec.

    The licence is the source card's; `source_name` and `name`, of the result, are hub ids or
    directories' names.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ptconvert", "parallel-track" if schedule.track_layers(spec.tracks) else "ladder"],
        base_model=source_name if source_name.count("/") == 1 else None,
        **cast(Any, _licence(source / "README.md")),
    )
    before, after = Schedule(tensor_parallel(range(shape.layers))).counts, schedule.counts
    carries = shape.bytes_per_token
    return f"""---
{data.to_yaml()}
---

# {source_name.split("/")[-1]}, converted by ptconvert

Made from `{source_name}` without training: the same weights under another schedule, which changes
what the model computes. Measure its quality before you use it, and heal it (distil it from its
source) where the loss matters.

| | {source_name.split("/")[-1]} | this model |
| --- | --- | --- |
| all-reduces per forward pass | {before.all_reduces} | {after.all_reduces} |
| of them waited for | {before.waited_for} | {after.waited_for} |
| bytes per token per all-reduce | {carries} | {carries} |

{spec.tracks} tracks. Open it with transformers, with ptconvert installed and imported or with
`trust_remote_code=True`:

```python
import ptconvert
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

## Schedule

```
{schedule}
```

## Spec

```yaml
{spec.text.rstrip()}
```
"""


def _licence(card: Path) -> dict[str, str]:
    """The licence fields of the source's model card, if it has one that can be read."""
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return {}
    found = {key: data.get(key) for key in _LICENCE_KEYS}
    return {key: value for key, value in found.items() if isinstance(value, str)}
