"""The folder of a run: made once for all processes of a launch, and never one that exists."""

import os
import time
from datetime import datetime, timedelta
from pathlib import Path

from src.core.errors import UserError
from src.core.files import write_text
from src.core.launch import Launch
from src.core.weights import resolve

ENVIRONMENT_KEY = "RAE_RUN_DIR"
"""Tells the processes that Lightning starts from the first one which folder that one made."""
_WAIT = timedelta(minutes=10)


def run_folder(log_dir: str, wanted: str | None, launch: Launch) -> Path:
    """The same folder in every process; the first of them has created it.

    Args:
        wanted: a folder that the user asked for; it may exist. None: LOG_DIR/runs/YYYY-MM-DD/HH-MM-SS, `-2` when taken.
    """
    if (made := os.environ.get(ENVIRONMENT_KEY)) and launch.kind == "child":
        return Path(made)
    if launch.kind == "slurm":
        return _shared_by_file(log_dir, wanted, launch)
    if launch.kind == "torchrun" and launch.world > 1:
        return _shared_by_store(log_dir, wanted, launch)
    folder = _create(log_dir, wanted)
    os.environ[ENVIRONMENT_KEY] = str(folder)
    return folder


def _create(log_dir: str, wanted: str | None) -> Path:
    try:
        if wanted is not None:
            folder = resolve(wanted)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        now = datetime.now()
        base = resolve(log_dir) / "runs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
        base.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"The run's folder can't be made: {error}. Set paths.log_dir to a place that can be written."
        ) from error


def _shared_by_store(log_dir: str, wanted: str | None, launch: Launch) -> Path:
    """torchrun: through the key-value store that the processes meet at anyway."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=_WAIT))
    key = f"{ENVIRONMENT_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if launch.main:
        store.set(key, str(_create(log_dir, wanted)))
    return Path(store.get(key).decode())


def _shared_by_file(log_dir: str, wanted: str | None, launch: Launch) -> Path:
    """SLURM: through a file named after the job step, which no other launch shares."""
    env = os.environ
    note = (
        resolve(log_dir)
        / "runs"
        / f".slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_STEP_ID', '0')}-{env.get('SLURM_RESTART_COUNT', '0')}"
    )
    if launch.main:
        folder = _create(log_dir, wanted)
        write_text(note, str(folder))
        return folder
    deadline = time.monotonic() + _WAIT.total_seconds()
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"The first process did not leave {note} within {_WAIT}: is {log_dir} on a file system that all nodes share?"
            )
        time.sleep(0.2)
    return Path(note.read_text())
