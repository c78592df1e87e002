"""Set up the project's own Python environment from the hashed lock. Standard library only; run by the Makefile.

python3 workflow/bootstrap.py ENVIRONMENT
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".uv"
SUPPORTED = ((3, 11), (3, 13))


def main(environment: Path) -> None:
    ensure_python()
    print(f"setting up {environment.name} (Python {'.'.join(map(str, sys.version_info[:3]))}) ...", flush=True)
    uv = find_uv()
    if not (environment / "bin" / "python").exists():
        venv.create(environment, with_pip=False, symlinks=True, clear=environment.exists())
    sync = [uv, "pip", "sync", "--quiet", "--require-hashes", "--compile-bytecode", str(ROOT / "requirements.lock")]
    run(
        sync,
        "the packages of requirements.lock could not be installed: is the network there?",
        VIRTUAL_ENV=str(environment),
    )
    # The library is used from the checkout: a path file makes it importable from any working directory.
    site = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "lthlib-checkout.pth").write_text(f"{ROOT}\n")


def ensure_python() -> None:
    """Go on under this Python if it is supported, else start again under one that is."""
    if SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        return
    for minor in range(SUPPORTED[1][1], SUPPORTED[0][1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            os.execv(found, [found, *sys.argv])
    fail(
        f"Python 3.11, 3.12 or 3.13 is needed; this is {sys.version.split()[0]}. Install one of them "
        "(Debian, Ubuntu: apt install python3), or name it: make report PYTHON=/path/to/python3.12"
    )


def find_uv() -> str:
    """Return uv: the one on the PATH, else the pinned one, installed by pip beside the environment."""
    found = shutil.which("uv")
    if found:
        return found
    pinned = TOOLS / "bin" / "uv"
    if not pinned.exists():
        pip = [sys.executable, "-m", "pip"]
        if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
            pip = [str(pip_from_venv()), "-m", "pip"]
        target = ["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--target"]
        run(
            [*pip, *target, str(TOOLS), "-r", str(ROOT / "workflow" / "uv.lock.txt")],
            "uv could not be installed: is the network there? Or put a uv of your own on the PATH",
        )
    return str(pinned)


def pip_from_venv() -> Path:
    """Make a throw-away environment with pip: Debian's python3 has none outside, unless python3-pip is there."""
    folder = TOOLS / "pip"
    try:
        venv.create(folder, with_pip=True, symlinks=True, clear=True)
    except (subprocess.CalledProcessError, SystemExit):
        fail(
            "This Python has neither pip nor ensurepip. Install uv (and put it on the PATH), or the package "
            "python3-venv or python3-pip (Debian, Ubuntu), and run again."
        )
    return folder / "bin" / "python"


def run(command: list[str], problem: str, **environment: str) -> None:
    # Byte-compiled packages import two to three times faster; the variable would prevent it.
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    if subprocess.run(command, env=settings).returncode != 0:
        fail(problem)


def fail(problem: str) -> None:
    print(f"setup: {problem}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
