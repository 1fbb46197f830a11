"""The literal reference: DESIGN's equations over an explicit track axis, on the dense model.

It shares no code with the executor, the schedule or the transform: it reads the schedule's text on
its own, runs transformers' own dense layers, and splits a sublayer's output into tracks by zeroing
the heads or neurons of all other tracks before the output projection. Nothing is cached; decoding
is a forward pass over the whole prefix. Shape suffixes: T track, B batch, S sequence, D width.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

# For each sublayer and track: A and B (R, D), V (D, R), b (D).
Guesses = dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]]


@dataclass
class Written:
    """What a sublayer wrote: each track's partial, and what each sees of its own before the merge,
    both TBSD, and the output bias (BSD). `after` norms the sum with the bias, where the model has
    such a norm."""

    partial: torch.Tensor
    seen: torch.Tensor
    common: torch.Tensor
    after: Any
    factor: torch.Tensor | float = 1.0  # of what follows

    def joins(self, weight: float) -> torch.Tensor:
        """What joins the stream (BSD)."""
        total_BSD = weight * self.partial.sum(0) + self.common
        joined_BSD: torch.Tensor = total_BSD if self.after is None else self.after(total_BSD)
        return joined_BSD * self.factor


@dataclass
class Flight:
    """An all-reduce in flight; `left` counts the stages still to run before its merge.

    `total` is BSD, `seen` (own parts and guesses) is TBSD.
    """

    left: int
    total: torch.Tensor
    seen: torch.Tensor


@torch.no_grad()
def layer_inputs(
    model: Any, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[dict[str, Any]], list[torch.Tensor]]:
    """The embedded tokens (BSD), the keywords that each layer of the dense model is given, and what
    is added to the stream between each layer and the next, such as what is seen in a picture."""
    caught: list[tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = []
    left: list[torch.Tensor] = []

    def catch(_: Any, args: tuple[torch.Tensor, ...], given: dict[str, Any]) -> None:
        caught.append((args, given))

    layers = model.get_decoder().layers
    hooks = [la.register_forward_pre_hook(catch, with_kwargs=True) for la in layers]
    hooks += [la.register_forward_hook(lambda _, __, out: left.append(out)) for la in layers]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    entered = [args[0] for args, _ in caught]
    between = [b - a for a, b in zip(left[:-1], entered[1:], strict=True)]
    return entered[0], [given for _, given in caught], between


@torch.no_grad()
def ended(model: Any, base_BSD: torch.Tensor) -> torch.Tensor:
    """The dense model's logits, had its last layer given this stream."""
    hook = model.get_decoder().layers[-1].register_forward_hook(lambda *_: base_BSD)
    ids_BS = torch.zeros(base_BSD.shape[:2], dtype=torch.long)
    logits: torch.Tensor = model(input_ids=ids_BS, use_cache=False).logits
    hook.remove()
    return logits


def norm_after(layer: Any, name: str) -> Any:
    """What the output of a dense sublayer goes through before it joins the stream, or None."""
    names: tuple[str, ...] = ("post_self_attn_layernorm", "post_norm1")
    if name != "a":
        names = ("post_mlp_layernorm", "post_norm2", "post_feedforward_layernorm")
    elif hasattr(layer, "post_feedforward_layernorm"):
        names = ("post_attention_layernorm",)
    found = [getattr(layer, one) for one in names if hasattr(layer, one)]
    if not found or isinstance(found[0], torch.nn.Identity):
        return None
    return lambda x_BSD: getattr(layer, "residual_multiplier", 1.0) * found[0](x_BSD)


def parts(layer: Any, name: str) -> tuple[Any, Any, Any]:
    """The norm, the block and the output projection of a dense sublayer."""
    if hasattr(layer, "post_feedforward_layernorm") and not hasattr(layer, "input_layernorm"):
        norm = torch.nn.Identity()
        if name == "a":
            return norm, layer.self_attn, layer.self_attn.o_proj
        return norm, layer.mlp, layer.mlp.down_proj
    if name == "a":
        norm = getattr(layer, "attention_layernorm", None) or layer.input_layernorm
        if hasattr(layer, "linear_attn"):
            return norm, layer.linear_attn, layer.linear_attn.out_proj
        return norm, layer.self_attn, layer.self_attn.o_proj
    before = (
        *("feedforward_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm"),
        "input_layernorm",  # where attention and MLP are side by side
    )
    norm = next(getattr(layer, one) for one in before if hasattr(layer, one))
    names = [name for name in ("c_proj", "down_proj") if hasattr(layer.mlp, name)]
    return norm, layer.mlp, getattr(layer.mlp, names[0]) if names else None  # a mixture has several


