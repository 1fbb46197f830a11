"""ModelShape: what a config.json says about a model's tensors, and how tracks divide it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ptconvert.errors import ConfigError
from ptconvert.models.families import (
    COUNTS,
    FAMILIES,
    FULL,
    LINEAR,
    MODEL_TYPE_PREFIX,
    SIZES,
    UNSUPPORTED,
    Axis,
    Block,
    Family,
    TensorRule,
)
from ptconvert.models.wrappers import (
    TIED,
    WRAPPERS,
    Wrapper,
    decoder_prefix,
    embedding_name,
    language_config,
    wrapper_of,
)
from ptconvert.schedule.stages import MAX_LAYERS, Sublayer
from ptconvert.shorten import clipped

# safetensors' names of the dtypes that are converted, by torch's names and with their bytes.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TORCH_NAMES = {short: name for name, short in DTYPES.items()}
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
ORDER_DTYPE = "I32"  # of what a converted checkpoint holds beside weights: orders of units
ELEMENT_BYTES = {**DTYPE_BYTES, ORDER_DTYPE: 4}
HEAD = "lm_head.weight"
_MAX_SIZE = 2**31
MAX_HEADS = 65536
_EVERYWHERE = frozenset(("heads", "kv_heads", "neurons"))  # what every family's layers have


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder-only transformer; all are counts of elements.

    `dtype` is safetensors' name of the weights' type, None where config.json doesn't say. `kinds`
    are those of the layers, None where all are alike, and `rules` the tensors of each. `wrapper` is
    what the model is the language model of, where it is one.
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
    kinds: tuple[str | None, ...]
    rules: Mapping[str | None, tuple[TensorRule, ...]]
    wrapper: Wrapper | None = None
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_size: int = 0
    linear_value_size: int = 0
    linear_taps: int = 0

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

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
        return (self.wrapper or self.family).around

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

    def with_layers(self, count: int) -> ModelShape:
        """The same with so many layers, whose kinds go on as they began."""
        kinds = itertools.islice(itertools.cycle(self.kinds), count)
        return replace(self, kinds=tuple(kinds))

    @property
    def gated_head_size(self) -> int:
        """Of a query and its gate."""
        return 2 * self.head_size

    def rules_of(self, layer: int) -> tuple[TensorRule, ...]:
        """The tensors of a layer."""
        return self.rules[self.kinds[layer]]

    def block(self, sublayer: Sublayer) -> Block:
        """A sublayer's module."""
        return self.family.block(sublayer.kind, self.kinds[sublayer.layer])

    def is_linear(self, layer: int) -> bool:
        """Whether a layer's attention is linear: it has a state of one size, and no cache of all
        tokens."""
        return self.kinds[layer] == LINEAR

    def attention_units(self, layer: int) -> int:
        """How many units of a layer's attention can go to one track or another: KV heads, or key
        heads, with all that reads them."""
        return self.linear_key_heads if self.is_linear(layer) else self.kv_heads

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one all-reduce carries for one token: the residual stream's width.

        Partials that wait for the same all-reduce are summed locally first, so how many there
        are doesn't matter. bf16 is assumed where config.json doesn't say.
        """
        return self.width * DTYPE_BYTES[self.dtype or "BF16"]

    @property
    def one(self) -> int:
        """What a tensor of one element counts."""
        return 1

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
        return tuple(sum(map(self.length, rule.segments(axis))) for axis in range(len(rule.axes)))

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        return max(sum(math.prod(self.size(r)) for r in rules) for rules in self.rules.values())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors; a tied lm_head is not among them."""
        yield self.embedding, (self.vocabulary, self.width)
        for i in range(self.layers):
            for rule in self.rules_of(i):
                yield self.layer(i) + rule.name, self.size(rule)
        for name in self.family.final_norm:
            yield self.decoder + name, (self.width,)
        if not self.tied:
            yield HEAD, (self.vocabulary, self.width)

    def indivisible(self, tracks: int) -> str | None:
        """Why `tracks` can't share this model evenly, and what would do; None if they can."""
        fits = [n for n in range(1, self.heads + 1) if self._divides(n)]
        if tracks in fits:
            return None
        linear = ""
        if self.linear_key_heads:
            linear = f", {self.linear_key_heads} heads of linear attention"
        return (
            f"{tracks} tracks don't divide {self.heads} heads, {self.kv_heads} KV heads{linear} "
            f"and {self.neurons} FFN neurons; possible are {', '.join(map(str, fits))}"
        )

    def most_tracks(self, at_most: int) -> int:
        """The largest number of tracks, up to `at_most`, that can share this model evenly."""
        return max(n for n in range(1, at_most + 1) if self._divides(n))

    def _divides(self, tracks: int) -> bool:
        kv_fits = self.kv_heads % tracks == 0 or tracks % self.kv_heads == 0
        counts = (self.heads, self.neurons, self.linear_key_heads)
        return kv_fits and all(count % tracks == 0 for count in counts)

    def spans(self, rule: TensorRule, track: int, tracks: int) -> list[tuple[int, int]]:
        """The parts [start, stop) of `rule.axis` that a track owns, one of each segment, in
        elements.

        Heads and neurons are assigned contiguously. With fewer KV heads than tracks, the tracks
        whose query heads share a KV head each own that whole head.
        """
        if not rule.is_cut:
            return [(0, rows(self.size(rule)))]
        found = []
        for segment, begin in self.segments(rule):
            count = int(getattr(self, segment.count))
            unit = self.length(segment) // count
            first, own = track * count // tracks, max(count // tracks, 1)
            found.append((begin + first * unit, begin + (first + own) * unit))
        return found

    def share(self, rule: TensorRule, tracks: int) -> tuple[int, ...]:
        """The shape of one track's part of a layer's tensor."""
        own = sum(stop - start for start, stop in self.spans(rule, 0, tracks))
        return tuple(
            own if axis == rule.axis else size for axis, size in enumerate(self.size(rule))
        )

    @staticmethod
    def from_config(config: Mapping[str, object], where: str = "config.json") -> ModelShape:
        """Reads a config.json's fields; `where` names it in errors.

        Raises ConfigError, naming the family and the reason, for what can't be converted.
        """
        _refuse(config, where)
        wrapper = wrapper_of(config["model_type"])
        config = language_config(config)
        family = _family(config, wrapper, where)

        def size(key: str, otherwise: int | None = None, most: int = _MAX_SIZE) -> int:
            value = config.get(key, family.defaults.get(key))
            if value is None and (
                key not in {**family.defaults, **config} or key in family.nullable
            ):
                value = otherwise
            if type(value) is not int or not 1 <= value <= most:
                was = f"is {_short(value)}" if key in config else "is missing"
                raise ConfigError(f"{where}: {key} {was}; it must be a whole number, 1 to {most}")
            return value

        layers = size("num_hidden_layers", most=MAX_LAYERS)
        kinds: tuple[str | None, ...] = (None,) * layers
        if family.full_every is not None:
            kinds = _kinds(config.get("layer_types"), layers, size(family.full_every), where)
        axes = {part for r in family.layer for a in range(len(r.axes)) for part in r.segments(a)}
        own = {name for axis in axes for name in (axis.count, axis.unit)}
        keys = {**COUNTS, **SIZES}.items()
        others = {name: size(key) for name, key in keys if name in own - _EVERYWHERE}
        heads, width = size("num_attention_heads", most=MAX_HEADS), size("hidden_size")
        head_size = size("head_dim", width // heads)
        shape = ModelShape(
            family=family,
            width=width,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads, most=MAX_HEADS),
            head_size=head_size,
            neurons=size("intermediate_size"),
            vocabulary=size("vocab_size"),
            tied=is_tied(config, where),
            dtype=config_dtype(config, where),
            kinds=kinds,
            rules={kind: family.layer_rules(config, kind) for kind in dict.fromkeys(kinds)},
            wrapper=wrapper,
            **others,
        )
        if shape.heads % shape.kv_heads:
            raise ConfigError(
                f"{where}: {shape.heads} attention heads don't share {shape.kv_heads} KV heads "
                "evenly; num_key_value_heads must divide num_attention_heads"
            )
        if shape.linear_key_heads and shape.linear_value_heads % shape.linear_key_heads:
            raise ConfigError(
                f"{where}: {shape.linear_value_heads} value heads of linear attention don't share "
                f"{shape.linear_key_heads} key heads evenly; linear_num_key_heads must divide "
                "linear_num_value_heads"
            )
        return shape


def _kinds(given: object, layers: int, full_every: int, where: str) -> tuple[str, ...]:
    """Of which kind each layer is. Raises ConfigError."""
    if given is None:
        return tuple(LINEAR if (i + 1) % full_every else FULL for i in range(layers))
    if isinstance(given, list) and len(given) == layers and all(k in (FULL, LINEAR) for k in given):
        return tuple(given)
    raise ConfigError(
        f"{where}: layer_types is {_short(given)}; it must say of each of {layers} layers that it "
        f"is {FULL} or {LINEAR}"
    )


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
    if "ptconvert" in config:
        raise ConfigError(
            f"{where}: this checkpoint is converted already; `ptconvert transform --to-dense` "
            "gives back its source"
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(
            f"{where}: the weights are quantised (quantization_config); convert the unquantised "
            "checkpoint and quantise the result"
        )
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and any(k.startswith("AutoModel") for k in auto_map):
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
        raise ConfigError(
            f"{where}: {of}{model_type} can't be converted: {UNSUPPORTED[model_type]}"
        )
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ConfigError(f"{where}: {of}{model_type} with experts can't be converted: MoE layers")
    family = FAMILIES.get(model_type)
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
    return family
