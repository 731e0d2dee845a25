"""Audit the pinned dependencies for known vulnerabilities: `python .ci/audit.py constraints.txt VENV`.

Asks PyPI's advisory database by way of pip-audit, which is installed into a virtual environment of its own, so that
what it needs is not among what the tests run on. Where the database cannot be reached it says so and exits with 0; a
known vulnerability, or a pip-audit that cannot be installed although the database answers, is a failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"
# Any version of any package: its answer shows whether advisories can be had here. Mirrors of packages have none.
PROBE = "https://pypi.org/pypi/pip/24.0/json"
TIMEOUT = 10  # seconds


def why_unreachable() -> str | None:
    """Return why advisories cannot be read here, or None where they can."""
    try:
        with urllib.request.urlopen(PROBE, timeout=TIMEOUT) as answer:
            known = json.load(answer)
    except (OSError, ValueError) as error:
        return str(error)
    return None if isinstance(known, dict) and "vulnerabilities" in known else "its answer holds no advisories"


def main(constraints: Path, environment: Path) -> int:
    """Return the exit code."""
    if reason := why_unreachable():
        print(f"audit: SKIPPED, nothing was audited: {PROBE} cannot be read ({reason})")
        return 0
    folder = environment / "audit"
    if not (folder / "bin" / "pip-audit").is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", PIP_AUDIT], check=True)
    # Every version is pinned, so that nothing has to be resolved or installed to be audited.
    command = [folder / "bin" / "pip-audit", "--requirement", constraints, "--no-deps", "--disable-pip"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
