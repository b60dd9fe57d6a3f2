"""Small operations on optimisers and gradients, without host synchronisation."""

from collections.abc import Sequence

import torch
from torch import nn

from src.core.distributed import is_distributed, mean_over_ranks
from src.training.settings import OptimizerSettings


def adamw(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return fused AdamW over what `module` trains."""
    trained = (p for p in module.parameters() if p.requires_grad)
    return torch.optim.AdamW(
        trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over ranks, in one exchange."""
    if not is_distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
