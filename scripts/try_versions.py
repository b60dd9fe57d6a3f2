"""Run the tests with other versions of Python, torch and transformers than the pinned ones. Not part of `.ci/run`.

    python scripts/try_versions.py                                      the bounds of pyproject.toml
    python scripts/try_versions.py --torch 2.12.1 --transformers 5.20.0 --python python3.13
    python scripts/try_versions.py --tests tests/test_step_parity.py    these tests instead of all but the slow ones

Each version gets its own environment in a temporary folder, with requirements.txt changed in that one version. Prints what
passed, what failed and what can't be installed here. The bounds in pyproject.toml are those that such runs have confirmed.

Exit codes: 0 all that could be installed passed, 1 something failed, 2 nothing could be installed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers")


def bounds(package: str) -> list[str]:
    """Return the lowest version that pyproject.toml allows and the pinned one."""
    text = (ROOT / "pyproject.toml").read_text() + (ROOT / "requirements.txt").read_text()
    return re.findall(rf'^ *"?{package}[>=]=([\d.]+)', text, re.MULTILINE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in PACKAGES:
        default = bounds(package)
        parser.add_argument(
            f"--{package}", nargs="*", default=default, metavar="VERSION", help=f"default: {' '.join(default)}"
        )
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON", help="default: this one")
    parser.add_argument(
        "--tests", nargs="+", default=["-m", "not slow"], help="arguments for pytest (default: all but slow)"
    )
    return parser


def attempt(python: str, versions: dict[str, str], tests: list[str], folder: Path) -> str:
    """Install and test in `folder`; return `passed ...`, `FAILED ...` or `not installable ...`."""
    wanted = (ROOT / "requirements.txt").read_text()
    for package, version in versions.items():
        wanted = re.sub(rf"^{package}==.*$", f"{package}=={version}", wanted, flags=re.MULTILINE)
    if "transformers" in versions:  # the pinned hub client goes with the pinned transformers
        wanted = re.sub(r"^huggingface-hub==.*$", "huggingface-hub", wanted, flags=re.MULTILINE)
    (folder / "requirements.txt").write_text(wanted)
    own = str(folder / "venv/bin/python")
    for command in (
        [python, "-m", "venv", str(folder / "venv")],
        [own, "-m", "pip", "install", "--quiet", "-r", str(folder / "requirements.txt")],
    ):
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            return f"not installable: {error}"
        if done.returncode:
            return f"not installable: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "--tb=line", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n    ".join([f"{'FAILED' if done.returncode else 'passed'}: {lines[-1].strip('= ')}", *failed])


def main() -> int:
    options = build_parser().parse_args()
    tries = [
        (python, {package: v}) for python in options.python for package in PACKAGES for v in getattr(options, package)
    ]
    found = []
    for python, versions in tries:
        with tempfile.TemporaryDirectory(prefix="try_versions_") as folder:
            found.append(attempt(python, versions, options.tests, Path(folder)))
        name = ", ".join(f"{package} {version}" for package, version in versions.items())
        print(f"{Path(python).name}, {name}: {found[-1]}", flush=True)
    installed = [result for result in found if not result.startswith("not installable")]
    return 2 if not installed else int(any(result.startswith("FAILED") for result in installed))


if __name__ == "__main__":
    sys.exit(main())
