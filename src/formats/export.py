"""Export a model, atomically, to a folder in one of three formats; write the files of the official code.

Our decoder uses the official parameter names.

Legend: C latent channels, h = w latent grid.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.files import check_folder, write_torch
from src.core.weights import DTYPES
from src.formats.card import model_card
from src.formats.checkpoint import LoadedModel
from src.formats.decoder_files import RECORD, STATISTICS
from src.formats.diffusers import write_diffusers
from src.formats.folder import write_folder
from src.formats.provenance import file_hashes, provenance, write_record
from src.models.rae import RAE

log = logging.getLogger(__name__)

Format = Literal["official", "diffusers", "folder"]
DECODER = "model.pt"


def export(
    loaded: LoadedModel,
    output: Path,
    format: Format,
    dtype: str = "fp32",
    with_encoder: bool = False,
    published_names: bool = False,
    overwrite: bool = False,
    score_files: Sequence[str | Path] = (),
) -> list[str]:
    """Write the export with its statistics, record and model card; return remarks for its users.

    Args:
        with_encoder: include the encoder in format `folder`; `diffusers` always includes it, `official` never.
        published_names: for `diffusers`: name the encoder's parameters as in transformers 4.

    Raises:
        UserError: `output` exists, can't be written, or the format can't represent the model.
    """
    facts = provenance(loaded, score_files) | {"format": format, "dtype": dtype}
    with new_folder(output, overwrite) as folder:
        if format == "official":
            remarks = write_official(loaded.rae, folder, DTYPES[dtype])
        elif format == "diffusers":
            remarks = write_diffusers(loaded.rae, folder, DTYPES[dtype], published_names)
        else:
            remarks = write_folder(loaded, folder, DTYPES[dtype], with_encoder)
        write_own_statistics(loaded.rae, folder, loaded.description["encoder"])
        facts |= {"remarks": remarks, "files": file_hashes(folder)}
        write_record(facts, folder)
        (folder / "README.md").write_text(model_card(loaded.rae, facts))
    if facts["untrained"]:
        remarks = [f"UNTRAINED: {', '.join(facts['untrained'])}. The model card warns of it at the top.", *remarks]
    return remarks


@contextmanager
def new_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """Create a folder that is renamed to `output` only if the block ends without an error.

    Raises:
        UserError: `output` exists and must not be overwritten, or is not an export (its content is unknown).
    """
    check_output(output, overwrite)
    temporary, replaced = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_output(output, overwrite)  # again: another process may have written it in the meantime
        if output.exists():  # kept until the new one is in place
            os.replace(output, replaced)
        os.replace(temporary, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--output {output} can't be written: {error.strerror or error}. Choose a folder with write permission "
            "and free space."
        ) from error
    finally:
        if replaced.exists() and not output.exists():
            os.replace(replaced, output)
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless `output` is free, or an earlier export and `overwrite` is set."""
    check_folder(output, overwrite, (RECORD,), "an earlier export")


def write_official(rae: RAE, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Write `model.pt`, a flat dictionary of tensors; return remarks for its users.

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
    """Write statistics in the official format, {mean, var} each float32 C x h x w or None, plus the encoder's identity."""
    values = {name: None if v is None else v.float().cpu().clone() for name, v in (("mean", mean), ("var", var))}
    write_torch(path, {**values, "encoder": dict(encoder)})


def write_own_statistics(rae: RAE, folder: str | Path, encoder: Mapping[str, Any]) -> None:
    """Write `stats.pt` into the folder of an export, if the model has statistics."""
    if rae.has_statistics:
        write_statistics(rae.latent_mean, rae.latent_var, encoder, Path(folder) / STATISTICS)
