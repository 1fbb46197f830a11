"""The model families that can be converted, as data: their layers' tensors, and how these divide.

Adding a family is adding a row. A tensor is written as its axes, and what an axis counts says how
tracks share it: `(Q, D)` has a row for each channel of the query heads, and each track has those of
its own heads. Nothing else in the package names a family, one of its tensors or one of its norms.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from ptconvert.models.gemma4 import gemma4_config
from ptconvert.schedule.stages import Kind

MODEL_TYPE_PREFIX = "ptconvert_"  # of a converted model's type, before its family's
SCORE_CAP = "attn_logit_softcapping"  # in config.json, the soft cap of Gemma 2's attention


class Cut(enum.Enum):
    """What goes to one track or another. Which of an axis' indices a track owns says
    `ModelShape.spans`, and in an assignment's order `checkpoint.layout`."""

    HEADS = "query heads"
    KV_HEADS = "KV heads"
    LINEAR_HEADS = "linear attention's key heads, with their value heads"
    NEURONS = "FFN neurons"
    SHARED_NEURONS = "neurons of the experts that all tokens go to"


# By what is cut, what an assignment calls the order in which it goes to tracks.
ORDERS = MappingProxyType(
    {
        Cut.HEADS: "kv_heads",
        Cut.KV_HEADS: "kv_heads",
        Cut.LINEAR_HEADS: "kv_heads",
        Cut.NEURONS: "neurons",
        Cut.SHARED_NEURONS: "shared_neurons",
    }
)
NEURONS = (Cut.NEURONS, Cut.SHARED_NEURONS)


@dataclass(frozen=True)
class Axis:
    """What an axis of a tensor counts, by ModelShape's attributes: `count` units, or nothing that
    could be divided, of `unit` elements each."""

    count: str
    unit: str | None = None
    cut: Cut | None = None


D, V = Axis("width"), Axis("vocabulary")
HEAD_SIZE = Axis("head_size")
ONE = Axis("one")
Q = Axis("heads", "head_size", Cut.HEADS)
KV = Axis("kv_heads", "head_size", Cut.KV_HEADS)
HEAD, KV_HEAD = Axis("heads", None, Cut.HEADS), Axis("kv_heads", None, Cut.KV_HEADS)
GATED_Q = Axis("heads", "gated_head_size", Cut.HEADS)  # a query and its gate, head by head
LINEAR_K = Axis("linear_key_heads", "linear_key_size", Cut.LINEAR_HEADS)
LINEAR_V = Axis("linear_value_heads", "linear_value_size", Cut.LINEAR_HEADS)
LINEAR_HEAD = Axis("linear_value_heads", None, Cut.LINEAR_HEADS)
LINEAR_VALUE_SIZE, LINEAR_TAPS = Axis("linear_value_size"), Axis("linear_taps")
LINEAR_GROUP = Axis("linear_key_heads", "linear_group_size", Cut.LINEAR_HEADS)
LINEAR_GATES = Axis("linear_key_heads", "linear_gates", Cut.LINEAR_HEADS)
# Layers with full attention that have heads of their own beside those with a sliding window.
GLOBAL_Q = Axis("heads", "global_head_size", Cut.HEADS)
GLOBAL_KV = Axis("global_kv_heads", "global_head_size", Cut.KV_HEADS)
GLOBAL_HEAD_SIZE = Axis("global_head_size")
N = Axis("neurons", None, Cut.NEURONS)
PAIRED_N = Axis("neurons", "pair", Cut.NEURONS)  # gate and up channel, neuron by neuron
# Latent attention: queries, keys and values of all heads come out of two vectors of a few channels.
Q_LATENT, KV_LATENT = Axis("query_latent"), Axis("kv_latent")
KV_LATENT_ROPE = Axis("kv_latent_rope")
LATENT_Q = Axis("heads", "latent_query_size", Cut.HEADS)
LATENT_KV = Axis("heads", "latent_kv_size", Cut.HEADS)  # a key without its position, and a value
LATENT_V = Axis("heads", "latent_value_size", Cut.HEADS)
E = Axis("experts")
EXPERT_N = Axis("expert_neurons", None, Cut.NEURONS)  # of each
SHARED_N = Axis("shared_neurons", None, Cut.SHARED_NEURONS)
SHARED_N_IN_ALL = Axis("shared_experts_neurons", None, Cut.SHARED_NEURONS)  # of several as one
# What the counts that are divided are called in a config.json, and in the classes that read one.
COUNTS = MappingProxyType(
    {
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "linear_key_heads": "linear_num_key_heads",
        "linear_value_heads": "linear_num_value_heads",
        "neurons": "intermediate_size",
        "expert_neurons": "moe_intermediate_size",
        "shared_neurons": "shared_expert_intermediate_size",
    }
)


