"""The one protocol by which reconstructions are scored: during training and from the command line alike (design §6).

Originals and reconstructions are compared as 8-bit images: rFID on Inception features, and the means of per-image PSNR,
SSIM and LPIPS from the same pass.

Legend: B batch, H, W image px.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.core.distributed import float64_device
from src.core.images import Quantization, bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.precision import full_float32
from src.metrics.fid import FeatureStatistics, Moments, few_images_warning, frechet_distance
from src.metrics.inception import InceptionFeatures
from src.metrics.means import RunningMeans
from src.metrics.quality import psnr, ssim
from src.metrics.reference import add_features

logger = logging.getLogger(__name__)

Lpips = Callable[[Tensor, Tensor], Tensor]  # two batches in [-1, 1] -> (B,)


class ReconstructionScore:
    """Takes batches with `update`, adds up ranks with `reduce` (once), and gives the numbers with `compute`.

    `quantization` makes the 8-bit reconstruction (`truncate` for the official figures). `reference` are ready moments
    to score against instead of the originals' own, whose features then aren't computed; it may be another score's
    `originals`, so that several reconstructions of the same images share them. Memory doesn't grow with the images.
    The score is called `rfid`, or `rfid_untrained` when the Inception network is untrained.
    """

    def __init__(
        self,
        inception: InceptionFeatures,
        inception_batch_size: int,
        lpips: Lpips | None = None,
        quantization: Quantization = "round",
        reference: Moments | None = None,
    ) -> None:
        self.inception, self.inception_batch_size, self.lpips = inception, inception_batch_size, lpips
        self.quantization = quantization
        self.score_name = "rfid_untrained" if inception.untrained else "rfid"
        device = float64_device(inception.device)
        self.reconstructions = FeatureStatistics(inception.feature_dim, device)
        self.originals = None if reference is not None else FeatureStatistics(inception.feature_dim, device)
        self._reference = reference
        self._means = RunningMeans(["psnr", "ssim"] + ["lpips"] * (lpips is not None))
        self._broken = RunningMeans(["not_finite"])
        self._reduced = False

    @property
    def reference(self) -> Moments:
        """What is scored against: the given moments, or the originals' own, which grow with each update."""
        return self.originals if self._reference is None else self._reference

    @torch.no_grad()
    def update(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Originals uint8 B x 3 x H x W and reconstructions float [0, 1] of the same shape, on any device.

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
        add_features(self.reconstructions, self.inception, decoded, self.inception_batch_size)
        if self.originals is not None:
            add_features(self.originals, self.inception, original, self.inception_batch_size)
        values = {"psnr": psnr(original, decoded), "ssim": ssim(original, decoded)}
        if self.lpips is not None:
            x, y = (unit_to_signed(bytes_to_unit(images)) for images in (original, decoded))
            with full_float32(x.device):
                values["lpips"] = self.lpips(x, y).flatten()
        self._means.update(values)
        return values

    def to_bytes(self, reconstruction: Tensor) -> Tensor:
        """The 8-bit images that are scored: uint8 of the same shape."""
        return unit_to_bytes(reconstruction.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), self.quantization)

    def reduce(self, group: Any | None = None) -> "ReconstructionScore":
        """Add up the ranks of `group`; on every rank, after its last `update`, also where it had no image."""
        if self._reduced:
            raise RuntimeError("a score is reduced over ranks once; reducing again would count every image twice")
        self._reduced = True
        parts = (self.reconstructions, self.originals, self._means, self._broken)
        for part in parts:
            if part is not None:
                part.reduce(group)
        return self

    def compute(self, warn_of_few: bool = True) -> dict[str, float | int]:
        """{score name: FID, "psnr": mean dB, "ssim", "lpips" where asked for, "images": int} of what was taken in.

        Takes seconds at 2,048 features (on the CPU), so let one rank do it. UserError for fewer than two images;
        logs a warning for fewer images than features, unless told not to (again).
        """
        score = frechet_distance(self.reference, self.reconstructions)
        warning = few_images_warning(self._means.count, self.inception.feature_dim)
        if warning and warn_of_few:
            logger.warning("%s", warning)
        broken = round(self._broken.means()["not_finite"] * self._broken.count)
        if broken:
            logger.warning("%d of %d reconstructions held values that are not finite", broken, self._broken.count)
        return {self.score_name: score, **self._means.means(), "images": self._means.count}
