"""Checkpoint files: written beside their target and put in its place, read without running code."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from src.core.errors import UserError
from src.core.files import replacing
from src.core.weights import read


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
    """torch.save; a crash while writing leaves the previous file as it was."""
    try:
        with replacing(
            target, tag="next"
        ) as file:  # one name for all: several GB that a killed run leaves are used again
            torch.save(content, file)
    except OSError as error:
        raise UserError(
            f"The checkpoint {target} can't be written: {error}. The previous one is untouched; make room and use ckpt_path=last."
        ) from error
