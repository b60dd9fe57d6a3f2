"""Latent statistics of a data set: one pass, any number of processes, resumed where it stopped.

The images are taken in pieces of PIECE_IMAGES. After each the sums of all processes are added up and written beside the
output, so an interrupted pass repeats one piece at most, also with another batch size or number of processes.

Legend: B batch, C latent channels, h = w latent grid.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from src.core.distributed import Process, float64_device, sum_over_ranks
from src.core.errors import UserError
from src.core.files import write_torch
from src.core.precision import full_float32
from src.core.terminal import Update
from src.core.weights import read
from src.data.decode import Decoder
from src.evaluation.images import MAX_MEGAPIXELS, Images, centre_crops
from src.evaluation.options import StatisticsOptions
from src.models.rae import RAE

log = logging.getLogger(__name__)

PIECE_IMAGES = 16_384


class LatentMoments:
    """Count and float64 sums of z and z^2 per element, which add up over batches, processes and interrupted passes.

    var = E[z^2] - E[z]^2 loses (mean / std)^2 * 1e-16 of its precision, so latents whose mean is a hundred standard
    deviations from 0 still have 12 digits.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.count = 0
        place = float64_device(torch.device(device))
        self.sums = torch.zeros(2, *shape, dtype=torch.float64, device=place)  # of z and of z^2

    def update(self, latents: Tensor) -> None:
        """Take in raw latents, B C h w of any float type."""
        z = latents.detach().to(self.sums.device).double()
        self.add(len(z), torch.stack([z.sum(dim=0), z.square().sum(dim=0)]))

    def add(self, count: int, sums: Tensor) -> None:
        """Add the sums, 2 C h w, of `count` images."""
        self.count += count
        self.sums += sums.to(self.sums.device)

    def reduce(self) -> Self:
        """Replace this process's sums by those of all, in place; once, and on every process."""
        total = sum_over_ranks(torch.cat([self.sums.flatten(), self.sums.new_tensor([self.count])]))
        self.sums, self.count = total[:-1].view_as(self.sums), round(total[-1].item())
        return self

    def mean(self) -> Tensor:
        """Return float64 C h w."""
        return self.sums[0] / self.count

    def var(self) -> Tensor:
        """Return float64 C h w; of the population (divided by the number of images), as numpy's."""
        return (self.sums[1] / self.count - self.mean().square()).clamp(min=0)


def latent_statistics(
    rae: RAE, images: Images, options: StatisticsOptions, process: Process, update: Update
) -> dict[str, Any]:
    """Return what `src/latent_stats.py` writes: mean and var (float32, C x h x w) of raw latents, and what they are of.

    The sums so far lie beside `options.output` until the caller has written it. `update(done, total)` counts images.

    Raises:
        UserError: fewer than two images, or too many bad ones.
    """
    rows = images.rows[: options.num_samples]
    identity = {"encoder": rae.encoder.identity(), "image_size": rae.geometry.image_size, "images": len(rows),
                "data": images.source.fingerprint(), "exif": options.exif, "piece_images": PIECE_IMAGES}  # fmt: skip
    partial = partial_file(options.output)
    total, done = LatentMoments(rae.latent_shape, process.device), 0
    if state := _interrupted(partial, identity):
        done = state["done"]
        total.add(state["count"], state["sums"])
    update(done, len(rows))
    for start in range(done, len(rows), PIECE_IMAGES):
        piece = replace(images, rows=rows[start : start + PIECE_IMAGES])
        moments = _piece(rae, piece, options, process, lambda n, s=start: update(s + n, len(rows)))
        total.add(moments.count, moments.sums)
        if process.main and start + PIECE_IMAGES < len(rows):
            sums = {"count": total.count, "sums": total.sums.cpu()}
            write_torch(partial, {"pass": identity, "done": start + PIECE_IMAGES, **sums})
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


def _interrupted(partial: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the sums that an interrupted pass over the same images left, if any."""
    if not partial.is_file():
        return None
    try:
        state = read(partial)
    except UserError as error:
        log.warning("The sums of an earlier pass can't be used: %s", error)
        return None
    if state.get("pass") != identity:
        log.warning("%s is of other images or another encoder: starting afresh.", partial)
        return None
    log.warning("Continuing an earlier pass at image %s.", f"{state['done']:,}")
    return state
