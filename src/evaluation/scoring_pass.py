"""Reconstruct and score images in one pass; every reconstruction score and sheet of the project comes from here.

Legend: B batch, H, W image px. Images are uint8 B x 3 x H x W, reconstructions float in [0, 1] scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.core.distributed import Process
from src.metrics.reconstruction import ReconstructionScore

Reconstruct = Callable[[Tensor, Tensor], Iterable[Tensor]]
"""(images, rows of the source (B,)) -> one batch of reconstructions for each scored variant."""


@dataclass(frozen=True)
class ScoredBatch:
    """A scored batch of one variant, on any device."""

    places: Tensor  # (B,) int64, in the evaluation order over all ranks
    rows: Tensor  # (B,) int64, rows of the source
    original: Tensor  # uint8 B 3 H W
    decoded: Tensor  # uint8 B 3 H W
    values: Mapping[str, Tensor]
    """psnr, ssim and lpips (or lpips_untrained), those that were requested, each (B,)."""


Observer = Callable[[Sequence[ScoredBatch]], None]
"""Called with each scored batch: an entry for each variant, of the same images."""


@torch.no_grad()
def score_images(
    batches: Iterable[Mapping[str, Any]],
    reconstruct: Reconstruct,
    scores: Sequence[ReconstructionScore],
    process: Process,
    observers: Sequence[Observer] = (),
) -> None:
    """Add this rank's share of the images to `scores`, one for each variant. The caller reduces them afterwards.

    batches: as `src.data.dataset.collate` makes them; position p of rank r is position p * world + r overall. Without
    scores, `reconstruct` runs for its side effects.
    """
    for batch in batches:
        images = batch["image"].to(process.device, non_blocking=True)
        places = batch["position"] * process.world + process.rank
        scored = []
        for score, output in zip(scores, reconstruct(images, batch["index"]), strict=True):
            values = score.update(images, output)
            if observers:
                scored.append(ScoredBatch(places, batch["index"], images, score.to_bytes(output), values))
        for observer in observers:
            observer(scored)