def share_of(count: int, track: int, tracks: int, together: int = 1) -> range:
    """Which of so many units a track owns, one after the other; where there are fewer than tracks,
    several tracks own the same one.

    Of units that are kept `together`, so many each, it owns whole groups: where tracks don't divide
    these, some tracks one more than others.
    """
    groups = count // together
    first = track * groups // tracks
    last = max((track + 1) * groups // tracks, min(first + 1, groups))  # of nothing, nothing
    return range(first * together, last * together)


# And what only some families have, and isn't divided.
SIZES = MappingProxyType(
    {
        "global_kv_heads": "num_global_key_value_heads",
        "global_head_size": "global_head_dim",
        "linear_key_size": "linear_key_head_dim",
        "linear_value_size": "linear_value_head_dim",
        "linear_taps": "linear_conv_kernel_dim",
        "query_latent": "q_lora_rank",
        "kv_latent": "kv_lora_rank",
        "rope_size": "qk_rope_head_dim",
        "nope_size": "qk_nope_head_dim",
        "latent_value_size": "v_head_dim",
        "experts": "num_experts",
        "active_experts": "num_experts_per_tok",
        "shared_experts": "n_shared_experts",
    }
)
# By one of these a config.json says that it is of a mixture, whatever the family.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# What a layer is, of what its family has: of its attention as config.json calls it, of its MLP.
FULL, LINEAR, SLIDING = "full_attention", "linear_attention", "sliding_attention"
DENSE, EXPERTS = "one MLP", "experts"
Layer = frozenset[str]  # such words


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a layer.

    `name` is relative to the layer. `axes` are what each axis counts, several after each
    other where projections are fused into one. `when` names the config.json flag that switches the
    tensor on, `unless` one that switches it off, `of` what layers are that have it, where not all
    do. A tensor without an axis that is cut is copied to every track; one that is `common` is no
    track's, but known to all: an output bias, which is added once, or the norm of what is merged.
    One that is `once` is added by its own module, so the first track has it and the others zeros.
    `apart` is how checkpoints may hold it: each expert ({}) by itself, and each of the fused
    projections; or just by another name. What is one `expert`'s by itself says whose.

    What a quantised weight is kept as (`models.quantised`) has the `kept` size, and one of its
    indices along the axis that is cut stands for `per` of the weight's. `told` is what it says of
    the weight that it is a part of, and so isn't cut but said anew of each part.
    """

    name: str
    axes: tuple[Axis | tuple[Axis, ...], ...]
    when: str | None = None
    common: bool = False
    once: bool = False
    of: str | None = None
    apart: tuple[str, ...] = ()
    unless: str | None = None
    expert: int | None = None
    kept: tuple[int, ...] | None = None
    per: int = 1
    told: str | None = None

    def stored(self, experts: int) -> Iterator[TensorRule]:
        """Its tensors where checkpoints hold it apart."""
        if not self.apart:
            yield self
        elif "{}" not in self.apart[0]:
            yield replace(self, name=self.apart[0], apart=())
        else:
            for expert in range(experts):
                for name, segment in zip(self.apart, self.segments(self.axis), strict=True):
                    axes = (*self.axes[1 : self.axis], segment, *self.axes[self.axis + 1 :])
                    own = replace(self, name=name.format(expert), axes=axes, apart=())
                    yield replace(own, expert=expert)

    def segments(self, axis: int) -> tuple[Axis, ...]:
        """What follows each other along an axis; a scalar has no axis."""
        found = self.axes[axis] if self.axes else ()
        return found if isinstance(found, tuple) else (found,)

    @cached_property
    def axis(self) -> int:
        """The axis that is cut, 0 where none is."""
        cut = (a for a in range(len(self.axes)) if any(s.cut for s in self.segments(a)))
        return next(cut, 0)

    @cached_property
    def is_cut(self) -> bool:
        """Whether each track has its own share, and no copy."""
        return any(segment.cut for segment in self.segments(self.axis))

    @property
    def is_of_experts(self) -> bool:
        """Whether each expert has its own share of it."""
        return self.is_cut and E in self.segments(0)

    @property
    def is_common_bias(self) -> bool:
        """Whether it is an output bias that all tracks know: of what they know, no norm."""
        return self.common and self.name.endswith(".bias")

    @property
    def is_routed(self) -> bool:
        """Whether a token passes it only of the experts that it goes to."""
        return (self.is_cut or self.once) and E in self.segments(0)


@dataclass(frozen=True)
class Block:
    """One of a layer's two sublayers: what the layer calls its module and the norm before it, if
    there is one, and what that module calls its output projection. With a norm `after` what it
    gives is normed before it joins the stream (post-norm).

    It takes the keywords that a model's forward gives its layers: under other names if they are
    `renamed`, `without` some.
    """

    name: str
    norm: str | None
    output: str
    after: str | None = None
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    without: tuple[str, ...] = ()

    @property
    def common_bias(self) -> str:
        """What the output projection's bias is called where tracks have it in common."""
        return common_name(f"{self.name}.{self.output}.bias")


@dataclass(frozen=True)
class Shared:
    """What a mixture's module calls its experts that all tokens go to, and the linear layer whose
    sigmoid their output is multiplied by, where there is one; its router, which gives weights and
    indices after its logits, and the experts that these choose."""

    experts: str
    weighed_by: str | None = None
    router: str = "gate"
    routed: str = "experts"


@dataclass(frozen=True)
class Family:
    """A model family: its transformers classes, its layers, and how its config.json is read.

    `prefix` is what the names of its classes in transformers begin with, and `base_model` how that
    of the class without lm_head ends, `decoder_layer` how that of its layers does; `ends` are
    attributes of the first of these that say how many layers there are. Without a `causal_lm` it
    has no class with one, and is only ever found inside of another model (`wrappers`). Tensors
    whose names begin with those of `around` aren't the model's, but come along.

    `defaults` are its config class's, where a key is missing; a None means that the class can't do
    without. A null of the `nullable` keys means that the other sizes say it, and the class takes no
    other null. What sublayers add to the stream is multiplied by the config's `multiplier`, where
    there is one; and the stream after a layer by that layer's buffer `scalar`. Where layers'
    attention is of two `kinds`, full first, config.json says which by `layer_types`, or by the key
    `full_every` of how many one is full, or it is one of so many, and the `last_full`; or by the
    key `full_until` of how many are at first; or they follow each other as a `cycle`; or `full_by`
    has the key of a list of which are and, without it, of how many one isn't. With none of these
    all layers are of the second kind. Those with SLIDING attention see the `sliding_window` of the
    last tokens, where config.json says one, and `use_sliding_window` where that is among
    the defaults. Linear attention is the block `linear`. Where one of the keys `experts` says how
    many there are, MLPs are mixtures of them, but where one of the keys `dense` says that a layer
    has one; `shared` says what these call experts that all tokens go to, if there are any. With
    `layer_more` checkpoints hold a layer after the last, which predicts further tokens; it comes
    along. With `parallel` attention and MLP of a layer are side by side: both read what enters it.
    `plain_norms` says that all norms between sublayers are RMSNorms that multiply by their weight:
    no LayerNorm, and not by one more than the weight.
    `own_keys` gives a config.json in the keys that are read here, where others say the same, by it
    and the layers with full attention, of those with two kinds. One in which a key of `refused`
    says anything but no is refused, for that reason.
    """

    model_type: str
    prefix: str
    layer: tuple[TensorRule, ...]
    defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    nullable: tuple[str, ...] = ()
    attention: Block = Block("self_attn", "input_layernorm", "o_proj")
    mlp: Block = Block("mlp", "post_attention_layernorm", "down_proj")
    linear: Block | None = None
    multiplier: str | None = None
    scalar: str | None = None
    kinds: tuple[str, str] = (FULL, LINEAR)
    full_every: str | int | None = None
    last_full: bool = False
    full_until: str | None = None
    cycle: tuple[str, ...] = ()
    full_by: tuple[str, str] | None = None
    own_keys: Callable[[Mapping[str, object], Sequence[int]], Mapping[str, object]] = (
        lambda config, _: config
    )
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    experts: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    shared: Shared | None = None
    base_model: str = "Model"
    decoder_layer: str = "DecoderLayer"
    ends: tuple[str, ...] = ()
    causal_lm: bool = True
    layer_more: bool = False
    parallel: bool = False
    final_norm: tuple[str, ...] = ("norm.weight",)
    plain_norms: bool = True
    around: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Family], tuple[str]]:
        return named, (self.model_type,)  # a model that is copied or pickled holds one

    @property
    def kinds_differ(self) -> bool:
        """Whether layers of its two kinds have tensors of their own."""
        return any(rule.of in self.kinds for rule in self.layer)

    @property
    def classes(self) -> Mapping[str, str]:
        """Its classes in transformers, by the Auto class that opens each."""
        base = self.prefix + self.base_model
        classes = {"AutoConfig": base.removesuffix("Model") + "Config", "AutoModel": base}
        if self.causal_lm:
            classes["AutoModelForCausalLM"] = f"{self.prefix}ForCausalLM"
        return classes

    def block(self, kind: Kind, layer: Layer = frozenset()) -> Block:
        """A sublayer's module, in a layer that is this.

        Code that runs in a layer's forward asks here, and no dict: torch 2.13's dynamo keeps no
        guard on an Enum that is looked up in one, and a layer compiled for its attention would run
        that where its MLP is asked for.
        """
        if kind is not Kind.ATTENTION:
            return self.mlp
        return self.linear if self.linear is not None and LINEAR in layer else self.attention

    def block_of(self, kind: Kind, layer: object) -> Block:
        """The same, of a layer that is there."""
        linear = self.linear is not None and hasattr(layer, self.linear.name)
        return self.block(kind, frozenset([LINEAR] if linear else []))

    def is_shared(self, rule: TensorRule) -> bool:
        """Whether a mixture's tensor is of the experts that all tokens go to."""
        if self.shared is None:
            return False
        names = filter(None, (self.shared.experts, self.shared.weighed_by))
        return rule.name.startswith(tuple(f"{self.mlp.name}.{name}." for name in names))

    def layer_rules(
        self, config: Mapping[str, object], layer: Layer = frozenset()
    ) -> tuple[TensorRule, ...]:
        """The tensors that a layer that is this has by a config."""
        known = {**self.defaults, **config}
        return tuple(
            rule
            for rule in self.layer
            if (rule.when is None or known.get(rule.when) is True)
            and (rule.unless is None or known.get(rule.unless) is not True)
            and (rule.of is None or rule.of in layer)
        )


