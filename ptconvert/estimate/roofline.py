"""The compute time of a stage on one rank: a roofline per part plus a fixed cost per kernel.

Each part of a sublayer (its matrix products; attention over the cache) takes the larger of its
FLOPs over the rate reached and its bytes over the bandwidth reached (Williams, Waterman and
Patterson, "Roofline", CACM 52(4), 2009). FLOPs are 2 per weight and token, and 4 per query element
and token attended to (Chowdhery et al., PaLM, 2204.02311, appendix B). Bytes are weights, the KV
cache, and activations, each once (Pope et al., "Efficiently Scaling Transformer Inference",
2211.05102, section 3). Nothing here knows of communication.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from ptconvert.estimate.hardware import Device, Engine
from ptconvert.models.guesses import guess_tensors
from ptconvert.models.shape import ModelShape
from ptconvert.schedule.stages import BLOCKS, Kind, Sublayer

NO_GUESSES: Mapping[Sublayer, int] = MappingProxyType({})


@dataclass(frozen=True)
class Pass:
    """One forward pass: `tokens` new tokens in each of `sequences`, after `past` cached ones.

    `allocated` is the cache's length in tokens, for engines that attend to all of it. Of the new
    tokens of a decode step so many are `drafted`, of which it says whether they are right. Of a
    server's mean step sequences and tokens are fractions, and prompts may go through `beside` them.
    """

    sequences: float
    tokens: float
    past: float = 0
    allocated: float = 0
    drafted: int = 0
    beside: Pass | None = None

    @property
    def is_prefill(self) -> bool:
        """Whether it isn't a decode step, whose kernels are in a graph."""
        return self.tokens > 1 + self.drafted or self.beside is not None

    @property
    def alike(self) -> tuple[Pass, ...]:
        """The sequences that have as many tokens each, which attention takes by themselves."""
        return (self,) if self.beside is None else (replace(self, beside=None), self.beside)

    @property
    def total(self) -> float:
        """New tokens of all sequences."""
        return sum(part.sequences * part.tokens for part in self.alike)

    def attended(self, window: int | None = None) -> float:
        """How many tokens a new one attends to, itself among them, in the mean over the new ones:
        the i-th to past + i, or to as many as the window has (Mistral 7B, arXiv 2310.06825)."""
        if window is None:
            return self.past + (self.tokens + 1) / 2
        within = min(max(window - self.past, 0), self.tokens)  # new tokens that see all before them
        seen = within * (self.past + (within + 1) / 2) + (self.tokens - within) * window
        return seen / self.tokens

    def cached(self, window: int | None = None) -> float:
        """How many tokens of a sequence all of the new ones attend to together."""
        whole = self.past + self.tokens
        return whole if window is None else min(whole, window + self.tokens - 1)


@dataclass(frozen=True)
class Part:
    """Work of one rank: FLOPs and bytes of memory traffic.

    `batched` bytes are of weights that meet more than one token. `quantised` are the FLOPs of what
    is multiplied in one of `models.quantised.PRODUCTS`, which aren't among `flops`; `attends` says
    that these are attention's.
    """

    flops: float
    nbytes: float
    batched: float = 0.0
    quantised: Mapping[str, float] = field(default_factory=dict)
    attends: bool = False

    def seconds(self, device: Device, engine: Engine) -> float:
        """The larger of the two over what is reached of the device's rates."""
        computed = self.flops / device.tflops(None)
        computed += sum(flops / device.tflops(product) for product, flops in self.quantised.items())
        computed /= 1e12 * engine.reach(device, self.attends)
        bandwidth = device.memory_gb_s * 1e9 * device.memory_reach
        slower = self.batched / device.batched_reach
        return max(computed, (self.nbytes - self.batched + slower) / bandwidth)


def stage_seconds(
    sublayers: Iterable[Sublayer],
    shape: ModelShape,
    device: Device,
    engine: Engine,
    ranks: int,
    one: Pass,
    tracks: int = 0,
    tracked: frozenset[int] = frozenset(),
    guesses: Mapping[Sublayer, int] = NO_GUESSES,
) -> float:
    """Seconds that one of `ranks` computes for sublayers that run one after another.

    A rank runs tracks / ranks tracks of a `tracked` layer one by one, each with its own kernels;
    and as many guesses of the rank given after a sublayer that has them.
    """
    total = 0.0
    for sublayer in sublayers:
        cut = max(tracks, ranks) if sublayer.layer in tracked else ranks
        parts = sublayer_parts(sublayer, shape, engine, cut, one)
        once = sum(part.seconds(device, engine) for part in parts)
        fixed = kernel_seconds(kernels_of(sublayer.kind, engine, one), device, engine, one)
        total += cut // ranks * (once + fixed)
        if sublayer in guesses:
            guess = guess_part(shape, guesses[sublayer], one).seconds(device, engine)
            fixed = kernel_seconds(engine.guess_kernels, device, engine, one)
            total += max(tracks, ranks) // ranks * (guess + fixed)
    return total


