"""The estimator: formulas by hand, limits, properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from estimating import (
    GPT_FAST,
    H100,
    LAYERS,
    LINKS,
    ROOT,
    SCHEDULES,
    SETTINGS,
    SHAPE,
    VLLM,
    Given,
    seconds,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ptconvert.checkpoint.files import read_config
from ptconvert.estimate.collective import Reduction, Transfer, all_reduce
from ptconvert.estimate.compare import faster
from ptconvert.estimate.hardware import Link, Protocol, read_engine, read_hardware
from ptconvert.estimate.model import Workload, estimate, reduction, step
from ptconvert.estimate.roofline import Part, Pass, rank_bytes, sublayer_parts
from ptconvert.estimate.timeline import run
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.presets import PRESETS, dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import Kind, Sublayer


def test_a_decode_step_by_hand() -> None:
    """Llama-3.1-70B, batch 1, one decode step of gpt-fast on 8 H100, from its sizes."""
    weights = {"a": (8192 * 8192 * 2 + 2 * 8192 * 1024) / 8, "m": 3 * 8192 * 28672 / 8}
    fitted = H100.device
    bandwidth = 3350e9 * fitted.memory_reach
    moved = {"a": 4 * 8192 + 3 * 1024 + 2 * 128, "m": 4 * 8192 + 4 * 3584}
    matrices = sum(2 * (weights[k] + moved[k]) / bandwidth for k in "am")
    cache = 2 * (1536 * 2 * 128 * 8 + 2 * 128) / bandwidth  # each of 8 query heads reads it
    layer = matrices + cache + 13 * fitted.kernel_us * 1e-6
    head = 2 * (128256 * 8192 + 128256 + 4 * 8192) / bandwidth + 4 * fitted.kernel_us * 1e-6
    link = H100.links[0]
    latency = (link.base_us + 14 * link.protocols[0].step_us) * 1e-6
    ring = latency + 2 * 7 / 8 * 2 * 8192 / 141e9
    one = Pass(1, 1, past=1280, allocated=1536)
    found = step(dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 8, one)
    assert found.compute == pytest.approx(80 * layer + head, rel=1e-9)
    assert found.seconds == pytest.approx(80 * layer + head + 160 * ring, rel=1e-9)
    assert found.communication == pytest.approx(160 * ring / found.seconds)


def test_a_prefill_is_bound_by_flops() -> None:
    one = Pass(4, 1024, allocated=1024)
    flops = 2 * 4 * 1024 * (LAYERS * 3 * 8192 * 28672 / 8)
    silent = replace(H100, links=(replace(H100.links[0], ranks=8),))
    found = step(dense_schedule(LAYERS), SHAPE, silent, VLLM, 8, one).compute
    assert found > flops / (989.4e12 * VLLM.matmul_reach)
    faster_chip = replace(H100.device, matmul_tflops=2 * 989.4)
    half = step(
        dense_schedule(LAYERS), SHAPE, replace(H100, device=faster_chip), VLLM, 8, one
    ).compute
    assert 0.5 < half / found < 0.55


def test_all_reduce_formulas() -> None:
    link = Link(
        name="x",
        ranks=8,
        base_us=5,
        algorithm="ring",
        protocols=(Protocol(step_us=2, gb_s=10),),
    )
    ring = seconds(8e6, 4, [link])
    assert ring == pytest.approx(5e-6 + 6 * 2e-6 + 2 * 3 / 4 * 8e6 / 10e9)
    tree = seconds(8e6, 6, [replace(link, algorithm="tree")])
    assert tree == pytest.approx(5e-6 + 2 * 3 * 2e-6 + 2 * 8e6 / 10e9)
    both = replace(link, algorithm="ring or tree")
    assert seconds(8, 8, [both]) < seconds(8, 8, [link])
    assert seconds(8e9, 8, [both]) == seconds(8e9, 8, [link])
    direct = replace(link, one_shot_us=3)
    assert seconds(100, 4, [direct], one_shot=True) == pytest.approx(3e-6 + 300 / 10e9)
    assert seconds(8e6, 4, [direct], one_shot=True) == ring  # (n-1) m is more to read
    twice = replace(direct, two_shot_us=5, two_shot_gb_s=20)  # 2 x 3/4 of the message at 20 GB/s
    assert seconds(8e6, 4, [twice], one_shot=True) == pytest.approx(5e-6 + 1.5 * 8e6 / 20e9)
    assert seconds(100, 4, [twice], one_shot=True) == seconds(100, 4, [direct], one_shot=True)
    assert seconds(8e6, 4, [twice]) == ring
    slow_start = replace(link, protocols=(Protocol(step_us=2, gb_s=10, more_us=3),))
    assert seconds(8e6, 4, [slow_start]) == pytest.approx(ring + 3e-6)
    switched = replace(link, switch_us=7, switch_gb_s=40)
    parts = all_reduce(8e6, 8, [switched])
    assert (parts.fixed, parts.moving) == pytest.approx((12e-6, 8e6 / 40e9))
    assert seconds(8e6, 8, [switched]) == pytest.approx(12e-6 + 8e6 / 40e9)
    ringed = seconds(8e6, 8, [switched], in_switch=False)
    assert ringed == seconds(8e6, 8, [link])
    outer = replace(link, ranks=16, base_us=20)
    two_levels = seconds(8e6, 16, [link, outer])
    within, between = seconds(8e6, 8, [link]), seconds(1e6, 2, [outer])
    assert two_levels == pytest.approx(within + between)
    assert seconds(8, 16, [both, outer]) == seconds(8, 16, [link, outer])  # halves of no tree
    assert seconds(8e6, 1, []) == 0


def test_nccl_between_nodes_by_hand() -> None:
    """Two nodes of 8: a message goes by the least of LL, LL128 and NVLSTree, as it grows."""
    row = read_hardware("2x8-h100-sxm-ib400")
    near, far = row.links
    base = near.base_us + far.base_us
    steps = 2 * (7 * near.protocols[0].step_us + 5)  # down and up a node's chain, and across
    for nbytes, corrected in ((32768, 0.7), (131072, 0.5)):  # LL: 39 GB/s, of which a tree reaches
        moved = 2 * nbytes / (8 * 4.9e9 * corrected)
        assert seconds(nbytes, 16, row.links) == pytest.approx((base + steps) * 1e-6 + moved)
    steps = 7.4 + 2 * (7 * 1.9 + 8.5)  # LL128: NVLink's 340 GB/s, as eight adapters have 352
    found = seconds(2**19, 16, row.links)
    assert found == pytest.approx((base + steps) * 1e-6 + 2 * 2**19 / (340e9 * 0.6))
    large = seconds(2**25, 16, row.links)
    assert large == pytest.approx((base + 1.8 + 25 + 2 * 14) * 1e-6 + 2**25 / 275e9)
    rings = replace(near, switch_gb_s=0.0)  # without a switch a ring in Simple
    ring = (base + 1.8 + 28 * 3.4 + 2 * 14) * 1e-6 + 2 * 15 / 16 * 2**28 / 360e9
    assert seconds(2**28, 16, [rings, far]) == pytest.approx(ring)
    assert seconds(2**28, 16, row.links, in_switch=False) == pytest.approx(ring)
    sizes = [2 ** (n / 8) for n in range(30 * 8)]
    times = [seconds(nbytes, 16, row.links) for nbytes in sizes]
    assert times == sorted(times) and times[0] > seconds(1, 8, row.links)


def test_one_shot_kernels_have_a_rate_and_a_most_of_ranks() -> None:
    """By hand: 8 KB of 7 others at 27.7 GB/s after 7.5 us; two PCIe cards have vLLM's, four not."""
    (link,) = read_hardware("rtx-pro-6000-pcie-one-shot").links
    eight = all_reduce(8192, 8, [link], one_shot=True)
    assert eight.seconds == pytest.approx((4.1 + 6 * 0.57) * 1e-6 + 7 * 8192 / 27.7e9)
    assert eight.way == "one-shot kernel"
    (link,) = read_hardware("rtx-pro-6000-pcie").links
    two = all_reduce(16384, 2, [link], one_shot=True)
    assert two.seconds == pytest.approx(4.1e-6 + 16384 / 41.1e9)
    four = all_reduce(16384, 4, [link], one_shot=True)
    assert four.way == "ring"
    assert four.seconds == pytest.approx(6.6e-6 + 6 * 1.26e-6 + 1.5 * 16384 / 41.1e9)