def common_name(tensor: str) -> str:
    """What a tensor that is common to all tracks is called among those of its layer: a norm as it
    is, an output bias such as `mlp.down_proj.bias` without its block, `down_proj_bias`."""
    inside = tensor.split(".")[1:]
    return "_".join(inside) if len(inside) > 1 else tensor


def guesses_of(kind: Kind) -> str:
    """What a sublayer's guesses are called in a converted layer, whatever the family calls its
    block; a function, and no dict, as `Family.block` says."""
    if kind is Kind.SHARED:
        return "mlp_shared"
    if kind is Kind.ROUTED:
        return "mlp_routed"
    return "mlp" if kind is Kind.MLP else "self_attn"


def _norms(*names: str, bias: bool = False) -> tuple[TensorRule, ...]:
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(TensorRule(f"{name}.{part}", (D,)) for name in names for part in parts)


_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_NORMS = _norms(*_TWO_NORMS)
_O = (TensorRule("self_attn.o_proj.weight", (D, Q)),)
_ATTENTION = (
    TensorRule("self_attn.q_proj.weight", (Q, D)),
    TensorRule("self_attn.k_proj.weight", (KV, D)),
    TensorRule("self_attn.v_proj.weight", (KV, D)),
    *_O,
)
_UP_DOWN = (
    TensorRule("mlp.up_proj.weight", (N, D)),
    TensorRule("mlp.down_proj.weight", (D, N)),
)
_MLP = (TensorRule("mlp.gate_proj.weight", (N, D)), *_UP_DOWN)
_FUSED_MLP = (
    TensorRule("mlp.gate_up_proj.weight", ((N, N), D)),
    TensorRule("mlp.down_proj.weight", (D, N)),
)


def _norms_after(*names: str, when: str | None = None) -> tuple[TensorRule, ...]:
    """Norms of what joins the stream, which is the same for all tracks."""
    return tuple(TensorRule(f"{name}.weight", (D,), when, common=True) for name in names)


