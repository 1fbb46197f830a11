"""A converted model's own head for further tokens (MTP) in vLLM.

The head comes along as it was, so vLLM's model of it, made for the source, reads it out of the
converted checkpoint: by the source's config.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from vllm.config import SpeculativeConfig

from ptconvert.checkpoint.section import SECTION, read_section, source_config

_by_vllm = SpeculativeConfig.hf_config_override


def config_of_draft(config: Any) -> Any:
    """What vLLM makes a drafting model by, from the config of the checkpoint that has it: where
    that is converted, for a head by its source's. Raises ConfigError."""
    given = config.to_dict()
    if SECTION in given:
        source = source_config(given, read_section(given))
        family = source.pop("model_type")
        head = _by_vllm(AutoConfig.for_model(family, **source))
        if head.model_type != family:
            return head
    return _by_vllm(config)


def install() -> None:
    """Makes vLLM ask `config_of_draft`; once more changes nothing."""
    SpeculativeConfig.hf_config_override = staticmethod(config_of_draft)
