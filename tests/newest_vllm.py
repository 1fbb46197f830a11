"""Whether the newest vLLM still has what the plugin takes: python tests/newest_vllm.py [WHEEL].

Reads vLLM's source and installs nothing: a release for CUDA can't be imported without its GPUs.
Each name that `ptconvert/engines/vllm` imports must be there, what is called by such a name must
take the arguments that it is given, and what is read of an imported module must be in it. Of its
models with pictures, which have a converted one inside: that they make their language model by the
name that is said, and ask it for nothing that the converted one hasn't. Of its all-reduces: that
those which `verify` counts by name are still called so, and that there are no others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ptconvert"
ENGINE, WRAPPERS = PACKAGE / "engines" / "vllm", PACKAGE / "models" / "wrappers.py"
COUNTERS = PACKAGE / "runtime" / "counters.py"
MODELS = "vllm.model_executor.models"
NOT_TAKEN = ("compute_logits_local",)  # sampling by shares of the vocabulary
# Operations with an all-reduce that are part of another, which is counted, and AMD's.
NOT_COUNTED = re.compile("all_reduce_symmetric_with_copy|rocm_.*")
Found = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """A package's source, by the names of its modules."""

    root: Path

    def file(self, module: str) -> Path | None:
        """Where a module lies; None where there is none."""
        path = self.root.joinpath(*module.split("."))
        files = path.with_suffix(".py"), path / "__init__.py"
        return next((file for file in files if file.is_file()), None)

    def bound(self, module: str) -> dict[str, ast.AST]:
        """What a module's top level binds; what it imports all of by a star included."""
        found = bound(self.file(module))
        for origin in [self.origin(module, n) for n in found.values() if is_star(n)]:
            names = [name for name in self.bound(origin) if not name.startswith("_")]
            found = {n: ast.ImportFrom(origin, [ast.alias(n)], 0) for n in names} | found
        return found

    def origin(self, module: str, node: ast.AST) -> str:
        """The module that one imports from."""
        assert isinstance(node, ast.ImportFrom)
        if not node.level:
            return node.module or ""
        package, inside = module.split("."), self.file(module)
        drop = node.level - (inside is not None and inside.name == "__init__.py")
        return ".".join([*package[: len(package) - drop], *filter(None, [node.module])])

    def has(self, module: str, name: str) -> bool:
        """Whether a module binds a name, or has a submodule of it."""
        return name in self.bound(module) or self.file(f"{module}.{name}") is not None

    def definition(self, module: str, name: str) -> tuple[str, Found] | None:
        """The function or class that a name of a module means, and its module; None where it is
        something else."""
        node = self.bound(module).get(name)
        if isinstance(node, Found):
            return module, node
        if isinstance(node, ast.ImportFrom):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.definition(self.origin(module, node), original)
        return None

    def takes(self, module: str, node: Found) -> ast.arguments | None:
        """The arguments of a function, or of a class's constructor; None where it isn't known."""
        if not isinstance(node, ast.ClassDef):
            return node.args
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                own = ast.arguments(**{f: getattr(item.args, f) for f in item.args._fields})
                drop = 1 if own.args or own.posonlyargs else 0
                own.args = own.args[drop:]
                return own
        for base in node.bases:
            if isinstance(base, ast.Name) and (found := self.definition(module, base.id)):
                return self.takes(*found)
        return None


@cache
def bound(file: Path | None) -> dict[str, ast.AST]:
    """What a module's top level binds, `if` and `try` included."""
    if file is None:
        return {}
    found: dict[str, ast.AST] = {}
    waiting: list[ast.stmt] = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, Found):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [(a.asname or a.name).partition(".")[0] for a in node.names]
            found |= {f"*{len(found)}" if n == "*" else n: node for n in names}
        elif isinstance(node, ast.Assign):
            parts = (n for target in node.targets for n in ast.walk(target))
            found |= {n.id: node for n in parts if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.If | ast.Try):
            handlers = [s for h in getattr(node, "handlers", []) for s in h.body]
            waiting += [*node.body, *node.orelse, *handlers]
    return found