def _qk_norms(
    q: str = "q_norm", k: str = "k_norm", size: Axis = HEAD_SIZE
) -> tuple[TensorRule, ...]:
    return tuple(TensorRule(f"self_attn.{name}.weight", (size,)) for name in (q, k))


def _qkv_biases(when: str | None, q: Axis = Q, kv: Axis = KV) -> tuple[TensorRule, ...]:
    return (
        TensorRule("self_attn.q_proj.bias", (q,), when),
        TensorRule("self_attn.k_proj.bias", (kv,), when),
        TensorRule("self_attn.v_proj.bias", (kv,), when),
    )


def _o_bias(when: str) -> tuple[TensorRule, ...]:
    return (TensorRule("self_attn.o_proj.bias", (D,), when, common=True),)


def _up_down_biases(when: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule("mlp.up_proj.bias", (N,), when),
        TensorRule("mlp.down_proj.bias", (D,), when, common=True),
    )


def _mlp_biases(when: str) -> tuple[TensorRule, ...]:
    return (TensorRule("mlp.gate_proj.bias", (N,), when), *_up_down_biases(when))


# Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434): the latents' projections are
# copies, what comes out of them is each head's own
_LATENT_ATTENTION = (
    TensorRule("self_attn.q_a_proj.weight", (Q_LATENT, D)),
    TensorRule("self_attn.q_a_layernorm.weight", (Q_LATENT,)),
    TensorRule("self_attn.q_b_proj.weight", (LATENT_Q, Q_LATENT)),
    TensorRule("self_attn.kv_a_proj_with_mqa.weight", (KV_LATENT_ROPE, D)),
    TensorRule("self_attn.kv_a_layernorm.weight", (KV_LATENT,)),
    TensorRule("self_attn.kv_b_proj.weight", (LATENT_KV, KV_LATENT)),
    TensorRule("self_attn.o_proj.weight", (D, LATENT_V)),
    TensorRule("self_attn.q_a_proj.bias", (Q_LATENT,), "attention_bias"),
    TensorRule("self_attn.kv_a_proj_with_mqa.bias", (KV_LATENT_ROPE,), "attention_bias"),
    *_o_bias("attention_bias"),
)
_LLAMA = _NORMS + _ATTENTION + _MLP
_ATTENTION_BIASES = _qkv_biases("attention_bias") + _o_bias("attention_bias")
_LLAMA_BIASED = _LLAMA + _ATTENTION_BIASES + _mlp_biases("mlp_bias")
_UNGATED = _ATTENTION + _UP_DOWN + _ATTENTION_BIASES + _up_down_biases("mlp_bias")
_KV_HEADS = "num_key_value_heads"
_COHERE = _norms("input_layernorm") + _ATTENTION + _MLP + _ATTENTION_BIASES
_BEHIND_ONE_NORM = Block("mlp", "input_layernorm", "down_proj")
_BIASED_FINAL_NORM = ("norm.weight", "norm.bias")
_SIZES = (_KV_HEADS, "head_dim")
_WINDOWED = (FULL, SLIDING)
_SWITCHED_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, **_SWITCHED_WINDOW, "max_window_layers": 28}


def _in(kind: str, *rules: TensorRule) -> tuple[TensorRule, ...]:
    """Tensors of the layers of one kind."""
    return tuple(replace(rule, of=kind) for rule in rules)


_GROUPED = (
    TensorRule("linear_attn.in_proj_qkvz.weight", (LINEAR_GROUP, D)),
    TensorRule("linear_attn.in_proj_ba.weight", (LINEAR_GATES, D)),
)


def _linear_rules(*projections: TensorRule) -> tuple[TensorRule, ...]:
    """Gated DeltaNet (arXiv 2412.06464), by default with the projections that Qwen3.5 has."""
    qkv = (LINEAR_K, LINEAR_K, LINEAR_V)
    apart = (
        TensorRule("linear_attn.in_proj_qkv.weight", (qkv, D)),
        TensorRule("linear_attn.in_proj_z.weight", (LINEAR_V, D)),
        TensorRule("linear_attn.in_proj_b.weight", (LINEAR_HEAD, D)),
        TensorRule("linear_attn.in_proj_a.weight", (LINEAR_HEAD, D)),
    )
    return _in(
        LINEAR,
        TensorRule("linear_attn.dt_bias", (LINEAR_HEAD,)),
        TensorRule("linear_attn.A_log", (LINEAR_HEAD,)),
        TensorRule("linear_attn.conv1d.weight", (qkv, ONE, LINEAR_TAPS)),
        TensorRule("linear_attn.norm.weight", (LINEAR_VALUE_SIZE,)),
        TensorRule("linear_attn.out_proj.weight", (D, LINEAR_V)),
        *(projections or apart),
    )


def _experts(
    neurons: Axis, names: tuple[str, str, str], *others: TensorRule
) -> tuple[TensorRule, ...]:
    """A mixture of experts, each with so many neurons; `names` are what checkpoints call an
    expert's gate, up and down projection."""
    gate, up, down = names
    return _in(
        EXPERTS,
        TensorRule("mlp.experts.gate_up_proj", (E, (neurons, neurons), D), apart=(gate, up)),
        TensorRule("mlp.experts.down_proj", (E, D, neurons), apart=(down,)),
        *others,
    )


def _projections(of: str, neurons: Axis) -> tuple[TensorRule, ...]:
    """A gated MLP."""
    return (
        TensorRule(f"{of}.gate_proj.weight", (neurons, D)),
        TensorRule(f"{of}.up_proj.weight", (neurons, D)),
        TensorRule(f"{of}.down_proj.weight", (D, neurons)),
    )


