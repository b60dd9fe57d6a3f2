"""Score reconstructions, in training and from the command line, by one protocol (docs/evaluation.md).

Originals and reconstructions are compared as 8-bit images: Frechet distances of features (rFID for Inception), and means
of per-image PSNR, SSIM and LPIPS from the same pass.

Legend: B batch, H, W image px.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from src.core.images import Quantization, bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.precision import full_float32
from src.metrics.features import FeatureNetwork, score_name
from src.metrics.fid import Moments, few_images_warning, frechet_distance
from src.metrics.generation import ImageStatistics
from src.metrics.quality import RunningMeans, psnr, ssim

log = logging.getLogger(__name__)

Lpips = Callable[[Tensor, Tensor], Tensor]  # two batches in [-1, 1] -> (B,)


class ReconstructionScore:
    """Scores of reconstructions: call `update` with batches, `reduce` once to combine ranks, then `compute`.

    No `networks`: no Frechet distance. `batch_size`: images per forward pass. `quantization`: how floats become 8-bit
    (`truncate` for the official figures). `references`: moments to score against, by the network's `space`, instead of those
    of the originals, whose features are then not computed; pass another score's `references` to share them between several
    reconstructions of the same images. Memory doesn't grow with the number of images. Scores of untrained networks are
    called `rfid_untrained` and `lpips_untrained`.
    """

    def __init__(
        self,
        networks: Sequence[FeatureNetwork] = (),
        batch_size: int = 1,
        lpips: Lpips | None = None,
        quantization: Quantization = "round",
        references: Mapping[str, Moments] | None = None,
    ) -> None:
        self.networks, self.lpips, self.quantization = tuple(networks), lpips, quantization
        untrained = getattr(lpips, "untrained", False)
        self.quality_names = ("psnr", "ssim", *([f"lpips{'_untrained' * untrained}"] if lpips is not None else []))
        """Names of the per-image values."""

        def statistics(network: FeatureNetwork) -> ImageStatistics:
            return ImageStatistics(network, batch_size, keep=False, spatial=False)

        self._reconstructions = {network.space: statistics(network) for network in networks}
        missing = [network for network in networks if network.space not in (references or {})]
        self._originals = {network.space: statistics(network) for network in missing}
        own = {space: part.pool for space, part in self._originals.items()}
        self.references: Mapping[str, Moments] = {**(references or {}), **own}
        """Moments to score against, by `space`: those given, or the originals' own, which change with each update."""
        self._means = RunningMeans(self.quality_names)
        self._broken = RunningMeans(["not_finite"])
        self._reduced = False

    @property
    def count(self) -> int:
        """Number of images so far; of all ranks after `reduce`."""
        return self._means.count

    @torch.no_grad()
    def update(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Add originals uint8 B x 3 x H x W and reconstructions float [0, 1] of the same shape, on any device.

        Returns the per-image values psnr (dB), ssim, and lpips if available, each (B,). Reconstructions outside of
        [0, 1] are clamped; non-finite values count as 0, and `compute` warns about them.
        """
        if self._reduced:
            raise RuntimeError("this score was reduced over ranks already; make a new one for more images")
        original = original.to(reconstruction.device)
        decoded = self.to_bytes(reconstruction)
        values = {"psnr": psnr(original, decoded), "ssim": ssim(original, decoded)}
        self._broken.update({"not_finite": ~torch.isfinite(reconstruction).flatten(1).all(dim=1)})
        for found, images in ((self._reconstructions, decoded), (self._originals, original)):
            for part in found.values():
                part.update(images)
        if self.lpips is not None:
            x, y = (unit_to_signed(bytes_to_unit(images)) for images in (original, decoded))
            with full_float32(x.device):
                values[self.quality_names[-1]] = self.lpips(x, y).flatten()
        self._means.update(values)
        return values

    def to_bytes(self, reconstruction: Tensor) -> Tensor:
        """Return the 8-bit images that are scored, uint8 of the same shape."""
        return unit_to_bytes(reconstruction.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), self.quantization)

    def reduce(self) -> Self:
        """Add up all ranks. Call on every rank after its last `update`, even if it had no images."""
        if self._reduced:
            raise RuntimeError("a score is reduced over ranks once; reducing again would count every image twice")
        self._reduced = True
        for part in (*self._reconstructions.values(), *self._originals.values(), self._means, self._broken):
            part.reduce()
        return self

    def compute(self, warn_of_few: bool = True) -> dict[str, float | int]:
        """Return {"rfid": FID, "psnr": mean dB, "ssim", "lpips" if requested, "images": int} of all images so far. For other
        networks the distance has names such as `rfd_dinov2`.

        FID takes seconds at 2,048 features (on the CPU), so call it on one rank. UserError for fewer than two images;
        `warn_of_few`: log a warning if there are fewer images than features.
        """
        values: dict[str, float | int] = {}
        for network in self.networks:
            distance = frechet_distance(self.references[network.space], self._reconstructions[network.space].pool)
            values[score_name("rfid", network)] = distance
            warning = few_images_warning(self.count, network.feature_dim)
            if warning and warn_of_few:
                log.warning("%s", warning)
        broken = round(self._broken.means()["not_finite"] * self.count) if self.count else 0
        if broken:
            log.warning("%d of %d reconstructions held values that are not finite", broken, self.count)
        return {**values, **self._means.means(), "images": self.count}
