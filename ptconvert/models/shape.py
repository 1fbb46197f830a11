"""ModelShape: what a config.json says about a model's tensors, and how tracks divide it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ptconvert.errors import ConfigError
from ptconvert.models.families import (
    COUNTS,
    EXPERT_COUNTS,
    EXPERTS,
    FAMILIES,
    FULL,
    LINEAR,
    MODEL_TYPE_PREFIX,
    NEURONS,
    ORDERS,
    SIZES,
    SLIDING,
    UNSUPPORTED,
    Axis,
    Block,
    D,
    E,
    Family,
    Layer,
    TensorRule,
    V,
    share_of,
)
from ptconvert.models.mixtures import mlps_of
from ptconvert.models.quantised import (
    QUANTIZATION,
    Role,
    Width,
    check_method,
    quantization_of,
    weight_width,
)
from ptconvert.models.wrappers import (
    TEXT,
    TIED,
    WRAPPERS,
    Wrapper,
    decoder_prefix,
    embedding_name,
    language_config,
    layer_of,
    wrapper_of,
)
from ptconvert.schedule.presets import dense_schedule
from ptconvert.schedule.schedule import Schedule
from ptconvert.schedule.stages import BLOCKS, MAX_LAYERS, Kind, Sublayer
from ptconvert.shorten import clipped

# safetensors' names of the dtypes that are converted, by torch's names and with their bytes.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TORCH_NAMES = {short: name for name, short in DTYPES.items()}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
ORDER_DTYPE = "I32"  # of what a converted checkpoint holds beside weights: orders of units
# and of what may be carried along
_OTHERS = {"F64": 8, "I64": 8, "U64": 8, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOAT8 = dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
ELEMENT_BYTES = {**DTYPE_BYTES, ORDER_DTYPE: 4, **_OTHERS, **_FLOAT8}
HEAD = "lm_head.weight"
_MAX_SIZE = 2**31
MAX_HEADS = 65536
_EVERYWHERE = frozenset(("heads", "kv_heads", "neurons"))  # what is read for itself
_NEEDED = {  # sizes that others are counted by
    "experts": ("active_experts",),
    "kv_latent_rope": ("kv_latent", "rope_size"),
    "latent_query_size": ("nope_size", "rope_size"),
    "latent_kv_size": ("nope_size", "latent_value_size"),
    "shared_experts_neurons": ("shared_experts",),
    "linear_group_size": ("linear_key_size", "linear_value_size"),
    "linear_gates": ("linear_value_heads",),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder-only transformer; all are counts of elements.

    `dtype` is safetensors' name of the weights' type, None where config.json doesn't say. `kinds`
    say what each layer is, and `rules` what tensors such a layer has. `wrapper` is what the model
    is the language model of, where it is one. `apart` says that a checkpoint holds each expert by
    itself. Sliding attention sees the last `window` tokens. `quantised` are the tensors that it
    holds of each layer with quantised weights, None of lm_head; `widths` say what each number of
    such weights takes, by the weight's name, as config.json has it. `together` are how many neurons
    go to a track as one where not all tracks have as many, by what config.json calls their count.
    """

    family: Family
    width: int
    heads: int
    kv_heads: int
    head_size: int
    neurons: int
    vocabulary: int
    tied: bool
    dtype: str | None
    kinds: tuple[Layer, ...]
    rules: Mapping[Layer, tuple[TensorRule, ...]]
    global_kv_heads: int = 0
    global_head_size: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_size: int = 0
    linear_value_size: int = 0
    linear_taps: int = 0
    experts: int = 0
    active_experts: int = 0
    expert_neurons: int = 0
    shared_neurons: int = 0
    shared_experts: int = 0
    query_latent: int = 0
    kv_latent: int = 0
    rope_size: int = 0
    nope_size: int = 0
    latent_value_size: int = 0
    window: int = 0
    wrapper: Wrapper | None = None
    apart: bool = False
    quantised: Mapping[int | None, tuple[TensorRule, ...]] = field(default_factory=dict)
    widths: Mapping[str, Width] = field(default_factory=dict)
    together: Mapping[str, int] = field(default_factory=dict)

    @property
    def latent_query_size(self) -> int:
        """Of a head of latent attention: its query, with and without positions."""
        return self.nope_size + self.rope_size

    @property
    def latent_kv_size(self) -> int:
        """Of a head: its key without positions, and its value."""
        return self.nope_size + self.latent_value_size

    @property
    def kv_latent_rope(self) -> int:
        """Of what is cached for each token: the latent of keys and values, and the one key with
        positions that all heads share."""
        return self.kv_latent + self.rope_size

    @property
    def shared_experts_neurons(self) -> int:
        """Of the shared experts together."""
        return self.shared_experts * self.expert_neurons

    @property
    def linear_group_size(self) -> int:
        """Of a key head of linear attention its query and key, and its value heads' values and
        gates."""
        values = self.linear_value_heads // self.linear_key_heads * self.linear_value_size
        return 2 * self.linear_key_size + 2 * values

    @property
    def linear_gates(self) -> int:
        """Of a key head, two for each of its value heads."""
        return 2 * self.linear_value_heads // self.linear_key_heads

    @property
    def kv_width(self) -> int:
        """Channels of all keys, and of all values."""
        return self.kv_heads * self.head_size

    @property
    def decoder(self) -> str:
        """What the names of all its tensors begin with, but that of lm_head."""
        return decoder_prefix(self.model_type)

    @property
    def embedding(self) -> str:
        """What the embedding's weight is called."""
        return embedding_name(self.model_type)

    @property
    def around(self) -> tuple[str, ...]:
        """What the names of tensors begin with that are carried along."""
        more = (self.layer(self.layers),) if self.family.layer_more else ()
        return (*(self.wrapper or self.family).around, *more)

    @property
    def mtp(self) -> tuple[str, ...]:
        """What of these are heads for further tokens (MTP), which models open without."""
        return tuple(b for b in self.around if b.startswith(("mtp.", f"{self.decoder}layers.")))

    def layer(self, index: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self.decoder}layers.{index}."

    @property
    def model_type(self) -> str:
        """What config.json calls it."""
        return (self.wrapper or self.family).model_type

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.kinds)

    @property
    def dense(self) -> Schedule:
        """What the model itself runs, which every other schedule is compared with."""
        return dense_schedule(self.layers, self.family.parallel)

    def with_layers(self, count: int) -> ModelShape:
        """The same with so many layers, whose kinds go on as they began."""
        kinds = itertools.islice(itertools.cycle(self.kinds), count)
        return replace(self, kinds=tuple(kinds))

    @property
    def gated_head_size(self) -> int:
        """Of a query and its gate."""
        return 2 * self.head_size

    @property
    def linear_state(self) -> int:
        """Numbers that a layer with linear attention keeps of a sequence: a matrix for each value
        head."""
        return self.linear_value_heads * self.linear_key_size * self.linear_value_size

    def rules_of(self, layer: int) -> tuple[TensorRule, ...]:
        """The tensors of a layer, as transformers has them in memory."""
        return self.rules[self.kinds[layer]]

    def stored_of(self, layer: int) -> tuple[TensorRule, ...]:
        """The tensors of a layer as the checkpoint holds them."""
        return self.quantised.get(layer) or self.unquantised_of(layer)

    def unquantised_of(self, layer: int) -> tuple[TensorRule, ...]:
        """The same, each weight as one tensor."""
        rules = self.rules_of(layer)
        return _apart(rules, self.experts) if self.apart else rules

    @property
    def unquantised(self) -> ModelShape:
        """The same with each weight as one tensor."""
        return replace(self, quantised={})

    @property
    def stored_head(self) -> tuple[TensorRule, ...]:
        """The tensors of lm_head as the checkpoint holds them."""
        return self.quantised.get(None) or (TensorRule(HEAD, (V, D)),)

    def stored_as(self, names: Iterable[str]) -> ModelShape:
        """The same, of a checkpoint that has tensors of these names."""
        begins = {name.partition("{}")[0] for rule in self.family.layer for name in rule.apart}
        experts = "|".join(re.escape(b) for b in begins if b.endswith(".experts."))
        if not experts:
            return self
        apart = re.compile(rf"layers\.(\d+)\.(?:tracks\.\d+\.)?(?:{experts})0\.")
        own = (apart.search(name) for name in names if not name.startswith(self.around))
        return replace(self, apart=any(m and int(m[1]) < self.layers for m in own))

    def parts_of(self, name: str) -> list[list[str]] | None:
        """What a tensor of the model is called in the checkpoint: for each expert, its parts; None
        where it is as it is called in the model."""
        layer = layer_of(name)
        if layer is None or not self.apart:
            return None
        for rule in self.rules_of(layer):
            if rule.apart and name.endswith(f".{rule.name}"):
                before, count = name.removesuffix(rule.name), len(rule.apart)
                stored = [before + part.name for part in rule.stored(self.experts)]
                return [stored[i : i + count] for i in range(0, len(stored), count)]
        return None

    def block(self, sublayer: Sublayer) -> Block:
        """A sublayer's module."""
        return self.family.block(sublayer.kind, self.kinds[sublayer.layer])

    def is_linear(self, layer: int) -> bool:
        """Whether a layer's attention is linear: it has a state of one size, and no cache of all
        tokens."""
        return LINEAR in self.kinds[layer]

    def window_of(self, layer: int) -> int | None:
        """The last tokens, itself among them, that a token attends to in a layer; None for all."""
        return (self.window or None) if SLIDING in self.kinds[layer] else None

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return EXPERTS in self.kinds[layer]

    @property
    def divisible(self) -> frozenset[int]:
        """The layers whose MLP is a mixture with shared experts, which may run in two parts."""
        if self.family.shared is None:
            return frozenset()
        return frozenset(filter(self.is_mixture, range(self.layers)))

    def orders_of(self, layer: int) -> dict[str, tuple[int, ...]]:
        """What of a layer can go to one track or another, by what an assignment calls its order:
        how many units; of experts (experts, neurons), as each one's neurons are shared out. Those
        that quantised weights keep together are one unit."""
        found: dict[str, tuple[int, ...]] = {"kv_heads": (self.attention_units(layer),)}
        for rule in self.rules_of(layer):
            experts = (self.experts,) if rule.is_of_experts else ()
            for segment in rule.segments(rule.axis):
                if segment.cut in NEURONS:
                    found[ORDERS[segment.cut]] = (*experts, int(getattr(self, segment.count)))
        together = dict.fromkeys(found, 1)
        for rule in self.quantised.get(layer, ()):
            for segment in rule.segments(rule.axis) if rule.per > 1 else ():
                assert segment.cut is not None
                of = ORDERS[segment.cut]
                own = self._parted_by(rule, segment, found[of][-1])
                together[of] = math.lcm(together[of], own)
        return {of: (*size[:-1], size[-1] // together[of]) for of, size in found.items()}

    def _parted_by(self, rule: TensorRule, segment: Axis, units: int) -> int:
        """How many of a segment's units one of a quantised tensor's indices is of."""
        return rule.per // math.gcd(rule.per, self.length(segment) // units)

    def shared_by(self, tracks: int) -> ModelShape:
        """The same, as so many tracks share it: where they don't divide the groups of neurons that
        quantised weights keep together, some have a group more than others."""
        found: dict[str, int] = {}
        for rule in {rule for rules in self.quantised.values() for rule in rules if rule.per > 1}:
            for segment in rule.segments(rule.axis):
                if segment.cut in NEURONS:
                    key, of_each = self._counted_as(segment)
                    own = self._parted_by(rule, segment, int(getattr(self, segment.count)))
                    found[key] = math.lcm(found.get(key, 1), own // math.gcd(own, of_each))
        counts = {key: int(getattr(self, name)) for name, key in COUNTS.items() if key in found}
        together = {
            key: group
            for key, group in found.items()
            if counts[key] % group == 0 and counts[key] % (group * tracks)
            if counts[key] // group >= tracks
        }
        return replace(self, together=together)

    def _counted_as(self, segment: Axis) -> tuple[str, int]:
        """What config.json calls the count that a segment's is a multiple of, and how many times:
        all of DeepSeek's shared experts are as one, of so many times an expert's neurons."""
        if segment.count == "shared_experts_neurons":
            return COUNTS["expert_neurons"], self.shared_experts
        return COUNTS[segment.count], 1

    def bytes_of(self, layer: int, rule: TensorRule) -> float:
        """Bytes that a number of a layer's tensor takes."""
        whole = float(self.bytes_per_token // self.width)
        width = self.widths.get(self.layer(layer) + rule.name)
        return whole if width is None else width.bits / 8

    def product_of(self, layer: int, rule: TensorRule) -> str | None:
        """What a layer's tensor is multiplied in, one of `PRODUCTS`; None of the model's dtype."""
        width = self.widths.get(self.layer(layer) + rule.name)
        return None if width is None else width.product

    def alike(self, layer: int) -> object:
        """What layers have in common that are as large and as fast as each other."""
        widths = tuple(self.widths.get(self.layer(layer) + r.name) for r in self.rules_of(layer))
        return self.kinds[layer], widths if self.widths else None

    def routed_share(self, rule: TensorRule) -> float:
        """Which share of a tensor one token is multiplied with: of the experts those that it goes
        to."""
        return self.active_experts / self.experts if rule.is_routed else 1.0

    def runs_in(self, rule: TensorRule, sublayer: Sublayer) -> bool:
        """Whether a sublayer of its layer runs a tensor: not only the norm before it."""
        if not rule.name.startswith(f"{self.block(sublayer).name}."):
            return False
        if not sublayer.kind.is_part:
            return True
        return self.family.is_shared(rule) == (sublayer.kind is Kind.SHARED)

    def passed_neurons(self, layer: int, kind: Kind = Kind.MLP) -> int:
        """How many neurons a token passes in a layer's MLP, or in one of its two parts."""
        if not self.is_mixture(layer):
            return self.neurons
        shared = self.shared_neurons + self.shared_experts_neurons
        routed = self.active_experts * (self.expert_neurons or self.neurons)
        return {Kind.SHARED: shared, Kind.ROUTED: routed}.get(kind, shared + routed)

    def attention_units(self, layer: int) -> int:
        """How many units of a layer's attention can go to one track or another: KV heads, or key
        heads, with all that reads them."""
        return self.linear_key_heads if self.is_linear(layer) else self.kv_heads_of(layer)

    def kv_heads_of(self, layer: int) -> int:
        """KV heads of a layer's softmax attention."""
        return self.global_kv_heads if self._is_global(layer) else self.kv_heads

    def head_size_of(self, layer: int) -> int:
        """Channels of one of its heads."""
        return self.global_head_size if self._is_global(layer) else self.head_size

    def _is_global(self, layer: int) -> bool:
        return bool(self.global_head_size) and FULL in self.kinds[layer]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one all-reduce carries for one token: the residual stream's width. bf16 is
        assumed where config.json doesn't say."""
        return self.width * DTYPE_BYTES[self.dtype or "BF16"]

    @property
    def norms_sums(self) -> bool:
        """Whether what a sublayer gives is normed before it joins the stream (post-norm)."""
        after = {f"{self.family.block(kind).after}.weight" for kind in BLOCKS}
        return any(rule.name in after for rules in self.rules.values() for rule in rules)

    def payloads(self, sublayers: int) -> int:
        """How many streams an all-reduce carries that takes so many sublayers' partials: they are
        summed locally first, but where each one's sum is normed for itself."""
        return sublayers if self.norms_sums else min(sublayers, 1)

    def bytes_all_reduced(self, schedule: Schedule) -> int:
        """Bytes that all of a schedule's all-reduces carry for one token."""
        return sum(map(self.payloads, schedule.carried)) * self.bytes_per_token

    @property
    def one(self) -> int:
        """What a tensor of one element counts."""
        return 1

    @property
    def pair(self) -> int:
        """Of a neuron whose gate and up channel lie side by side."""
        return 2

    def length(self, axis: Axis) -> int:
        """How many elements an axis has, or its segment."""
        unit = 1 if axis.unit is None else getattr(self, axis.unit)
        return int(getattr(self, axis.count) * unit)

    def segments(self, rule: TensorRule) -> list[tuple[Axis, int]]:
        """What follows each other along the axis of a tensor that is cut, and where each begins."""
        segments = rule.segments(rule.axis)
        lengths = [self.length(segment) for segment in segments]
        return list(zip(segments, itertools.accumulate(lengths[:-1], initial=0), strict=True))

    def size(self, rule: TensorRule) -> tuple[int, ...]:
        """The shape of a layer's tensor."""
        if rule.kept is not None:
            return rule.kept
        return tuple(sum(map(self.length, rule.segments(axis))) for axis in range(len(rule.axes)))

    def told(self, rule: TensorRule, track: int, tracks: int) -> Sequence[int]:
        """What a tensor says that describes a quantised weight: of a track's share of it."""
        size = [sum(map(self.length, rule.segments(axis))) for axis in range(len(rule.axes))]
        size[rule.axis] = sum(stop - start for start, stop in self.cuts(rule, track, tracks))
        if rule.told == Role.SHAPE.value:
            return size
        return [place // rule.per for place in range(*size)]

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        return max(sum(math.prod(self.size(r)) for r in rules) for rules in self.rules.values())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors; a tied lm_head is not among them."""
        yield self.embedding, (self.vocabulary, self.width)
        for i in range(self.layers):
            for rule in self.stored_of(i):
                yield self.layer(i) + rule.name, self.size(rule)
        for name in self.family.final_norm:
            yield self.decoder + name, (self.width,)
        if not self.tied:
            yield from ((rule.name, self.size(rule)) for rule in self.stored_head)

    def module(self, layer: int, rule: TensorRule) -> str | None:
        """What a quantization_config calls the module that has a weight, which may be one expert's;
        None where it is no linear's, or a router's."""
        biased = rule.name.endswith("bias")  # of experts it has two axes, too
        if len(rule.axes) < 2 or biased or (not rule.is_cut and E in rule.axes):
            return None
        return self.layer(layer) + next(rule.stored(1)).name.removesuffix(".weight")

    def indivisible(self, tracks: int, most: int | None = None) -> str | None:
        """Why `tracks` can't share this model evenly, and what would do, up to `most`; None if they
        can."""
        fits = [n for n in range(1, self.heads + 1) if self._divides(n)]
        if tracks in fits:
            return None
        fits = [n for n in fits if n <= (most or self.heads)]
        linear = ""
        if self.global_kv_heads:
            linear = f", {self.global_kv_heads} KV heads of full attention"
        if self.linear_key_heads:
            linear = f", {self.linear_key_heads} heads of linear attention"
        neurons = [f"{count} FFN neurons" for count in self._neurons.values()]
        return (
            f"{tracks} tracks don't divide {self.heads} heads, {self.kv_heads} KV heads{linear} "
            f"and {' and '.join(neurons)}; possible are {', '.join(map(str, fits))}"
        )

    def _divides(self, tracks: int) -> bool:
        kv_heads = {self.kv_heads, self.global_kv_heads or self.kv_heads}
        kv_fits = all(n % tracks == 0 or tracks % n == 0 for n in kv_heads)
        counts = (self.heads, self.linear_key_heads, *self._neurons.values())
        return kv_fits and all(count % tracks == 0 for count in counts)

    @property
    def _neurons(self) -> Mapping[str, int]:
        """How many there are of each sort that is cut."""
        segments = (s for rules in self.rules.values() for r in rules for s in r.segments(r.axis))
        names = dict.fromkeys(s.count for s in segments if s.cut in NEURONS)
        return {name: int(getattr(self, name)) for name in names}

    def misaligned(self, tracks: int, layers: Iterable[int]) -> str | None:
        """Why the quantised weights of some layers can't be cut into `tracks`, and what would do;
        None if they can. Nothing is quantised anew, so what has one scale, or lies in one integer,
        stays together."""
        layers = list(layers)

        def parted(n: int) -> tuple[TensorRule, int] | None:
            return self.shared_by(n).parted(n, layers)

        found = parted(tracks)
        if found is None:
            return None
        rule, own = found
        fits = [n for n in range(1, self.heads + 1) if self._divides(n) and parted(n) is None]
        return (
            f"{tracks} tracks don't divide the quantised weights: {rule.name} has one number for "
            f"each {rule.per} of {own * tracks}, and a track would own {own} of these; possible "
            f"are {', '.join(map(str, fits))}"
        )

    def parted(self, tracks: int, layers: Iterable[int]) -> tuple[TensorRule, int] | None:
        """A quantised tensor of some layers of which one number is of two tracks' elements, as they
        share the model; and how many of its weight's a track owns."""
        rules = (r for layer in layers for r in self.quantised.get(layer, ()) if r.per > 1)
        distinct = {(rule.axes, rule.per): rule for rule in rules}.values()
        owned = ((r, stop - start) for r in distinct for start, stop in self.cuts(r, 0, tracks))
        return next((one for one in owned if tracks > 1 and one[1] % one[0].per), None)

    def shares(self, layer: int, of: str, tracks: int) -> list[int]:
        """How many of the units of one of `orders_of` each track owns."""
        units = self.orders_of(layer)[of][-1]
        counts = (
            segment
            for rule in self.rules_of(layer)
            for segment in rule.segments(rule.axis)
            if segment.cut in NEURONS and ORDERS[segment.cut] == of
        )
        together = 1
        if (segment := next(counts, None)) is not None:
            key, times = self._counted_as(segment)
            each = int(getattr(self, segment.count)) // units
            together = max(self.together.get(key, 1) * times // each, 1)
        return [len(share_of(units, track, tracks, together)) for track in range(tracks)]

    def spans(self, rule: TensorRule, track: int, tracks: int) -> list[tuple[int, int]]:
        """The parts [start, stop) of `rule.axis` that a track owns, one of each segment, in
        elements."""
        if not rule.is_cut:
            return [(0, rows(self.size(rule)))]
        cuts = self.cuts(rule, track, tracks)
        return [(start // rule.per, math.ceil(stop / rule.per)) for start, stop in cuts]

    def cuts(self, rule: TensorRule, track: int, tracks: int) -> list[tuple[int, int]]:
        """The same in elements of the weight, where it is quantised and a tensor has one for
        several.

        Heads and neurons are assigned contiguously. With fewer KV heads than tracks, the tracks
        whose query heads share a KV head each own that whole head.
        """
        found = []
        for segment, begin in self.segments(rule):
            count = int(getattr(self, segment.count))
            key, times = self._counted_as(segment) if segment.cut in NEURONS else ("", 1)
            unit = self.length(segment) // count
            own = share_of(count, track, tracks, self.together.get(key, 1) * times)
            found.append((begin + own.start * unit, begin + own.stop * unit))
        return found

    def share(self, rule: TensorRule, track: int, tracks: int) -> tuple[int, ...]:
        """The shape of a track's part of a layer's tensor."""
        if rule.told is not None:
            return (len(self.told(rule, track, tracks)),)
        own = sum(stop - start for start, stop in self.spans(rule, track, tracks))
        return tuple(
            own if axis == rule.axis else size for axis, size in enumerate(self.size(rule))
        )

    @staticmethod
    def from_config(config: Mapping[str, object], where: str = "config.json") -> ModelShape:
        """Reads a config.json's fields; `where` names it in errors.

        Raises ConfigError, naming the family and the reason, for what can't be converted.
        """
        _refuse(config, where)
        wrapper, whole = wrapper_of(config["model_type"]), config
        config = language_config(config)
        family = _family(config, wrapper, where)

        def size(
            key: str, otherwise: int | None = None, most: int = _MAX_SIZE, least: int = 1
        ) -> int:
            value = config.get(key, family.defaults.get(key))
            if value is None and (
                key not in {**family.defaults, **config} or key in family.nullable
            ):
                value = otherwise
            if type(value) is not int or not least <= value <= most:
                was = f"is {_short(value)}" if key in config else "is missing"
                raise ConfigError(
                    f"{where}: {key} {was}; it must be a whole number, {least} to {most}"
                )
            return value

        layers = size("num_hidden_layers", most=MAX_LAYERS)
        window, known = 0, {**family.defaults, **config}
        switched = "use_sliding_window" in family.defaults
        if SLIDING in family.kinds and (not switched or known["use_sliding_window"]):
            window = size("sliding_window") if known.get("sliding_window") else 0
        attention: tuple[str | None, ...] = (None,) * layers
        if family.kinds_differ or window:
            attention = _kinds(family, config, layers, size, where)
        try:
            config = family.own_keys(config, [i for i in range(layers) if attention[i] == FULL])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        kinds = tuple(
            frozenset(filter(None, pair))
            for pair in zip(attention, mlps_of(family, config, layers, where), strict=True)
        )
        rules = {kind: family.layer_rules(config, kind) for kind in dict.fromkeys(kinds)}
        used = {rule for own in rules.values() for rule in own}
        axes = {part for r in used for a in range(len(r.axes)) for part in r.segments(a)}
        own = {name for axis in axes for name in (axis.count, axis.unit) if name is not None}
        own |= {n for whole, needed in _NEEDED.items() if whole in own for n in needed}
        keys = {**COUNTS, **SIZES}
        if family.experts:
            given = [key for key in family.experts if config.get(key) is not None]
            if len({str(config[key]) for key in given}) > 1:
                raise ConfigError(f"{where}: {' and '.join(given)} differ; they mean the same")
            keys["experts"] = (given or family.experts)[0]
        others: dict[str, Any] = {
            name: size(key) for name, key in keys.items() if name in own - _EVERYWHERE
        }
        heads, width = size("num_attention_heads", most=MAX_HEADS), size("hidden_size")
        head_size, kv_heads = size("head_dim", width // heads), heads  # of latent attention as many
        if "kv_latent" not in own:
            kv_heads = size("num_key_value_heads", heads, most=MAX_HEADS)
        shape = ModelShape(
            family=family,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            neurons=size("intermediate_size") if "neurons" in own else 0,
            vocabulary=size("vocab_size"),
            tied=is_tied(config, where),
            dtype=config_dtype(config, where),
            kinds=kinds,
            rules=rules,
            window=window,
            wrapper=wrapper,
            **others,
        )
        if (quantization := quantization_of(whole)) is not None:
            found = {
                name: _width(quantization, module, where)
                for layer in range(layers)
                for rule in shape.rules_of(layer)
                if (name := shape.layer(layer) + rule.name)
                and (module := shape.module(layer, rule))
            }
            shape = replace(shape, widths={k: v for k, v in found.items() if v is not None})
        for name in ("kv_heads", "global_kv_heads"):
            if shape.heads % (getattr(shape, name) or 1):
                key = {**COUNTS, **SIZES}[name]
                raise ConfigError(
                    f"{where}: {shape.heads} attention heads don't share {getattr(shape, name)} KV "
                    f"heads evenly; {key} must divide num_attention_heads"
                )
        if shape.linear_key_heads and shape.linear_value_heads % shape.linear_key_heads:
            raise ConfigError(
                f"{where}: {shape.linear_value_heads} value heads of linear attention don't share "
                f"{shape.linear_key_heads} key heads evenly; linear_num_key_heads must divide "
                "linear_num_value_heads"
            )
        return shape


def _width(quantization: Mapping[str, Any], module: str, where: str) -> Width | None:
    """What each number of a module's weight takes. Raises ConfigError."""
    try:
        return weight_width(quantization, module)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{where}: {QUANTIZATION} doesn't say how {module} is quantised: {_short(error)}"
        ) from None


def _kinds(
    family: Family,
    config: Mapping[str, object],
    layers: int,
    size: Callable[..., int],
    where: str,
) -> tuple[str, ...]:
    """Of which kind each layer is, where `size` reads a key of config.json. Raises ConfigError."""
    full, other = family.kinds
    if not (family.full_every or family.full_until or family.cycle or family.full_by):
        return (other,) * layers
    given = config.get("layer_types")
    if given is None and family.full_by:
        listed, every_key = family.full_by
        flags = config.get(listed)
        if flags is None:
            interval = size(every_key)
            flags = [(i + 1) % interval for i in range(layers)]
        if not isinstance(flags, list) or len(flags) != layers:
            raise ConfigError(
                f"{where}: {listed} is {_short(flags)}; it must have a number for each of {layers} "
                "layers"
            )
        given = [full if flag else other for flag in flags]
    if given is None and family.full_until:
        first = size(family.full_until, least=0)
        given = [full if i < first else other for i in range(layers)]
    elif given is None and family.full_every:
        every = size(family.full_every) if isinstance(family.full_every, str) else family.full_every
        given = [other if (i + 1) % every else full for i in range(layers)]
    elif given is None:
        given = list(itertools.islice(itertools.cycle(family.cycle), layers))
    if (
        not isinstance(given, list)
        or len(given) != layers
        or not all(kind in family.kinds for kind in given)
    ):
        raise ConfigError(
            f"{where}: layer_types is {_short(given)}; it must say of each of {layers} layers that "
            f"it is {full} or {other}"
        )
    return (*given[:-1], full if family.last_full else given[-1])


@lru_cache(maxsize=64)
def _apart(rules: tuple[TensorRule, ...], experts: int) -> tuple[TensorRule, ...]:
    return tuple(stored for rule in rules for stored in rule.stored(experts))


def rows(size: tuple[int, ...]) -> int:
    """How long a tensor's first axis is; a scalar counts as one row."""
    return size[0] if size else 1


def is_tied(config: Mapping[str, object], where: str = "config.json") -> bool:
    """Whether a model's config.json, or a converted one's, says that lm_head is the embedding."""
    config = language_config(config)
    family = FAMILIES.get(str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    defaults = family.defaults if family else {}
    return _flag({**defaults, **config}, TIED, where)


def config_dtype(config: Mapping[str, object], where: str) -> str | None:
    """The dtype that a config.json says, where it does; torch's short names mean the same."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if dtype is None:
        return None
    name = {"half": "float16", "float": "float32"}.get(str(dtype), dtype)
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(
            f"{where}: {key} is {_short(dtype)}; the weights must be {' or '.join(DTYPES)}, "
            "written so"
        )
    return DTYPES[name]


def _flag(config: Mapping[str, object], key: str, where: str) -> bool:
    """A key that is true, false or absent, which is false; transformers opens no other."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {_short(value)}; it must be true or false, or absent")
    return value


def _short(value: object) -> str:
    return clipped(repr(value), 60)


def _refuse(config: Mapping[str, object], where: str) -> None:
    """Raises ConfigError for a model that can't be converted, whatever its sizes."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"{where}: model_type is {_short(model_type)}; it must name a family")
    if "ptconvert" not in config and model_type.startswith(MODEL_TYPE_PREFIX):
        raise ConfigError(f"{where}: model_type is {model_type}, but the ptconvert section is gone")
    if "ptconvert" in config:
        raise ConfigError(
            f"{where}: this checkpoint is converted already; `ptconvert transform --to-dense` "
            "gives back its source"
        )
    parts = [config, *(p for p in (config.get(TEXT),) if isinstance(p, Mapping))]
    for part in parts:
        if part.get(QUANTIZATION) is not None:
            check_method(part[QUANTIZATION], where)
    if reason := _refused_by_name(config):
        raise ConfigError(f"{where}: {reason}")
    maps = (part.get("auto_map") for part in parts)
    if any(k.startswith("AutoModel") for m in maps if isinstance(m, dict) for k in m):
        raise ConfigError(
            f"{where}: the model runs its own code (auto_map), which may not be {model_type}'s; "
            "only transformers' own classes can be converted"
        )
    described = WRAPPERS.get(model_type) or FAMILIES.get(model_type)
    if described is None:
        return
    # Which tensors there are says more than whether lm_head's class saved them; and the first
    # Llamas called it LLaMAForCausalLM.
    classes = [name for auto, name in described.classes.items() if auto != "AutoConfig"]
    architectures = config.get("architectures")
    names = {str([name]).lower() for name in classes}
    if architectures and str(architectures).lower() not in names:
        raise ConfigError(
            f"{where}: architectures is {_short(architectures)}; only {classes[-1]} can be "
            f"converted for {model_type}"
        )


def _family(config: Mapping[str, object], wrapper: Wrapper | None, where: str) -> Family:
    """The family that a language model's config names, or ConfigError with the reason why it is
    refused."""
    model_type = str(config.get("model_type"))
    of = f"{wrapper.model_type} with " if wrapper else ""
    if model_type in UNSUPPORTED:
        raise ConfigError(f"{where}: {of}{_refused_by_name(config)}")
    family = FAMILIES.get(model_type)
    if any(map(config.get, EXPERT_COUNTS)) and not (family and family.experts):
        raise ConfigError(f"{where}: {of}{model_type} with experts can't be converted: MoE layers")
    if family is None:
        supported = ", ".join(f.model_type for f in FAMILIES.values() if f.causal_lm)
        around = "" if wrapper else f", and around them {', '.join(WRAPPERS)}"
        raise ConfigError(
            f"{where}: {of}model_type {_short(model_type)} is not supported; supported are "
            f"{supported}{around}"
        )
    if wrapper is None and not family.causal_lm:
        raise ConfigError(
            f"{where}: {model_type} is the language model of another, and transformers has no "
            "class for it alone; convert the checkpoint that it is a part of"
        )
    if reason := _refused_by_name(config):
        raise ConfigError(f"{where}: {of}{reason}")
    return family


def _refused_by_name(config: Mapping[str, object]) -> str | None:
    """Why a language model isn't converted that its family or one of its keys names; None where
    they name none such."""
    model_type = str(config.get("model_type"))
    if model_type in UNSUPPORTED:
        return f"{model_type} can't be converted: {UNSUPPORTED[model_type]}"
    family = FAMILIES.get(model_type)
    if family is None:
        return None
    known = {**family.defaults, **config}
    return next(
        (
            f"{model_type} with {key} {_short(known[key])} can't be converted: {reason}"
            for key, reason in family.refused.items()
            if known.get(key)
        ),
        None,
    )
