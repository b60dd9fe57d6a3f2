"""Spectral normalisation with an explicit power iteration. Miyato et al., arXiv 1802.05957.

Same results as `torch.nn.utils.spectral_norm` (eps 1e-12): W / sigma with sigma = u^T W v, where the gradient flows
through sigma with u and v held constant. There every forward in training mode iterates; here only `power_iteration()`
does, so forward never changes state in any mode, and a batch can be processed in chunks.

Legend: S stacked matrices (each normalised on its own), O rows, K columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
WARM_UP_ITERATIONS = 15
"""Power iterations at construction: with random u and v, sigma is far too small and the first forward would explode."""


class SpectralWeights(nn.Module):
    """S weights of the same shape, stored as S x shape: parameter `weight_orig`, buffers `weight_u` and `weight_v`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_orig = nn.Parameter(weight)
        matrices = weight.detach().flatten(2)  # S O K
        self.register_buffer("weight_u", F.normalize(torch.randn(matrices.shape[:2]), dim=1, eps=EPS))
        self.register_buffer("weight_v", F.normalize(torch.randn(len(matrices), matrices.shape[2]), dim=1, eps=EPS))
        for _ in range(WARM_UP_ITERATIONS):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Set v <- normalised W^T u, u <- normalised W v in place, in the dtype of the weights, without synchronisation."""
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            matrices = self.weight_orig.flatten(2)
            v = F.normalize((self.weight_u[:, None] @ matrices)[:, 0], dim=1, eps=EPS)
            u = F.normalize((matrices @ v[:, :, None])[:, :, 0], dim=1, eps=EPS)
            self.weight_v.copy_(v)
            self.weight_u.copy_(u)

    def forward(self) -> tuple[Tensor, ...]:
        """Return S normalised weights. Does not change state."""
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            # Clone: the backward of this forward may run after the next power iteration.
            u, v = self.weight_u.clone(), self.weight_v.clone()
            sigma = (u * (self.weight_orig.flatten(2) @ v[:, :, None])[:, :, 0]).sum(1)
            return (self.weight_orig / sigma.view(-1, *[1] * (self.weight_orig.ndim - 1))).unbind(0)


class PlainWeights(nn.Module):
    """Same interface without normalisation, for `using_spec_norm: false`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def power_iteration(self) -> None:
        """Do nothing."""

    def forward(self) -> tuple[Tensor, ...]:
        return self.weight.unbind(0)