def members(node: Found) -> frozenset[str]:
    """What a class binds; nothing where others that it is derived from may bind more."""
    if not isinstance(node, ast.ClassDef) or node.bases:
        return frozenset()
    named = {item.name for item in node.body if isinstance(item, Found)}
    targets = (t for item in node.body if isinstance(item, ast.Assign) for t in item.targets)
    fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
    return frozenset(named | {t.id for t in (*targets, *fields) if isinstance(t, ast.Name)})


def is_star(node: ast.AST) -> bool:
    """Whether it imports all of a module."""
    return isinstance(node, ast.ImportFrom) and node.names[0].name == "*"


def departures(plugin: Path, package: str, source: Source) -> Iterator[str]:
    """What of a package's source isn't as a plugin's files take it, each in a line."""
    for file in sorted(plugin.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
                module = str(node.module)
                for alias in node.names:
                    imported[alias.asname or alias.name] = module, alias.name
                    if not source.has(module, alias.name):
                        yield f"{file.name}:{node.lineno}: {module} has no {alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found = source.definition(*imported.get(node.func.id, ("", "")))
                taken = found and source.takes(*found)
                if taken and (fault := misfit(node, taken)):
                    yield f"{file.name}:{node.lineno}: {node.func.id} {fault}"
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = imported.get(node.value.id, ("", ""))
                whole = f"{module}.{name}"
                if module and source.file(whole) and not source.has(whole, node.attr):
                    yield f"{file.name}:{node.lineno}: {whole} has no {node.attr}"
                found = source.definition(module, name)
                if found and (own := members(found[1])) and node.attr not in own:
                    yield f"{file.name}:{node.lineno}: {whole} has no {node.attr}"


def misfit(call: ast.Call, taken: ast.arguments) -> str | None:
    """Why arguments don't fit, as far as they are written out."""
    places = [a.arg for a in (*taken.posonlyargs, *taken.args)]
    keywords = {*(a.arg for a in taken.args), *(a.arg for a in taken.kwonlyargs)}
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    given = {k.arg for k in call.keywords if k.arg is not None}
    if unknown := sorted(given - keywords) if taken.kwarg is None else []:
        return f"takes no {', '.join(unknown)}"
    if len(call.args) > len(places) and taken.vararg is None:
        return f"takes {len(places)} arguments by place, not {len(call.args)}"
    if starred or any(k.arg is None for k in call.keywords):
        return None
    needed = places[len(call.args) : len(places) - len(taken.defaults)]
    pairs = zip(taken.kwonlyargs, taken.kw_defaults, strict=True)
    needed += [a.arg for a, default in pairs if default is None]
    missing = [name for name in needed if name not in given]
    return f"wants {', '.join(missing)}" if missing else None


def strangers(plugin: Path, wrappers: Path, source: Source) -> Iterator[str]:
    """What of vLLM's models with pictures isn't as the plugin takes it, each in a line."""
    makers, names = language_models(plugin / "families.py"), classes(wrappers)
    registered = dict(tuples(source.file(f"{MODELS}.registry")))
    converted = definition_in(plugin / "model.py", "PTConvertForCausalLM")
    forward = method(definition_in(plugin / "model.py", "PTConvertModel"), "forward")
    asked = texts(plugin / "wrappers.py", ("_COUNTS", "_ASKED_FOR"))
    known = {*own_names(converted), *asked, *NOT_TAKEN}
    taken = {a.arg for a in forward.args.args}
    for model_type, maker in makers.items():
        name = f"{names[model_type]}ForConditionalGeneration"
        place, name = map(str, registered.get(name, (name, name))[:2])
        module = f"{MODELS}.{place}"
        found = source.definition(module, name)
        if found is None:
            yield f"{module} has no {name}"
            continue
        if not source.has(found[0], maker):
            yield f"{found[0]} has no {maker}, by which {name} made its language model"
        for node in ast.walk(found[1]):
            if not (isinstance(node, ast.Attribute) and is_language_model(node.value)):
                continue
            if node.attr not in known:
                yield f"{found[0]}:{node.lineno}: {name} asks its language model for {node.attr}"
        for call in (n for n in ast.walk(found[1]) if isinstance(n, ast.Call)):
            given = {k.arg for k in call.keywords if k.arg is not None}
            called = call.func
            if not isinstance(called, ast.Attribute) or called.attr != "model":
                continue
            if is_language_model(called.value) and (more := sorted(given - taken)):
                yield f"{found[0]}:{call.lineno}: {name} gives its layers {', '.join(more)}"


def uncounted(counters: Path, source: Source) -> Iterator[str]:
    """What of the operations that all-reduce isn't as the counters have them, each in a line."""
    names = texts(counters, ["_VLLM_ALL_REDUCES"])
    counted = {name.removeprefix("vllm::") for name in names if name.startswith("vllm::")}
    files = sorted((source.root / "vllm").rglob("*.py"))
    registered = {
        name: file
        for file in files
        for name in re.findall(r'op_name="(\w*all_?reduce\w*)"', file.read_text(encoding="utf-8"))
    }
    for name in sorted(counted - registered.keys()):
        yield f"counters.py: vLLM has no operation vllm::{name}"
    for name in sorted(registered.keys() - counted):
        if not NOT_COUNTED.fullmatch(name):
            yield f"counters.py: vllm::{name} isn't counted ({registered[name].name})"


def is_language_model(node: ast.AST) -> bool:
    """Whether it is `self.language_model`."""
    if not isinstance(node, ast.Attribute) or node.attr != "language_model":
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def language_models(file: Path) -> dict[str, str]:
    """LANGUAGE_MODELS, by what is written."""
    top, found = bound(file), dict[str, str]()
    (written,) = (n for n in ast.walk(top["LANGUAGE_MODELS"]) if isinstance(n, ast.Dict))
    for key, value in zip(written.keys, written.values, strict=True):
        named = top[value.id] if isinstance(value, ast.Name) else None
        assert isinstance(key, ast.Constant)
        found[str(key.value)] = ast.literal_eval(
            named.value if isinstance(named, ast.Assign) else value
        )
    return found


def classes(file: Path) -> dict[str, str]:
    """How wrappers' classes begin, by model_type: the first two of what each Wrapper is given."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call))
    made = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Wrapper")
    return {ast.literal_eval(c.args[0]): ast.literal_eval(c.args[1]) for c in made}


def tuples(file: Path | None) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The entries of all mappings of a file that have tuples."""
    tree = ast.parse("" if file is None else file.read_text(encoding="utf-8"))
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Dict)):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                yield str(key.value), ast.literal_eval(value)


