"""One engine of test_sglang.py, in a process of its own: python engine.py CASE.json FOUND.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from ptconvert.engines.sglang.verify import counted, engine, generate

    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    prompts, new = case["prompts"], case["new_tokens"]
    limits = {
        "chunked_prefill_size": 64,  # less than the longest prompt, so that it comes in chunks
        "max_running_requests": 8,
        "max_total_tokens": 4096,
    }
    with engine(Path(case["path"]), 2, "cpu", dtype="float32", **limits) as running:
        found: dict[str, Any] = {"answers": generate(running, prompts, new)}
        found["again"] = generate(running, prompts, new)
        greedy = {"temperature": 0, "max_new_tokens": 1}
        outputs = running.generate(input_ids=prompts, sampling_params=greedy)
        found["cached"] = sum(one["meta_info"]["cached_tokens"] for one in outputs)
        with counted(running, 2) as passes:
            generate(running, [[7, 8, 9, 10, 11]], 3)
        found["passes"] = passes
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":  # SGLang starts its workers by importing this again
    main()
