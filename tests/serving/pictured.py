"""What ranks.py runs with models that see: requests with pictures, and counted passes of some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import seeing
from starting import started

NEW_TOKENS = 8
COUNTED = ["another text", "a new picture"]  # in this order, as a tower runs before a pass
FIRST = ["text", "seeing", "another picture", "two", "long"]


def requests(name: str) -> dict[str, tuple[str, list[Any]]]:
    """Prompts by what is special about them, and their pictures."""
    mark, one, other = seeing.MARKS[name], *seeing.pictures(0)
    return {
        "text": ("What is in it?", []),
        "seeing": (f"What is in {mark}?", [one]),
        "another picture": (f"What is in {mark}?", [other]),
        "two": (f"Is {mark} as {mark} is?", [one, other]),
        "another text": ("How many are there?", []),
        "a new picture": (f"How many are there in {mark}?", seeing.pictures(1)[:1]),
        "long": (f"{'So it goes. ' * 8} What is in {mark}, then? {'Look. ' * 8}", [one]),
    }


def run(case: dict[str, Any], rank: int, ranks: int, rendezvous: Path) -> dict[str, Any]:
    """Prompts' ids, and answers to them, to the same in a chat, and once more out of the caches."""
    import vllm
    from transformers.models.auto import image_processing_auto

    image_processing_auto._resolve_backend = lambda *_: "pil"  # torchvision may be an empty one
    seeing.processor(case["model"])  # so that transformers knows what it is made of
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False
    )
    settings = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 2, "video": 0}}
    llm = started(case, rank, ranks, rendezvous, **settings)
    asked = requests(case["model"])

    def generate(names: list[str]) -> dict[str, Any]:
        prompts = [
            {
                "prompt": asked[n][0],
                **({"multi_modal_data": {"image": p}} if (p := asked[n][1]) else {}),
            }
            for n in names
        ]
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        return {name: answered(output) for name, output in zip(names, outputs, strict=True)}

    found: dict[str, Any] = {"answers": generate(FIRST), "again": generate(FIRST)}
    before, after = asked["seeing"][0].split(seeing.MARKS[case["model"]])
    content = [
        {"type": "text", "text": before},
        {"type": "image_pil", "image_pil": asked["seeing"][1][0]},
        {"type": "text", "text": after},
    ]
    talk = [{"role": "user", "content": content}]
    found["chat"] = answered(llm.chat(talk, greedy, use_tqdm=False)[0])
    llm.collective_rpc("ptconvert_start_counting")
    for name in COUNTED:
        found["answers"] |= generate([name])
    found["passes"] = llm.collective_rpc("ptconvert_stop_counting")[0]
    llm.llm_engine.engine_core.shutdown()
    return found


def answered(output: Any) -> dict[str, Any]:
    tokens = list(output.outputs[0].token_ids)
    steps = zip(tokens, output.outputs[0].logprobs, strict=True)
    return {
        "prompt": list(output.prompt_token_ids),
        "answer": (tokens, [step[token].logprob for token, step in steps]),
        "cached": output.num_cached_tokens,
    }
