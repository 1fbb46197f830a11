"""The table of families against transformers' classes, and what must fail where it is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import VARIANTS, Convert, MakeDense, load, random_model, spec_text
from numpy.typing import NDArray
from reference import reference_logits
from safetensors.torch import load_file
from test_modeling import SCHEDULES, TOLERANCE, difference, left_padded, step_logits
from test_random_schedules import logits_on_a_rank

import ptconvert.modeling.layers as layers_module
import ptconvert.models.shape as shape_module
from ptconvert.calibrate import affinity
from ptconvert.calibrate.guess import fit_guesses
from ptconvert.calibrate.reading import UNREAD, readers_metric
from ptconvert.checkpoint.calibration import Assignment, Calibration
from ptconvert.checkpoint.files import read_config
from ptconvert.checkpoint.reader import open_checkpoint
from ptconvert.convert.transform import execute, plan_to_dense
from ptconvert.heal.blockwise import Pieces, blocks_of
from ptconvert.measure.opening import section_of
from ptconvert.modeling.config import CONFIGS
from ptconvert.modeling.layers import TrackConfig, layer_class
from ptconvert.modeling.model import BASE_MODELS, CAUSAL_LMS
from ptconvert.models import families
from ptconvert.models.families import FULL, KV, LINEAR, D, E, N, Q
from ptconvert.models.shape import ModelShape
from ptconvert.runtime.launch import launch
from ptconvert.runtime.load import shape_of
from ptconvert.schedule.stages import BLOCKS, Kind, Sublayer
from ptconvert.spec.document import parse_spec
from ptconvert.verify.expected import FP32_TOLERANCE, RECURRENT_TOLERANCE

# How many matrices read the stream in attention and in the MLP of a last layer, where not 3 and 2.
READ = {
    **dict.fromkeys(("glm", "glm4", "apertus", "nemotron", "starcoder2", "jais2", "arcee"), (3, 1)),
    **{"phi3": (1, 1), "gemma4_text": (2, 2), "gemma4_unified_text": (2, 2)},
    **{"glm4_moe": (3, 4), "deepseek_v3": (2, 4), "qwen3_5_text": (4, 2)},
    **{"qwen3_next": (2, 5), "qwen3_5_moe_text": (4, 5)},
}
OF_A_FAMILY = {name: VARIANTS[name] for name in VARIANTS if name in CAUSAL_LMS}


def config_of(variant: str, **changed: Any) -> Any:
    family, settings = VARIANTS[variant]
    sizes = {
        **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16},
    }
    config_class = getattr(transformers, f"{family}ForCausalLM").config_class
    given = {**settings, **sizes, "pad_token_id": 0, **changed}
    if "layer_types" in given:
        given["layer_types"] = given["layer_types"][: given["num_hidden_layers"]]
    return config_class(**given)


def shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def test_every_family_is_tested() -> None:
    alone = {name for name, family in families.FAMILIES.items() if family.causal_lm}
    assert set(OF_A_FAMILY) == alone  # the others are in tests/test_seeing.py


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("tracks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_cuts_what_the_classes_do(variant: str, tracks: int, kv_heads: int) -> None:
    """A dense layer and a track's layer differ where the table cuts, by as much, nowhere else."""
    config = config_of(variant, num_key_value_heads=kv_heads)
    check_table(ModelShape.from_config(config.to_dict()), config, tracks)


def check_table(shape: ModelShape, config: Any, tracks: int) -> None:
    """Compares a shape's rules with the classes of a language model's config."""
    for layer in range(shape.layers):
        with torch.device("meta"):
            dense = layer_class(config)(config, layer)
            track = layer_class(config)(TrackConfig(config, 0, tracks), layer)
        rules = {rule.name: rule for rule in shape.rules_of(layer)}
        assert shapes(dense) == {name: shape.size(rule) for name, rule in rules.items()}
        assert shapes(track) == {name: shape.share(rule, 0, tracks) for name, rule in rules.items()}
        for kind in BLOCKS:  # its input is divided, so that what it gives is a partial
            block = shape.block(Sublayer(layer, kind))
            named = re.compile(rf"{block.name}\.(.*\.)?{block.output}(\.weight)?")  # experts', too
            outputs = [rule for name, rule in rules.items() if named.fullmatch(name)]
            assert outputs
            for output in outputs:
                experts = getattr(getattr(dense, block.name), "experts", None)
                assert output.axis == len(output.axes) - (2 if is_transposed(experts) else 1)
                own = math.prod(shape.share(output, 0, tracks))
                assert own * tracks == math.prod(shape.size(output))