_NAMES: tuple[str, str, str] = (
    "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.down_proj.weight",
)
_ROUTER = TensorRule("mlp.gate.weight", (E, D))
_QWEN_EXPERTS = _experts(EXPERT_N, _NAMES, _ROUTER)
_QWEN_SHARED = _in(
    EXPERTS,
    *_projections("mlp.shared_expert", SHARED_N),
    TensorRule("mlp.shared_expert_gate.weight", (ONE, D)),
)
_GLM_EXPERTS = _experts(
    EXPERT_N,
    _NAMES,
    _ROUTER,
    TensorRule("mlp.gate.e_score_correction_bias", (E,)),
    *_projections("mlp.shared_experts", SHARED_N_IN_ALL),
)
_SHARED_EXPERTS = Shared("shared_experts")
_SHARED_EXPERT = Shared("shared_expert", "shared_expert_gate")
_DENSE_BY_STEP = ("mlp_only_layers", "decoder_sparse_step")


# Gemma's four norms, and the blocks between them
_GEMMA_NORMS = _norms("input_layernorm", "pre_feedforward_layernorm") + _norms_after(
    "post_attention_layernorm", "post_feedforward_layernorm"
)
_GEMMA_ATTENTION = Block("self_attn", "input_layernorm", "o_proj", "post_attention_layernorm")
_GEMMA_MLP = Block("mlp", "pre_feedforward_layernorm", "down_proj", "post_feedforward_layernorm")


# Of full attention in Gemma 4; some models have keys for values there.
_GLOBAL_ATTENTION = _in(
    FULL,
    TensorRule("self_attn.q_proj.weight", (GLOBAL_Q, D)),
    TensorRule("self_attn.k_proj.weight", (GLOBAL_KV, D)),
    TensorRule("self_attn.v_proj.weight", (GLOBAL_KV, D), unless="attention_k_eq_v"),
    TensorRule("self_attn.o_proj.weight", (D, GLOBAL_Q)),
    *_qk_norms(size=GLOBAL_HEAD_SIZE),
    *_qkv_biases("attention_bias", GLOBAL_Q, GLOBAL_KV)[:2],
    TensorRule("self_attn.v_proj.bias", (GLOBAL_KV,), "attention_bias", unless="attention_k_eq_v"),
    *_o_bias("attention_bias"),
)


def _defaults(**values: object) -> Mapping[str, object]:
    return MappingProxyType(values)


_GATED_ATTENTION = _in(
    FULL,
    TensorRule("self_attn.q_proj.weight", (GATED_Q, D)),
    *_ATTENTION[1:],
    *_qk_norms(),
    TensorRule("self_attn.q_proj.bias", (GATED_Q,), "attention_bias"),
    *_ATTENTION_BIASES[1:],
)
_LINEAR_BLOCK = Block(
    "linear_attn",
    "input_layernorm",
    "out_proj",
    renamed=MappingProxyType({"past_key_values": "cache_params"}),
    without=("position_embeddings", "position_ids"),
)
_HYBRID_DEFAULTS = _defaults(
    num_key_value_heads=4,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    full_attention_interval=4,
)
_MIXED_DEFAULTS = {
    **_HYBRID_DEFAULTS,
    **{"num_key_value_heads": 2, "moe_intermediate_size": 512},
    "shared_expert_intermediate_size": 512,
}


