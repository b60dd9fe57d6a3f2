"""Small operations on optimisers and gradients, without host synchronisation."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.core.distributed import mean_over_ranks
from src.training.settings import OptimizerSettings


def adamw(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over what `module` trains."""
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, a scalar on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients averaged over ranks, in one exchange."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
