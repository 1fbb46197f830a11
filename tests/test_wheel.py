"""The wheel: built from the checkout, it installs and runs outside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from conftest import MakeDense, spec_text

ROOT = Path(__file__).parents[1]


def test_wheel_installs_and_runs_elsewhere(make_dense: MakeDense, tmp_path: Path) -> None:
    tree, not_of_it = tmp_path / "tree", shutil.ignore_patterns(".*", "*.egg-info", "real", "demo")
    shutil.copytree(ROOT, tree, ignore=not_of_it)  # as building writes into it
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, tree]
    done = subprocess.run([*map(str, build)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ptconvert/py.typed" in names and not any(n.startswith("tests") for n in names)
    configs = (ROOT / "specs" / "configs").glob("*.json")
    assert {f"ptconvert/models/configs/{path.name}" for path in configs} < set(names)
    templates = (ROOT / "ptconvert" / "report" / "templates").iterdir()
    assert {f"ptconvert/report/templates/{file.name}" for file in templates} <= {*names}
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run([*map(str, install)], check=True, capture_output=True)
    (tmp_path / "spec.yaml").write_text(spec_text(4, "use: parallel_track, depth: 2"))
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        f"import ptconvert; assert ptconvert.__file__.startswith({str(site)!r})\n"
        "from ptconvert.cli import main; main()"
    )
    arguments = ["transform", make_dense("llama"), tmp_path / "out", "--spec", "spec.yaml"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "modeling_ptconvert.py").is_file()
