"""Write the files of the official code: a decoder's state dict (`model.pt`) and latent statistics (`stats.pt`).

Their parameter names are those of our decoder, so the table between the two is the identity; reading them is in
`src/formats/decoder_files.py`.

Legend: C latent channels, h = w latent grid.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.core.files import write_torch
from src.formats.decoder_files import STATISTICS
from src.models.rae import RAE

DECODER = "model.pt"


def write_official(rae: RAE, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write `model.pt`, a flat dictionary of tensors; returns remarks for whoever uses it.

    Positions are stored, as the official code expects, so any grid works there.
    """
    state = {
        name: value.detach().to(dtype).cpu().contiguous().clone() for name, value in rae.decoder.state_dict().items()
    }
    write_torch(Path(folder) / DECODER, state)
    remarks = [
        f"The official code builds the decoder for its own grid: use it at {rae.geometry.image_size} px with "
        f"patches of {rae.geometry.decoder_patch} px."
    ]
    if not rae.decoder_denormalize:
        remarks.append(
            "The decoder's output is the image itself (RAEv2); the first RAE code would multiply it by the "
            "encoder's std and add its mean."
        )
    return remarks


def write_statistics(mean: Tensor | None, var: Tensor | None, encoder: Mapping[str, Any], path: str | Path) -> None:
    """Write the official file, {mean, var} each float32 C x h x w or None, and the encoder's identity."""
    values = {name: None if v is None else v.float().cpu().clone() for name, v in (("mean", mean), ("var", var))}
    write_torch(path, {**values, "encoder": dict(encoder)})


def write_own_statistics(rae: RAE, folder: str | Path, encoder: Mapping[str, Any]) -> None:
    """Write `stats.pt` beside an export of a model that has statistics."""
    if rae.has_statistics:
        write_statistics(rae.latent_mean, rae.latent_var, encoder, Path(folder) / STATISTICS)
