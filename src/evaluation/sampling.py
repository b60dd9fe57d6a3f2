"""Solvers and guidance for sampling from a diffusion transformer. Sources: RAE (arXiv 2510.11690) and RAEv2 (arXiv
2605.18324); docs/recipe.md, "Stage 2".

A *conditional* is a function (x, t, y) -> velocity: `conditional(model, prediction)`, or one with guidance. Guidance can
be nested. `for_labels` turns a conditional into a *field* (x, t) -> velocity, which `solve` integrates:

    guided = classifier_free(internal_guidance(model, "x", Guidance(1.78, 0.1, 1)), model.null_label, Guidance(1.5))
    latents = solve(for_labels(guided, labels), noise, sampling_grid(100, s, "raev2"), "euler")

The caller sets evaluation mode and autocast. Legend: B batch, C latent channels, h = w latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.losses.flow_matching import per_image, velocity

Field = Callable[[Tensor, Tensor], Tensor]
Conditional = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def solve(field: Field, z: Tensor, grid: Tensor, method: str) -> Tensor:
    """Integrate dx/dt = field(x, t) from x = z at grid[0] and return x at grid[-1], in z's dtype.

    Args:
        field: called with t of shape (B,) in z's dtype; velocities of lower precision are accumulated in z's dtype.
        z: B C h w
        grid: times, preferably float64 (`sampling_grid`); their differences are the step sizes.
        method: `euler`; `heun`: the trapezoidal rule, with two evaluations in every interval including the last;
            `dopri5`: adaptive (torchdiffeq, atol 1e-6, rtol 1e-3), uses only the first and last time of the grid.

    Raises:
        UserError: unknown method, or torchdiffeq is not installed.
    """
    if method == "dopri5":
        return _dopri5(field, z, grid)
    if method not in ("euler", "heun"):
        raise UserError(f"method={method!r}: expected euler, heun or dopri5.")
    times, x = grid.double().tolist(), z
    for start, end in pairwise(times):
        step = end - start
        slope = field(x, _times(z, start)).to(z.dtype)
        if method == "heun":
            ahead = field(x + step * slope, _times(z, end)).to(z.dtype)
            slope = (slope + ahead) / 2
        x = x + step * slope
    return x


def _times(z: Tensor, value: float) -> Tensor:
    """Return `value` as times (B,) in z's dtype, with a CPU copy in `on_host` so that comparing it needs no sync."""
    times = z.new_full((len(z),), value)
    times.on_host = torch.tensor([value], dtype=z.dtype)  # type: ignore[attr-defined]
    return times


def adaptive_solver() -> Any:
    """Return torchdiffeq's `odeint`. Raises UserError if it is not installed."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError(
            f"Sampling method dopri5 needs torchdiffeq ({error}): pip install torchdiffeq, or choose heun."
        ) from error
    return odeint


def _dopri5(field: Field, z: Tensor, grid: Tensor) -> Tensor:
    odeint = adaptive_solver()
    ends = grid[[0, -1]].to(z)
    return odeint(lambda t, x: field(x, t.to(z).expand(len(z))), z, ends, atol=1e-6, rtol=1e-3, method="dopri5")[-1]


@dataclass(frozen=True)
class Guidance:
    """Scale w in v_weak + w (v_strong - v_weak), and the closed interval of times in which guidance applies."""

    scale: float
    t_min: float = 0.0
    t_max: float = 1.0

    def used_at(self, t: Tensor) -> bool:
        """Return whether guidance applies at any of the times. Syncs with the device unless t has `on_host` (`_times`)."""
        return self.scale > 1 and bool(_inside(getattr(t, "on_host", t), self.t_min, self.t_max).any())


def guide(strong: Tensor, weak: Tensor, w: float | Tensor, t: float | Tensor, t_min: float, t_max: float) -> Tensor:
    """Return weak + w (strong - weak) where t_min <= t <= t_max, else strong. `w` and `t` are numbers or (B,)."""
    if isinstance(w, Tensor):
        w = per_image(w, strong)
    guided = weak + w * (strong - weak)
    inside = _inside(torch.as_tensor(t, device=strong.device), t_min, t_max)
    return torch.where(per_image(inside, strong), guided, strong)


def _inside(t: Tensor, t_min: float, t_max: float) -> Tensor:
    return (t >= t_min) & (t <= t_max)


def for_labels(conditional: Conditional, labels: Tensor) -> Field:
    """Return the field (x, t) -> velocity for fixed labels (B,)."""
    return lambda x, t: conditional(x, t, labels)


def conditional(model: nn.Module, prediction: str, t_eps: float = 0.05) -> Conditional:
    """Return a model as a conditional; of two outputs (full, base) the full one counts. Arguments as in `velocity`."""

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return velocity(_outputs(model, x, t, y)[0], x, t, prediction, t_eps)

    return run


def classifier_free(inner: Conditional, null_label: int | None, guidance: Guidance) -> Conditional:
    """Add classifier-free guidance (Ho & Salimans, arXiv 2207.12598), computed in one batch of twice the size.

    Outside the interval only the conditional half is computed. Raises UserError without a null label.
    """
    if null_label is None:
        raise UserError(
            f"cfg={guidance.scale:g} (model.sampler.cfg, --cfg) needs a null label, but the model, or its guide, has "
            "model.label_dropout=0."
        )

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not guidance.used_at(t):
            return inner(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null_label)])
        twice = torch.cat([t, t])
        if hasattr(t, "on_host"):
            twice.on_host = t.on_host  # type: ignore[attr-defined]
        strong, weak = inner(torch.cat([x, x]), twice, labels).chunk(2)
        return guide(strong, weak, guidance.scale, t, guidance.t_min, guidance.t_max)

    return run


def autoguidance(strong: Conditional, weak: Conditional, guidance: Guidance) -> Conditional:
    """Guide by a weaker model with the same labels (Karras et al., arXiv 2406.02507), which runs only inside the interval."""

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not guidance.used_at(t):
            return strong(x, t, y)
        return guide(strong(x, t, y), weak(x, t, y), guidance.scale, t, guidance.t_min, guidance.t_max)

    return run


def internal_guidance(
    model: nn.Module,
    prediction: str,
    guidance: Guidance,
    t_eps: float = 0.05,
    null_label: int | None = None,
    null_scale: float | None = None,
) -> Conditional:
    """Guide the full output by the base output of the same forward pass (RAEv2).

    `null_scale`: scale for images with the null label, which occur when `classifier_free` wraps this.
    """
    if null_scale is not None and null_label is None:
        raise UserError(f"null_scale={null_scale} needs null_label, the label that it applies to.")

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        full, base = _outputs(model, x, t, y)
        scale = x.new_full((len(x),), guidance.scale)
        if null_scale is not None:
            scale.masked_fill_(y == null_label, null_scale)  # assigning through the mask would sync with the device
        output = guide(full, base, scale, t, guidance.t_min, guidance.t_max)
        return velocity(output, x, t, prediction, t_eps)

    return run


def _outputs(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Return the model's one or two outputs in x's dtype: guidance amplifies the rounding errors of half precision."""
    output = model(x, t, y)
    return tuple(part.to(x.dtype) for part in (output if isinstance(output, tuple) else (output,)))
