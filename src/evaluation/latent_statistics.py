"""Latent statistics of a data set: one pass, any number of processes, resumed where it stopped.

The images are taken in pieces of PIECE_IMAGES. After each the sums of all processes are added up and written beside the
output, so an interrupted pass repeats one piece at most, also with another batch size or number of processes.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.core.errors import UserError
from src.core.files import write_torch
from src.core.precision import full_float32
from src.core.processes import Place
from src.core.weights import read
from src.evaluation.images import Images, evaluation_loader
from src.evaluation.latent_moments import LatentSums
from src.models.rae import RAE

log = logging.getLogger(__name__)

PIECE_IMAGES = 16_384
Progress = Callable[[int, int], None]
"""(images done, images in all)"""


def latent_statistics(
    rae: RAE,
    images: Images,
    num_images: int | None,
    loading: Mapping[str, Any],
    place: Place,
    output: Path,
    progress: Progress,
    piece_images: int = PIECE_IMAGES,
) -> dict[str, Any]:
    """What `src/latent_stats.py` writes: mean and var (float32, C x h x w) of raw latents, and what they are of.

    Args:
        loading: `batch_size`, `num_workers`, `decoder` and `max_bad_share` of `evaluation_loader`.
        output: where the caller will write; the sums so far lie beside it until then.

    Raises:
        UserError: fewer than two images, or too many bad ones.
    """
    rows = images.rows[:num_images]
    pass_over = {"encoder": rae.encoder.identity(), "image_size": rae.geometry.image_size, "images": len(rows),
                 "data": images.source.fingerprint(), "exif": loading["decoder"].exif, "piece_images": piece_images}  # fmt: skip
    partial = partial_file(output)
    total, done = _resume(partial, pass_over, rae, place)
    progress(done, len(rows))
    for start in range(done, len(rows), piece_images):
        piece = replace(images, rows=rows[start : start + piece_images])
        total.merge(_piece(rae, piece, loading, place, lambda n, s=start: progress(s + n, len(rows))))
        if place.main and start + piece_images < len(rows):
            write_torch(partial, {"pass": pass_over, "done": start + piece_images, **total.state()})
    if total.count < 2:
        raise UserError(f"Statistics need at least two images, {images.folder} gave {total.count}.")
    if total.count < len(rows):
        log.warning("%d of %d images could not be decoded and are left out.", len(rows) - total.count, len(rows))
    return {
        "mean": total.mean().float().cpu(),
        "var": total.var().float().cpu(),
        "encoder": pass_over["encoder"],
        "image_size": rae.geometry.image_size,
        "images": total.count,
        "data": images.description() | {"data_dir": images.folder.name},
    }


def partial_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@torch.no_grad()
def _piece(
    rae: RAE, piece: Images, loading: Mapping[str, Any], place: Place, progress: Callable[[int], None]
) -> LatentSums:
    sums = LatentSums(rae.latent_shape, place.device)
    if len(piece.rows) > place.rank:  # else this process has no share of it
        loader = evaluation_loader(
            piece, rae.geometry.image_size, None, device=place.device, rank=place.rank, world=place.world, **loading
        )
        seen = 0
        with full_float32(place.device):
            for batch in loader:
                sums.update(rae.encode_raw(batch["image"].to(place.device, non_blocking=True)))
                seen += len(batch["image"])
                progress(min(seen * place.world, len(piece.rows)))
    return sums.reduce()


def _resume(partial: Path, pass_over: Mapping[str, Any], rae: RAE, place: Place) -> tuple[LatentSums, int]:
    nothing = LatentSums(rae.latent_shape, place.device), 0
    if not partial.is_file():
        return nothing
    try:
        state = read(partial)
    except UserError as error:
        log.warning("The sums of an earlier pass can't be used: %s", error)
        return nothing
    if state.get("pass") != pass_over:
        log.warning("%s is of other images or another encoder: starting afresh.", partial)
        return nothing
    log.warning("Continuing an earlier pass at image %s.", f"{state['done']:,}")
    return LatentSums.from_state(state, place.device), int(state["done"])
