"""Options that several commands have: each is defined here, once, so that a name has one type, one
help and one meaning everywhere. docs/options.md lists them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ptconvert.spec.terms import VOCABULARIES

F = TypeVar("F", bound=Callable[..., Any])

_COUNT = click.IntRange(1, 2**20)
_TOKENS = click.IntRange(1, 2**24)
SEQUENCES = 65_536


class Number(click.FloatRange):
    """A finite number within a range."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} isn't a finite number", param, ctx)
        return number


class File(click.Path):
    """A file or directory, as a Path; an empty text is none, and not the directory one is in."""

    def __init__(self, **wanted: Any) -> None:
        super().__init__(path_type=Path, **wanted)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(named(value, param, ctx), param, ctx)


class Source(click.ParamType):  # type: ignore[type-arg]
    """What names a model or a spec: a path, a hub id or a known name."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(named(value, param, ctx))


def named(value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
    """A path, unless it is empty. Raises BadParameter."""
    if not str(value).strip():
        raise click.BadParameter("it is empty; name a path", ctx, param)
    return value


class BatchSize(click.ParamType):  # type: ignore[type-arg]
    """`auto` (None) or a number of sequences."""

    name = "auto|N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or value == "auto":
            return None
        if str(value).isdecimal() and 0 < int(value) <= SEQUENCES:
            return int(value)
        return self.fail(f"{value!r} is neither auto nor a number of sequences", param, ctx)


_SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "SRC",
        "type": Source(),
        "help": "The model: a directory, a config.json, a hub id or a name of `estimate --list`.",
    },
    "--revision": {"help": "Branch, tag or commit of the source model, where it is a hub id."},
    "--text": {
        "name": "texts",
        "multiple": True,
        "metavar": "FILE",
        "type": File(exists=True, dir_okay=False),
        "help": "Plain text such as the model is for; may be given again.",
    },
    "--window": {"type": click.IntRange(2), "help": "Tokens in a window of the text."},
    "--windows": {"type": click.IntRange(1), "help": "Windows, evenly over the text."},
    "--limit": {
        "type": Number(min=0, min_open=True),
        "help": "Documents per task; below 1, the share of them.",
    },
    "--batch-size": {"type": BatchSize(), "help": "Windows or documents at once."},
    "--device": {"metavar": "NAME", "help": "Where it runs, as torch names it."},
    "--dtype": {
        "type": click.Choice(["auto", "float32", "bfloat16", "float16"]),
        "help": "What to compute in.",
    },
    "--seed": {"type": click.IntRange(0, 2**32 - 1), "help": "Of all that is drawn at random."},
    "--hardware": {"metavar": "NAME|FILE", "help": "A row of `estimate --list`, or a file."},
    "--engine": {"metavar": "NAME|FILE", "help": "What serves it, as `estimate --list` has it."},
    "--vocabulary": {
        "type": click.Choice(VOCABULARIES),
        "help": "Whether a conversion's ranks share lm_head, or each has it all.",
    },
    "--ranks": {"type": _COUNT, "help": "Ranks that share the model."},
    "--batch": {"type": _COUNT, "default": 1, "help": "Requests at once."},
    "--prompt": {"type": _TOKENS, "metavar": "TOKENS", "help": "Length of each prompt."},
    "--new": {"type": _TOKENS, "metavar": "TOKENS", "help": "Tokens generated for each."},
    "--speculate": {
        "type": click.IntRange(1, 64),
        "metavar": "K",
        "help": "Speculative decoding: tokens drafted for each decode step.",
    },
    "--draft": {
        "metavar": "ngram|layer|MODEL",
        "default": "ngram",
        "help": "What drafts: the text so far, one more layer (MTP, EAGLE), or in eval a smaller "
        "model.",
    },
    "--cache": {
        "type": File(file_okay=False),
        "help": "Where answers and measurements are kept.",
    },
    "--dry-run": {
        "is_flag": True,
        "help": "Check everything, print what it will take, and write nothing.",
    },
    "--overwrite": {
        "is_flag": True,
        "help": "Replace DST if it is a checkpoint, and has no files of other kinds.",
    },
    "--html": {
        "name": "html_file",
        "metavar": "FILE",
        "type": File(dir_okay=False),
        "help": "Also write a report as one self-contained page.",
    },
    "--json": {"name": "as_json", "is_flag": True, "help": "Print all figures as JSON instead."},
}


def shared(
    flag: str,
    default: Any = None,
    says: str | None = None,
    required: bool = False,
    takes: click.ParamType | None = None,  # type: ignore[type-arg]
) -> Callable[[F], F]:
    """The option of that name. A command chooses only whether it must be given, its default, what
    to say of that in words, and that it `takes` no more than some of the values."""
    attributes = dict(_SHARED[flag], required=required)
    if takes is not None:
        attributes.update(type=takes, metavar=None)
    names = (flag, attributes.pop("name", flag.strip("-").replace("-", "_")))
    if default is not None:
        attributes["default"] = default
    if "default" in attributes and says is None:
        attributes["show_default"] = True
    if says is not None:
        attributes["help"] += f" [{says}]"
    return click.option(*names, **attributes)


class Renamed(click.Command):
    """A command that takes options by the names that they had, too, and says the new ones."""

    def __init__(self, *arguments: Any, renamed: dict[str, str], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.renamed = renamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for place, argument in enumerate(args):
            old, *value = argument.split("=", 1)
            if old in self.renamed:
                click.echo(f"{old} is now {self.renamed[old]}", err=True)
                args[place] = "=".join([self.renamed[old], *value])
        return super().parse_args(ctx, args)