_GEMMA_DEFAULTS = _defaults(
    num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096
)
_GEMMA4_DEFAULTS = _defaults(
    **{**_GEMMA_DEFAULTS, "sliding_window": 1024},
    num_global_key_value_heads=4,
    global_head_dim=256,
)
_SHARED_KEYS = MappingProxyType({"num_kv_shared_layers": "its layers share keys and values"})
_GEMMA4 = Family(
    "gemma4_text",
    "Gemma4",
    (
        *_GEMMA_NORMS,
        *_in(SLIDING, *_ATTENTION, *_qk_norms(), *_ATTENTION_BIASES),
        *_GLOBAL_ATTENTION,
        *_MLP,
        TensorRule("layer_scalar", (ONE,), common=True),
    ),
    _defaults(**{**_GEMMA4_DEFAULTS, "sliding_window": 512}, hidden_size_per_layer_input=256),
    attention=_GEMMA_ATTENTION,
    mlp=_GEMMA_MLP,
    scalar="layer_scalar",
    kinds=_WINDOWED,
    full_every=6,
    last_full=True,
    base_model="TextModel",
    decoder_layer="TextDecoderLayer",
    ends=("first_kv_shared_layer_idx",),
    own_keys=gemma4_config,
    refused=MappingProxyType(
        {
            **_SHARED_KEYS,
            "hidden_size_per_layer_input": "its layers have inputs of their own",
            "enable_moe_block": "its layers have experts beside an MLP",
        }
    ),
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        f.model_type: f
        for f in (
            Family("llama", "Llama", _LLAMA_BIASED, nullable=_SIZES),
            Family(
                "mistral",
                "Mistral",
                _LLAMA,
                _defaults(num_key_value_heads=8, sliding_window=4096),
                nullable=("head_dim",),
                kinds=_WINDOWED,
            ),
            Family(
                "qwen2",
                "Qwen2",
                _LLAMA + _qkv_biases(None),
                _defaults(**_QWEN_DEFAULTS),
                nullable=(_KV_HEADS,),
                kinds=_WINDOWED,
                full_until="max_window_layers",
            ),
            Family(
                "qwen3",
                "Qwen3",
                _LLAMA + _qk_norms() + _ATTENTION_BIASES,
                _defaults(**_QWEN_DEFAULTS, head_dim=128),
                nullable=(_KV_HEADS,),
                kinds=_WINDOWED,
                full_until="max_window_layers",
            ),
            Family(
                "qwen3_vl_text",
                "Qwen3VLText",
                _LLAMA + _qk_norms() + _ATTENTION_BIASES,
                _defaults(num_key_value_heads=32, head_dim=128),
                nullable=(_KV_HEADS,),
                causal_lm=False,
            ),
            Family(
                "phi3",
                "Phi3",
                (
                    *_NORMS,
                    TensorRule("self_attn.qkv_proj.weight", ((Q, KV, KV), D)),
                    *_O,
                    *_FUSED_MLP,
                ),
                nullable=(_KV_HEADS,),
                kinds=_WINDOWED,
            ),
            Family(
                "granite",
                "Granite",
                _LLAMA_BIASED,
                nullable=(_KV_HEADS,),
                multiplier="residual_multiplier",
            ),
            Family(
                "seed_oss",
                "SeedOss",
                _LLAMA
                + _qkv_biases("attention_bias")
                + _o_bias("attention_out_bias")
                + _mlp_biases("mlp_bias"),
                _defaults(num_key_value_heads=8, head_dim=128, attention_bias=True),
                nullable=_SIZES,
            ),
            Family(
                "ministral3",
                "Ministral3",
                _LLAMA,
                _defaults(num_key_value_heads=8, head_dim=128),
                kinds=_WINDOWED,
            ),
            Family(
                "ernie4_5",
                "Ernie4_5",
                _LLAMA + _qkv_biases("use_bias") + _o_bias("use_bias") + _mlp_biases("use_bias"),
                _defaults(num_key_value_heads=2, head_dim=128, tie_word_embeddings=True),
                nullable=_SIZES,
            ),
            Family(
                "smollm3",
                "SmolLM3",
                _LLAMA_BIASED,
                _defaults(
                    num_key_value_heads=4,
                    tie_word_embeddings=True,
                    use_sliding_window=False,
                    no_rope_layer_interval=4,
                ),
                nullable=(_KV_HEADS,),
                kinds=_WINDOWED,
                full_by=("no_rope_layers", "no_rope_layer_interval"),
            ),
            Family(
                "glm",
                "Glm",
                _NORMS + _ATTENTION + _FUSED_MLP + _qkv_biases("attention_bias"),
                _defaults(num_key_value_heads=2, head_dim=128, attention_bias=True),
            ),
            Family(
                "apertus",
                "Apertus",
                (
                    *_norms("attention_layernorm", "feedforward_layernorm"),
                    *_ATTENTION,
                    *_UP_DOWN,
                    *_qk_norms(),
                    *_ATTENTION_BIASES,
                    TensorRule("mlp.act_fn.alpha_p", (ONE,)),
                    TensorRule("mlp.act_fn.alpha_n", (ONE,)),
                    TensorRule("mlp.act_fn.beta", ()),
                    TensorRule("mlp.act_fn.eps", ()),
                ),
                nullable=(_KV_HEADS,),
                attention=Block("self_attn", "attention_layernorm", "o_proj"),
                mlp=Block("mlp", "feedforward_layernorm", "down_proj"),
            ),
            Family(
                "nemotron",
                "Nemotron",
                _norms(*_TWO_NORMS, bias=True) + _UNGATED,
                defaults=_defaults(num_key_value_heads=None),
                nullable=("head_dim",),
                final_norm=_BIASED_FINAL_NORM,
                plain_norms=False,
            ),
            Family(
                "hunyuan_v1_dense",
                "HunYuanDenseV1",
                _LLAMA + _qk_norms("query_layernorm", "key_layernorm") + _ATTENTION_BIASES,
                defaults=_defaults(head_dim=None),
                nullable=(_KV_HEADS,),
            ),
            Family(
                "starcoder2",
                "Starcoder2",
                (
                    *_norms(*_TWO_NORMS, bias=True),
                    *_ATTENTION,
                    TensorRule("mlp.c_fc.weight", (N, D)),
                    TensorRule("mlp.c_proj.weight", (D, N)),
                    *_qkv_biases("use_bias"),
                    *_o_bias("use_bias"),
                    TensorRule("mlp.c_fc.bias", (N,), "use_bias"),
                    TensorRule("mlp.c_proj.bias", (D,), "use_bias", common=True),
                ),
                _defaults(num_key_value_heads=2, use_bias=True, tie_word_embeddings=True),
                nullable=("head_dim",),
                mlp=Block("mlp", "post_attention_layernorm", "c_proj"),
                final_norm=_BIASED_FINAL_NORM,
                kinds=_WINDOWED,
                plain_norms=False,
            ),
            Family(
                "arcee",
                "Arcee",
                _NORMS + _UNGATED,
                nullable=_SIZES,
            ),
            Family(
                "cwm",
                "Cwm",
                _LLAMA,
                _defaults(num_key_value_heads=8, head_dim=128, sliding_window=8192),
                kinds=_WINDOWED,
                cycle=(FULL, SLIDING, SLIDING, SLIDING),
            ),
            Family(
                "gemma",
                "Gemma",
                _LLAMA + _ATTENTION_BIASES,
                _defaults(num_key_value_heads=16, head_dim=256, tie_word_embeddings=True),
                plain_norms=False,
            ),
            Family(
                "jais2",
                "Jais2",
                _norms(*_TWO_NORMS, bias=True) + _UNGATED,
                _defaults(attention_bias=True, mlp_bias=True),
                nullable=_SIZES,
                final_norm=_BIASED_FINAL_NORM,
                plain_norms=False,
            ),
            Family(
                "gemma2",
                "Gemma2",
                _GEMMA_NORMS + _ATTENTION + _MLP + _ATTENTION_BIASES,
                _GEMMA_DEFAULTS,
                attention=_GEMMA_ATTENTION,
                mlp=_GEMMA_MLP,
                kinds=_WINDOWED,
                full_every=2,
                plain_norms=False,
            ),
            Family(
                "gemma3_text",
                "Gemma3",
                _GEMMA_NORMS + _ATTENTION + _qk_norms() + _MLP + _ATTENTION_BIASES,
                _defaults(**_GEMMA_DEFAULTS, sliding_window_pattern=6),
                attention=_GEMMA_ATTENTION,
                mlp=_GEMMA_MLP,
                base_model="TextModel",
                kinds=_WINDOWED,
                full_every="sliding_window_pattern",
                plain_norms=False,
            ),
            _GEMMA4,
            replace(
                _GEMMA4,
                model_type="gemma4_unified_text",
                prefix="Gemma4Unified",
                defaults=_GEMMA4_DEFAULTS,
                refused=_SHARED_KEYS,
            ),
            Family(
                "glm4",
                "Glm4",
                (
                    *_NORMS,
                    *_norms_after("post_self_attn_layernorm", "post_mlp_layernorm"),
                    *_ATTENTION,
                    *_FUSED_MLP,
                    *_qkv_biases("attention_bias"),
                ),
                _defaults(num_key_value_heads=2, head_dim=128, attention_bias=True),
                attention=Block(
                    "self_attn", "input_layernorm", "o_proj", "post_self_attn_layernorm"
                ),
                mlp=Block("mlp", "post_attention_layernorm", "down_proj", "post_mlp_layernorm"),
            ),
            Family(
                "exaone4",
                "Exaone4",
                (
                    *_norms_after("post_attention_layernorm", "post_feedforward_layernorm"),
                    *_ATTENTION,
                    *_qk_norms(),
                    *_MLP,
                ),
                _defaults(num_key_value_heads=32, sliding_window=4096, sliding_window_pattern=4),
                attention=Block("self_attn", None, "o_proj", "post_attention_layernorm"),
                mlp=Block("mlp", None, "down_proj", "post_feedforward_layernorm"),
                kinds=_WINDOWED,
                full_every="sliding_window_pattern",
            ),
            Family(
                "hyperclovax",
                "HyperCLOVAX",
                _LLAMA_BIASED + _norms_after("post_norm1", "post_norm2", when="use_post_norm"),
                _defaults(use_post_norm=True),
                nullable=_SIZES,
                attention=Block("self_attn", "input_layernorm", "o_proj", "post_norm1"),
                mlp=Block("mlp", "post_attention_layernorm", "down_proj", "post_norm2"),
                multiplier="residual_multiplier",
            ),
            Family(
                "cohere",
                "Cohere",
                (
                    *_COHERE,
                    TensorRule("self_attn.q_norm.weight", (HEAD, HEAD_SIZE), "use_qk_norm"),
                    TensorRule("self_attn.k_norm.weight", (KV_HEAD, HEAD_SIZE), "use_qk_norm"),
                ),
                _defaults(tie_word_embeddings=True),
                nullable=(_KV_HEADS,),
                mlp=_BEHIND_ONE_NORM,
                parallel=True,
                plain_norms=False,
            ),
            Family(
                "cohere2",
                "Cohere2",
                _COHERE,
                _defaults(tie_word_embeddings=True, sliding_window=4096, sliding_window_pattern=4),
                nullable=(_KV_HEADS,),
                mlp=_BEHIND_ONE_NORM,
                parallel=True,
                kinds=_WINDOWED,
                full_every="sliding_window_pattern",
                plain_norms=False,
            ),
            Family(
                "qwen3_5_text",
                "Qwen3_5",
                (*_NORMS, *_GATED_ATTENTION, *_linear_rules(), *_MLP),
                _HYBRID_DEFAULTS,
                linear=_LINEAR_BLOCK,
                full_every="full_attention_interval",
                base_model="TextModel",
                around=("mtp.",),
                plain_norms=False,
            ),
            Family(
                "qwen3_moe",
                "Qwen3Moe",
                (
                    *_NORMS,
                    *_ATTENTION,
                    *_qk_norms(),
                    *_ATTENTION_BIASES,
                    *_in(DENSE, *_MLP),
                    *_QWEN_EXPERTS,
                ),
                _defaults(
                    **_SWITCHED_WINDOW,
                    num_key_value_heads=4,
                    moe_intermediate_size=768,
                    num_experts=128,
                    num_experts_per_tok=8,
                ),
                experts=("num_experts", "num_local_experts"),
                dense=_DENSE_BY_STEP,
                kinds=_WINDOWED,
            ),
            Family(
                "mixtral",
                "Mixtral",
                (
                    *_NORMS,
                    *_ATTENTION,
                    *_experts(
                        N,
                        (
                            "block_sparse_moe.experts.{}.w1.weight",
                            "block_sparse_moe.experts.{}.w3.weight",
                            "block_sparse_moe.experts.{}.w2.weight",
                        ),
                        replace(_ROUTER, apart=("block_sparse_moe.gate.weight",)),
                    ),
                ),
                _defaults(num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2),
                nullable=("head_dim",),
                experts=("num_local_experts", "num_experts"),
                kinds=_WINDOWED,
            ),
            Family(
                "glm4_moe",
                "Glm4Moe",
                (
                    *_NORMS,
                    *_ATTENTION,
                    *(replace(rule, when="use_qk_norm") for rule in _qk_norms()),
                    *_qkv_biases("attention_bias"),
                    *_in(DENSE, *_MLP),
                    *_GLM_EXPERTS,
                ),
                _defaults(
                    num_key_value_heads=8,
                    moe_intermediate_size=1408,
                    n_routed_experts=128,
                    n_shared_experts=1,
                    num_experts_per_tok=8,
                    first_k_dense_replace=1,
                ),
                experts=("n_routed_experts", "num_local_experts"),
                dense=("first_k_dense_replace",),
                shared=_SHARED_EXPERTS,
                layer_more=True,
            ),
            Family(
                "deepseek_v3",
                "DeepseekV3",
                (
                    *_NORMS,
                    *_LATENT_ATTENTION,
                    *_in(DENSE, *_MLP),
                    *_GLM_EXPERTS,
                ),
                _defaults(
                    q_lora_rank=1536,
                    kv_lora_rank=512,
                    qk_rope_head_dim=64,
                    qk_nope_head_dim=128,
                    v_head_dim=128,
                    moe_intermediate_size=2048,
                    n_routed_experts=256,
                    n_shared_experts=1,
                    num_experts_per_tok=8,
                    first_k_dense_replace=3,
                ),
                nullable=("head_dim",),
                experts=("n_routed_experts", "num_local_experts"),
                dense=("first_k_dense_replace",),
                shared=_SHARED_EXPERTS,
                layer_more=True,
                refused=MappingProxyType(
                    {"gated_attention": "what its heads give goes through a gate (Instella-MoE)"}
                ),
            ),
            Family(
                "gpt_oss",
                "GptOss",
                (
                    *_NORMS,
                    *_ATTENTION,
                    TensorRule("self_attn.sinks", (HEAD,)),
                    *_ATTENTION_BIASES,
                    *_in(
                        EXPERTS,
                        TensorRule("mlp.experts.gate_up_proj", (E, D, PAIRED_N)),
                        TensorRule("mlp.experts.gate_up_proj_bias", (E, PAIRED_N)),
                        TensorRule("mlp.experts.down_proj", (E, N, D)),
                        TensorRule("mlp.experts.down_proj_bias", (E, D), once=True),
                        TensorRule("mlp.router.weight", (E, D)),
                        TensorRule("mlp.router.bias", (E,)),
                    ),
                ),
                _defaults(
                    sliding_window=128,
                    num_key_value_heads=8,
                    head_dim=64,
                    attention_bias=True,
                    num_local_experts=128,
                    num_experts_per_tok=4,
                ),
                experts=("num_local_experts", "num_experts"),
                kinds=_WINDOWED,
                full_every=2,
            ),
            Family(
                "qwen3_next",
                "Qwen3Next",
                (
                    *_NORMS,
                    *_GATED_ATTENTION,
                    *_linear_rules(*_GROUPED),
                    *_in(DENSE, *_MLP),
                    *_QWEN_EXPERTS,
                    *_QWEN_SHARED,
                ),
                _defaults(**_MIXED_DEFAULTS, num_experts=512, num_experts_per_tok=10),
                linear=_LINEAR_BLOCK,
                full_every="full_attention_interval",
                experts=("num_experts",),
                shared=_SHARED_EXPERT,
                dense=_DENSE_BY_STEP,
                around=("mtp.",),
                plain_norms=False,
            ),
            Family(
                "qwen3_5_moe_text",
                "Qwen3_5Moe",
                (*_NORMS, *_GATED_ATTENTION, *_linear_rules(), *_QWEN_EXPERTS, *_QWEN_SHARED),
                _defaults(**_MIXED_DEFAULTS, num_experts=256, num_experts_per_tok=8),
                linear=_LINEAR_BLOCK,
                full_every="full_attention_interval",
                experts=("num_experts",),
                shared=_SHARED_EXPERT,
                base_model="TextModel",
                around=("mtp.",),
                plain_norms=False,
            ),
        )
    }
)


