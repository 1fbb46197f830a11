"""A server's steady state: against a simulation of its steps, its limits, its laws."""

from __future__ import annotations

import html
import json
import random
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from estimating import H100, SHAPE, VLLM
from hypothesis import given, settings
from hypothesis import strategies as st
from test_estimate_command import GIVEN, run_command

from ptconvert.estimate.alternatives import Stages
from ptconvert.estimate.compare import BASELINE, Candidate, Row, Setting
from ptconvert.estimate.model import Speculation, Workload, estimate, step
from ptconvert.estimate.roofline import Pass, rank_bytes, sublayer_parts
from ptconvert.estimate.server import (
    Load,
    Served,
    Server,
    Steady,
    _Steps,
    piped,
    scheduled,
    serve,
    servers,
)
from ptconvert.schedule.presets import PRESETS
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer

SMALL = SHAPE.with_layers(4)
DENSE = Candidate(BASELINE, SMALL.dense, 8)


def setting(prompt: int, new: int, speculation: Speculation | None = None) -> Setting:
    workload = Workload(1, prompt, new, speculation or Speculation(0, 0.0))
    return Setting(SMALL, H100, VLLM, "vllm", 8, workload)


def test_chunks_beside_decode_steps_by_hand() -> None:
    """3 sequences that decode after 1000 tokens, and 500 tokens of a prompt after 250, on 8 ranks:
    weights are read once for all 503, attention is of each."""
    chunk = Pass(1, 500, past=250, allocated=2000)
    one = Pass(3, 1, past=1000, allocated=2000, beside=chunk)
    assert one.total == 503 and one.is_prefill
    (mlp,) = sublayer_parts(Sublayer(0, Kind.MLP), SHAPE, VLLM, 8, one)
    assert mlp.flops == 2 * 503 * 3 * 8192 * 28672 / 8
    assert mlp.nbytes == 2 * (3 * 8192 * 28672 / 8 + 503 * 4 * (8192 + 28672 / 8))
    projections, *cores = sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, VLLM, 8, one)
    assert projections.flops == 2 * 503 * (2 * 8192 * 8192 + 2 * 8192 * 1024) / 8
    alone = [replace(one, beside=None), chunk]
    assert cores == [
        sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, VLLM, 8, x)[1] for x in alone
    ]
    assert cores[1].flops == 4 * 500 * 500.5 * 8 * 128


def simulated(
    s: Setting, load: Load, requests: int, accepted: int = 0
) -> tuple[float, float, float]:
    """Mean TTFT and TPOT in seconds, and requests that decode, of a server run step by step."""
    draw, workload, now = random.Random(0), s.workload, 0.0
    arrivals, at = deque[float](), 0.0
    for _ in range(requests):
        at += draw.expovariate(load.rate)
        arrivals.append(at)
    waiting = list[list[float]]()  # arrival, tokens of its prompt that have gone through
    decoding = list[list[float]]()  # first token at, tokens to come
    firsts, gaps, area = list[float](), list[float](), 0.0
    width = workload.decode.tokens

    @cache
    def seconds(n: int, prompts: int, tokens: int, past: int) -> float:
        chunk = Pass(prompts, tokens, past, 1) if prompts else None
        one = replace(workload.decode, sequences=n, beside=chunk)
        return step(SMALL.dense, SMALL, H100, VLLM, 8, one).seconds

    while len(gaps) < requests:
        while arrivals and arrivals[0] <= now:
            waiting.append([arrivals.popleft(), 0])
        if not waiting and not decoding:
            now = arrivals[0]
            continue
        room, taken = load.chunk - width * len(decoding), list[tuple[list[float], float]]()
        for request in waiting:
            if room > 0:
                taken.append((request, min(room, workload.prompt - request[1])))
                room -= taken[-1][1]
        tokens = sum(t for _, t in taken) / max(len(taken), 1)
        past = sum(r[1] for r, _ in taken) / max(len(taken), 1)
        took = seconds(len(decoding), len(taken), round(tokens), round(past / 64) * 64)
        area, now = area + took * len(decoding), now + took
        for one in decoding:
            one[1] -= 1 + accepted
        gaps += [(now - first) / (workload.new - 1) for first, left in decoding if left <= 0]
        decoding = [one for one in decoding if one[1] > 0]
        for request, n in taken:
            request[1] += n
            if request[1] >= workload.prompt:
                waiting.remove(request)
                firsts.append(now - request[0])
                decoding.append([now, workload.new - 1])
    return sum(firsts) / requests, sum(gaps) / requests, area / now


