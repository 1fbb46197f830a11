"""vLLM on GPUs against the single-process model: one rank with all tracks, CUDA graphs, and several
ranks with NCCL's and vLLM's own all-reduces.

On CPUs, in `make test-vllm`, the same cases run without graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from places import VLLM, on

pytestmark = VLLM

TRACKS = 4
GRAPHS = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
# Eager first; then vLLM's own choice, full graphs in decoding, and graphs that end where an
# all-reduce is in flight.
ONE_RANK: dict[str, tuple[bool, dict[str, Any]]] = {
    "eager": (True, {}),
    "graphs": (False, {}),
    "piecewise graphs": (False, GRAPHS),
}
SEVERAL: dict[str, tuple[bool, dict[str, Any]]] = {
    "vLLM's own all-reduces": (True, {}),
    "NCCL": (True, {"disable_custom_all_reduce": True}),
    "graphs": (False, {}),
}


@pytest.mark.parametrize(
    ("device", "ranks", "names"),
    [
        ("cpu", 1, ["eager"]),
        on(1, "cuda", 1, list(ONE_RANK)),
        on(2, "cuda", 2, list(SEVERAL)),
        on(4, "cuda", 4, list(SEVERAL)),
    ],
)
def test_answers_and_all_reduces(
    device: str, ranks: int, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and log-probabilities under each; eager, where passes can be told apart, counts."""
    from served import MIXED, apart, greedy, make_model, prompts, shape_of
    from test_parity import NEW_TOKENS, case_of, of_case, run_cases, schedule_of

    from ptconvert.engines.verify import TOLERANCE, count_checks

    # else Triton rounds fp32 to TF32, further than the tolerance; the ranks inherit it
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    path = make_model(tmp_path, "llama-biases", TRACKS, MIXED)
    reference = greedy(path, prompts(), NEW_TOKENS)
    cases = []
    for name in names:
        eager, arguments = (ONE_RANK if ranks == 1 else SEVERAL)[name]
        case = case_of("dense", path, device=device, **arguments)
        cases.append({**case, "name": name, "eager": eager})
    found = run_cases(tmp_path, cases, ranks)
    for case in cases:
        for rank in of_case(found, case["name"]):
            assert apart(rank["answers"], reference) <= TOLERANCE, case["name"]
            assert apart(rank["again"], reference) <= TOLERANCE, case["name"]
        if case["eager"]:
            passes = [rank["passes"] for rank in of_case(found, case["name"])]
            checks = count_checks(passes, schedule_of(path), shape_of(path), new_tokens=3)
            assert all(check.ok for check in checks), checks


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), on(2, 2), on(4, 4)])
def test_verify_in_16_bits(ranks: int, tmp_path: Path) -> None:
    """Compiled, as people serve: on GPUs with NVLink an all-reduce is then one kernel with the norm
    after it, which vLLM has for 16 bits only."""
    import engines  # noqa: F401  # settings
    from commands import verify
    from served import MIXED, make_model

    path = make_model(tmp_path, "llama-biases", TRACKS, MIXED)
    options = ["--ranks", str(ranks), "--dtype", "bfloat16", "--batch", "3"]
    code, report = verify(path, *options)
    assert code == 0 and report["mode"] == "compiled", report["checks"]
    assert [check["name"] for check in report["checks"]][-1] == "their log-probabilities"
