"""What the commands share: errors as one line, sizes, output."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from ptconvert.checkpoint.files import read_config
from ptconvert.errors import EvaluationError, PTConvertError
from ptconvert.measure.needs import Needs, shares_memory
from ptconvert.models.shape import ModelShape
from ptconvert.plan.frontier import SUFFIX as FRONTIER

SPECS = ".yaml", ".yml", FRONTIER  # how specs and frontiers end, and hub ids don't
_SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Commands(click.Group):
    """A group whose commands end with one line and exit code 2 where the user's input is wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # diagrams, where the locale can't draw
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # so that it cleans up, as Ctrl-C does
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            return ctx.exit(130)
        except BrokenPipeError:
            raise
        except PTConvertError as error:
            lines = str(error).splitlines()
        except OSError as error:
            lines = [f"{error.filename}: {error.strerror}" if error.filename else str(error)]
        for line in lines:
            click.echo(f"error: {line}", err=True)
        return ctx.exit(2)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class ByteSize(click.ParamType):  # type: ignore[type-arg]
    """A size such as 5GB, 500MB or 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]I?B)?", str(value).strip().upper())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size such as 5GB, 500MB or 4GiB", param, ctx)
        return int(match[1]) * _SIZES[match[2] or ""]


def model_config(model: str, revision: str | None) -> tuple[Mapping[str, Any], ModelShape]:
    """A model's config.json, and its shape."""
    from ptconvert.checkpoint.source import locate

    path = locate(model, revision, config_only=True)
    config = read_config(path)
    return config, ModelShape.from_config(config, str(path))


def spec_or_checkpoint(argument: str, revision: str | None) -> Path:
    """The spec file, frontier or converted checkpoint that an argument names; of a hub id the
    directory of its config.json. Raises CheckpointError, as for a revision of what is here."""
    from ptconvert.checkpoint.source import check_revision, is_hub_id, locate

    if not is_hub_id(argument) or Path(argument).suffix in SPECS:
        check_revision(revision, argument)
        return Path(argument)
    return locate(argument, revision, config_only=True)


def given(*names: str) -> str:
    """Those of the command's options, by their parameters' names, that its line has."""
    context = click.get_current_context()
    return ", ".join(
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    )


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path]) -> None:
    """Raises UsageError where files can't be written, by their options, or where one would replace
    an input or another, before anything is computed for them."""
    known = {path.resolve(): "is read, too" for path in inputs}
    for option, file in outputs.items():
        if file is None:
            continue
        folder = file.resolve().parent
        there = folder.is_dir() and not file.is_dir()
        if not there or not os.access(file if file.exists() else folder, os.W_OK):
            raise click.UsageError(
                f"{option} {file}: it must be a writable file in a directory that exists"
            )
        if (why := known.get(file.resolve())) is not None:
            raise click.UsageError(f"{option} {file}: it {why}; name another file")
        known[file.resolve()] = f"is {option}, too"


def print_figures(figures: dict[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    if as_json:
        click.echo(to_json(figures))
    else:
        show(Console(highlight=False, markup=False))


def to_json(figures: Any) -> str:
    """As JSON, which has neither NaN nor infinities: what isn't finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(figures), indent=2, allow_nan=False)


def print_needs(needs: Needs, room: Mapping[str, int], as_json: bool) -> None:
    """What a command will take, beside the bytes that there were free by place before."""
    from ptconvert.report.terminal import needs_table

    def show(console: Console) -> None:
        needs_table(console, needs, room)
        console.print("Nothing was written (--dry-run).", style="dim")

    print_figures(needs.as_json(room), as_json, show)


def free_room(device: str, folder: Path) -> dict[str, int]:
    """The bytes that are free by place, as `Needs` names them: on the device, in memory, and on the
    disk of a folder that may not be there yet."""
    from ptconvert.runtime.memory import free_memory

    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    room = {device: free_memory(device), "disk": shutil.disk_usage(there).free}
    return room if shares_memory(device) else {**room, "memory": free_memory("cpu")}


@contextmanager
def timing(device: str) -> Iterator[None]:
    """Raises EvaluationError where not even one layer of the model fits."""
    import torch

    from ptconvert.measure.batch import enough_memory

    what = f"--dry-run: not even a layer and a window or two fit on {device}, to time them"
    try:
        with enough_memory(what):
            yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def need_packages(extra: str, *packages: str) -> None:
    """Raises EvaluationError where a command's packages, which come with an extra, aren't here."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EvaluationError(
            f"{extra} needs {', '.join(missing)}, not installed here: "
            f"pip install 'ptconvert[{extra}]'"
        )


def torch_device(name: str | None) -> str:
    """The device asked for, or the best there is. Raises EvaluationError where it isn't there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = (str(error).splitlines() or [""])[0]
        raise EvaluationError(f"--device {name}: torch can't use it: {what}") from error
    return name
