"""Find the checkpoint for `ckpt_path`, and log what changes when a run is resumed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.folder_lock import owner_of
from src.core.json_files import read_json
from src.core.text import flat
from src.core.weights import read, resolve
from src.formats.checkpoint import check_resumable, with_current_keys

log = logging.getLogger(__name__)

_MAY_CHANGE = {
    "data": (
        "_target_",  # the class may have moved
        "num_workers", "worker_timeout_s", "prefetch_factor", "pin_memory", "worker_start", "max_bad_share", "val_batch_size",
        "use_hf_dataset", "allow_changed", "cache_gb", "storage_options", "mix_unit",  # the data is compared by its fingerprint
        "batch_size", "accumulate",  # the global batch is compared instead
    ),
    "model": (
        "_target_", "compile", "sample_every", "log_every_n_steps", "loss_chunk_size",
        "activation_checkpointing", "network.activation_checkpointing",
        "accumulate_grad_batches", "max_skipped_steps",
    ),
}  # fmt: skip
"""Keys that may change on resume: they affect neither the sequence of batches nor the updates."""


def find_checkpoint(ckpt_path: str | None, log_dir: str, experiment: str) -> Path | None:
    """Return the checkpoint file. ckpt_path: None: fresh start; `last`: the newest last.ckpt among runs of this experiment,
    including sweeps; else a path. Raises UserError if there is none."""
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        path = resolve(ckpt_path)
        if not path.is_file():
            raise UserError(
                f"ckpt_path={ckpt_path}: no such file ({path}). Use the path of a .ckpt file, `last`, or null for a new run."
            )
        return path
    root, patterns = resolve(log_dir), ("runs/*/*", "multiruns/*/*/*")
    files = [file for pattern in patterns for file in root.glob(f"{pattern}/checkpoints/last.ckpt")]
    found = {file: _experiment(file.parents[1]) for file in files}
    own = [file for file, name in found.items() if name == experiment]
    if not own:
        others = ", ".join(sorted({name for name in found.values() if name}))
        raise UserError(
            f"ckpt_path=last: no checkpoint of experiment_name={experiment} under {root} (searched runs/DATE/TIME and "
            f"multiruns/DATE/TIME/N). Experiments with one: {others or 'none'}. Remove ckpt_path to start from scratch."
        )
    return max(own, key=lambda file: file.stat().st_mtime_ns)


def announce_resume(checkpoint: Path, config: Mapping[str, Any], processes: int) -> None:
    """Log where the run resumes, and warn about every change that makes it differ from the run that it continues."""
    content = read(checkpoint)
    check_resumable(content, checkpoint)
    before = content["config"]
    before = {**before, "model": with_current_keys(before.get("model") or {})}
    log.info("Resuming at step %s (epoch %s).", content["global_step"], content["epoch"] + 1)
    run = checkpoint.parent.parent
    if run.resolve() != resolve(config["paths"]["run_dir"] or "").resolve() and (owner := owner_of(run)):
        log.warning("The run of that checkpoint is still going on in %s (%s); this one runs beside it.", run, owner)
    epochs = config["trainer"]["max_epochs"]
    done = content.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("completed", 0)
    if done >= epochs:
        log.warning("That run is finished (%s epochs); nothing is left to do. Raise trainer.max_epochs to go on.", done)
    batches = [_global_batch(c, n) for c, n in ((before, content.get("processes")), (config, processes))]
    if batches[0] != batches[1]:
        log.warning("The global batch was %s and is now %s: steps and epochs no longer match that run.", *batches)
    for key in ("precision", "float32_matmul_precision"):
        was, now = before.get("trainer", {}).get(key), config["trainer"].get(key)
        if was is not None and str(was) != str(now):
            log.warning("trainer.%s was %s and is now %s: results are rounded differently from now on.", key, was, now)
    for group, free in _MAY_CHANGE.items():
        was, now = flat(before.get(group) or {}), flat(config[group])
        for key in sorted((was.keys() | now.keys()) - set(free)):
            if was.get(key) != now.get(key):
                change = f"{group}.{key} was {was.get(key)} and is now {now.get(key)}"
                log.warning("%s: this run differs from the one it resumes.", change)


def _global_batch(config: Mapping[str, Any], processes: int | None) -> int | None:
    data = config.get("data") or {}
    if processes is None or "batch_size" not in data:
        return None
    return data["batch_size"] * data["accumulate"] * processes


def _experiment(run: Path) -> str | None:
    try:
        return read_json(run / "run.json", experiment_name=str)["experiment_name"]
    except UserError:
        return None
