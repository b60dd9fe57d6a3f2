"""One pass over the images, by which every score of the project is made.

Legend: B batch, H, W image px. Images are uint8 B x 3 x H x W, reconstructions float in [0, 1] scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.metrics.reconstruction import ReconstructionScore

Reconstruct = Callable[[Tensor, Tensor], Iterable[Tensor]]
"""(images, rows of the source (B,)) -> one batch of reconstructions for each variant that is scored."""


class Observer(Protocol):
    """Sees every batch once it is scored."""

    def observe(self, variants: "Sequence[ScoredBatch]") -> None:
        """One entry for each variant, of the same images."""
        ...


class ScoredBatch:
    """What is known of a batch: places in the evaluation order over all ranks, rows of the source, images, values."""

    def __init__(
        self, places: Tensor, rows: Tensor, original: Tensor, decoded: Tensor, values: Mapping[str, Tensor]
    ) -> None:
        self.places, self.rows = places, rows  # (B,) int64
        self.original, self.decoded = original, decoded  # uint8 B 3 H W
        self.values = values  # psnr, ssim, lpips: each (B,)


@torch.no_grad()
def score_images(
    batches: Iterable[Mapping[str, Any]],
    reconstruct: Reconstruct,
    scores: Sequence[ReconstructionScore],
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    observers: Sequence[Observer] = (),
) -> None:
    """Take this rank's share of the images into `scores`, one for each variant. Reduce them afterwards.

    batches: as `src.data.dataset.collate` makes them; place p of rank r is place p * world + r of the whole.
    """
    for batch in batches:
        images = batch["image"].to(device, non_blocking=True)
        places = batch["position"] * world + rank
        outputs = reconstruct(images, batch["index"])
        scored = []
        for score, output in zip(scores, outputs, strict=True):
            values = score.update(images, output)
            if observers:
                scored.append(ScoredBatch(places, batch["index"], images, score.to_bytes(output), values))
        for observer in observers:
            observer.observe(scored)


def shared_scores(first: ReconstructionScore, count: int) -> list[ReconstructionScore]:
    """Scores for `count` reconstructions of the same images: the rest share the originals' features of `first`."""
    others = (
        ReconstructionScore(
            first.inception, first.inception_batch_size, first.lpips, first.quantization, first.reference
        )
        for _ in range(count - 1)
    )
    return [first, *others]
