"""Checkpoint files: written beside their target and put in its place, read without running code."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from src.errors import UserError
from src.weights import read

log = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """A crash while writing leaves the previous file as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content = read(path)
        if not isinstance(content, dict) or "state_dict" not in content or "loops" not in content:
            raise UserError(
                f"{path} is no checkpoint of a training run. Weights of others go into model.pretrained_decoder_path, not "
                "ckpt_path."
            )
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write_atomically(content: Any, target: Path) -> None:
    """torch.save into `target` by way of a file beside it, flushed to the disk before it takes the name."""
    beside = target.with_name(f".{target.name}.writing")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        _sync_folder(target.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {target} can't be written: {error}. The previous one is untouched; make room and use ckpt_path=last."
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for `source`, replacing `target` at once; a copy where the file system has no hard links."""
    beside = target.with_name(f".{target.name}.writing")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    os.replace(beside, target)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
