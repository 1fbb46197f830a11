"""The small files beside a model's weights: which of them go along with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ptconvert.checkpoint.section import ADAPTER_FOLDER
from ptconvert.errors import CheckpointError, ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
CHAT_TEMPLATES = "additional_chat_templates"
FOLDERS = CHAT_TEMPLATES, ADAPTER_FOLDER  # that a checkpoint's directory may have
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Tokenizer (of several versions, as Mistral's), generation config, chat template, licence.
_SMALL = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "LICENSE*", "NOTICE*"),
    f"{CHAT_TEMPLATES}/*.jinja",
    *(f"{ADAPTER_FOLDER}/{name}" for name in (ADAPTER, ADAPTER_WEIGHTS)),
)
# What describes weights that are not the result's: other copies of them, an adapter.
_OTHERS = ("params.json", "*.index.json", ADAPTER)
# As transformers finds the modules that must lie beside one that it runs.
_RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)


_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Raises CheckpointError where a file is what Git leaves in place of a large one."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError:
        return  # whoever reads it says so
    if start == _POINTER:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
        )


def refuse_dangling(file: Path) -> None:
    """Raises CheckpointError for a link to nothing, as of a download that was cut short."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file} is a link to a file that isn't there; download it again, or remove it"
        )


def adapter_alone(file: Path) -> str:
    """What there is to say of a directory whose adapter_config.json has no model beside it."""
    config = _json(file)
    found = config if isinstance(config, dict) else {}
    kind, base = found.get("peft_type") or "PEFT", found.get("base_model_name_or_path")
    what = f"{kind} of {base}" if base else f"{kind}"
    return (
        f"{file.parent} is an adapter ({what}), not a model; merge it and convert that: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained'
        "('SRC', dtype='auto').merge_and_unload().save_pretrained('OUT')\""
    )


def goes_along(name: str) -> bool:
    """Whether a file goes along with a model's weights, by its path in the model's directory."""
    small = any(name.count("/") == p.count("/") and fnmatchcase(name, p) for p in _SMALL)
    return small and not any(fnmatchcase(name, p) for p in _OTHERS)


def listed(path: Path) -> list[Path]:
    """What lies in a checkpoint's directory, and in the folders that it may have."""
    patterns = ("*", *(f"{folder}/*" for folder in FOLDERS))
    return [file for pattern in patterns for file in path.glob(pattern)]


def small_files(path: Path) -> tuple[Path, ...]:
    """The files of a directory that go along with its weights, the code among them. Raises
    CheckpointError."""
    found = {p for p in listed(path) if goes_along(p.relative_to(path).as_posix())}
    found |= {path / name for name in code_files(path)}
    for file in found:
        refuse_dangling(file)
    return tuple(sorted(p for p in found if p.is_file()))


def code_files(path: Path) -> set[str]:
    """The Python files that a directory's configs name for transformers to run, if it is trusted.

    These are the modules that an `auto_map` names, such as a tokenizer's, and what they import
    from beside them. Not all of them need be there.
    """
    found: set[str] = set()
    waiting = [m for file in path.glob("*config.json") for m in _modules(_json(file))]
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in found or "/" in name:
            continue
        found.add(name)
        if (path / name).is_file():
            text = (path / name).read_text(encoding="utf-8", errors="replace")
            waiting += [a or b for a, b in _RELATIVE_IMPORT.findall(text)]
    return found


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever needs what it says refuses it


def _modules(config: object) -> list[str]:
    """The modules that a config's auto_map entries name, less those of other repositories."""
    return [
        reference.rpartition(".")[0]
        for reference in _references(config)
        if "--" not in reference and "." in reference
    ]


def _references(config: object) -> Iterator[str]:
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "auto_map":
            for entry in value.values() if isinstance(value, dict) else [value]:
                entries = entry if isinstance(entry, list) else [entry]  # a tokenizer's, slow, fast
                yield from (e for e in entries if isinstance(e, str))
        else:
            yield from _references(value)  # what a conversion replaced, which --to-dense restores


def read_config(path: Path) -> dict[str, object]:
    """A config.json as a dict. `path` is the file or its directory. Raises ConfigError."""
    file = path / "config.json" if path.is_dir() else path
    refuse_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (file.parent / ADAPTER).is_file():
            raise ConfigError(adapter_alone(file.parent / ADAPTER)) from None
        raise ConfigError(f"{file} is missing; a checkpoint directory has a config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} can't be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must hold a JSON object, with model_type and the sizes")
    return config