def sublayer_parts(
    sublayer: Sublayer, shape: ModelShape, engine: Engine, cut: int, one: Pass
) -> tuple[Part, ...]:
    """The parts of a sublayer's work, for one of `cut` equal shares of its heads or neurons."""
    weights = _weights(shape, sublayer, cut)
    if sublayer.kind is not Kind.ATTENTION:
        return _mlp(shape, sublayer, cut, one)
    if shape.is_linear(sublayer.layer):
        return _linear_attention(shape, weights, cut, one)
    return _attention(shape, sublayer.layer, engine, weights, cut, one)


def guess_part(shape: ModelShape, rank: int, one: Pass) -> Part:
    """The work of one track's guess of the others' partials, and of its addition to the stream.

    V (A x + B p) + b with A and B of (rank, width) and V of (width, rank).
    """
    sizes = _guess_sizes(shape, rank)
    weights = sum(math.prod(size) for size in sizes if len(size) > 1)
    biases = sum(math.prod(size) for size in sizes) - weights
    moved = one.total * (4 * shape.width + 4 * rank)  # x, p, guess out and in; products, their sum
    size = _bytes(shape)
    nbytes = (weights + biases + moved) * size
    batched = weights * size if one.total > 1 else 0.0
    return Part(2 * one.total * weights, nbytes, batched)


def _guess_sizes(shape: ModelShape, rank: int) -> list[tuple[int, ...]]:
    one_sublayer = {Sublayer(0, Kind.ATTENTION): rank}
    return [size for _, _, size in guess_tensors(shape, one_sublayer, 1)]


def kernels_of(kind: Kind, engine: Engine, one: Pass) -> float:
    """How many kernels a sublayer has; each of a mixture's two parts as many as an MLP."""
    own = engine.attention_kernels if kind is Kind.ATTENTION else engine.mlp_kernels
    return own + (engine.batched_kernels if one.total > 1 else 0.0)


def kernel_seconds(kernels: float, device: Device, engine: Engine, one: Pass) -> float:
    """The fixed time of some kernels of a pass."""
    launch = engine.prefill_launch_us if one.is_prefill else 0.0
    return kernels * (device.kernel_us + launch) * 1e-6


def head_seconds(shape: ModelShape, device: Device, engine: Engine, ranks: int, one: Pass) -> float:
    """Seconds for embeddings, final norm and lm_head, and the host's time for the step."""
    tokens = logits_of(engine, one)
    rows = shape.vocabulary / (ranks if engine.cuts_lm_head else 1)
    weights = rows * shape.width
    nbytes = weights + tokens * rows + 4 * one.total * shape.width
    size = _bytes(shape)
    part = Part(2 * tokens * weights, nbytes * size, weights * size if tokens > 1 else 0.0)
    fixed = kernel_seconds(engine.head_kernels, device, engine, one)
    host = engine.step_us + engine.sequence_us * sum(part.sequences for part in one.alike)
    return part.seconds(device, engine) + fixed + host * 1e-6


def joining_part(shape: ModelShape, one: Pass) -> Part:
    """The work of the product that makes a drafting layer's input of the stream and the embedding
    of the next token (DeepSeek-V3, arXiv 2412.19437, section 2.2), whole on each rank."""
    weights, size = 2 * shape.width**2, _bytes(shape)
    nbytes = (weights + one.total * 3 * shape.width) * size
    return Part(2 * one.total * weights, nbytes, weights * size if one.total > 1 else 0.0)


def logits_of(engine: Engine, one: Pass) -> float:
    """Of how many tokens there are logits."""
    if engine.logits == "all":
        return one.total
    return sum(part.sequences * (1 + part.drafted) for part in one.alike)


def _bytes(shape: ModelShape) -> int:
    return shape.bytes_per_token // shape.width


