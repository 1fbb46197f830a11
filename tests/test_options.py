"""One vocabulary: a name is the same option in every command, and docs/options.md has them all."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ptconvert.cli import main
from ptconvert.cli.options import Renamed, shared
from ptconvert.cli.verify import verify as verify_command

PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")


def options() -> dict[str, dict[str, click.Option]]:
    """The options that the help shows, by their names, then by command."""
    found: dict[str, dict[str, click.Option]] = defaultdict(dict)
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                found[parameter.opts[-1]][name] = parameter
    return found


def meaning(option: click.Option) -> dict[str, Any]:
    """All of an option that isn't the command's own choice: whether it is required, its default,
    what the help says of it, and which of the values it takes."""
    about = option.to_info_dict()
    for own in ("default", "required", "type"):
        about.pop(own)
    return {**about, "help": re.sub(r" \[.*\]$", "", option.help or "")}


def widest(flag: str) -> click.Option:
    """The option with all of its values."""

    @click.command()
    @shared(flag)
    def command() -> None: ...

    option = command.params[0]
    assert isinstance(option, click.Option)
    return option


SHARED = {flag: found for flag, found in options().items() if len(found) > 1}


def test_options_are_shared() -> None:
    assert len(SHARED) > 15 and {"--text", "--windows", "--json", "--dtype"} <= SHARED.keys()


@pytest.mark.parametrize("flag", SHARED)
def test_a_name_is_one_option_in_every_command(flag: str) -> None:
    meanings = [meaning(option) for option in SHARED[flag].values()]
    assert all(one == meanings[0] for one in meanings), meanings
    assert meanings[0]["help"]
    most = widest(flag)
    for option in SHARED[flag].values():
        if option.type.to_info_dict() != most.type.to_info_dict():
            values = option.type.choices if isinstance(option.type, click.Choice) else ["1", "8"]
            for value in values:  # some of those of the others, and the same
                assert option.type(value) == most.type(value)
        else:
            assert option.metavar == most.metavar


def test_what_the_help_says_of_a_default_is_the_default() -> None:
    for flag, found in SHARED.items():
        for command, option in found.items():
            said = re.search(r" \[(.*)\]$", option.help or "")
            has_one = not option.is_flag and isinstance(option.default, (int, str))
            assert has_one <= (bool(option.show_default) or said is not None), (flag, command)
            if said and option.default == "auto":
                assert said[1].startswith("auto: "), (flag, command)


def test_the_page_lists_the_shared_options_and_their_commands() -> None:
    lines = [re.split(r" *(?<!\\)\| *", line) for line in PAGE.splitlines() if "| `--" in line]
    rows = [(line[1].strip("`").split()[0], line[3]) for line in lines]
    listed = {flag: set(commands.split(", ")) for flag, commands in rows}
    assert listed == {flag: set(found) for flag, found in SHARED.items()}


@click.command(cls=Renamed, renamed={"--old": "--new"})
@click.option("--new", type=int)
def renamed(new: int) -> None:
    click.echo(new)


@pytest.mark.parametrize("arguments", [["--old", "3"], ["--old=3"]])
def test_an_old_name_works_and_says_the_new_one(arguments: list[str]) -> None:
    done = CliRunner().invoke(renamed, arguments)
    assert (done.stdout, done.stderr) == ("3\n", "--old is now --new\n")


@pytest.mark.parametrize(
    ("arguments", "parsed", "said"),
    [
        (["CKPT", "--json"], (None, True), ""),
        (["--json", "CKPT"], (None, True), ""),
        (["--json", "--batch", "2", "CKPT"], (None, True), ""),
        (["CKPT", "--json", "r.json"], ("r.json", False), "--json r.json is now --report r.json\n"),
        (["--json", "r.json", "CKPT"], ("r.json", False), "--json r.json is now --report r.json\n"),
        (["--json=r.json", "CKPT"], ("r.json", False), "--json r.json is now --report r.json\n"),
        (["CKPT", "--json", "-"], (None, True), "--json - is now --json\n"),
        (["CKPT", "--json", "--report", "r.json"], ("r.json", True), ""),
        (
            ["CKPT", "--prompt-tokens", "4", "--json", "r.json"],
            ("r.json", False),
            "--prompt-tokens is now --prompt\n--json r.json is now --report r.json\n",
        ),
    ],
)
def test_json_is_a_flag_in_verify_too(
    arguments: list[str],
    parsed: tuple[str | None, bool],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = verify_command.make_context("verify", [*arguments, "--ranks", "2"]).params
    file = values["report_file"]
    assert (file and str(file), values["as_json"]) == parsed
    assert values["checkpoint"] == "CKPT" and capsys.readouterr().err == said


def test_a_checkpoint_and_a_file_too_many_is_still_an_error() -> None:
    done = CliRunner().invoke(main, ["verify", "a", "b", "c", "--json", "--ranks", "2"])
    assert done.exit_code == 2 and "unexpected extra argument" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["heal", "a", "b", "--teacher", "c", "--dtype", "float16"],
            "'--dtype': 'float16' is not one of 'auto', 'float32', 'bfloat16'",
        ),
        (
            ["heal", "a", "b", "--teacher", "c", "--batch-size", "auto"],
            "'--batch-size': 'auto' is not a valid integer range",
        ),
        (
            ["verify", "a", "--ranks", "2", "--device", "cuda:1"],
            "'--device': 'cuda:1' is not one of 'cpu', 'cuda'",
        ),
        (["verify", "a", "--ranks", "2", "--new", "1"], "--new: at least 2"),
    ],
)
def test_values_that_a_command_lacks_are_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("command", "refused"),
    [("heal", ["|float16", "auto|N"]), ("verify", ["--device NAME"])],
)
def test_help_offers_what_the_command_takes(command: str, refused: list[str]) -> None:
    shown = CliRunner().invoke(main, [command, "--help"]).stdout
    assert not [value for value in refused if value in shown]