def ran(candidate: Candidate, s: Setting, load: Load) -> Server:
    return serve(scheduled(candidate, s), s, load)


@pytest.mark.parametrize(
    ("prompt", "new", "chunk", "share"),
    [
        (512, 129, 2048, 0.02),
        (512, 129, 2048, 0.5),
        (1024, 513, 2048, 0.8),
        (4096, 65, 1024, 0.8),
        (64, 257, 512, 0.8),
        (8192, 257, 2048, 0.8),
    ],
)
def test_the_steady_state_is_that_of_a_simulation(
    prompt: int, new: int, chunk: int, share: float
) -> None:
    """At a share of the rate that saturates it, with random arrivals. Where prompts are long and
    come in crowds, tokens wait longer than in the mean step."""
    s = setting(prompt, new)
    most = ran(DENSE, s, Load(1, chunk)).most
    load = Load(share * most, chunk)
    found = ran(DENSE, s, load).steady
    ttft, tpot, running = simulated(s, load, 1500)
    assert found is not None
    assert found.ttft - VLLM.request_us * 1e-6 == pytest.approx(ttft, rel=0.16)
    assert found.tpot == pytest.approx(tpot, rel=0.16)
    assert found.running == pytest.approx(running, rel=0.16)


def test_a_rare_request_has_the_server_alone() -> None:
    """TTFT and TPOT are those of a batch of one, with a prompt of 4096 in chunks of 1024."""
    s = setting(4096, 257)
    found = ran(DENSE, s, Load(1e-6, 1025)).steady
    static = estimate(SMALL.dense, SMALL, H100, VLLM, 8, s.workload)
    chunks = [
        step(SMALL.dense, SMALL, H100, VLLM, 8, replace(s.workload.decode, beside=chunk)).seconds
        for chunk in (Pass(1, 1024, past, 4353) for past in (0, 1024, 2048, 3072))
    ]
    assert found is not None and found.tpot == pytest.approx(static.tpot, rel=1e-4)
    assert found.ttft == pytest.approx(sum(chunks) + VLLM.request_us * 1e-6, rel=1e-2)
    assert sum(chunks) > static.prefill.seconds  # weights are read four times


@given(
    st.sampled_from([SMALL.dense, Schedule(PRESETS["ladder"](range(4)))]),
    *(st.integers(1, 3000), st.integers(2, 600), st.integers(64, 4096), st.floats(0.01, 0.99)),
    st.sampled_from([Speculation(0, 0.0), Speculation(3, 1.5), Speculation(2, 2.0, layer=True)]),
)
@settings(max_examples=25, deadline=None)
def test_the_laws_of_a_server(
    schedule: Schedule, prompt: int, new: int, chunk: int, share: float, speculation: Speculation
) -> None:
    s, candidate = setting(prompt, new, speculation), Candidate("drawn", schedule, 8)
    most = ran(candidate, s, Load(1, chunk)).most
    ours, more, over = (
        ran(candidate, s, Load(rate, chunk))
        for rate in (share * most, (1 + share) / 2 * most, most * 1.01)
    )
    assert ours.most == more.most == over.most > 0 and over.steady is None
    assert ours.steady is not None and more.steady is not None
    served = ours.steady.tokens_per_second / new
    assert served == pytest.approx(share * most, rel=0.1)  # a prompt in a chunk more is a jump
    little = served * (new - 1) * ours.steady.tpot
    assert ours.steady.running == pytest.approx(little)
    assert more.steady.running >= ours.steady.running and ours.steady.ttft > 0


def test_what_a_server_saturates_by() -> None:
    """A device of so much memory as is needed for weights and 5 requests, or much more than that;
    or of too little for one."""
    s = setting(1024, 513)
    one = replace(s.workload.decode, allocated=1024 + 256)
    weights, cache = (
        rank_bytes(SMALL, VLLM.serving(False), 8, replace(one, sequences=0)),
        4 * 2 * 128 * 2 * (1024 + 256),  # layers, keys and values of a KV head, bytes, tokens
    )

    def of(requests: float) -> Server:
        device = replace(H100.device, memory_gb=(weights + requests * cache) / 1e9)
        return ran(DENSE, replace(s, hardware=replace(H100, device=device)), Load(0.1, 2048))

    few, none = of(5), of(0.9)
    assert few.limit == "full memory" and few.steady is not None
    steady = ran(DENSE, s, Load(few.most, 2048)).steady
    assert steady is not None
    # 5 hold cache, of which those with chunks are few: one step of 1 + 512 that a request takes
    assert steady.running == pytest.approx(5 * 512 / 513, rel=1e-3)
    assert none.most == 0 and none.steady is None
    roomy = of(1e6)
    assert roomy.limit == "full steps"
    mean = replace(
        replace(s.workload.decode, sequences=512 * 2048 / 1536),
        beside=Pass(2048 / 1536 * 1, 1024, 0, 1537),
    )
    full = step(SMALL.dense, SMALL, H100, VLLM, 8, mean).seconds
    assert roomy.most == pytest.approx(2048 / (1024 + 512) / full, rel=0.05)


