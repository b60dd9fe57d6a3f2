"""Flow matching on latents: times, paths, losses. Sources: RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324);
docs/recipe.md, "Stage 2".

t = 1 is noise, t = 0 is data: x_t = (1 - t) x + t eps, velocity v = eps - x. Pure functions: random draws are arguments.

Legend: B batch, C latent channels, h = w latent grid. Latents are B C h w, times (B,).
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from src.core.errors import UserError
from src.core.settings import Settings

Time = TypeVar("Time", float, Tensor)
LAST_TIME = 0.999
"""Largest t of RAE in training, and the share of the time axis that its sampling grid covers."""


def time_shift(latent_shape: Sequence[int]) -> float:
    """Return s = sqrt(m / 4096) for latents of m = C h w dimensions: higher-dimensional latents need more noise.

    Raises:
        UserError: s is below 1.
    """
    numbers = math.prod(latent_shape)
    if numbers < 4096:
        raise UserError(
            f"Latents of {' x '.join(map(str, latent_shape))} = {numbers} numbers give a time shift of "
            f"{math.sqrt(numbers / 4096):.3f}; it must be at least 1, so 4096 numbers or more. Set the shift to 1 instead."
        )
    return math.sqrt(numbers / 4096)


def shift_time(t: Time, s: float) -> Time:
    """Return s t / (1 + (s - 1) t), computed so that 0 and 1 map exactly to themselves."""
    return s * t / ((1 - t) + s * t)


def sampling_grid(num_steps: int, s: float, kind: str, start: float = 1.0) -> Tensor:
    """Return the shifted sampling times, descending from `start`, float64.

    Args:
        num_steps: with `rae` the number of points (one step fewer), with `raev2` the number of steps (one point more).
        s: time shift; 1: evenly spaced.
        kind: `rae` ends at the shifted 0.001, `raev2` at 0.

    Raises:
        UserError: too few steps, or an unknown kind.
    """
    fewest = {"rae": 2, "raev2": 1}.get(kind)
    if fewest is None:
        raise UserError(f"kind={kind!r}: expected rae or raev2.")
    if num_steps < fewest:
        raise UserError(f"num_steps={num_steps}: a {kind} grid needs at least {fewest}.")
    last, points = (1 - LAST_TIME, num_steps) if kind == "rae" else (0.0, num_steps + 1)
    return shift_time(torch.linspace(shift_time(start, 1 / s), last, points, dtype=torch.float64), s)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t = (1 - t) x + t eps."""
    t = per_image(t, x)
    return (1 - t) * x + t * noise


def velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: str, t_eps: float = 0.05) -> Tensor:
    """Convert a model's output to a velocity.

    `prediction`: `velocity`: the output itself; `x`: the clean latent x^, so v = (x_t - x^) / max(t, t_eps); else UserError.
    """
    if prediction not in ("velocity", "x"):
        raise UserError(f"prediction={prediction!r}: expected velocity or x.")
    return output if prediction == "velocity" else (x_t - output) / per_image(t, x_t).clamp(min=t_eps)


def flow_matching_loss(
    output: Tensor | tuple[Tensor, Tensor],
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    prediction: str,
    t_eps: float,
    base_weight: float = 1.0,
) -> dict[str, Tensor]:
    """Return `loss` per image (B,): the mean over C, h, w of the squared velocity error.

    Args:
        output: of the model; (full, base) also returns `full` and `base`, and `loss` = full + base_weight * base.
        t_eps: the target is (x_t - x) / max(t, t_eps): RAE 0, which gives eps - x; RAEv2 0.05 for either prediction.
    """
    if isinstance(output, tuple):
        full, base = (flow_matching_loss(part, x, noise, t, prediction, t_eps)["loss"] for part in output)
        return {"loss": full + base_weight * base, "full": full, "base": base}
    if prediction == "x":
        if t_eps <= 0:
            raise UserError(f"t_eps={t_eps}: the prediction 'x' divides by max(t, t_eps); RAEv2 has 0.05.")
        difference = (x - output) / per_image(t, x).clamp(min=t_eps)  # x_t cancels
    else:
        share = (per_image(t, x) / t_eps).clamp(max=1) if t_eps > 0 else 1
        difference = output - (noise - x) * share
    return {"loss": difference.square().flatten(1).mean(1)}


def quartile_sums(losses: Tensor, uniforms: Tensor) -> Tensor:
    """Return 4 sums and 4 counts of the losses (B,), in their dtype, by quartile of the uniforms U[0, 1) that t came from.

    t is monotone in the uniforms, so these are quartiles of t too. The results add up over batches and ranks.
    """
    quartile = (uniforms * 4).long().clamp(max=3).to(losses.device, non_blocking=True)
    members = (quartile[:, None] == torch.arange(4, device=losses.device)).to(losses.dtype)  # B 4
    with torch.autocast(losses.device.type, enabled=False):  # autocast would round the losses to half precision
        return torch.cat([losses @ members, members.sum(0)])


def per_image(t: Tensor, images: Tensor) -> Tensor:
    """Reshape (B,) -> B 1 1 1, for `images` of any number of dimensions."""
    return t.reshape(-1, *[1] * (images.ndim - 1))


class FlowSettings(Settings):
    """The node `model.flow`."""

    prediction: Literal["velocity", "x"]
    """Meaning of the network's output: eps - z, or the clean latent (RAEv2)."""
    t_eps: float = Field(ge=0, lt=1)
    """Velocities are divided by max(t, t_eps): 0 in RAE, 0.05 in RAEv2."""
    time: Literal["uniform", "truncated_logit_normal", "logit_normal"]
    time_mu: float
    time_sigma: float = Field(gt=0)
    shift: float | None = Field(ge=1)
    """Time shift s; None: sqrt(C h w / 4096)."""
    base_weight: float = Field(ge=0)
    """Weight of the base head's loss, if the network has one (RAEv2's internal guidance)."""

    def draw_time(self, uniforms: Tensor, shift: float) -> Tensor:
        """Map U[0, 1) to shifted training times t; monotone, so quartiles of the uniforms are quartiles of t.

        Before the shift, `uniform`: on [0, 0.999); `logit_normal`: sigmoid(N(mu, sigma)) (RAEv2);
        `truncated_logit_normal`: the same conditioned on t <= 0.999 (RAE), by inverting the CDF.
        """
        mu, sigma = self.time_mu, self.time_sigma
        if self.time == "uniform":
            t = LAST_TIME * uniforms
        elif self.time == "truncated_logit_normal":
            largest = (math.log(LAST_TIME / (1 - LAST_TIME)) - mu) / sigma
            share = 0.5 * math.erfc(-largest / math.sqrt(2))  # of the normal distribution below `largest`
            t = torch.sigmoid(mu + sigma * torch.special.ndtri(uniforms.double() * share)).to(uniforms.dtype)
        else:
            normals = torch.special.ndtri(uniforms.double().clamp(min=2**-26)).to(uniforms.dtype)
            t = torch.sigmoid(mu + sigma * normals)
        return shift_time(t, shift)

    def shift_for(self, latent_shape: Sequence[int]) -> float:
        """Return s for latents of `latent_shape`."""
        return time_shift(latent_shape) if self.shift is None else self.shift