def definition_in(file: Path, name: str) -> ast.ClassDef:
    """A class of a file of ours."""
    found = bound(file)[name]
    assert isinstance(found, ast.ClassDef)
    return found


def method(node: ast.ClassDef, name: str) -> ast.FunctionDef:
    """A method of a class of ours."""
    return next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name)


def own_names(node: ast.ClassDef) -> Iterator[str]:
    """A class's methods, and what its constructor gives it."""
    yield from (item.name for item in node.body if isinstance(item, ast.FunctionDef))
    for part in ast.walk(method(node, "__init__")):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            yield part.attr


def texts(file: Path, names: Sequence[str]) -> Iterator[str]:
    """All texts in what a file binds to some names."""
    for node in (n for name in names for n in ast.walk(bound(file)[name])):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def newest(folder: Path) -> Path:
    """The newest wheel of vLLM on the package index."""
    command = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "vllm"]
    subprocess.run([sys.executable, *command, "-d", str(folder)], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = Path(sys.argv[1]) if len(sys.argv) > 1 else newest(folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.endswith(".py")])
        source = Source(folder)
        found = [*departures(ENGINE, "vllm", source), *strangers(ENGINE, WRAPPERS, source)]
        found += uncounted(COUNTERS, source)
    print(f"{wheel.name}: {'; '.join(found) or 'all that the plugin takes is there'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
