"""Tokenizers as people's checkpoints name them, and everything that two must agree in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "Hello world, I'm an AI. def f(x): return  x + 12345\n\n  two  spaces",
    "<|x|> user hi",
] * 4
TEXTS = [
    "Hello world. I'm an AI.\n  def f(x):\n\treturn  x",
    "  two  spaces 12345 é ü 漢字",
    "<|x|>a",
]
CHAT = "{% for m in messages %}<|x|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
# tokenizer_config.json, None where there is no such file; by what it says of the class.
CLASSES: dict[str, dict[str, Any] | None] = {
    "no file": None,
    "no class": {"chat_template": CHAT, "eos_token": "<|endoftext|>"},
    **{
        name: {"tokenizer_class": name, "chat_template": CHAT, "eos_token": "<|endoftext|>"}
        for name in (
            "PreTrainedTokenizerFast",
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "GPT2Tokenizer",
            "Qwen2Tokenizer",
        )
    },
}


def trained() -> Tokenizer:
    """A byte-level BPE whose ids depend on how text is split before it, which classes decide."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|x|>", "<|endoftext|>", "<unk>"],  # which Gemma's class asks for
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def put(directory: Path, tokenizer: Tokenizer, name: str) -> None:
    """Writes tokenizer.json and the tokenizer_config.json of one of CLASSES."""
    tokenizer.save(str(directory / "tokenizer.json"))
    file, config = directory / "tokenizer_config.json", CLASSES[name]
    file.unlink(missing_ok=True)
    if config is not None:
        file.write_text(json.dumps(config))


def facts(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does with TEXTS, and what it says of itself."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    chat = [{"role": "user", "content": TEXTS[0]}]
    return {
        "class": type(tokenizer).__name__.removeprefix("Cached"),
        "ids": ids,
        "decoded": [tokenizer.decode(one) for one in ids],
        "special": dict(tokenizer.special_tokens_map),
        "chat": tokenizer.chat_template and tokenizer.apply_chat_template(chat, tokenize=False),
        "size": len(tokenizer),
    }
