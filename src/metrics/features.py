"""Interface of the feature networks that the scores use. The networks themselves: `src/evaluation/networks.py`.

Legend: B batch, F features, S spatial features, K classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.core.weights import Frozen

INCEPTION = "inception"
_PLAIN = {"rfid": "rfd", "gfid": "gfd"}  # the I is for Inception


class FeatureOutputs(NamedTuple):
    """Network outputs that the scores use. Only Inception has all three, for the scores of ADM's suite."""

    pool: Tensor
    """B F, for the Frechet distance, precision and recall."""
    spatial: Tensor | None = None
    """B S, for sFID: 7 channels of `mixed_6/conv` after its ReLU, flattened as (row, column, channel)."""
    logits: Tensor | None = None
    """B K, for the Inception Score: without the bias."""


class FeatureNetwork(Frozen):
    """Maps uint8 images B x 3 x H x W of any size to features B F; always float32, also under autocast."""

    space: str
    """Name in options and scores."""
    name: str
    """Identifies network and weights. References store it; only features of the same name may be compared."""
    feature_dim: int
    spatial_dim: int = 0
    """S; 0: the network has neither spatial features nor logits."""
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
    """Return the key of a score: `rfid`, `gfid`, ... for Inception, `rfd_dinov2`, `precision_dinov2`, ... for another network;
    with random weights it ends in `_untrained`."""
    if network.space != INCEPTION:
        score = f"{_PLAIN.get(score, score)}_{network.space}"
    return f"{score}_untrained" if network.untrained else score
