"""What decides a healing's result: its settings, as the command line gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

LORA_ALPHA = 2  # times the rank: what an adapter's product is scaled by is this over 1


@dataclass(frozen=True)
class Settings:
    """`tokens` are those that each stage trains on, repeated passes counted; None is one pass.

    `train` says which weights move: `changed`, the layers that the schedule changes, or `all`,
    embeddings and lm_head too. `batch_size` counts windows per process and backward pass,
    `accumulation` backward passes per step. `patience` counts evaluations without gain before
    training stops; gain is what `stop_on` says, `kl` on the held-out windows or an lm-eval task, of
    which `limit` documents (below 1, that share; None, all) are scored. `objective` is `kl`,
    KL(teacher || student), or `cross_entropy` on the text itself, the yardstick. `top_k` has the
    teacher's answers kept, of so many tokens at each position; None has it run at every step.
    `mtp` has the head for further tokens trained, too, after the rest.
    `options` go to transformers' TrainingArguments as they are.
    """

    tokens: int | None = None
    train: str = "changed"
    blockwise: bool = False
    kl: bool = True
    lora: int | None = None
    learning_rate: float | None = None
    block_learning_rate: float = 1e-4
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.05
    evaluations: int = 20
    patience: int = 10
    stop_on: str = "kl"
    limit: float | None = None
    seed: int = 0
    objective: str = "kl"
    top_k: int | None = None
    mtp: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    gradient_checkpointing: bool = False
    fsdp: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def of_head(self) -> Settings:
        """Those by which the head for further tokens is trained, whole: it is small."""
        return replace(self, lora=None, gradient_checkpointing=False)

    @property
    def rate(self) -> float:
        """The KL stage's learning rate. By default what is usual for models of billions of
        parameters; small ones take more (3e-4 for 11 million)."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.lora is None else 2e-4
