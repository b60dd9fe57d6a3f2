"""Build the optimisers and apply an update.

AdamW, or Muon for matrices with AdamW for the rest as one optimiser (one schedule, one entry in a checkpoint). Source of
Muon: RAEv2 (arXiv 2605.18324). Deviation (docs/recipe.md, "Stage 2"): torch's Muon uses one coefficient triple for all
Newton-Schulz steps, RAEv2's private package uses Polar Express coefficients.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from src.core.nonfinite import NonFiniteCounter
from src.training.settings import OptimizerSettings


def adamw(module: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return fused AdamW over the trainable parameters of `module`."""
    trained = (p for p in module.parameters() if p.requires_grad)
    return torch.optim.AdamW(
        trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


class MuonWithAdamW(torch.optim.Optimizer):
    """Updates 2-D parameters by Muon (momentum .95, Nesterov, learning rates matched to AdamW's), all others by AdamW."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([{"params": matrices}, {"params": others}], {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update both parts with the learning rate of the first group."""
        result = closure() if closure is not None else None
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])


def step_optimizer(
    optimizer: Any,
    lr: float,
    counter: NonFiniteCounter,
    step: int,
    watched: Mapping[str, Tensor],
    prefix: str = "",
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
) -> Tensor:
    """Update with the current gradients, or leave weights and moments unchanged if a number is not finite.

    Args:
        optimizer: any torch optimiser, bare (its steps are not counted) or in Lightning's wrapper, which applies its scaler
            itself. One that is not fused ignores `found_inf`, so there the host waits for the device.
        counter: records numbers that are not finite in update `step`.
        watched: scalars that must be finite, named as in `CAUSAL_ORDER` after `prefix`.
        scaler: loss scaler of these gradients. It skips overflowing gradients itself, so they are not watched.
        clip: largest norm of the gradient; None: no clipping.

    Returns:
        Norm of the gradient before clipping, a scalar on the device.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    norm = norm / loss_scale(scaler, norm.device)
    scaled = scaler is not None and scaler.is_enabled()
    seen = watched if scaled else {**watched, "gradient": norm}
    found = counter.observe(step, {prefix + name: value for name, value in seen.items()})
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in inner.param_groups:
        group["lr"] = lr
    if not scaled and getattr(inner, "_step_supports_amp_scaling", False):  # fused: 1 skips the update
        inner.found_inf = found
    elif not scaled and found.item():  # no gradients: no update
        inner.zero_grad(set_to_none=True)
    with record_function("optimizer"):
        if scaler is None or optimizer is not inner:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return norm


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | float:
    """Return the scale of a loss scaler without waiting for the device; 1 without a scaler."""
    return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