class Weights(NamedTuple):
    """So many numbers, by what they are multiplied in, which take so many bytes."""

    numbers: Mapping[str | None, float]
    nbytes: float

    def products(self, tokens: float) -> tuple[float, Mapping[str, float]]:
        """FLOPs of so many tokens: in the model's dtype, and in each other."""
        flops = {product: 2 * tokens * numbers for product, numbers in self.numbers.items()}
        return flops.get(None, 0.0), {product: f for product, f in flops.items() if product}

    def batched(self, one: Pass) -> float:
        """Those of the bytes that meet more than one token."""
        return self.nbytes if one.total > 1 else 0.0


def _weights(
    shape: ModelShape, sublayer: Sublayer, cut: int, experts: float | None = None
) -> Weights:
    """A sublayer's weights on one of `cut` equal parts, of so many experts only."""
    numbers, nbytes = dict[str | None, float](), 0.0
    for rule in shape.rules_of(sublayer.layer):
        if shape.runs_in(rule, sublayer):
            routed = experts is not None and shape.routed_share(rule) != 1.0
            part = (experts or 0.0) / shape.experts if routed else 1.0
            own = math.prod(shape.share(rule, 0, cut)) * part
            product = shape.product_of(sublayer.layer, rule)
            numbers[product] = numbers.get(product, 0.0) + own
            nbytes += own * shape.bytes_of(sublayer.layer, rule)
    return Weights(numbers, nbytes)


def _linear_attention(shape: ModelShape, weights: Weights, cut: int, one: Pass) -> tuple[Part, ...]:
    """Projections, and the state of one of `cut` parts, by the gated delta rule (Gated DeltaNet,
    arXiv 2412.06464): a token reads the state by its key, writes it, and reads it by its query, 2
    FLOPs each for each number of it. It is held in fp32, and a pass goes over it once; after each
    drafted token it is kept, as the next may be wrong.
    """
    values = shape.linear_value_heads * shape.linear_value_size / cut
    keys = shape.linear_key_heads * shape.linear_key_size / cut
    moved = one.total * (4 * shape.width + 4 * values + 4 * keys)  # norm, addition; in and out
    size = _bytes(shape)
    projections = _projections(weights, moved * size, one)
    state = shape.linear_state / cut
    recurrences = (
        Part(6 * part.total * state, 4 * part.sequences * state * (2 + part.drafted))
        for part in one.alike
    )
    return projections, *recurrences


