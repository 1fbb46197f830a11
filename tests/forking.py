"""Scripts in processes of their own, forked from one that has imported what takes longest.

An interpreter takes seconds to import torch and transformers, a test's script much less to run.
What a script finds is as in a new interpreter: an empty `__main__`, its arguments in `sys.argv`,
its own folder and output, and no modules but those asked for and what they import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

# Reads a script a line from its input, and writes the status of each, when it is done.
SERVER = """
import importlib, json, os, sys, traceback, types

def run(code, arguments, folder, outputs):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in enumerate(outputs, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    try:
        exec(compile(code, "<string>", "exec"), vars(main))
        return 0
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(bool(left.code))
    except BaseException:
        traceback.print_exc()
        return 1

told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what is printed by an import is no status
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    child = os.fork()
    if not child:
        status = run(**json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=told, flush=True)
"""


class Run(Protocol):
    """Runs a script with arguments in `folder`, where its output is left, too."""

    def __call__(
        self, code: str, *arguments: object, folder: Path
    ) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def forking(*modules: str, **env: str) -> Iterator[Run]:
    """What runs scripts in processes that have imported `modules`, with `env` set."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **env},
    )
    assert server.stdin is not None and server.stdout is not None
    asked, told = server.stdin, server.stdout

    def run(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
        outputs = folder / "stdout.txt", folder / "stderr.txt"
        given: dict[str, Any] = {"code": code, "arguments": [str(a) for a in arguments]}
        given |= {"folder": str(folder), "outputs": [str(file) for file in outputs]}
        print(json.dumps(given), file=asked, flush=True)
        status = told.readline()
        assert status, f"the process that imports {', '.join(modules)} has ended"
        out, err = (file.read_text() for file in outputs)
        return subprocess.CompletedProcess(given["arguments"], int(status), out, err)

    with server:
        try:
            yield run
        finally:
            asked.close()