def test_an_engine_runs_so_many_requests_at_a_time() -> None:
    """256 of 1024 + 512 tokens: Little's law over the step that has them all."""
    s = setting(1024, 513)
    found = ran(DENSE, s, Load(0.1, 8192, 256))
    assert found.limit == "requests at a time"
    x = 256 / 513  # 512 steps that a request decodes in, and one for its prompt
    steps = [
        step(SMALL.dense, SMALL, H100, VLLM, 8, replace(one, sequences=x * 512)).seconds
        for one in (
            s.workload.decode,
            replace(s.workload.decode, beside=Pass(1, 1024, 0, 1537)),
        )
    ]
    assert found.most == pytest.approx(x / (x * steps[1] + (1 - x) * steps[0]))
    assert found.most < ran(DENSE, s, Load(0.1, 8192)).most


def test_a_pipeline_serves_a_crowd_on_each_stage() -> None:
    """A crowd steps again once all stages are through, or the slowest has had all crowds; of each
    layer a stage holds the cache of all of them."""
    s = setting(1024, 513)
    stages, one = Stages(s, 2), replace(s.workload.decode, sequences=3.0)
    whole, slowest = stages.through(one)
    piped_4x2 = piped(s, 2)
    assert piped_4x2.name == "pipeline 4x2" and stages.count == 4
    assert piped_4x2.seconds(one) == max(whole, 4 * slowest)
    cache = 2 * 4 * 128 * 2 * s.workload.decode.allocated  # of a layer, on each of 2 ranks
    more = piped_4x2.nbytes(one) - piped_4x2.nbytes(replace(one, sequences=2.0))
    assert more == pytest.approx(4 * cache)
    each = serve(piped_4x2, s, Load(0.1, 2048, 8))
    row = Row(DENSE, *(estimate(SMALL.dense, SMALL, H100, VLLM, 8, s.workload),) * 2)
    found = {server.name: server for server in servers([row], s, Load(0.4, 2048, 32))}
    assert {name.split()[0] for name in found} == {BASELINE, "pipeline", "replicas"}
    best = max(x.most for name, x in found.items() if name.startswith("pipeline"))
    assert best >= 4 * each.most * (1 - 1e-9)  # of the sizes, that which serves most


@given(st.integers(1, 3000), st.integers(2, 600), st.integers(64, 4096))
@settings(max_examples=25, deadline=None)
def test_the_rate_falls_only_where_a_prompt_takes_a_step_more(
    prompt: int, new: int, chunk: int
) -> None:
    """So that a bisection below the first end at which it is higher finds the least solution."""
    s = setting(prompt, new)
    steps = _Steps(scheduled(DENSE, s), s, chunk)
    most = chunk / (prompt + new - 1) * 0.999
    ends = [0.0, *steps.jumps(most), most]
    assert [steps.chunks(end) for end in ends[1:]] == sorted({steps.chunks(e) for e in ends[1:]})
    for low, high in pairwise(ends[-4:]):
        xs = [low + (high - low) * (n + 0.5) / 8 for n in range(8)] + [high]
        rates = [x / steps.mean(x) for x in xs]
        assert rates == sorted(rates) and {steps.chunks(x) for x in xs} == {steps.chunks(high)}


