"""Which checkpoint `ckpt_path` means."""

import json
from pathlib import Path

from src.errors import UserError
from src.weights import resolve


def find_checkpoint(ckpt_path: str | None, log_dir: str, experiment: str) -> Path | None:
    """None: a fresh start. `last`: the newest last.ckpt among runs of this experiment. Anything else is a path."""
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        path = resolve(ckpt_path)
        if not path.is_file():
            raise UserError(f"ckpt_path={ckpt_path}: no such file ({path}). Use the path of a .ckpt file, `last`, or null for a fresh start.")
        return path
    runs = resolve(log_dir) / "runs"
    found = [file for file in runs.glob("*/*/checkpoints/last.ckpt") if _experiment(file.parents[1]) == experiment]
    if not found:
        others = sorted({name for file in runs.glob("*/*/checkpoints/last.ckpt") if (name := _experiment(file.parents[1]))})
        raise UserError(
            f"ckpt_path=last: no checkpoint of experiment_name={experiment} under {runs} (looked at "
            f"DATE/TIME/checkpoints/last.ckpt). Experiments with one: {', '.join(others) or 'none'}. Drop ckpt_path to start afresh."
        )
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def _experiment(run: Path) -> str | None:
    try:
        return json.loads((run / "run.json").read_text()).get("experiment_name")
    except (OSError, ValueError):
        return None