def test_the_way_of_an_all_reduce_has_its_name() -> None:
    """8 H100 over NVLink, from 16 KB to 256 MB, and 16 on two nodes."""

    def way(nbytes: float, one_shot: bool, in_switch: bool = True) -> str:
        return all_reduce(nbytes, 8, H100.links, one_shot=one_shot, in_switch=in_switch).way

    assert way(2**14, True) == "one-shot kernel" and way(2**22, True) == "two-shot kernel"
    assert way(2**14, False) == "ring, LL" and way(2**28, False) == "in the switch"
    assert way(2**28, False, in_switch=False) == "ring, Simple"
    links = read_hardware("2x8-h100-sxm-ib400").links
    ways = [all_reduce(nbytes, 16, links).way for nbytes in (2**15, 2**19, 2**25)]
    assert ways == [
        "tree across nodes, LL",
        "tree across nodes, LL128",
        "tree of the nodes' switches",
    ]
    outer = replace(links[1], algorithm="ring")
    assert all_reduce(2**14, 16, [links[0], outer]).way == "ring, LL"  # of both levels


def test_fewer_bits_on_the_wire_are_asked_for() -> None:
    """QuickReduce in INT4 on 8 MI300X: 10.7 us and 14/8 x 16 MB over 412 GB/s; a ring has 6.76 us,
    14 steps of 0.8 and 202 GB/s. vLLM doesn't unless it is told to."""
    row, one = read_hardware("mi300x"), Pass(1, 1024)
    nbytes = 1024 * 16384
    plain = reduction(SHAPE, row, VLLM, 8, one)
    assert plain.blocking.seconds == pytest.approx(17.96e-6 + 14 / 8 * nbytes / 202e9)
    asked = reduction(SHAPE, row, replace(VLLM, quantised="blocking"), 8, one)
    assert asked.blocking.seconds == pytest.approx(10.7e-6 + 14 / 8 * nbytes / 412e9)
    assert asked.way == "quantised by VLLM_ROCM_QUICK_REDUCE_QUANTIZATION=INT4"
    assert asked.overlapped == plain.overlapped