def test_a_servers_verdict_is_of_its_load() -> None:
    """By a token's time at its rate, or by what it serves at most where tokens take no longer, each
    against the best of all others."""

    def of(ours: Server, *others: Server) -> str:
        return Served(Load(2.0, 2048), [*others, ours]).verdict

    def way(name: str, most: float, tpot: float | None) -> Server:
        steady = None if tpot is None else Steady(1.0, 0.1, tpot, 1.0)
        return Server(name, steady, most, "full steps", name == "ours")

    same = of(way("ours", 3.06, 0.0101), way("dense", 3.0, 0.01))
    assert same == (
        "As a server: don't convert: ours serves 3.06 requests a second at most, dense 3.00; a "
        "token takes 10.10 ms, with dense 10.00."
    )
    assert "convert: " in of(way("ours", 3.2, 0.01), way("dense", 3.0, 0.01))[12:22]
    assert of(way("ours", 3.0, 0.009), way("dense", 3.0, 0.01)).startswith("As a server: convert")
    over = of(way("ours", 3.0, 0.01), way("dense", 1.9, None))
    assert over == (
        "As a server: convert: ours serves 3.00 requests a second at most, dense 1.90, and all "
        "that leaves the model as it is saturates."
    )
    slow, quick = way("replicas", 3.1, 0.02), way("dense", 2.9, 0.01)
    assert of(way("ours", 3.0, 0.0098), slow, quick) == (
        "As a server: don't convert: ours serves 3.00 requests a second at most, replicas 3.10; a "
        "token takes 9.80 ms, with dense 10.00."
    )
    assert "As a server: convert" in of(way("ours", 3.0, 0.009), slow, quick)
    assert "As a server: convert" in of(way("ours", 3.4, 0.0104), slow, quick)
    assert "don't" in of(way("ours", 3.4, 0.011), slow, quick)  # a token takes 10% longer
    lost = of(way("ours", 3.5, None), slow, quick)
    assert "don't convert" in lost and "ours saturates, dense doesn't" in lost
    assert of(way("ours", 0.0, None), way("dense", 3.0, 0.01)) == ""


def test_a_server_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    given = (*GIVEN, "--rate", 2)
    out = run_command(*given, "--chunk", 1024, "--html", file)[0]
    assert "\n2 requests a second, 1,024 tokens in a step at most\n" in out
    text = file.read_text()
    assert "<h2>As a server</h2>" in text and "2 requests a second, 1,024 tokens" in text
    figures = json.loads(run_command(*given, "--json")[0])["server"]
    assert figures["tokens_in_a_step"] == 2048 and figures["notes"] == []
    assert figures["requests_in_a_step"] is None
    few = json.loads(run_command(*given, "--seqs", 4, "--json")[0])["server"]
    assert few["requests_in_a_step"] == 4
    assert {way["limited_by"] for way in few["ways"]} == {"requests at a time"}
    assert "1,024 tokens and 4 requests in a step" in run_command(
        *given, "--chunk", 1024, "--seqs", 4
    )[0].replace("2 requests a second, ", "")
    base, ours, *others = figures["ways"]
    ways = {way["name"]: way for way in others}
    replicas = ways["replicas"]
    assert base["name"] == "tensor_parallel" and "pipeline" in ways
    assert figures["verdict"] in " ".join(run_command(*given)[0].split())
    assert "As a server: convert: llama-3.1-8b-balanced" in html.unescape(text)
    assert ours["most_requests_per_second"] > base["most_requests_per_second"] > 2
    assert ours["tokens_per_second"] == pytest.approx(2 * 512)
    assert replicas["running"] > base["running"] > ours["running"]  # the slower, the more
    many = run_command(*GIVEN, "--rate", 1000)[0]
    said = " ".join(many.split())
    assert said.count("note:") == 2 and "note: At 1000 requests a second these saturate" in said
    assert (
        f"tensor_parallel, at most {base['most_requests_per_second']:,.2f} ({base['limited_by']})"
        in said
    )
    big = ("--model", "llama-3.1-405b", "--hardware", "l40s-pcie", "--rate", 2)
    out = run_command(*big)[0]
    assert "note: No server here holds the weights and one request's cache." in out
    assert "tokens in a step at most" not in out
    assert "server" not in json.loads(run_command(*GIVEN, "--json")[0])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--rate", 0), "0.0 is not in the range"),
        (("--rate", "inf"), "inf is not in the range"),
        (("--rate", "nan"), "nan isn't a finite number"),
        (("--chunk", 512), "--chunk needs --rate R, the requests that come in a second"),
        (("--seqs", 4), "--seqs needs --rate R, the requests that come in a second"),
        (("--rate", 1, "--chunk", 0), "0 is not in the range"),
        (("--rate", 1, "--seqs", 0), "0 is not in the range"),
    ],
)
def test_a_wrong_load_is_a_line(arguments: tuple[object, ...], what: str) -> None:
    _, err = run_command(*GIVEN, *arguments, code=2)
    assert what in err.replace("\n", " ") and "Traceback" not in err
