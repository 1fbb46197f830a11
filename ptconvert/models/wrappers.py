"""Vision-language models, which have a language model of one of the families in them, as data.

The language model is converted; towers, projectors and what else lies around it come along byte
for byte. Nothing else in the package names such a model, or where its language model lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ptconvert.models.families import MODEL_TYPE_PREFIX

TIED = "tie_word_embeddings"
TEXT = "text_config"
_LAYER = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)(?:\.|$)")
_DTYPES = ("dtype", "torch_dtype")
# What transformers takes a language model's sizes to be where its config names its family, but not
# them, as in LLaVA 1.5's: its config classes' defaults.
_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "llama": {
            **{"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000},
            **{"num_hidden_layers": 32, "num_attention_heads": 32},
            "max_position_embeddings": 2048,
        },
        "mistral": {
            **{"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000},
            **{"num_hidden_layers": 32, "num_attention_heads": 32},
            "max_position_embeddings": 131072,
        },
        "qwen2": {
            **{"hidden_size": 4096, "intermediate_size": 22016, "vocab_size": 151936},
            **{"num_hidden_layers": 32, "num_attention_heads": 32},
            "max_position_embeddings": 32768,
        },
    }
)


@dataclass(frozen=True)
class Wrapper:
    """One of these models: its class in transformers that answers, and what lies where.

    `text` is the family of its language model where its config names none. The names of the tensors
    around begin with those of `around`. What transformers calls the beginning of a name that older
    layouts have says `older`. Its embeddings are `tied` where its config doesn't say; with
    `tied_by_text` also where its language model's does.
    """

    model_type: str
    prefix: str
    text: str
    around: tuple[str, ...]
    older: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tied: bool = False
    tied_by_text: bool = False

    @property
    def whole(self) -> str:
        """Its class that answers, in transformers and in vLLM."""
        return f"{self.prefix}ForConditionalGeneration"

    @property
    def classes(self) -> Mapping[str, str]:
        """Its classes in transformers, by the Auto class that opens each. One that is converted
        opens as a causal language model too, which it is where no picture is given."""
        return {
            "AutoConfig": f"{self.prefix}Config",
            "AutoModel": f"{self.prefix}Model",
            "AutoModelForImageTextToText": self.whole,
            "AutoModelForCausalLM": self.whole,
        }


_LLAVA: Mapping[str, str] = MappingProxyType(
    {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
)
_HEARS = ("model.audio_tower.", "model.embed_audio.")
OPTIONAL = ("mtp.", *_HEARS)  # of what is around
_PROJECTED = ("model.vision_tower.", "model.multi_modal_projector.")

WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        w.model_type: w
        for w in (
            Wrapper("qwen3_5", "Qwen3_5", "qwen3_5_text", ("model.visual.", "mtp.")),
            Wrapper("qwen3_5_moe", "Qwen3_5Moe", "qwen3_5_moe_text", ("model.visual.", "mtp.")),
            Wrapper("qwen3_vl", "Qwen3VL", "qwen3_vl_text", ("model.visual.",)),
            Wrapper("gemma3", "Gemma3", "gemma3_text", _PROJECTED, _LLAVA, tied=True),
            Wrapper(
                "gemma4",
                "Gemma4",
                "gemma4_text",
                ("model.vision_tower.", "model.embed_vision.", *_HEARS),
                tied=True,
            ),
            Wrapper(
                "gemma4_unified",
                "Gemma4Unified",
                "gemma4_unified_text",
                ("model.embed_vision.", *_HEARS),
                MappingProxyType(
                    {
                        "model.vision_embedder.": "model.embed_vision.",
                        "model.embed_vision.embedding_projection.": (
                            "model.embed_vision.multimodal_embedder.embedding_projection."
                        ),
                    }
                ),
                tied=True,
            ),
            Wrapper("mistral3", "Mistral3", "mistral", _PROJECTED, _LLAVA, tied=True),
            Wrapper("internvl", "InternVL", "qwen2", _PROJECTED, _LLAVA, tied=True),
            Wrapper("llava", "Llava", "llama", _PROJECTED, _LLAVA, tied_by_text=True),
        )
    }
)


def wrapper_of(model_type: object) -> Wrapper | None:
    """The wrapper of this type, dense or converted, where it is one's."""
    return WRAPPERS.get(str(model_type).removeprefix(MODEL_TYPE_PREFIX))


def opened_by(model_type: object) -> str:
    """Which of transformers' Auto classes opens a model whole."""
    whole = wrapper_of(model_type) is not None
    return "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM"


def decoder_prefix(model_type: object) -> str:
    """What the names of the language model's tensors begin with, but that of lm_head."""
    return "model." if wrapper_of(model_type) is None else "model.language_model."


def embedding_name(model_type: object) -> str:
    """What the weight of a model's embedding is called."""
    return f"{decoder_prefix(model_type)}embed_tokens.weight"


def layer_of(name: str) -> int | None:
    """The layer of the language model that a tensor or module is of, by its name."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def by_todays_tower(name: str) -> str:
    """A tensor's name without a level that older vision towers have in them, which transformers
    leaves out where its class has none."""
    return name.replace(".vision_model.", ".")


def by_older_name(name: str, older: Mapping[str, str]) -> str:
    """A tensor's name as an `older` layout has it, by the longest beginning that this renames."""
    found = [old for old, today in older.items() if name.startswith(today)]
    old = max(found, key=lambda old: len(older[old]), default=None)
    return name if old is None else name.replace(older[old], old, 1)


def is_around(name: str, model_type: object) -> bool:
    """Whether a tensor is of what lies around the language model."""
    return not name.startswith((decoder_prefix(model_type), "lm_head."))


def language_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """What a config.json says of the language model, as one that has nothing around it says it."""
    wrapper = wrapper_of(config.get("model_type"))
    if wrapper is None:
        return config
    given = config.get(TEXT)
    text: dict[str, object] = {"model_type": wrapper.text}
    if isinstance(given, Mapping):
        text |= _SIZES.get(str(given.get("model_type", wrapper.text)), {})
        text |= given
    tied = config.get(TIED, wrapper.tied)
    if wrapper.tied_by_text:
        tied = tied or text.get(TIED, False)
    dtypes = {key: config[key] for key in _DTYPES if config.get(key) is not None}
    if dtypes:  # whose word counts
        text = {key: value for key, value in text.items() if key not in _DTYPES}
    return {**text, TIED: tied, **dtypes}
