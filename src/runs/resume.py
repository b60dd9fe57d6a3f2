"""Which checkpoint `ckpt_path` means."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.weights import read, resolve

log = logging.getLogger(__name__)

_FREE = {"num_workers", "prefetch_factor", "pin_memory", "worker_start", "max_bad_share"}
"""Keys of `data:` that don't touch the stream of batches."""


def find_checkpoint(ckpt_path: str | None, log_dir: str, experiment: str) -> Path | None:
    """None: a fresh start. `last`: the newest last.ckpt among runs of this experiment. Anything else is a path."""
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        path = resolve(ckpt_path)
        if not path.is_file():
            raise UserError(
                f"ckpt_path={ckpt_path}: no such file ({path}). Use the path of a .ckpt file, `last`, or null for a fresh start."
            )
        return path
    runs = resolve(log_dir) / "runs"
    found = [file for file in runs.glob("*/*/checkpoints/last.ckpt") if _experiment(file.parents[1]) == experiment]
    if not found:
        others = sorted(
            {name for file in runs.glob("*/*/checkpoints/last.ckpt") if (name := _experiment(file.parents[1]))}
        )
        raise UserError(
            f"ckpt_path=last: no checkpoint of experiment_name={experiment} under {runs} (looked at "
            f"DATE/TIME/checkpoints/last.ckpt). Experiments with one: {', '.join(others) or 'none'}. "
            "Drop ckpt_path to start afresh."
        )
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def announce_resume(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Say where a resumed run stands, and every change that makes it another run than the one it continues."""
    content = read(checkpoint)
    if not isinstance(content, Mapping):
        return  # the trainer will refuse it
    before = content.get("config") or {}
    log.info("Resuming at step %s (epoch %s).", content.get("global_step"), content.get("epoch"))
    epochs = config["trainer"]["max_epochs"]
    old = before.get("trainer", {}).get("max_epochs", epochs)
    if old != epochs:
        log.warning(
            "trainer.max_epochs was %s and is now %s: the cosine ends elsewhere, so the learning rate bends here.",
            old,
            epochs,
        )
    done = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("completed", 0)
    if old == epochs and done >= epochs:
        log.warning("That run is finished (%s epochs); nothing is left to do. Raise trainer.max_epochs to go on.", done)
    for key, value in before.get("data", {}).items():
        now = config["data"].get(key)
        if now != value and key not in _FREE:
            log.warning(
                "data.%s was %s and is now %s: batches will differ from those of an uninterrupted run.", key, value, now
            )


def _experiment(run: Path) -> str | None:
    try:
        return json.loads((run / "run.json").read_text()).get("experiment_name")
    except (OSError, ValueError):
        return None
