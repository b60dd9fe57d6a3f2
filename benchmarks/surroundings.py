"""Where and on what a benchmark ran, and its file."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def surroundings(device: torch.device | None = None) -> dict[str, Any]:
    """Return the device's name, threads, versions and the state of the code."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "clean": not _git("status", "--porcelain"),
    }


def write(record: dict[str, Any], out: Path | None) -> None:
    """Write a record as JSON with the command that made it; None: not at all."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    out.write_text(json.dumps({"command": command, **record}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
