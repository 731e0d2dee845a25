"""What is installed: exactly our top-level packages, with their data, and nobody else's under the same names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = {"cli", "merges", "probes", "surgery"}


def test_the_wheel_holds_our_packages_and_their_data(tmp_path: Path) -> None:
    for name in (*NAMES, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {file.split("/")[0] for file in files if ".dist-info/" not in file} == NAMES
    for name in NAMES:
        held = {file for file in files if file.startswith(f"{name}/")}
        tree = {
            str(p.relative_to(ROOT)) for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        }
        assert held == tree


def test_no_other_distribution_provides_our_names() -> None:
    for name in NAMES:
        assert set(packages_distributions().get(name, [])) <= {"model-surgery"}