def _unfused(schedule: Schedule, one: Pass, shape: ModelShape = SHAPE) -> float:
    """Kernels by which the fusion with norms makes a pass shorter on 8 H100."""
    apart, fused = (
        step(schedule, shape, H100, engine, 8, one)
        for engine in (replace(VLLM, fused_norm="none"), VLLM)
    )
    assert apart.compute - fused.compute == pytest.approx(apart.seconds - fused.seconds)
    return (apart.seconds - fused.seconds) * 1e6 / H100.device.kernel_us


def test_a_norm_after_an_all_reduce_is_in_its_kernel() -> None:
    """One kernel less for each blocking all-reduce of 70B, the last one's being the final norm: 160
    of a decode step; none where a sum of 33 sequences is more than half a MiB. Of a conversion's
    those with nothing else to merge, and no output bias; overlapped ones not."""
    dense, one = dense_schedule(LAYERS), Pass(1, 1, past=1000, allocated=2000)
    assert _unfused(dense, one) == pytest.approx(160)
    assert _unfused(dense, replace(one, sequences=31)) == pytest.approx(160)
    assert _unfused(dense, replace(one, sequences=33)) == pytest.approx(0)
    assert _unfused(dense, Pass(1, 1024)) == pytest.approx(0)
    assert _unfused(SCHEDULES["parallel_track"], one) == pytest.approx(20)
    assert _unfused(SCHEDULES["ladder"], one) == pytest.approx(0)
    two = SHAPE.with_layers(2)
    assert _unfused(Schedule.parse("a0~1 m0! a1! m1!"), one, two) == pytest.approx(2)
    config = {
        **{"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 2},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672},
        **{"vocab_size": 128256, "dtype": "bfloat16", "attention_bias": True},
    }
    biased = ModelShape.from_config(config)
    assert _unfused(biased.dense, one, biased) == pytest.approx(4)
    assert _unfused(Schedule.parse("a0! m0! a1. m1!"), one, biased) == pytest.approx(1)
    moved = reduction(SHAPE, H100, VLLM, 8, one)
    assert moved.way == "one-shot kernel, fused with the norm"


def test_norms_that_no_kernel_fuses() -> None:
    """LayerNorms, and RMSNorms that multiply by one more than their weight."""
    config = {"hidden_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 1000}
    one = Pass(1, 1, past=1000, allocated=2000)
    for family, each in (("mistral", 4), ("starcoder2", 0), ("gemma", 0)):
        own = {"head_dim": 128, "model_type": family, "dtype": "bfloat16"}
        shape = ModelShape.from_config({**config, **own})
        assert _unfused(shape.dense, one, shape) == pytest.approx(each)
        assert reduction(shape, H100, VLLM, 8, one).fused is bool(each)


def test_a_kernel_for_more_cards_serves_two_as_fast_as_one_for_two() -> None:
    custom, plain = (
        all_reduce(16384, 2, read_hardware(name).links, one_shot=True)
        for name in ("rtx-pro-6000-pcie-one-shot", "rtx-pro-6000-pcie")
    )
    assert custom.fixed == plain.fixed == pytest.approx(4.1e-6)
    eight = all_reduce(1024, 8, read_hardware("rtx-pro-6000-pcie-one-shot").links, one_shot=True)
    assert eight.fixed == pytest.approx(7.5e-6, rel=0.01)


@pytest.mark.parametrize("engine", ["gpt-fast", "tensorrt-llm", "vllm-parallel-track-paper"])
def test_the_papers_engines_fuse_no_norm(engine: str) -> None:
    assert not reduction(SHAPE, H100, read_engine(engine), 8, Pass(1, 1)).fused


@pytest.mark.parametrize("row", ["h100-sxm-p2p-off", "a100-sxm", "mi300x", "rtx-pro-6000-pcie"])
def test_norms_are_fused_over_nvlink_on_hopper_and_blackwell(row: str) -> None:
    assert not reduction(SHAPE, read_hardware(row), VLLM, 2, Pass(1, 1)).fused
    for name in ("h100-sxm", "h200-sxm", "b200", "b300", "2x8-h100-sxm-ib400"):
        assert reduction(SHAPE, read_hardware(name), VLLM, 8, Pass(1, 1)).fused
    assert not reduction(SHAPE, read_hardware("2x8-h100-sxm-ib400"), VLLM, 16, Pass(1, 1)).fused
    assert not reduction(SHAPE, H100, VLLM, 1, Pass(1, 1)).fused


def test_an_engines_own_kernels_take_messages_up_to_a_size() -> None:
    """70B at batch 256: 4 MiB in two shots, 14/8 of it at 280 GB/s; 513 sequences are too many."""
    for sequences, own in ((256, True), (513, False)):
        moved = reduction(SHAPE, H100, VLLM, 8, Pass(sequences, 1, past=1)).blocking
        nbytes = sequences * 16384
        two_shot = 12e-6 + 14 / 8 * nbytes / 280e9
        assert (moved.seconds == pytest.approx(two_shot)) is own


@pytest.mark.parametrize(
    ("with_it", "without"),
    [
        ("h100-sxm", "h100-sxm-p2p-off"),
        *(
            (f"{card}-pcie", f"{card}-p2p-off")
            for card in ("rtx-3090", "rtx-4090", "rtx-5090", "rtx-5070-ti", "rtx-pro-6000")
        ),
    ],
)
def test_turning_peer_to_peer_off_makes_nothing_faster(with_it: str, without: str) -> None:
    on, off = read_hardware(with_it), read_hardware(without)
    assert on.device == off.device
    for one_shot, in_switch in ((True, False), (True, True), (False, True)):
        for ranks in (2, 4, 8):
            for nbytes in (2**n for n in range(34)):
                slow, fast = (
                    seconds(nbytes, ranks, x.links, one_shot=one_shot, in_switch=in_switch)
                    for x in (off, on)
                )
                assert slow >= fast, (ranks, nbytes)


def _alike(fixed: float, moving: float = 0.0) -> list[Reduction]:
    """All-reduces of four stages that take as long whatever their ending."""
    return [Reduction(Transfer(fixed, moving), Transfer(fixed, moving))] * 4


def test_an_overlapped_all_reduce_hides_under_the_stages_before_its_merge() -> None:
    device = replace(H100.device, overlap_share=0.0, bulk_overlap_share=0.0)
    schedule = Schedule.parse("a0~1 m0~1 a1~1 m1!")
    hidden = run(schedule, [10.0] * 4, 0.0, _alike(6.0), device)
    assert hidden.seconds == 46  # only the last is waited for
    assert [s.waited for s in hidden.spans] == [0, 0, 0, 6]
    exposed = run(schedule, [10.0] * 4, 0.0, _alike(14.0), device)
    # stages begin at 0, 10, 24 (a0's merge), 38 (m0's); the last waits for a1's, then its own
    assert [s.compute[0] for s in exposed.spans] == [0, 10, 24, 38]
    assert exposed.seconds == 66 and exposed.spans[3].waited == 18
    two = run(schedule, [10.0] * 4, 0.0, _alike(14.0), replace(device, reduces_at_once=2))
    assert [s.compute[0] for s in two.spans] == [0, 10, 24, 34] and two.seconds == 58
    shared = run(schedule, [10.0] * 4, 0.0, _alike(6.0), replace(device, overlap_share=0.5))
    assert shared.seconds == 46 + 3 * 3
    bulky = replace(device, overlap_share=0.5, bulk_overlap_share=0.75)
    assert run(schedule, [10.0] * 4, 0.0, _alike(2.0, 4.0), bulky).seconds == 46 + 3 * 4
    blocking = run(Schedule.parse("a0! m0! a1. m1!"), [10.0] * 4, 1.0, _alike(6.0), device)
    assert blocking.seconds == 40 + 3 * 6 + 1 and blocking.compute == 41


def test_each_kind_of_ending_has_its_own_all_reduce() -> None:
    """A blocking one of 2 and an overlapped one of 6, also where it is merged at once."""
    device = replace(H100.device, overlap_share=0.5, bulk_overlap_share=0.0)
    moved = [Reduction(Transfer(2.0), Transfer(6.0))] * 4
    found = run(Schedule.parse("a0! m0~1 a1. m1~1"), [10.0] * 4, 0.0, moved, device)
    assert [s.reduce for s in found.spans] == [(10, 12), (22, 28), None, (45, 51)]
    assert found.seconds == 40 + 2 + 3 + 6  # a1 gives 3 to the all-reduce beside it


def test_overlapped_all_reduces_are_nccl_where_blocking_ones_are_one_shot() -> None:
    """So ladder gains nothing from vLLM over NVLink at batch 1, where NCCL for both would have it
    gain. By hand: 16 kB on 8 ranks, one-shot 3.75 us and 7 x 16384 B over 370 GB/s; a ring 7.4 us,
    14 steps of 1.11 us and 14/8 x 16384 B over 141 GB/s."""
    one = Pass(1, 1, past=1280, allocated=1536)
    link = H100.links[0]
    for name in ("vllm", "vllm-parallel-track-paper"):
        moved = reduction(SHAPE, H100, read_engine(name), 8, one)
        shot = link.one_shot_us * 1e-6 + 7 * 16384 / 370e9
        ring = (link.base_us + 14 * link.protocols[0].step_us) * 1e-6 + 14 / 8 * 16384 / 141e9
        assert moved.blocking.seconds == pytest.approx(shot)
        assert moved.overlapped.seconds == pytest.approx(ring) and ring > 5 * shot
    alike = reduction(SHAPE, H100, GPT_FAST, 8, one)
    assert alike.blocking == alike.overlapped


def test_ladder_over_nvlink_is_no_faster_in_vllm() -> None:
    """On 8 ranks at batch 1, 1024 + 512 tokens; it would be if blocking all-reduces were NCCL's."""
    vllm, workload = read_engine("vllm-parallel-track-paper"), Workload(1, 1024, 512)
    for model, expected in (("8b", 0.98), ("70b", 0.98)):
        shape = ModelShape.from_config(
            read_config(ROOT / "specs" / "configs" / f"llama-3.1-{model}.json")
        )
        ladder = Schedule(PRESETS["ladder"](range(shape.layers)))
        base, ours, base_by_nccl, ours_by_nccl = (
            estimate(schedule, shape, H100, engine, 8, workload).tokens_per_second
            for engine in (vllm, replace(vllm, one_shot="none"))
            for schedule in (dense_schedule(shape.layers), ladder)
        )
        assert ours / base == pytest.approx(expected, abs=0.005)
        assert ours_by_nccl / base_by_nccl > 1.05


def test_what_an_engine_takes_beside_the_roofline() -> None:
    """By hand on 8 ranks: kernels more with several tokens, host time of sequences and of prompts'
    tokens, and attention at a rate of its own."""
    plain = replace(GPT_FAST, batched_kernels=0.0)
    more = replace(plain, batched_kernels=2.0, sequence_us=5.0)
    dense = dense_schedule(LAYERS)
    for sequences in (1, 16):
        one = Pass(sequences, 1, past=100, allocated=200)
        before, after = (step(dense, SHAPE, H100, e, 8, one).compute for e in (plain, more))
        kernels = 2 * 160 * H100.device.kernel_us if sequences > 1 else 0.0
        assert after - before == pytest.approx((kernels + 5 * sequences) * 1e-6)
    slow, fast = replace(VLLM, prompt_token_us=0.0), replace(VLLM, prompt_token_us=3.0)
    times = [estimate(dense, SHAPE, H100, e, 8, Workload(2, 1000, 8)).ttft for e in (slow, fast)]
    assert times[1] - times[0] == pytest.approx(1000 * 3e-6)
    long = Pass(1, 2**17, allocated=2**17)
    quick = replace(VLLM, attention_reach=2 * VLLM.matmul_reach)
    same, half = (
        sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, e, 8, long)[1].seconds(H100.device, e)
        for e in (replace(VLLM, attention_reach=0.0), quick)
    )
    flops = 4 * 2**17 * (2**17 + 1) / 2 * 1024
    assert same == pytest.approx(flops / (989.4e12 * VLLM.matmul_reach)) == pytest.approx(2 * half)


def test_few_heads_read_their_cache_slowly() -> None:
    """Each of a step's KV heads at 0.1 of the bandwidth, all at 0.5; a prefill at 0.5."""
    engine = replace(VLLM, kv_reach=0.5, kv_head_reach=0.1)
    for sequences, ranks, reach in ((1, 8, 0.1), (3, 8, 0.3), (64, 8, 0.5), (1, 4, 0.2)):
        one = Pass(sequences, 1, past=999)
        core = sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, engine, ranks, one)[1]
        keys = 2 * 8 / ranks * 128
        assert core.nbytes == pytest.approx(2 * sequences * keys * (1000 / reach + 1))
    prefill = sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, engine, 8, Pass(1, 9))[1]
    assert prefill.nbytes == pytest.approx(2 * 2 * 128 * (9 / 0.5 + 9))