def _attention(
    shape: ModelShape, layer: int, engine: Engine, weights: Weights, cut: int, one: Pass
) -> tuple[Part, ...]:
    """Projections, and attention over the cache, of one of `cut` parts."""
    if shape.kv_latent:
        return _latent_attention(shape, weights, cut, one)
    window = shape.window_of(layer)
    kv_heads, head_size = shape.kv_heads_of(layer), shape.head_size_of(layer)
    queries = shape.heads * head_size / cut
    own = max(kv_heads // cut, 1)  # KV heads, replicated where there are fewer than parts
    keys = 2 * own * head_size  # and values, elements per token
    moved = one.total * (4 * shape.width + 3 * queries + keys)  # norm, addition; in and out
    size = _bytes(shape)
    projections = _projections(weights, moved * size, one)
    reads = shape.heads / cut / own if engine.kv_reads == "per query head" else 1
    cores = []
    for part in one.alike:
        attended, cached = part.attended(window), part.cached(window)
        if engine.cache == "allocated":
            attended = cached = min(part.allocated, window or part.allocated)
        reach = engine.kv_reach
        if not part.is_prefill:
            reach = min(reach, engine.kv_head_reach * max(part.sequences, 1.0) * own)
        read = part.sequences * cached * keys * reads / reach
        scores = 0.0
        if part.tokens > 1:
            heads = shape.heads / cut
            scores = engine.score_passes * part.total * attended * heads
        flops = 4 * part.total * attended * queries
        cores.append(Part(flops, (read + scores + part.total * keys) * size, attends=True))
    return projections, *cores


def _latent_attention(shape: ModelShape, weights: Weights, cut: int, one: Pass) -> tuple[Part, ...]:
    """The same of latent attention (MLA; DeepSeek-V2, arXiv 2405.04434), in the cheaper of two
    forms, as engines serve it.

    Absorbed, in decode steps: each head attends over the latents that are cached, which every part
    has whole, and reads them as its values; the products out of the latent are with queries and
    with what was attended to. Expanded, in prefills: each head has keys and values of its own,
    which come out of the cached latents anew, are written and read. Latents are read at the
    bandwidth reached, as FlashMLA says of itself (3000 of 3350 GB/s of an H800), whatever share an
    engine's attention over keys and values reaches.
    """
    heads, latent = shape.heads / cut, shape.kv_latent_rope
    moved = one.total * (4 * shape.width + 3 * heads * shape.latent_query_size + latent)
    size = _bytes(shape)
    projections = _projections(weights, moved * size, one)
    own = shape.latent_query_size + shape.latent_value_size  # of a head's key and value
    cores = []
    for part in one.alike:
        scores, cached = 2 * part.total * part.attended() * heads, part.sequences * part.cached()
        read = cached * latent + part.total * latent
        absorbed = Part(scores * (latent + shape.kv_latent), read * size)
        again = 2 * part.sequences * part.past * heads * shape.latent_kv_size * shape.kv_latent
        expanded = Part(scores * own + again, (read + 2 * cached * heads * own) * size)
        cores.append(min(absorbed, expanded, key=lambda part: part.flops))
    return projections, *cores


def _mlp(shape: ModelShape, sublayer: Sublayer, cut: int, one: Pass) -> tuple[Part, ...]:
    """One MLP, or a mixture of experts, or a part of one: each token is multiplied with
    `active_experts` of them, and those are read that any token goes to. With E experts and k
    active, and tokens that choose evenly and apart from each other, of T tokens none goes to one
    with probability (1 - k/E)^T.
    """
    multiplied = read = _weights(shape, sublayer, cut)
    neurons = shape.passed_neurons(sublayer.layer, sublayer.kind)
    if shape.is_mixture(sublayer.layer):
        missed = (1 - shape.active_experts / shape.experts) ** one.total
        read = _weights(shape, sublayer, cut, shape.experts * (1 - missed))
        multiplied = _weights(shape, sublayer, cut, shape.active_experts)
    moved = one.total * (4 * shape.width + 4 * neurons / cut)
    nbytes = read.nbytes + moved * _bytes(shape)
    flops, quantised = multiplied.products(one.total)
    return (Part(flops, nbytes, read.batched(one), quantised),)


def _projections(weights: Weights, moved: float, one: Pass) -> Part:
    """Products with weights, which are read once, as `moved` bytes are in and out."""
    flops, quantised = weights.products(one.total)
    return Part(flops, weights.nbytes + moved, weights.batched(one), quantised)


def rank_bytes(
    shape: ModelShape,
    engine: Engine,
    ranks: int,
    one: Pass,
    tracks: int = 0,
    tracked: frozenset[int] = frozenset(),
    guesses: Mapping[Sublayer, int] = NO_GUESSES,
    drafting: bool = False,
) -> float:
    """Bytes of weights and KV cache, or states, that a rank holds for a pass.

    A rank holds tracks / ranks tracks of each of the `tracked` layers, with KV heads of their own,
    and their guesses. Of a layer with a window the engine keeps no more than that, once a prompt
    has gone through. With a `drafting` layer it holds one more, as `draft_seconds` says.
    """
    first = {shape.alike(layer): layer for layer in reversed(range(shape.layers))}
    alike = Counter((first[shape.alike(layer)], layer in tracked) for layer in range(shape.layers))
    layers, size = 0.0, _bytes(shape)
    if drafting:
        alike[first[shape.alike(shape.layers - 1)], False] += 1
        layers += 2 * shape.width**2 * size
    for (layer, as_tracks), count in alike.items():
        cut = max(tracks, ranks) if as_tracks else ranks
        if shape.is_linear(layer):
            cache = one.sequences * (1 + one.drafted) * shape.linear_state / cut * 4 / size
        elif shape.kv_latent:
            cache = one.sequences * one.allocated * shape.kv_latent_rope
        else:
            kv_heads = max(shape.kv_heads_of(layer) // cut, 1)
            held = min(one.allocated, shape.window_of(layer) or one.allocated)
            cache = one.sequences * held * 2 * kv_heads * shape.head_size_of(layer)
        weights = sum(_weights(shape, Sublayer(layer, which), cut).nbytes for which in BLOCKS)
        layers += count * cut // ranks * (weights + cache * size)
    cuts = (engine.cuts_embedding, engine.cuts_lm_head)
    rows = [shape.vocabulary / (ranks if cut else 1) for cut in cuts]
    if shape.tied:  # one tensor, unless one of them is cut and the other isn't
        rows = list(dict.fromkeys(rows))
    vocabulary = sum(rows) * shape.width
    guessed = sum(math.prod(size) for _, _, size in guess_tensors(shape, guesses, 1))
    return layers + (max(tracks, ranks) // ranks * guessed + vocabulary) * size
