"""Prints docs/families.md: what of a model can be converted, from the package's own tables.

python docs/families.py > docs/families.md
"""

from __future__ import annotations

from collections.abc import Iterator

from ptconvert.engines.sglang.families import SERVED as IN_SGLANG
from ptconvert.engines.vllm.families import LANGUAGE_MODELS, SEE_EACH_OTHER
from ptconvert.engines.vllm.families import SERVED as IN_VLLM
from ptconvert.models.families import FAMILIES, UNSUPPORTED, Family
from ptconvert.models.shape import DTYPES
from ptconvert.models.wrappers import WRAPPERS, Wrapper

HEAD = """\
# Families of models

`python docs/families.py > docs/families.md` writes this page from the tables that the conversion
itself goes by; a test compares them.

An ending is exact where the tracks together give what one device gives that runs the same schedule:
of `!` that is the source model, of `~k` the source model with later merges. After `.` and `^k` each
track goes on without the others' partials, so that the result depends on the number of tracks; with
one track it is the source model, but for output biases, which all tracks wait for.

Of a mixture of experts each track has an equal share of the neurons of every expert, and a copy of
the router, which it asks with what it reads itself: after `.` and `^k` tracks may choose other
experts than each other, and `eval --text` says how often they choose others than the source. A
checkpoint may hold experts apart or fused; the result is in the layout of its source. With
assignment by affinity each expert's neurons go to tracks by an order of their own, as many to each,
and so do those of shared experts; the router stays.
Output biases of experts (gpt-oss) are weighed by the router, so they are not common to all tracks:
the first track has them.

Where a model norms what a sublayer gives before it joins the stream (post-norm), the sum over
tracks is what is normed. So `!` and `~k` are exact there too, and an all-reduce that takes several
sublayers' partials carries each sublayer's by itself. After `.` and `^k` a track sees the norm of
its own partial, times a scale: 1/√n, or what `scale: fitted` finds on a text.

Attention and MLP of a layer are side by side in {parallel}: these models do one
all-reduce a layer as they are, and [presets](architectures.md#parallel-layers) mean stages `a|m`.

| `model_type` | transformers' class | exact | approximate | weights | fused, cut piece by piece | \
also has | in vLLM | in SGLang |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
AROUND = """
## With something around them

Of these vision-language models the language model is converted, if it is of a family above. What
lies around it comes along byte for byte, on every rank whole, and the result opens as transformers'
class for the whole, pictures and all. Texts alone are what `plan`, `heal` and `eval` go by, and
`estimate` leaves out the tower. In SGLang all of them are refused.

| `model_type` | transformers' class | language model, where it names none | comes along | in vLLM |
| --- | --- | --- | --- | --- |
"""
REFUSED = """
## Refused

Of models that bring their own code (`auto_map`) nothing is converted, and no other family is; of
quantised ones [these](quantised.md) are. These are refused by name:

| `model_type` | since |
| --- | --- |
"""


def row(family: Family) -> str:
    """One line of the table."""
    fused = [r.name.split(".")[-2] for r in family.layer if len(r.segments(r.axis)) > 1]
    has = [flag for flag in dict.fromkeys(r.when for r in family.layer) if flag]
    cells = (
        f"`{family.model_type}`",
        f"`{family.classes['AutoModelForCausalLM']}`" if family.causal_lm else "within others",
        "`!` `~k`",
        "`.` `^k`",
        ", ".join(DTYPES),
        ", ".join(f"`{name}`" for name in fused),
        ", ".join(f"`{name}`" for name in (*has, *filter(None, [family.multiplier]))),
        *("yes" if family.model_type in of else "refused" for of in (IN_VLLM, IN_SGLANG)),
    )
    return f"| {' | '.join(cells)} |"


def around(wrapper: Wrapper) -> str:
    """One line of the table of what lies around."""
    cells = (
        f"`{wrapper.model_type}`",
        f"`{wrapper.classes['AutoModelForImageTextToText']}`",
        f"`{wrapper.text}`",
        ", ".join(f"`{name}*`" for name in wrapper.around),
        in_vllm(wrapper.model_type),
    )
    return f"| {' | '.join(cells)} |"


def in_vllm(model_type: str) -> str:
    """Whether it is served with pictures."""
    if model_type in SEE_EACH_OTHER:
        return "yes, on CPUs [texts only](serving.md#pictures)"
    return "yes" if model_type in LANGUAGE_MODELS else "refused"


def page() -> str:
    """The whole page."""

    def lines() -> Iterator[str]:
        parallel = [f"`{family.model_type}`" for family in FAMILIES.values() if family.parallel]
        yield HEAD.rstrip("\n").format(parallel=" and ".join(parallel))
        yield from map(row, FAMILIES.values())
        yield AROUND.rstrip("\n")
        yield from map(around, WRAPPERS.values())
        yield REFUSED.rstrip("\n")
        yield from (f"| `{name}` | {reason} |" for name, reason in UNSUPPORTED.items())

    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    print(page(), end="")