def test_a_rank_reads_a_repeated_kv_head_for_its_own_queries_only() -> None:
    """64 heads and 8 KV heads on 16 ranks: 4 queries of a rank read its one KV head."""
    for ranks, reads in ((4, 8), (8, 8), (16, 4)):
        one = Pass(1, 1, past=999, allocated=1000)
        core = sublayer_parts(Sublayer(0, Kind.ATTENTION), SHAPE, GPT_FAST, ranks, one)[1]
        keys = 2 * max(8 // ranks, 1) * 128
        assert core.nbytes == 2 * keys * (1000 * reads + 1)


def test_guesses_take_time_and_memory() -> None:
    """Of rank 64 after every deferred sublayer: A, B, V and b of each track, x, p and the guess
    in and out, and 4 kernels; twice that where a rank has two tracks."""
    schedule, one = SCHEDULES["parallel_track"], Pass(1, 1, past=100, allocated=200)
    guesses = dict.fromkeys(schedule.own_kept(8), 64)
    assert len(guesses) == 160 - schedule.counts.all_reduces
    elements = 3 * 64 * 8192 + 8192
    moved = 2 * (elements + 4 * 8192 + 4 * 64) / (3350e9 * H100.device.memory_reach)
    each = moved + 4 * H100.device.kernel_us * 1e-6
    for ranks, tracks in ((8, 1), (4, 2)):
        without, with_them = (
            step(schedule, SHAPE, H100, VLLM, ranks, one, tracks=8, guesses=g)
            for g in ({}, guesses)
        )
        more = with_them.compute - without.compute
        assert more == pytest.approx(tracks * len(guesses) * each)
        held, empty = (
            rank_bytes(SHAPE, VLLM, ranks, one, 8, frozenset(range(80)), g) for g in (guesses, {})
        )
        assert held - empty == pytest.approx(tracks * len(guesses) * 2 * elements)


@given(SETTINGS)
@settings(max_examples=60)
def test_free_links_make_every_schedule_as_fast_as_tensor_parallel(given: Given) -> None:
    free = (Protocol(step_us=0, gb_s=1e9),)
    links = tuple(
        replace(x, base_us=0, one_shot_us=0, switch_gb_s=0, protocols=free)
        for x in given.hardware.links
    )
    hardware = replace(given.hardware, links=links)
    for engine in (GPT_FAST, VLLM):
        found, base = (
            step(s, given.shape, hardware, engine, given.ranks, given.one).seconds
            for s in (given.schedule, dense_schedule(given.schedule.layers))
        )
        assert found == pytest.approx(base, rel=1e-3)


@given(SETTINGS)
@settings(max_examples=60)
def test_one_rank_has_no_communication(given: Given) -> None:
    found = step(given.schedule, given.shape, given.hardware, VLLM, 1, given.one)
    assert found.seconds == pytest.approx(found.compute) and found.communication < 1e-9
    assert all(span.waited == 0 for span in found.spans)


@given(SETTINGS, st.floats(1, 100), st.integers(0, 2))
@settings(max_examples=250)
def test_time_never_falls_when_a_link_gets_slower(given: Given, times: float, which: int) -> None:
    """All links, or one of them."""
    links = given.hardware.links
    index = which % len(links)
    slowed = faster(replace(given.hardware, links=links[index : index + 1]), 1 / times).links
    one = replace(given.hardware, links=(*links[:index], *slowed, *links[index + 1 :]))
    for engine in (GPT_FAST, VLLM):
        fast, slow, slower = (
            step(
                given.schedule,
                given.shape,
                hardware,
                engine,
                given.ranks,
                given.one,
                tracks=given.tracks,
            )
            for hardware in (given.hardware, one, faster(given.hardware, 1 / times))
        )
        assert slow.seconds >= fast.seconds * (1 - 1e-9)
        assert slower.seconds >= slow.seconds * (1 - 1e-9)
        assert fast.seconds >= fast.compute * (1 - 1e-9)
        assert math.isfinite(slower.seconds) and 0 <= slower.communication + 1e-9 < 1 + 1e-9


@given(st.floats(1, 1e9), st.integers(2, 8), LINKS, st.sampled_from(["base_us", "step_us", "gb_s"]))
def test_each_number_of_a_link_matters_in_one_direction(
    nbytes: float, ranks: int, link: Link, which: str
) -> None:
    if which == "base_us":
        slower = replace(link, base_us=2 * link.base_us)
    elif which == "step_us":
        slow = tuple(replace(p, step_us=2 * p.step_us) for p in link.protocols)
        slower = replace(link, protocols=slow)
    else:
        slow = tuple(replace(p, gb_s=p.gb_s / 2) for p in link.protocols)
        slower = replace(link, protocols=slow)
    before, after = (seconds(nbytes, ranks, [x]) for x in (link, slower))
    assert after >= before
    assert seconds(2 * nbytes, ranks, [link]) >= before


def test_more_tracks_than_ranks_cost_kernels() -> None:
    schedule, one = SCHEDULES["parallel_track"], Pass(1, 1, past=100)
    same = step(schedule, SHAPE, H100, GPT_FAST, 4, one)
    twice = step(schedule, SHAPE, H100, GPT_FAST, 4, one, tracks=8)
    kernels = LAYERS * 13 * H100.device.kernel_us * 1e-6
    assert twice.compute - same.compute == pytest.approx(kernels, rel=0.15)
    assert step(dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 4, one, tracks=8) == step(
        dense_schedule(LAYERS), SHAPE, H100, GPT_FAST, 4, one
    )


def test_a_vocabulary_cut_by_rank_is_exchanged_in_every_pass() -> None:
    """Over slow links most of what a schedule can't save: as much for each schedule; but vLLM has
    the embedding of a conversion whole."""
    one, link = Pass(16, 1, past=100), read_hardware("4-workstations-10gbe").links[0]
    hardware = replace(H100, links=(link,))
    alone = replace(VLLM, vocabulary="replicated", converted_embedding="", converted_lm_head="")
    for schedule in (dense_schedule(LAYERS), SCHEDULES["parallel_track"]):
        with_it, without = (step(schedule, SHAPE, hardware, e, 2, one) for e in (VLLM, alone))
        embedded = seconds(16 * 8192 * 2, 2, [link], one_shot=True, in_switch=False)
        embedded *= schedule == dense_schedule(LAYERS)
        steps = (link.base_us + 2 * link.protocols[1].step_us) / 2 * 1e-6
        gathered = steps + 16 * 128256 * 2 / 2 / (link.protocols[1].gb_s * 1e9)
        waited = with_it.seconds - with_it.compute - (without.seconds - without.compute)
        assert waited == pytest.approx(embedded + gathered)
    assert step(schedule, SHAPE, hardware, VLLM, 1, one).communication < 1e-9
    paper = read_engine("vllm-parallel-track-paper")  # whose conversions are as its models
    assert paper.serving(True).cuts_embedding and not VLLM.serving(True).cuts_embedding


def test_a_request_is_its_prefill_and_its_steps() -> None:
    workload = Workload(batch=4, prompt=1000, new=101)
    e = estimate(dense_schedule(LAYERS), SHAPE, H100, VLLM, 8, workload)
    assert e.ttft == pytest.approx(e.prefill.seconds + VLLM.request_us * 1e-6)
    assert e.tokens_per_second == pytest.approx(4 * 101 / (e.ttft + 100 * e.tpot))
    assert 141e9 / 8 < e.memory < 141e9 / 8 + 1.1e9  # weights, a little cache
    assert estimate(dense_schedule(LAYERS), SHAPE, H100, VLLM, 8, replace(workload, new=1)).tpot


def test_linear_attention_has_a_state_and_no_cache() -> None:
    """By hand, for 32 layers of which every fourth has full attention, at the class's own sizes."""
    config = {
        **{"model_type": "qwen3_5_text", "hidden_size": 4096, "num_hidden_layers": 32},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 12288},
        **{"vocab_size": 1000, "dtype": "bfloat16"},
    }
    shape = ModelShape.from_config(config)
    one = Pass(sequences=2, tokens=1, past=1023, allocated=4096)
    state = 32 * 128 * 128  # numbers, in fp32
    projections = 4096 * (2 * 2048 + 4096 + 4096 + 2 * 32 + 4096)
    others = 32 * 2 + 128 + 4 * (2 * 2048 + 4096)  # A, dt, norm, convolution
    weights, recurrence = sublayer_parts(Sublayer(0, Kind.ATTENTION), shape, VLLM, 1, one)
    assert weights.flops == 2 * 2 * (projections + others)
    assert recurrence == Part(6 * 2 * state, 2 * 4 * 2 * state)
    half = sublayer_parts(Sublayer(0, Kind.ATTENTION), shape, VLLM, 2, one)[1]
    assert half == Part(3 * 2 * state, 4 * 2 * state)
    later = Pass(sequences=2, tokens=1, past=8191, allocated=16384)
    assert sublayer_parts(Sublayer(0, Kind.ATTENTION), shape, VLLM, 1, later)[1] == recurrence
    assert sublayer_parts(Sublayer(3, Kind.ATTENTION), shape, VLLM, 1, later)[1].nbytes > 1e7
    full = 8 * 2 * 4096 * 2 * 4 * 256 * 2  # layers, sequences, tokens, K and V, heads, size, bytes
    held = [rank_bytes(shape, VLLM, 1, Pass(n, 1, 0, 4096)) for n in (2, 0)]
    assert held[0] - held[1] == full + 24 * 2 * state * 4


