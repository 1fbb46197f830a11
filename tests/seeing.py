"""Tiny random vision-language models of the real classes, and pictures for them.

Which ids a picture's place is filled with says the processor of each, which needs torchvision for
all but LLaVA's; its image processor, which doesn't, is what makes the pixels here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import SCALES, SIZES, VARIANTS, bytes_as_tokens, randomised
from PIL import Image

from ptconvert.models.wrappers import WRAPPERS

PICTURE = 300  # the id of a picture's places
_PATCH = 4
_TEXT = {**SIZES, "vocab_size": 320, "pad_token_id": None}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "patch_size": _PATCH, "image_size": 16}
_QWEN_VISION = {
    **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4},
    **{"patch_size": _PATCH, "out_hidden_size": 32, "num_position_embeddings": 16},
}
_QWEN_IDS = {"image_token_id": PICTURE, "video_token_id": 301, "vision_start_token_id": 302}
_SOFT_TOKENS = 70  # the fewest that Gemma 4's processor lets a picture have at most
_GEMMA4_IDS = {"image_token_id": PICTURE, "boi_token_id": 301, "eoi_token_id": 302}
_MROPE = {
    **{"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True},
    "mrope_section": [2, 1, 1],
}


def text_config(variant: str, **more: Any) -> dict[str, Any]:
    """What a config says of a language model of one of VARIANTS."""
    family, settings = VARIANTS[variant]
    config_class = getattr(transformers, f"{family}ForCausalLM").config_class
    return {**_TEXT, **settings, **more, "model_type": config_class.model_type}


def _llava(**text: Any) -> Any:
    return transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION, **_HEADS},
        text_config=text_config("llama", **text),
        image_token_index=PICTURE,
    )


def _mistral3(**text: Any) -> Any:
    return transformers.Mistral3Config(
        vision_config={"model_type": "pixtral", **_VISION, **_HEADS, "head_dim": 8},
        text_config=text_config("ministral3", **text),
        image_token_index=PICTURE,
        tie_word_embeddings=False,
    )


def _internvl(**text: Any) -> Any:
    sizes = {**_HEADS, "patch_size": [_PATCH] * 2, "image_size": [16, 16]}
    return transformers.InternVLConfig(
        vision_config={"model_type": "internvl_vision", **_VISION, **sizes},
        text_config=text_config("qwen2", **text),
        image_token_id=PICTURE,
    )


def _qwen3_vl(**text: Any) -> Any:
    return transformers.Qwen3VLConfig(
        vision_config={
            **{**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
            "out_hidden_size": text.get("hidden_size", _TEXT["hidden_size"]),
        },
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _MROPE, **text},
        **_QWEN_IDS,
    )


def _qwen3_5(config_class: Any, variant: str, **text: Any) -> Any:
    rope = {**_MROPE, "partial_rotary_factor": 0.5}
    width = text.get("hidden_size", _TEXT["hidden_size"])
    return config_class(
        vision_config={**_QWEN_VISION, "out_hidden_size": width},
        text_config=text_config(variant, **{"head_dim": 16, "rope_parameters": rope, **text}),
        **_QWEN_IDS,
    )


def _gemma3(**text: Any) -> Any:
    return transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_VISION, **_HEADS},
        text_config=text_config("gemma3_text", attention_bias=False, **text),
        mm_tokens_per_image=4,
        image_token_id=PICTURE,
        tie_word_embeddings=False,
    )


def _gemma4(**text: Any) -> Any:
    vision = {**_VISION, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    vision |= {"patch_size": _PATCH, "position_embedding_size": 64}
    return transformers.Gemma4Config(
        vision_config={**vision, "default_output_length": _SOFT_TOKENS},  # which vLLM reads
        text_config=text_config("gemma4_text", pad_token_id=0, **text),
        **_GEMMA4_IDS,
        tie_word_embeddings=False,
    )


def _gemma4_unified(**text: Any) -> Any:
    vision = {"patch_size": _PATCH, "pooling_kernel_size": 2, "mm_embed_dim": 24}
    return transformers.Gemma4UnifiedConfig(
        vision_config={
            **{**vision, "mm_posemb_size": 8, "output_proj_dims": 24},
            "num_soft_tokens": _SOFT_TOKENS,  # which vLLM reads
        },
        text_config=text_config("gemma4_unified_text", pad_token_id=0, **text),
        **_GEMMA4_IDS,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Callable[..., Any]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
    "llava": _llava,
    "mistral3": _mistral3,
    "internvl": _internvl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": partial(_qwen3_5, transformers.Qwen3_5Config, "qwen3_5_text"),
    "qwen3_5_moe": partial(_qwen3_5, transformers.Qwen3_5MoeConfig, "qwen3_5_moe_text"),
}
_MODELS = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "gemma4": transformers.Gemma4ForConditionalGeneration,
    "gemma4_unified": transformers.Gemma4UnifiedForConditionalGeneration,
    "llava": transformers.LlavaForConditionalGeneration,
    "mistral3": transformers.Mistral3ForConditionalGeneration,
    "internvl": transformers.InternVLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
    "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
}


def _image_processor(name: str) -> Any:
    """Of pictures of 16 x 16, in patches of 4 x 4."""
    square = {"height": 16, "width": 16}
    if name == "llava":
        return transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    if name == "gemma3":
        return transformers.Gemma3ImageProcessorPil(size=square)
    if name == "gemma4_unified":
        return transformers.Gemma4ImageProcessorPil(patch_size=_PATCH)  # whose patches it merges
    if name == "gemma4":
        return transformers.Gemma4ImageProcessorPil(patch_size=_PATCH, max_soft_tokens=_SOFT_TOKENS)
    if name == "mistral3":
        return transformers.PixtralImageProcessorPil(patch_size=_PATCH, size={"longest_edge": 16})
    if name == "internvl":
        return transformers.GotOcr2ImageProcessorPil(size=square)
    area = {"shortest_edge": 64, "longest_edge": 1024}
    return transformers.Qwen2VLImageProcessorPil(patch_size=_PATCH, merge_size=2, size=area)


def seeing_model(name: str, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """A random one, `text` of its language model's config."""
    torch.manual_seed(0)
    scale = SCALES.get(f"{name}_text", 0.25)
    return randomised(_MODELS[name](CONFIGS[name](**text)), dtype, scale)