def is_transposed(experts: Any) -> bool:
    """Whether a module holds its weights as GPT-OSS's experts do."""
    return bool(getattr(experts, "is_transposed", False))


def test_linear_attention_rounds_otherwise_token_by_token() -> None:
    """Which is why `verify` allows more there."""
    model = random_model("qwen3_5_text")
    ids_BS, keep_BS = left_padded(1, 24)
    with torch.no_grad():
        whole = model(ids_BS).logits
    apart = difference(step_logits(model, ids_BS, keep_BS, 16), whole, keep_BS)
    assert FP32_TOLERANCE / 20 < apart < RECURRENT_TOLERANCE


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_each_block_is_called_as_the_dense_layer_calls_it(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """With the same keywords."""
    source, ids_BS = make_dense(variant), left_padded(1)[0]
    seen: list[list[set[str]]] = []
    for path in (source, convert(source, 2, SCHEDULES["track-2-rest"])):
        model, calls = load(path), list[set[str]]()
        names = {b.name for b in (own_block(variant, frozenset([la])) for la in (FULL, LINEAR))}
        for name, module in model.named_modules():
            if name.split(".")[-1] in names and ".tracks.1." not in name:
                module.register_forward_pre_hook(
                    lambda _, __, given, calls=calls: calls.append(set(given)), with_kwargs=True
                )
        with torch.no_grad():
            model(ids_BS)
        seen.append(calls)
    assert len(seen[0]) == 6
    for theirs, ours in zip(*seen, strict=True):
        assert theirs ^ ours <= {"use_cache"}  # which some layers keep, or make up


def test_packed_sequences_are_kept_apart_or_refused(
    make_dense: MakeDense, convert: Convert
) -> None:
    """What says where they begin reaches linear attention, which needs its kernels for it."""
    source = make_dense("qwen3_5_text")
    for path in (source, convert(source, 2, SCHEDULES["track-2-rest"])):
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            load(path)(left_padded(1)[0], cu_seq_lens_q=torch.tensor([0, 4, 12]))


def own_block(variant: str, layer: frozenset[str]) -> families.Block:
    return families.FAMILIES[variant].block(Kind.ATTENTION, layer)


@pytest.mark.parametrize("variant", ["llama", "granite"])
def test_a_stream_that_is_given_is_taken_as_it_is(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """At the first stage too, where a family may multiply its embeddings."""
    decoder = load(convert(make_dense(variant), 2, "use: ladder")).get_decoder()
    ids_BS = left_padded(1)[0]
    with torch.no_grad():
        expected = decoder(input_ids=ids_BS).last_hidden_state
        entered, _ = decoder.entry(input_ids=ids_BS)
        decoder.layers.first_stage = 0
        assert torch.equal(decoder(inputs_embeds=entered).last_hidden_state, expected)


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_layers_that_are_read_one_at_a_time(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """As heal's blocks are: parameters, and buffers that are stored."""
    path, ids_BS = convert(make_dense(variant), 2, SCHEDULES["track-2-rest"]), left_padded(1)[0]
    checkpoint = open_checkpoint(path)
    pieces = Pieces(checkpoint, torch.float32, "cpu")
    with torch.no_grad():
        stream = torch.stack(list(pieces.entered(ids_BS)))
        for block in blocks_of(section_of(checkpoint)):
            loaded = pieces.load(block.layers, block.stages)
            held = (loaded.model.layers[index] for index in block.layers)
            assert not any(t.is_meta for la in held for t in (*la.parameters(), *la.buffers()))
            stream = loaded(stream)
        attention = pieces.model.config._attn_implementation  # which not every family has as sdpa
        decoder = load(path, attn_implementation=attention).get_decoder()
        expected = decoder(input_ids=ids_BS).last_hidden_state
        decoder.layers.first_stage = len(decoder.layers.schedule.program)
        ended = decoder(inputs_embeds=stream, use_cache=False).last_hidden_state
        assert torch.allclose(ended, expected, atol=TOLERANCE)


def test_layers_by_slices_and_in_loops(make_dense: MakeDense, convert: Convert) -> None:
    model = load(convert(make_dense("llama"), 2, SCHEDULES["track-2-rest"]))
    layers = model.model.layers
    assert [*layers] == [*layers.children()] == [layers[i] for i in range(6)]
    assert [*layers[2:4]] == [layers[2], layers[3]] and isinstance(layers[:2], torch.nn.ModuleList)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_checkpointing_leaves_a_cache_alone(
    attention: str, make_dense: MakeDense, convert: Convert
) -> None:
    """As transformers does, since a layer that runs twice would fill it twice."""
    path, ids_BS = convert(make_dense("llama"), 2, SCHEDULES["track-2-rest"]), left_padded(1)[0]
    model = load(path, attn_implementation=attention).train()
    model.gradient_checkpointing_enable()
    cache = transformers.DynamicCache(config=model.config)
    model(ids_BS, labels=ids_BS, past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_what_generate_and_the_trainer_ask_a_forward(variant: str) -> None:
    for ours in (BASE_MODELS[variant], CAUSAL_LMS[variant]):
        theirs = next(c for c in ours.__mro__ if c.__module__.startswith("transformers.models."))
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_what_a_checkpoint_calls_its_classes(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    config = read_config(convert(make_dense(variant), 2, "use: ladder"))
    classes = dict(config["auto_map"])  # type: ignore[call-overload]
    assert config["architectures"] == [CAUSAL_LMS[variant].__name__]
    ours = CONFIGS[variant], BASE_MODELS[variant], CAUSAL_LMS[variant]
    assert [c.split(".")[1] for c in classes.values()] == [c.__name__ for c in ours]


@pytest.mark.slow
def test_every_family_on_ranks(make_dense: MakeDense, convert: Convert) -> None:
    """Layers held dense are cut among two ranks, the four tracks of others shared out."""
    paths = [convert(make_dense(v), 4, SCHEDULES["track-2-rest"]) for v in (*OF_A_FAMILY, "phi3")]
    by_rank = launch(logits_on_a_rank, paths, 2, "gloo", "cpu", 300)
    ids_BS = left_padded()[0]
    for i, path in enumerate(paths):
        with torch.no_grad():
            expected = load(path)(ids_BS).logits
        for rank in by_rank:
            found = torch.tensor(rank["logits"][i])
            assert difference(found, expected, torch.ones_like(ids_BS)) < TOLERANCE, path


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_units_that_go_where_it_makes_no_difference(
    variant: str, make_dense: MakeDense, convert: Convert, tmp_path: Path
) -> None:
    """What one track had goes to the other, each in another order: only sums are ordered otherwise.
    And back again. (Where the first track has something, it keeps its units.)"""
    source, (ids_BS, keep_BS) = make_dense(variant), left_padded()
    shape, draw = ModelShape.from_config(read_config(source)), np.random.default_rng(0)

    def order(size: tuple[int, ...]) -> NDArray[np.int32]:
        halves = np.split(np.broadcast_to(np.arange(size[-1], dtype=np.int32), size), 2, -1)
        if not any(rule.once for rule in shape.family.layer):
            halves.reverse()
        return np.concatenate([draw.permuted(half, axis=-1) for half in halves], -1)

    known = Calibration(
        {
            i: Assignment(**{of: order(size) for of, size in shape.orders_of(i).items()})
            for i in range(6)
        }
    )
    use, top = "use: parallel_track, depth: 2", "assignment: affinity\n"
    converted = convert(source, 2, use, top, calibration=known)
    with torch.no_grad():
        found, expected = (
            load(path)(input_ids=ids_BS, attention_mask=keep_BS).logits
            for path in (converted, convert(source, 2, use))
        )
    assert difference(found, expected, keep_BS) < TOLERANCE
    execute(plan_to_dense(open_checkpoint(converted)), tmp_path / "back")
    back, there = (load_file(p / "model.safetensors") for p in (tmp_path / "back", source))
    assert back.keys() == there.keys() and all(torch.equal(back[n], there[n]) for n in there)


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_affinity_takes_every_family(variant: str, make_dense: MakeDense) -> None:
    source = make_dense(variant)
    shape = ModelShape.from_config(read_config(source))
    schedule = parse_spec(spec_text(2, "use: parallel_track, depth: 3"), "s").schedule()
    ids_NT = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    found, (before, after) = affinity.assignments(
        load(source), shape, schedule, 2, ids_NT, lambda *_: None
    )
    assert after < before
    for layer, assignment in found.items():
        for of, size in shape.orders_of(layer).items():
            order = getattr(assignment, of)
            assert order.shape == size and (np.sort(order) == np.arange(size[-1])).all()


@pytest.mark.parametrize(
    ("variant", "left"),
    [
        *((variant, 0.9) for variant in ("phi3", "granite", "apertus", "nemotron", "mixtral")),
        ("gpt_oss", 0.9),
        ("qwen3_5_text", 0.99),  # linear attention of random weights is of all earlier tokens
    ],
)
def test_guesses_bring_every_family_nearer(
    variant: str, left: float, make_dense: MakeDense, convert: Convert
) -> None:
    source = make_dense(variant)
    decoder = load(convert(source, 2, "use: sync_point_drop")).get_decoder()
    ids_NT = torch.randint(3, 96, (40, 24), generator=torch.Generator().manual_seed(0))
    shape = shape_of(open_checkpoint(source))
    found = fit_guesses(decoder, shape, ids_NT, 16, lambda *_: None)
    assert len(found) == 6 and sum(fitted.error for fitted in found) < left * 6


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_errors_count_by_every_projection_that_reads_them(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """Each of trace 1: of a Llama's attention three and of its MLP two, of others more or fewer."""
    source = make_dense(variant)
    shape = shape_of(open_checkpoint(source))  # which may hold each expert by itself
    decoder = load(convert(source, 2, "use: parallel_track, depth: 2")).get_decoder()
    found = []
    for step in decoder.layers.schedule.program:
        if step.keeps_own:
            metric_DD = readers_metric(decoder, shape, step, 0)
            assert torch.linalg.eigvalsh(metric_DD)[0] > 0
            found.append(float(metric_DD.trace()) / (1 + UNREAD))
    counts = [round(count) for count in found]
    assert found == pytest.approx(counts, rel=1e-4)
    if not shape.family.parallel:  # of a block a1 is read by m1, and m0 by a1, too
        attention, mlp = READ.get(variant, (3, 2))
        assert counts[-2:] == [attention + mlp, mlp]


@pytest.mark.parametrize("variant", OF_A_FAMILY)
def test_one_track_is_the_source_and_ladder_is_the_same_for_every_n(
    variant: str, make_dense: MakeDense, convert: Convert
) -> None:
    """Without output biases, which no track sees before the merge."""
    rules = families.FAMILIES[variant].layer
    common = {rule.when: False for rule in rules if rule.common and rule.when}
    source, (ids_BS, keep_BS) = make_dense(variant, **common), left_padded()

    def logits(tracks: int, schedule: str) -> torch.Tensor:
        model = load(convert(source, tracks, schedule))
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids_BS, attention_mask=keep_BS).logits
        return found

    with torch.no_grad():
        dense = load(source)(input_ids=ids_BS, attention_mask=keep_BS).logits
    track, ladder = "use: parallel_track, depth: 2, overlap: 1", "use: ladder"
    assert difference(logits(1, track), dense, keep_BS) < TOLERANCE
    assert difference(logits(2, track), dense, keep_BS) > 100 * TOLERANCE
    assert difference(logits(2, ladder), logits(1, ladder), keep_BS) < TOLERANCE
    assert difference(logits(1, ladder), dense, keep_BS) > 100 * TOLERANCE


def dense_then_tracks() -> str:
    return "a0! m0! " + " ".join(f"a{i}. m{i}!" for i in range(1, 6))


def changed(family: str, name: str, **rule: Any) -> families.Family:
    """A family whose table is wrong about one tensor."""
    own = families.FAMILIES[family]
    rules = tuple(dataclasses.replace(r, **rule) if r.name == name else r for r in own.layer)
    assert rules != own.layer
    return dataclasses.replace(own, layer=rules)


WRONG = {
    "segments in another order": changed(
        "phi3", "self_attn.qkv_proj.weight", axes=((KV, KV, Q), D)
    ),
    "a bias on every track": changed("starcoder2", "mlp.c_proj.bias", common=False),
    "a bias that is no track's": changed("seed_oss", "mlp.up_proj.bias", common=True),
    "gate and up projection as two halves": changed(
        "gpt_oss", "mlp.experts.gate_up_proj", axes=(E, D, (N, N))
    ),
    "an expert's bias on every track": changed("gpt_oss", "mlp.experts.down_proj_bias", once=False),
    "no multiplier": dataclasses.replace(families.FAMILIES["granite"], multiplier=None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_is_wrong_is_not_the_reference(
    wrong: str, make_dense: MakeDense, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = WRONG[wrong]
    source, (ids_BS, keep_BS) = make_dense(family.model_type), left_padded()
    expected = reference_logits(load(source), dense_then_tracks(), 2, ids_BS, keep_BS)

    def off() -> float:
        model = load(convert(source, 2, f"stages: '{dense_then_tracks()}'"))
        with torch.no_grad():
            found = model(input_ids=ids_BS, attention_mask=keep_BS).logits
        return difference(found, expected, keep_BS)

    assert off() < TOLERANCE
    for module in (shape_module, layers_module):
        monkeypatch.setattr(module, "FAMILIES", {**families.FAMILIES, family.model_type: family})
    assert not off() < 100 * TOLERANCE  # or nothing at all, where a tensor is missing