DEEPSEEK = {  # V3's sizes; the others are its class's
    **{"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61},
    **{"num_attention_heads": 128, "intermediate_size": 18432, "vocab_size": 129280},
    "dtype": "bfloat16",
}


def test_latent_attention_by_hand() -> None:
    """A decode step of 3 sequences reads the latents of 512 + 64 numbers once for all heads, of
    which 8 ranks have 16 each; a prefill attends with keys of 128 + 64 and values of 128."""
    shape, first = ModelShape.from_config(DEEPSEEK), Sublayer(0, Kind.ATTENTION)
    rank = 7168 * 1536 + 16 * 192 * 1536 + 7168 * 576 + 16 * 256 * 512 + 7168 * 16 * 128
    rank += 1536 + 512  # the latents' norms
    decode = Pass(3, 1, past=999, allocated=4096)
    weights, core = sublayer_parts(first, shape, VLLM, 8, decode)
    assert weights.flops == 2 * 3 * rank
    assert weights.nbytes == 2 * (rank + 3 * (4 * 7168 + 3 * 16 * 192 + 576))
    assert core == Part(2 * 3 * 1000 * 16 * (576 + 512), 2 * 3 * 1001 * 576)
    prefill = sublayer_parts(first, shape, VLLM, 8, Pass(3, 1000, 0, 4096))[1]
    assert prefill.flops == 2 * 3000 * 500.5 * 16 * (192 + 128)
    assert prefill.nbytes == 2 * (2 * 3000 * 576 + 2 * 3000 * 16 * 320)
    # after others its keys and values come out of their latents again
    later = sublayer_parts(first, shape, VLLM, 8, Pass(3, 1000, 1000, 4096))[1]
    assert later.flops == 2 * 3000 * 1500.5 * 16 * 320 + 2 * 3000 * 16 * 256 * 512
    held = [rank_bytes(shape, VLLM, 8, Pass(n, 1, 0, 4096)) for n in (3, 0)]
    assert held[0] - held[1] == 3 * 61 * 4096 * 576 * 2  # on each rank, whatever their number
