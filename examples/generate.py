"""Opens a checkpoint, converted or not, with transformers and continues a line of Python.

python examples/generate.py CHECKPOINT [PROMPT]
"""

from __future__ import annotations

import sys

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptconvert  # noqa: F401  # makes AutoModelForCausalLM open converted checkpoints

PROMPT = '    def __init__(self, name):\n        """'


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    path = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    inputs = tokenizer(sys.argv[2] if len(sys.argv) > 2 else PROMPT, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(
        **inputs, max_new_tokens=48, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    print(tokenizer.decode(output[0]))


if __name__ == "__main__":
    main()
