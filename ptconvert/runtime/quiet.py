"""What other libraries say of themselves when they are imported, left out."""

from __future__ import annotations

import logging
import os
import warnings

# Of kernels that torchao and bitsandbytes, which others import, lack here; and of their enums.
_TALKERS = ("torchao", "bitsandbytes", "torch.utils._pytree")


def quiet_libraries() -> None:
    """Our own progress is shown, not that of every library below; called before their import."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # what they will rename in their next versions
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