def own_name(of_transformers: str) -> str:
    """What the class is called that is made of one of transformers'."""
    return f"PTConvert{of_transformers}"


def named(model_type: str) -> Family:
    """The family of this name."""
    return FAMILIES[model_type]


def sees_later(config: Mapping[str, object]) -> list[str]:
    """What a language model's config.json says, if anything, by which a text's tokens attend to
    later ones, too, as `key value`."""
    given = ((key, config.get(key, causal[0]), causal) for key, causal in _CAUSAL.items())
    return [f"{key} {value}" for key, value, causal in given if value not in causal]


def parallel_layers(config: Mapping[str, object]) -> bool:
    """Whether the layers of a language model, dense or converted, are parallel, by its config."""
    family = FAMILIES.get(str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX))
    return family is not None and family.parallel


# The values with which tokens see earlier ones only (but of a picture, each other), by key; the
# first where there is no key.
_CAUSAL = {"use_bidirectional_attention": (None, False, "vision"), "is_causal": (True,)}
_MOE = "its mixture of experts is none that is known here"
_LATENT = "its attention goes through latents (MLA) that differ from those of deepseek_v3"
_HYBRID = "it has layers other than attention and MLP"
_ALL_HEADS = (
    "it norms the queries and keys of all heads together, which tracks that have a few of them "
    "each can't do"
)