def save(name: str, path: Path, **options: Any) -> Path:
    """The same as a checkpoint, with a tokenizer of bytes and what makes pixels of pictures."""
    seeing_model(name, **options).save_pretrained(path)
    if name == "llava":
        processor(name).save_pretrained(path)
    else:
        _image_processor(name).save_pretrained(path)
        _tokenizer(name).save_pretrained(path)
    return path


def with_processor(name: str, path: Path) -> Path:
    """A checkpoint with its processor and a template for chats beside it."""
    whole = processor(name)
    whole.chat_template = CHAT_TEMPLATE.replace("PICTURE", MARKS[name])
    whole.save_pretrained(path)
    return path


# What stands for a picture in a prompt.
_QWENS = "qwen3_vl", "qwen3_5", "qwen3_5_moe"
_GEMMAS_4 = "gemma4", "gemma4_unified"
MARKS = {
    "llava": "<image>",
    "mistral3": "[IMG]",
    "internvl": "<IMG_CONTEXT>",
    **dict.fromkeys(_QWENS, "<|vision_start|><|image_pad|><|vision_end|>"),
    "gemma3": "<start_of_image>",
    **dict.fromkeys(_GEMMAS_4, "<|image|>"),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{{ 'PICTURE' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endfor %}"
)
_QWEN_TOKENS = {
    **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    **{"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
}
_GEMMA4_TOKENS = {
    **{"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"},
    **{"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
}
# Special tokens by what processors call them, of which the first is PICTURE and the others follow.
_TOKENS: dict[str, dict[str, str]] = {
    "mistral3": {
        **{"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]"},
        "image_end_token": "[IMG_END]",
    },
    "internvl": {
        **{"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>"},
        **{"end_image_token": "</img>", "video_token": "<video>"},
    },
    **dict.fromkeys(_QWENS, _QWEN_TOKENS),
    "gemma3": {
        **{"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"},
        **{"eoi_token": "<end_of_image>"},
        **{f"newlines_{n}": "\n" * n for n in range(1, 5)},  # which lie around a picture
    },
    **dict.fromkeys(_GEMMAS_4, _GEMMA4_TOKENS),
}


def _tokenizer(name: str) -> Any:
    """Of bytes."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_tokens({f"<{i}>": i for i in range(257, PICTURE)}),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=_TOKENS.get(name, {"image_token": "<image>"}),
    )


def processor(name: str) -> Any:
    """What makes ids and pixels of a prompt with pictures. For all but LLaVA's torchvision must be
    there (an empty one is enough)."""
    pixels, tokenizer = _image_processor(name), _tokenizer(name)
    if name == "llava":
        return transformers.LlavaProcessor(
            pixels,
            tokenizer,
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    # By their modules: where torchvision came later, transformers has others under these names.
    if name == "mistral3":
        made = _class("pixtral.processing_pixtral", "PixtralProcessor")
        return made(pixels, tokenizer, patch_size=_PATCH, spatial_merge_size=2)
    if name == "internvl":
        frames = _class("internvl.video_processing_internvl", "InternVLVideoProcessor")()
        made = _class("internvl.processing_internvl", "InternVLProcessor")
        return made(pixels, tokenizer, frames, image_seq_length=4)
    if name == "gemma3":
        made = _class("gemma3.processing_gemma3", "Gemma3Processor")
        return made(pixels, tokenizer, image_seq_length=4)
    if name in _GEMMAS_4:
        prefix = WRAPPERS[name].prefix
        parts = [
            _class(f"{name}.{file}_{name}", f"{prefix}{ending}")()
            for file, ending in (
                ("feature_extraction", "AudioFeatureExtractor"),
                ("video_processing", "VideoProcessor"),
            )
        ]
        if name == "gemma4_unified":
            pixels = _merging_patches()
        made = _class(f"{name}.processing_{name}", f"{prefix}Processor")
        return made(parts[0], pixels, tokenizer, parts[1])
    frames = _class("qwen3_vl.video_processing_qwen3_vl", "Qwen3VLVideoProcessor")
    made = _class("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor")
    return made(pixels, tokenizer, frames(patch_size=_PATCH, merge_size=2))


def _merging_patches() -> Any:
    """Gemma 4 Unified's image processor by PIL, of which transformers has none."""
    within = "gemma4_unified.image_processing_gemma4_unified"
    merge, pad = _class(within, "patches_merge"), _class(within, "pad_along_first_dim")

    class Gemma4UnifiedImageProcessorPil(transformers.Gemma4ImageProcessorPil):  # type: ignore[misc]
        def _preprocess(self, images: Any, **given: Any) -> Any:
            found = super()._preprocess(images, **given)
            merged = []
            for count, *each in zip(
                found["num_soft_tokens_per_image"],
                found["pixel_values"],
                found["image_position_ids"],
                strict=True,
            ):
                own = slice(int(count) * given["pooling_kernel_size"] ** 2)
                patches = (torch.as_tensor(part[own]) for part in each)
                merged.append(pad(*merge(*patches, int(count)), given["max_soft_tokens"]))
            found["pixel_values"], found["image_position_ids"] = map(
                torch.stack, zip(*merged, strict=True)
            )
            return found

    transformers.AutoImageProcessor.register(
        transformers.Gemma4UnifiedConfig,
        image_processor_classes={"pil": Gemma4UnifiedImageProcessorPil},
        exist_ok=True,
    )
    return Gemma4UnifiedImageProcessorPil(
        patch_size=_PATCH, pooling_kernel_size=2, max_soft_tokens=_SOFT_TOKENS
    )


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def pictures(seed: int = 0) -> list[Image.Image]:
    """Two, of noise."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)]


def merged_patches(images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Pictures as Gemma 4 Unified takes them: in patches of 2 x 2 of the processor's, and where
    each lies. (Its own processor needs torchvision.)"""
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    patches = pixels.reshape(len(images), 2, 8, 2, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    places = torch.tensor([[x, y] for y in range(2) for x in range(2)])
    return {
        "pixel_values": torch.from_numpy(patches.reshape(len(images), 4, -1).copy()),
        "image_position_ids": places.expand(len(images), 4, 2),
    }


def looking(name: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """A model's inputs: prompts of 12 random tokens, each with a picture after the third; that of
    the second is padded on the left."""
    pixels = merged_patches(images)
    if name != "gemma4_unified":
        pixels = dict(_image_processor(name)(images, return_tensors="pt"))
    for unread in ("num_patches", "num_crops", "num_soft_tokens_per_image"):
        pixels.pop(unread, None)
    places = {"llava": 16, "gemma4": 64}.get(name, 4)  # one of four patches, but in these
    generator = torch.Generator().manual_seed(1)
    text_BS = torch.randint(1, 257, (len(images), 12), generator=generator)
    seen_BS = torch.full((len(images), places), PICTURE)
    ids_BS = torch.cat([text_BS[:, :3], seen_BS, text_BS[:, 3:]], dim=1)
    keep_BS = torch.ones_like(ids_BS)
    keep_BS[1:, :2] = 0
    inputs = {"input_ids": ids_BS, "attention_mask": keep_BS, **pixels}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids_BS == PICTURE).int()
    if "image_grid_thw" in pixels or name.startswith("gemma4"):
        inputs["mm_token_type_ids"] = (ids_BS == PICTURE).int()
    return inputs


def under_todays_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, those of LLaVA's and Gemma 4 Unified's older layouts as transformers
    calls them now."""
    older = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    found = dict(tensors)
    if any(name.startswith("model.vision_embedder.") for name in found):
        older["model.vision_embedder."] = "model.embed_vision."
        within = "model.embed_vision.multimodal_embedder.embedding_"
        older["model.embed_vision.embedding_"] = within
    for begins, today in older.items():
        for name in [name for name in found if name.startswith(begins)]:
            found[today + name.removeprefix(begins)] = found.pop(name)
    return found
