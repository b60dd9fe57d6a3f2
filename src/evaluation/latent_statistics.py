"""Latent statistics of a data set: one pass, any number of processes, resumed where it stopped.

The images are taken in pieces of PIECE_IMAGES. After each the sums of all processes are added up and written beside the
output, so an interrupted pass repeats one piece at most, also with another batch size or number of processes.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.core.distributed import Process
from src.core.errors import UserError
from src.core.files import write_torch
from src.core.precision import full_float32
from src.core.terminal import Update
from src.core.weights import read
from src.data.decode import Decoder
from src.evaluation.images import MAX_MEGAPIXELS, Images, centre_crops
from src.evaluation.latent_moments import LatentMoments
from src.evaluation.options import StatisticsOptions
from src.models.rae import RAE

log = logging.getLogger(__name__)

PIECE_IMAGES = 16_384


def latent_statistics(
    rae: RAE,
    images: Images,
    options: StatisticsOptions,
    process: Process,
    update: Update,
    piece_images: int = PIECE_IMAGES,
) -> dict[str, Any]:
    """Return what `src/latent_stats.py` writes: mean and var (float32, C x h x w) of raw latents, and what they are of.

    The sums so far lie beside `options.output` until the caller has written it. `update(done, total)` counts images.

    Raises:
        UserError: fewer than two images, or too many bad ones.
    """
    rows = images.rows[: options.num_samples]
    identity = {"encoder": rae.encoder.identity(), "image_size": rae.geometry.image_size, "images": len(rows),
                "data": images.source.fingerprint(), "exif": options.exif, "piece_images": piece_images}  # fmt: skip
    partial = partial_file(options.output)
    total, done = _resume(partial, identity, rae, process)
    update(done, len(rows))
    for start in range(done, len(rows), piece_images):
        piece = replace(images, rows=rows[start : start + piece_images])
        total.merge(_piece(rae, piece, options, process, lambda n, s=start: update(s + n, len(rows))))
        if process.main and start + piece_images < len(rows):
            write_torch(partial, {"pass": identity, "done": start + piece_images, **total.state()})
    if total.count < 2:
        raise UserError(f"Statistics need at least two images, {images.folder} gave {total.count}.")
    if total.count < len(rows):
        log.warning("%d of %d images could not be decoded and are left out.", len(rows) - total.count, len(rows))
    return {
        "mean": total.mean().float().cpu(),
        "var": total.var().float().cpu(),
        "encoder": identity["encoder"],
        "image_size": rae.geometry.image_size,
        "images": total.count,
        "data": images.description() | {"data_dir": Path(images.folder).name},
    }


def partial_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@torch.no_grad()
def _piece(rae: RAE, piece: Images, options: StatisticsOptions, process: Process, update: Any) -> LatentMoments:
    """Return the moments of a piece, of all processes; `update(images done)`."""
    moments, seen = LatentMoments(rae.latent_shape, process.device), 0
    decoder = Decoder(options.exif, MAX_MEGAPIXELS)
    if len(piece.rows) > process.rank:  # else this process has no share of it
        with full_float32(process.device):
            for batch in centre_crops(piece, rae.geometry.image_size, decoder, options, process):
                moments.update(rae.encode_raw(batch["image"].to(process.device, non_blocking=True)))
                seen += len(batch["image"])
                update(min(seen * process.world, len(piece.rows)))
    return moments.reduce()


def _resume(partial: Path, identity: Mapping[str, Any], rae: RAE, process: Process) -> tuple[LatentMoments, int]:
    nothing = LatentMoments(rae.latent_shape, process.device), 0
    if not partial.is_file():
        return nothing
    try:
        state = read(partial)
    except UserError as error:
        log.warning("The sums of an earlier pass can't be used: %s", error)
        return nothing
    if state.get("pass") != identity:
        log.warning("%s is of other images or another encoder: starting afresh.", partial)
        return nothing
    log.warning("Continuing an earlier pass at image %s.", f"{state['done']:,}")
    return LatentMoments.from_state(state, process.device), int(state["done"])
