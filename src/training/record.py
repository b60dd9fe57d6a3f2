"""Create a run's folder, and write its configuration, `run.json` and final summary."""

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.callbacks.progress import TrainingProgress
from src.callbacks.samples import SampleImages
from src.core.errors import UserError
from src.core.files import write_text
from src.core.json_files import read_json
from src.core.run_names import git_state
from src.core.text import hydra_quoted, masked, table
from src.core.weights import resolve

log = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "pytorch-lightning", "hydra-core", "transformers", "datasets", "numpy", "pillow", "simplejpeg", "torchmetrics",
)  # fmt: skip


def make_folder(log_dir: str, wanted: str | None, checkpoint: Path | None = None) -> Path:
    """Create the folder of a run: `wanted`, or a new LOG_DIR/runs/YYYY-MM-DD/HH-MM-SS (`-2` if taken). Called on rank 0.

    `wanted` may exist, but may only hold a run if this one resumes from a `checkpoint` in it, or if that run was an earlier
    start of this SLURM job that saved nothing. Raises UserError otherwise, or if the folder can't be created.
    """
    now = datetime.now()
    base = resolve(wanted) if wanted else resolve(log_dir) / "runs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if wanted:
            base.mkdir(exist_ok=True)
            _check_free(base, checkpoint)
            return base
        for number in itertools.count(1):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        return folder
    except OSError as error:
        raise UserError(f"The run folder can't be created: {error}. Set paths.log_dir to a writable folder.") from error


def _check_free(folder: Path, checkpoint: Path | None) -> None:
    saved = sorted((folder / "checkpoints").glob("*.ckpt"))
    record = folder / "run.json"
    if not saved and not record.exists():
        return
    if checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve()):
        return
    try:
        job = read_json(record)["slurm_job"]
    except (UserError, KeyError):
        job = None
    if not saved and job is not None and job == os.environ.get("SLURM_JOB_ID"):
        return
    last = folder / "checkpoints" / "last.ckpt"
    resume = (
        f"Resume that run with ckpt_path={hydra_quoted(str(last))}, or" if last in saved else "It saved no last.ckpt;"
    )
    raise UserError(
        f"paths.run_dir={folder} already holds a run, which would be overwritten. {resume} choose another folder "
        "(paths.run_dir=null creates a new one)."
    )


def save_config(config: DictConfig, folder: Path) -> None:
    """Write the three usual files of Hydra into .hydra/, with secrets masked."""
    hydra = HydraConfig.get()
    for name, content in (
        ("config", config),
        ("hydra", OmegaConf.create({"hydra": OmegaConf.to_container(hydra, resolve=False)})),
        ("overrides", OmegaConf.create(list(hydra.overrides.task))),
    ):
        plain = masked(OmegaConf.to_container(content, resolve=False))
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))


class RunRecord:
    """Writes `run.json`: command, environment, status and results, rewritten atomically at each update."""

    def __init__(self, folder: Path | None, experiment: str) -> None:
        """`folder`: the run folder; None (ranks other than 0): nothing is written."""
        self._file = folder and folder / "run.json"
        self._content: dict[str, Any] = {
            "experiment_name": experiment,
            "status": "running",
            "started": datetime.now().isoformat(timespec="seconds"),
            "command": masked([Path(sys.executable).name, *sys.argv]),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "git": git_state() if folder else None,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
        }

    def update(self, values: Mapping[str, Any]) -> None:
        self._content.update(values)
        if self._file:
            write_text(self._file, json.dumps(self._content, indent=2, default=str) + "\n")

    def finish(self, status: str, warnings: list[str], **result: Any) -> None:
        """Write the final status: finished, failed, terminated (SIGTERM) or interrupted (Ctrl-C, SIGHUP, SIGUSR1)."""
        ended = datetime.now().isoformat(timespec="seconds")
        self.update({"status": status, "ended": ended, "warnings": warnings, **result})


def summary(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return the last values by logged name, the speed and the last sample image; log the main ones as a table."""
    result: dict[str, Any] = {"step": trainer.global_step, "epochs": trainer.current_epoch}
    progress = [callback for callback in trainer.callbacks if isinstance(callback, TrainingProgress)]
    result |= {name: float(value) for name, value in trainer.callback_metrics.items()}  # of `self.log` too
    result |= {name: value for name, (_, value) in module.scores.items()}
    shown = ("train/l", "train/gan", "disc/loss", "val/", "rfid", "gfid")
    rows = [(name, f"{result[name]:.4f}") for name in sorted(result) if name.startswith(shown)]
    if "val/psnr" in module.scores_at_start and "val/psnr" in result:
        result["psnr_before"] = module.scores_at_start["val/psnr"]
        change = f"{result['psnr_before']:.2f} -> {result['val/psnr']:.2f} dB (EMA, held-out images)"
        rows.append(("PSNR before -> after", change))
    for callback in progress:
        if callback.mean_images_per_s:
            result["images_per_s"] = callback.mean_images_per_s
            rows.append(("images/s", f"{callback.mean_images_per_s:.1f}"))
    for callback in trainer.callbacks:
        if isinstance(callback, SampleImages) and callback.last_file is not None:
            result["picture"] = str(callback.last_file)
            rows.append(("last sample image", f"{result['picture']} ({module.sample_row_names})"))
        if isinstance(callback, pl.callbacks.EarlyStopping) and callback.stopped_epoch:
            why = f"in epoch {callback.stopped_epoch + 1}; {callback.monitor} was best at {callback.best_score.item():.4f}"
            rows.append(("stopped early", why))
        left = callback.time_remaining() if isinstance(callback, pl.callbacks.Timer) else None
        if left is not None and left < 0:
            rows.append(("stopped early", "by trainer.max_time; resume with the same command and ckpt_path=last"))
    if trainer.is_global_zero:
        log.info("Done after %s steps%s", f"{trainer.global_step:,}", f":\n{table(rows)}" if rows else ".")
    return result


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
