"""Sample latents from a diffusion transformer: noise is a function of (seed, index), guidance comes from settings.

Legend: B images, C latent channels, h = w latent grid.
"""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.core.settings import Settings
from src.evaluation import sampling
from src.evaluation.sampling import Conditional, Guidance
from src.losses.flow_matching import FlowSettings, sampling_grid


class SamplerSettings(Settings):
    """The node `model.sampler` of stage-2 configs, which the options of `src/sample.py` override."""

    num_steps: int = Field(ge=1, le=10_000)
    """`rae`: number of time points, one more than steps; `raev2`: number of steps."""
    grid: Literal["rae", "raev2"]
    method: Literal["euler", "heun", "dopri5"]
    cfg: float = Field(ge=1)
    """Scale of classifier-free guidance; 1: none."""
    internal: float = Field(ge=1)
    """Scale of internal guidance, for networks with a base head; 1: none."""
    auto: float = Field(ge=1)
    """Scale of autoguidance by a second, weaker network; 1: none."""
    t_min: float = Field(ge=0, le=1)
    t_max: float = Field(ge=0, le=1)
    """Interval of times in which guidance applies, both ends included."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min={self.t_min:g} exceeds t_max={self.t_max:g}: guidance would never be used.")
        return self


class Sampler:
    """Samples latents by index: image i does not depend on the others in its batch, up to rounding."""

    def __init__(
        self,
        network: nn.Module,
        settings: SamplerSettings,
        flow: FlowSettings,
        seed: int,
        guide: tuple[nn.Module, FlowSettings] | None = None,
    ) -> None:
        """
        Args:
            network: a transformer of `src/models/dit.py` in evaluation mode.
            flow: settings that the network was trained with.
            guide: the weaker network of autoguidance, and the settings it was trained with.

        Raises:
            UserError: guidance that the networks don't support.
        """
        self.network, self.seed = network, seed
        self.shape: tuple[int, int, int] = network.latent_shape
        self.shift = flow.shift_for(self.shape)
        self.method, self.grid = settings.method, sampling_grid(settings.num_steps, self.shift, settings.grid)
        if self.method == "dopri5":
            sampling.adaptive_solver()  # fail before training, not at the first sample
        interval = settings.t_min, settings.t_max
        null_label: int | None = network.null_label
        run: Conditional = sampling.conditional(network, flow.prediction, flow.t_eps)
        if settings.internal > 1:
            if getattr(network, "base_model_depth", None) is None:
                raise UserError(
                    f"internal={settings.internal:g} (model.sampler.internal, --internal) needs a network with a base output "
                    "(model.network.base_model_depth), and this one has none. Set it to 1."
                )
            guidance = Guidance(settings.internal, *interval)
            run = sampling.internal_guidance(network, flow.prediction, guidance, flow.t_eps)
        if settings.auto > 1:
            if guide is None:
                raise UserError(
                    f"model.sampler.auto={settings.auto:g}: autoguidance needs a second network (src/sample.py --guide)."
                )
            weaker, its_flow = guide
            if (theirs := weaker.num_classes) != (ours := network.num_classes):
                raise UserError(f"The guide has {theirs} classes, the model {ours}: they must agree.")
            null_label = null_label if weaker.null_label is not None else None
            weak = sampling.conditional(weaker, its_flow.prediction, its_flow.t_eps)
            run = sampling.autoguidance(run, weak, Guidance(settings.auto, *interval))
        if settings.cfg > 1:
            run = sampling.classifier_free(run, null_label, Guidance(settings.cfg, *interval))
        self._run = run

    def latents(self, indices: Sequence[int], labels: Tensor, device: torch.device) -> Tensor:
        """Sample the latents, float32 B C h w, of the images with these indices and labels (B,)."""
        noise = streams.normals(self.seed, Purpose.SAMPLE_NOISE, 0, indices, self.shape, device)
        return self.integrate(noise, labels.to(device), self.grid)

    def integrate(self, z: Tensor, labels: Tensor, grid: Tensor) -> Tensor:
        """Integrate z, B C h w, from the first to the last time of `grid`. Labels (B,) are on the device of z."""
        return sampling.solve(sampling.for_labels(self._run, labels), z, grid, self.method)
