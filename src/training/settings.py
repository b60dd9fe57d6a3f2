"""Typed settings of `configs/model/*.yaml`, checked before data or weights are opened."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from src.core.schedules import Schedule
from src.core.settings import Settings
from src.formats.checkpoint import RAESettings, with_current_keys
from src.losses.diffaug import DiffAug
from src.losses.lpips import LPIPSSettings
from src.models.discriminator import DiscriminatorSettings
from src.models.encoder_presets import expand_encoder
from src.training.stage1_step import StepSettings

Epoch = Annotated[float, Field(ge=0, allow_inf_nan=True)]
"""In epochs. Fractions are rounded to a step; infinity means never."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """Settings of AdamW."""

    lr: float = Field(gt=0)
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]
    weight_decay: float = Field(ge=0)


class StageSettings(Settings):
    """Settings common to all stages."""

    typed_as: ClassVar[Mapping[str, str]] = {"seed": "seed"} | {
        key: f"trainer.{key}"
        for key in ("accumulate_grad_batches", "gradient_clip_val", "max_skipped_steps", "log_every_n_steps")
    }

    ema_decay: float = Field(ge=0, lt=1)
    sample_every: int = Field(ge=0)
    """Updates between sample images; 0: only at the end."""
    compile: bool
    seed: int
    accumulate_grad_batches: int = Field(ge=1)
    gradient_clip_val: Annotated[float, Field(gt=0)] | None
    """Largest norm of the gradient; None: no clipping."""
    max_skipped_steps: int = Field(ge=0)
    """Updates with non-finite numbers that are skipped before training stops; 0: stop at the first."""
    log_every_n_steps: int = Field(ge=1)


class StartEpochs(Settings):
    """Start epoch of each part of the loss."""

    lpips_start_epoch: Epoch
    disc_upd_start_epoch: Epoch
    disc_start_epoch: Epoch

    def start_steps(self, steps_per_epoch: int) -> dict[str, float]:
        """Return the first step of each part: whole numbers or infinity."""
        epochs = {"lpips": self.lpips_start_epoch, "disc": self.disc_upd_start_epoch, "gan": self.disc_start_epoch}
        return {part: epoch if math.isinf(epoch) else round(epoch * steps_per_epoch) for part, epoch in epochs.items()}


class LayerSubset(Settings):
    """Random subsets of the encoder's chosen blocks during training (FuseReg, arXiv 2609.31620)."""

    kind: Literal["none", "uniform"]
    keep_probability: float = Field(gt=0, le=1)
    """Per block, conditional on a non-empty subset; 0.5 makes all non-empty subsets equally likely."""


class LatentNoiseSettings(Settings):
    """Distribution of sigma, the standard deviation of the latent noise, with scale tau = `noise_tau`. See docs/recipe.md."""

    level: Literal["uniform", "half_normal", "logit_normal"]
    """uniform: U(0, tau), as RAE's code; half_normal: |N(0, (tau/2)^2)|, as RAE's paper (arXiv 2510.11690) at twice its tau;
    logit_normal: tau * sigmoid(N(mu, s^2)), the family of Esser et al. (arXiv 2403.03206, equation 19)."""
    mu: float
    s: float = Field(gt=0)
    """mu and s: only for logit_normal."""
    per: Literal["image", "token"]
    """image: all tokens of an image share sigma; token: one sigma per token."""

    def quantile(self, u: Tensor, tau: float) -> Tensor:
        """Return sigma for draws u from U[0, 1), of any shape: the inverse CDF."""
        if self.level == "half_normal":
            return tau / 2 * torch.special.ndtri((1 + u.double()) / 2).to(u.dtype)
        if self.level == "logit_normal":
            return tau * torch.sigmoid(self.mu + self.s * torch.special.ndtri(u.double())).to(u.dtype)
        return tau * u


class GeneratedLatentsSettings(Settings):
    """The node `model.generated`."""

    checkpoint: str | None
    """Checkpoint of stage 2; None: off, the decoder gets the latents of the images."""
    t0: Annotated[float, Field(gt=0, le=1)]
    """Time to which latents are noised; 0 is data, 1 is noise."""
    steps: Annotated[int, Field(ge=1)]
    """Sampler steps from t0 to 0, on the sampler's shifted grid."""


class AdversarySettings(Settings):
    """The node `model.disc_arch`."""

    arch: DiscriminatorSettings
    augment: DiffAug


class ModelSettings(RAESettings, StepSettings, StartEpochs, StageSettings):
    """The node `model:` of stage 1."""

    typed_as: ClassVar[Mapping[str, str]] = {**RAESettings.typed_as, **StageSettings.typed_as}

    optimizer: OptimizerSettings
    scheduler: Schedule
    disc_optimizer: OptimizerSettings
    disc_scheduler: Schedule
    disc_arch: AdversarySettings
    noise: LatentNoiseSettings
    generated: GeneratedLatentsSettings
    layer_subset: LayerSubset
    lpips_arch: LPIPSSettings

    @classmethod
    def parse(cls, values: Mapping[str, Any], key: str = "model") -> Self:
        """Check the node; keys of earlier versions are accepted. Raises UserError listing every problem."""
        return super().parse(expand_encoder(with_current_keys(values)), key)
