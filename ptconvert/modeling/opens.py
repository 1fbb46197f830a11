"""Whether transformers can make a model of a config.json, known before there is a checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ptconvert.errors import ConfigError, first_line
from ptconvert.models.wrappers import opened_by

# What transformers raises about values that it can't make sense of.
_WRONG = (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)


def check_opens(config: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a config.json of a dense model that transformers makes none of, as of
    an activation that it hasn't; the model is made without its weights."""
    if (why := _refused(json.dumps(config))) is not None:
        raise ConfigError(f"{where}: transformers can't make a model of it: {why}")


@cache  # asked before much is computed and before anything is written, of each of a plan's trials
def _refused(written: str) -> str | None:
    """Why transformers makes no model of a config.json's text; None where it does."""
    config = json.loads(written)
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        known = AutoConfig.for_model(**config)
        with torch.device("meta"):
            getattr(transformers, opened_by(config["model_type"])).from_config(known)
    except _WRONG as error:
        return first_line(error)
    finally:
        logger.setLevel(level)
    return None
