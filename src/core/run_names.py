"""Derive a run's name from its folder, and read the git state of the code."""

import re
import subprocess
from pathlib import Path
from typing import Any

from src.core.files import PROJECT_ROOT

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def run_id(folder: Path) -> str:
    """Return DATE_TIME for logs/runs/DATE/TIME (and what follows, in a multirun); for any other folder its name."""
    parts = folder.resolve().parts
    dates = [i for i, part in enumerate(parts) if _DATE.fullmatch(part)]
    return "_".join(parts[dates[-1] :]) if dates else parts[-1]


def git_state() -> dict[str, Any] | None:
    """Return the commit and whether the work tree is clean; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None