def output_inputs(layer: Any, name: str, x_BSD: torch.Tensor, extra: dict[str, Any]) -> Any:
    """What reaches the output projection of a dense sublayer, and that projection."""
    norm, block, projection = parts(layer, name)
    caught = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    if hasattr(block, "conv1d"):
        block(norm(x_BSD), None, extra["attention_mask"])
    elif name == "a":
        block(hidden_states=norm(x_BSD), **extra)
    else:
        block(norm(x_BSD))
    hook.remove()
    return caught[0], projection


def sublayer_partials(
    model: Any, sublayer: str, x_TBSD: torch.Tensor, extra: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each track's partial, and the common term, of a sublayer such as a3."""
    layer = model.get_decoder().layers[int(sublayer[1:])]
    if sublayer[0] != "a" and hasattr(layer.mlp, "experts"):
        return mixture_partials(layer, x_TBSD, sublayer[0])
    partials = []
    tracks = len(x_TBSD)
    for t in range(tracks):
        hidden, projection = output_inputs(layer, sublayer[0], x_TBSD[t], extra)
        own = torch.zeros_like(hidden)
        share = hidden.shape[-1] // tracks
        own[..., t * share : (t + 1) * share] = hidden[..., t * share : (t + 1) * share]
        partials.append(linear(own, projection.weight))
    bias = projection.bias
    common = torch.zeros_like(partials[0]) if bias is None else bias.expand_as(partials[0])
    scale = 1.0
    if norm_after(layer, sublayer[0]) is None:
        scale = getattr(layer, "residual_multiplier", 1.0)  # Granite's
    return scale * torch.stack(partials), scale * common


def mixture_partials(
    layer: Any, x_TBSD: torch.Tensor, which: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a mixture of experts, `m`: what it gives with the weights of all other tracks'
    neurons of every expert, shared ones too, taken as zero; and of its two parts, `s`, the shared
    experts, and `r`, the others, with those of the other part. Each track routes by what it reads
    itself. What it adds to each expert's output is of the first track alone."""
    partials, tracks = [], len(x_TBSD)
    for t in range(tracks):
        own = copy.deepcopy(layer.mlp)
        for name, weight in own.named_parameters():
            if "down_proj" in name and which == ("r" if "shared" in name else "s"):
                weight *= 0
            elif name.endswith("down_proj_bias"):
                weight *= t == 0
            elif "down_proj" in name:  # neurons are its last axis, or GPT-OSS's last but one
                in_columns = weight.mT if own.experts.is_transposed else weight
                share = in_columns.shape[-1] // tracks
                in_columns[..., : t * share] = 0
                in_columns[..., (t + 1) * share :] = 0
        out = own(layer.post_attention_layernorm(x_TBSD[t]))
        partials.append(out[0] if isinstance(out, tuple) else out)
    return torch.stack(partials), torch.zeros_like(partials[0])


def written(
    model: Any,
    sublayer: str,
    x_TBSD: torch.Tensor,
    extra: dict[str, Any],
    common_weight: float,
    own_scale: float | None,
) -> Written:
    """What a sublayer writes. Of its own part of what is normed a track sees the norm, times the
    scale, which is 1 over the root of their number if it isn't given."""
    partial_TBSD, common_BSD = sublayer_partials(model, sublayer, x_TBSD, extra)
    after = norm_after(model.get_decoder().layers[int(sublayer[1:])], sublayer[0])
    seen_TBSD = partial_TBSD
    if after is not None:
        scale = len(x_TBSD) ** -0.5 if own_scale is None else own_scale
        seen_TBSD = scale * torch.stack([after(partial) for partial in partial_TBSD])
    return Written(partial_TBSD, seen_TBSD, common_weight * common_BSD, after)


def guessed(
    model: Any, sublayer: str, x_TBSD: torch.Tensor, partial_TBSD: torch.Tensor, guesses: Guesses
) -> torch.Tensor:
    """What each track takes the others' partials of a sublayer to be, (T, B, S, D): V (A x + B p)
    + b of its normed input x and what it sees of its own partial, p, by four tensors for each
    track."""
    layer = model.get_decoder().layers[int(sublayer[1:])]
    norm, _, _ = parts(layer, sublayer[0])
    found = []
    for t, (a_RD, b_RD, v_DR, bias_D) in enumerate(guesses[sublayer]):
        inner = norm(x_TBSD[t]) @ a_RD.T + partial_TBSD[t] @ b_RD.T
        found.append(inner @ v_DR.T + bias_D)
    return torch.stack(found)


@torch.no_grad()
def reference_logits(
    model: Any,
    schedule: str,
    tracks: int,
    ids_BS: torch.Tensor,
    keep_BS: torch.Tensor | None = None,
    deferred: str = "sum",
    common_weight: float = 1.0,
    guesses: Guesses | None = None,
    inputs: dict[str, torch.Tensor] | None = None,
    own_scales: dict[str, float] | None = None,
) -> torch.Tensor:
    """Logits (B, S, vocabulary) of a dense eager-attention model under a schedule's text.

    `keep_BS` is 0 for padding; `inputs` are those of a model that is given more than tokens.
    `common_weight` is 1; negative controls count biases otherwise. `guesses` are by sublayer, such
    as a3, as are `own_scales` of those whose sums are normed.
    """
    keep_BS = torch.ones_like(ids_BS) if keep_BS is None else keep_BS
    positions = (keep_BS.cumsum(-1) - 1).clamp(min=0)
    tokens = {"input_ids": ids_BS, "attention_mask": keep_BS, "position_ids": positions}
    base_BSD, extras, between = layer_inputs(model, inputs or tokens)
    done: list[str] = []
    whole = 0  # layers of which both sublayers were run, and all before
    waited: list[Written] = []
    nothing_TBSD = torch.zeros(tracks, *base_BSD.shape)
    waited_guess_TBSD = nothing_TBSD
    flights: list[Flight] = []
    for word in schedule.split():
        match = re.fullmatch(r"([amsr0-9|]+)([!.~^])(\d*)", word)
        assert match is not None
        names, ending, lag = match[1].split("|"), match[2], int(match[3] or 0)
        x_TBSD = base_BSD + nothing_TBSD + sum(w.seen for w in waited)
        x_TBSD = x_TBSD + waited_guess_TBSD + sum(f.seen for f in flights)
        own = []
        for name in names:
            extra = extras[int(name[1:])]
            scale = (own_scales or {}).get(name)
            own.append(written(model, name, x_TBSD, extra, common_weight, scale))
            if guesses is not None and name in guesses:
                guess_TBSD = guessed(model, name, x_TBSD, own[-1].seen, guesses)
                waited_guess_TBSD = waited_guess_TBSD + guess_TBSD
        for flight in flights:
            flight.left -= 1
        if ending == ".":
            waited += own
        else:
            weight = 1 / tracks if deferred == "mean" else 1.0
            total_BSD, seen_TBSD = torch.zeros_like(base_BSD), nothing_TBSD
            for one, counts in [(w, weight) for w in waited] + [(w, 1.0) for w in own]:
                total_BSD = total_BSD + one.joins(counts)
                if ending == "^":
                    seen_TBSD = seen_TBSD + one.seen
            if ending == "^":
                seen_TBSD = seen_TBSD + waited_guess_TBSD
            waited_guess_TBSD = nothing_TBSD
            flights.append(Flight(lag, total_BSD, seen_TBSD))
            waited = []
        for flight in [f for f in flights if f.left == 0]:
            base_BSD = base_BSD + flight.total
        flights = [f for f in flights if f.left > 0]
        done += [name for name in names if name[0] != "s"]  # of two parts the routed one counts
        for layer in sorted({int(name[1:]) for name in names}):
            factor = getattr(model.get_decoder().layers[layer], "layer_scalar", None)
            if factor is None or not {f"a{layer}", f"m{layer}"} <= {*done}:
                continue
            base_BSD, waited_guess_TBSD = factor * base_BSD, factor * waited_guess_TBSD
            for one in waited:
                one.factor, one.seen = factor * one.factor, factor * one.seen
            for flight in flights:
                flight.total, flight.seen = factor * flight.total, factor * flight.seen
        while between and len([name for name in done if int(name[1:]) <= whole]) == 2 * whole + 2:
            base_BSD = base_BSD + between.pop(0)
            whole += 1
    for flight in flights:
        base_BSD = base_BSD + flight.total
    return ended(model, base_BSD)
