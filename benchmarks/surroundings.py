"""Helpers of all benchmarks: interleaved timing, a description of machine and code, the result file."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from src.core.distributed import find_device
from src.core.errors import UserError
from src.core.files import write_text
from src.core.run_names import git_state

ROOT = Path(__file__).resolve().parents[1]


def surroundings(device: torch.device | None = None) -> dict[str, Any]:
    """Return the device's name, the number of threads, versions and the git state."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(git_state() or {"commit": None, "clean": None}),
    }


def device_option(text: str) -> torch.device:
    """Convert --device. Raises ArgumentTypeError if there is no such device."""
    try:
        return find_device(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def in_turns(
    steps: Mapping[str, Callable[[], Any]], warm: int, repeats: int, clock: Callable[[], Any] = time.perf_counter
) -> dict[str, list[Any]]:
    """Time each step once per turn, so that changes of the machine's speed affect all alike; `warm` turns don't count."""
    found: dict[str, list[Any]] = {name: [] for name in steps}
    for turn in range(warm + repeats):
        for name, step in steps.items():
            began = clock()
            step()
            if turn >= warm:
                found[name].append(clock() - began)
    return found


def write(record: dict[str, Any], out: Path | None) -> None:
    """Write a record as JSON, with the command that made it. Does nothing if `out` is None."""
    if out is None:
        return
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    write_text(out, json.dumps({"command": command, **record}, indent=1) + "\n")
    print(f"\nwritten to {out}")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
