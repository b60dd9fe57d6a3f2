"""Compute the latent statistics of a data set: one resumable pass, on any number of processes.

The images are processed in pieces of PIECE_IMAGES. After each piece, the sums over all processes are written next to the
output, so a resumed pass repeats at most one piece, even with another batch size or number of processes.

Legend: B batch, C latent channels, h = w latent grid.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.core.distributed import Process, float64_device, sum_over_ranks
from src.core.errors import UserError
from src.core.files import write_torch
from src.core.precision import full_float32
from src.core.terminal import Update
from src.core.weights import read
from src.data.decode import Decoder
from src.data.order import evaluation_rows
from src.evaluation.images import MAX_MEGAPIXELS, Images, centre_crops
from src.evaluation.options import StatisticsOptions
from src.models.rae import RAE

log = logging.getLogger(__name__)

PIECE_IMAGES = 16_384


def latent_statistics(
    rae: RAE, images: Images, options: StatisticsOptions, process: Process, update: Update
) -> dict[str, Any]:
    """Return the content of the file: mean and var (float32, C x h x w) of raw latents, and how they were computed.

    The sums so far stay in `partial_file(options.output)`, which the caller deletes. `update(done, total)` counts images.

    Raises:
        UserError: fewer than two images, or too many bad ones.
    """
    rows = images.rows[np.sort(evaluation_rows(len(images.rows), options.num_samples))]  # a mix of all classes
    identity = {"encoder": rae.encoder.identity(), "image_size": rae.geometry.image_size, "images": len(rows),
                "data": images.source.fingerprint(), "exif": options.exif, "piece_images": PIECE_IMAGES}  # fmt: skip
    partial = partial_file(options.output)
    done, count, sums = _load_partial(partial, identity) or (
        0,
        0,
        torch.zeros(2, *rae.latent_shape, dtype=torch.float64),
    )
    update(done, len(rows))
    for start in range(done, len(rows), PIECE_IMAGES):
        piece = replace(images, rows=rows[start : start + PIECE_IMAGES])
        more, piece_sums = _sums(rae, piece, options, process, lambda n, s=start: update(s + n, len(rows)))
        count, sums = count + more, sums + piece_sums
        if process.main and start + PIECE_IMAGES < len(rows):
            write_torch(partial, {"pass": identity, "done": start + PIECE_IMAGES, "count": count, "sums": sums})
    if count < 2:
        raise UserError(f"Statistics need at least two images, but {images.folder} gave {count}.")
    if count < len(rows):
        log.warning("%d of %d images could not be decoded and are left out.", len(rows) - count, len(rows))
    # The relative error is about (mean / std)^2 * 1e-16: with a mean of 100 standard deviations 12 digits are left.
    mean = sums[0] / count
    var = (sums[1] / count - mean.square()).clamp(min=0)  # population variance, as in numpy
    return {
        "mean": mean.float(),
        "var": var.float(),
        "encoder": identity["encoder"],
        "image_size": rae.geometry.image_size,
        "images": count,
        "data": images.description() | {"data_dir": Path(images.folder).name},
    }


def partial_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@torch.no_grad()
def _sums(rae: RAE, piece: Images, options: StatisticsOptions, process: Process, update: Any) -> tuple[int, Tensor]:
    """Return the number of images of a piece and the sums of z and z^2 over all processes, float64 2 C h w on the CPU.
    `update(done)` counts images."""
    sums = torch.zeros(2, *rae.latent_shape, dtype=torch.float64, device=float64_device(process.device))
    decoder, count = Decoder(options.exif, MAX_MEGAPIXELS), 0
    if len(piece.rows) > process.rank:  # else there are no images for this rank
        with full_float32(process.device):
            for batch in centre_crops(piece, rae.geometry.image_size, decoder, options, process):
                z = rae.encode_raw(batch["image"].to(process.device, non_blocking=True)).to(sums.device).double()
                sums += torch.stack([z.sum(dim=0), z.square().sum(dim=0)])
                count += len(z)
                update(min(count * process.world, len(piece.rows)))
    total = sum_over_ranks(torch.cat([sums.flatten(), sums.new_tensor([count])])).cpu()
    return round(total[-1].item()), total[:-1].view_as(sums)


def _load_partial(partial: Path, identity: dict[str, Any]) -> tuple[int, int, Tensor] | None:
    """Return the state of an interrupted pass over the same images, if any: images done, images decoded, their sums."""
    if not partial.is_file():
        return None
    try:
        state = read(partial)
    except UserError as error:
        log.warning("The sums of an earlier pass can't be used: %s", error)
        return None
    if state.get("pass") != identity:
        log.warning("%s is from other images or another encoder: starting over.", partial)
        return None
    log.warning("Continuing an earlier pass at image %s.", f"{state['done']:,}")
    return state["done"], state["count"], state["sums"]