_HYPER = (
    "its residual stream is several, mixed anew at each sublayer (hyper-connections), so what "
    "joins it is no sum over tracks"
)
_PER_LAYER = "its layers have inputs of their own, and share keys and values"
_LANES = (
    "its lanes are never merged: the head takes the mean of what the last norm gives each, and the "
    "last layers' parts reach no other lane; `use: laneformer` runs other models so"
)

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "olmo2": _ALL_HEADS,
        "olmo3": _ALL_HEADS,
        "olmoe": _ALL_HEADS,
        "minimax_m2": _ALL_HEADS,
        "qwen2_moe": _MOE,
        "deepseek_v2": _LATENT,
        "llama4": _MOE,
        "llama4_text": _MOE,
        **dict.fromkeys(("deepseek_v4", "hy_v4"), _HYPER),
        **dict.fromkeys(("glm5_next", "glm5_next_text"), _HYPER),
        **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _HYPER),
        **dict.fromkeys(("gemma3n", "gemma3n_text"), _PER_LAYER),
        **dict.fromkeys(("laneformer", "laneformer_tp"), _LANES),
        "jamba": _HYBRID,
        "mamba": _HYBRID,
        "mamba2": _HYBRID,
    }
)

# Buffers that old checkpoints stored; they hold no weights and every loader ignores them.
CARRIED_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
