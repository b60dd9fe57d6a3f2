"""What a network of image features is to the scores; which ones there are: `src/evaluation/networks.py`.

Legend: B batch, F features, S spatial features, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.core.weights import Frozen

INCEPTION = "inception"
_PLAIN = {"rfid": "rfd", "gfid": "gfd"}  # the I is for Inception


class FeatureOutputs(NamedTuple):
    """What scores take of an image. All but the first are Inception's, for the scores of ADM's suite."""

    pool: Tensor
    """B F, for the Frechet distance, precision and recall"""
    spatial: Tensor | None = None
    """B S, for sFID: 7 channels of `mixed_6/conv` after its ReLU, flattened as (row, column, channel)"""
    logits: Tensor | None = None
    """B K, for the Inception Score: without the bias"""


class FeatureNetwork(Frozen):
    """Features B F of uint8 images B x 3 x H x W of any size; float32, whatever surrounds it."""

    space: str
    """Its name in options and scores."""
    name: str
    """Of its features: network and weights. References keep it; only equal names compare."""
    feature_dim: int
    spatial_dim: int = 0
    """0: neither spatial features nor logits."""
    untrained: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def outputs(self, images: Tensor) -> FeatureOutputs:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return `outputs(images).pool`."""
        return self.outputs(images).pool


def score_name(score: str, network: FeatureNetwork) -> str:
    """Return the key of a score: `rfid`, `gfid` and the others are Inception's, so of another network's features it is
    `rfd_dinov2`, `precision_dinov2`; of random weights it ends in `_untrained`."""
    if network.space != INCEPTION:
        score = f"{_PLAIN.get(score, score)}_{network.space}"
    return f"{score}_untrained" if network.untrained else score
