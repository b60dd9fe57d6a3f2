"""The protocol by which reconstructions are scored, in training and from the command line (docs/evaluation.md).

Originals and reconstructions are compared as 8-bit images: rFID on Inception features, and the means of per-image PSNR,
SSIM and LPIPS from the same pass.

Legend: B batch, H, W image px.
"""

import logging
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from src.core.distributed import float64_device
from src.core.images import Quantization, bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.precision import full_float32
from src.metrics.fid import FeatureStatistics, Moments, few_images_warning, frechet_distance
from src.metrics.inception import InceptionFeatures
from src.metrics.quality import RunningMeans, psnr, ssim
from src.metrics.reference import add_features

logger = logging.getLogger(__name__)

Lpips = Callable[[Tensor, Tensor], Tensor]  # two batches in [-1, 1] -> (B,)


class ReconstructionScore:
    """Takes batches with `update`, adds up ranks with `reduce` (once), and gives the numbers with `compute`.

    `inception` None: no FID. `quantization` makes the 8-bit reconstruction (`truncate` for the official figures).
    `reference` are ready moments to score against instead of the originals' own, whose features then aren't computed;
    it may be another score's `reference`, so that several reconstructions of the same images share them. Memory
    doesn't grow with the images. Numbers of untrained networks are called `rfid_untrained` and `lpips_untrained`.
    """

    def __init__(
        self,
        inception: InceptionFeatures | None,
        inception_batch_size: int = 1,
        lpips: Lpips | None = None,
        quantization: Quantization = "round",
        reference: Moments | None = None,
    ) -> None:
        self.inception, self.inception_batch_size, self.lpips = inception, inception_batch_size, lpips
        self.quantization = quantization
        self.quality_names = ("psnr", "ssim", *([_named("lpips", lpips)] if lpips is not None else []))
        """Of the per-image values."""
        self._statistics: dict[str, FeatureStatistics] = {}
        if inception is not None:
            kinds = ("reconstructions", "originals") if reference is None else ("reconstructions",)
            device = float64_device(inception.device)
            self._statistics = {kind: FeatureStatistics(inception.feature_dim, device) for kind in kinds}
        self._reference = reference
        self._means = RunningMeans(self.quality_names)
        self._broken = RunningMeans(["not_finite"])
        self._reduced = False

    @property
    def reference(self) -> Moments:
        """What is scored against: the given moments, or the originals' own, which grow with each update."""
        return self._statistics["originals"] if self._reference is None else self._reference

    @property
    def count(self) -> int:
        """Images taken in; of all ranks, once reduced."""
        return self._means.count

    @torch.no_grad()
    def update(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Take in originals uint8 B x 3 x H x W and reconstructions float [0, 1] of the same shape, on any device.

        Returns the per-image values psnr (dB), ssim, and lpips where there is one, each (B,). Reconstructions outside
        of [0, 1] are clamped; values that are not finite count as 0 and `compute` warns of them.
        """
        if self._reduced:
            raise RuntimeError("this score was reduced over ranks already; make a new one for more images")
        if original.shape != reconstruction.shape or original.dtype != torch.uint8:
            raise ValueError(
                f"expected uint8 originals and float reconstructions of one shape, got {original.dtype} "
                f"{tuple(original.shape)} and {reconstruction.dtype} {tuple(reconstruction.shape)}"
            )
        original = original.to(reconstruction.device)
        self._broken.update({"not_finite": ~torch.isfinite(reconstruction).flatten(1).all(dim=1)})
        decoded = self.to_bytes(reconstruction)
        for kind, statistics in self._statistics.items():
            images = original if kind == "originals" else decoded
            add_features(statistics, self.inception, images, self.inception_batch_size)
        values = {"psnr": psnr(original, decoded), "ssim": ssim(original, decoded)}
        if self.lpips is not None:
            x, y = (unit_to_signed(bytes_to_unit(images)) for images in (original, decoded))
            with full_float32(x.device):
                values[self.quality_names[-1]] = self.lpips(x, y).flatten()
        self._means.update(values)
        return values

    def to_bytes(self, reconstruction: Tensor) -> Tensor:
        """Return the 8-bit images that are scored: uint8 of the same shape."""
        return unit_to_bytes(reconstruction.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), self.quantization)

    def reduce(self) -> Self:
        """Add up the ranks; on every rank, after its last `update`, also where it had no image."""
        if self._reduced:
            raise RuntimeError("a score is reduced over ranks once; reducing again would count every image twice")
        self._reduced = True
        for part in (*self._statistics.values(), self._means, self._broken):
            part.reduce()
        return self

    def compute(self, warn_of_few: bool = True) -> dict[str, float | int]:
        """Return {"rfid": FID, "psnr": mean dB, "ssim", "lpips" where asked for, "images": int} of what was taken in.

        FID takes seconds at 2,048 features (on the CPU), so let one rank do it. UserError for fewer than two images;
        logs a warning for fewer images than features, unless told not to (again).
        """
        values: dict[str, float | int] = {}
        if self.inception is not None:
            distance = frechet_distance(self.reference, self._statistics["reconstructions"])
            values[_named("rfid", self.inception)] = distance
            warning = few_images_warning(self.count, self.inception.feature_dim)
            if warning and warn_of_few:
                logger.warning("%s", warning)
        broken = round(self._broken.means()["not_finite"] * self.count) if self.count else 0
        if broken:
            logger.warning("%d of %d reconstructions held values that are not finite", broken, self.count)
        return {**values, **self._means.means(), "images": self.count}


def _named(name: str, network: object) -> str:
    """Numbers of untrained networks are named as such."""
    return f"{name}_untrained" if getattr(network, "untrained", False) else name
