"""Projected discriminator: small convolutional heads on feature maps of a frozen DINO trunk.

Sauer et al., arXiv 2301.09515 (StyleGAN-T), as used in RAE (arXiv 2510.11690): only the heads are trained.

Legend: B batch, C width, L patch tokens, S heads. Images are B x 3 x H x W, float in [-1, 1].
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from src.core.settings import Settings, one_of
from src.core.weights import SizedWeights
from src.models.dino import RECIPES, TINY, DinoTrunk
from src.models.recompute import recomputed
from src.models.spectral_norm import PlainWeights, SpectralWeights

NORM_EPS = 1e-6
GROUPS = 32
SLOPE = 0.2
Pair = tuple[Tensor, Tensor]
"""Weight and bias."""


class DiscriminatorSettings(Settings):
    """The node `model.disc_arch.arch`: arguments of `DinoDiscriminator`."""

    dino_ckpt_path: str | None
    ks: int = Field(ge=1)
    """Kernel size of the second convolution: odd, at most 2 L + 1."""
    key_depths: list[int] = Field(min_length=1)
    """Blocks whose feature maps are used, from 0, ascending."""
    norm_type: Literal["bn", "gn"]
    """`bn` is the published name for a per-sample norm over L with affine parameters; `gn` is GroupNorm."""
    using_spec_norm: bool
    """Spectral normalisation of all convolutions."""
    recipe: Annotated[str, one_of(RECIPES)]
    """Sizes of the trunk."""
    weights: SizedWeights
    """`tiny` has its own sizes and ignores `recipe`."""

    @property
    def name(self) -> str:
        """Name of the trunk's sizes."""
        return "tiny" if self.weights == "tiny" else self.recipe

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes, depths = TINY if self.weights == "tiny" else RECIPES[self.recipe], self.key_depths
        if self.norm_type == "gn" and sizes.width % GROUPS:
            raise ValueError(f"norm_type=gn needs a width divisible by {GROUPS}; this trunk has {sizes.width}.")
        if self.ks % 2 == 0 or self.ks // 2 > sizes.tokens:
            raise ValueError(f"ks={self.ks}: expected an odd number up to {2 * sizes.tokens + 1}.")
        if depths != sorted(set(depths)) or not 0 <= depths[0] <= depths[-1] < sizes.depth:
            raise ValueError(
                f"key_depths={depths}: expected distinct block numbers in ascending order, from 0 to {sizes.depth - 1}."
            )
        return self


class DinoDiscriminator(nn.Module):
    """`D(images)` -> logits B x (S * L), S = len(key_depths) + 1.

    `forward` never changes state, in any mode. A discriminator step of the published recipe (one power iteration in each
    training forward, fake before real) is: power_iteration(); D(fake); power_iteration(); D(real).
    Only `heads` are trained; `trunk` is frozen. `untrained` is True if the trunk has seeded random weights.
    """

    def __init__(
        self,
        dino_ckpt_path: str | Path | None,
        ks: int,
        key_depths: Sequence[int],
        norm_type: str,
        using_spec_norm: bool,
        recipe: str,
        weights: SizedWeights = "pretrained",
        seed: int = 0,
    ) -> None:
        """Arguments as in `DiscriminatorSettings`; `seed` is for the heads and an untrained trunk.

        Raises:
            UserError: the trunk's file is missing or does not fit.
        """
        super().__init__()
        sizes = TINY if weights == "tiny" else RECIPES[recipe]
        # The published code puts the trunk's last map before the chosen ones, so it is used twice if 11 is chosen.
        self.map_depths = (sizes.depth - 1, *key_depths)
        self.run_depths = tuple(sorted(set(self.map_depths)))
        self.trunk = DinoTrunk(sizes, dino_ckpt_path, weights, seed)
        self.untrained = self.trunk.untrained
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = Heads(len(self.map_depths), sizes.width, ks, norm_type, using_spec_norm)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, B x (S * L)."""
        return self.heads(self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the input of each head: S maps B x L x C, each computed once (the same tensor may occur twice)."""
        maps = dict(zip(self.run_depths, self.trunk(images, self.run_depths), strict=True))
        return [maps[depth] for depth in self.map_depths]

    def power_iteration(self) -> None:
        """Run one power iteration on every convolution."""
        self.heads.power_iteration()

    @contextmanager
    def heads_frozen(self) -> Iterator[None]:
        """Freeze the heads in the block: gradients reach only the images, and nothing is saved for gradients of the heads."""
        saved = [parameter.requires_grad for parameter in self.heads.parameters()]
        self.heads.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in zip(self.heads.parameters(), saved, strict=True):
                parameter.requires_grad_(flag)


class Heads(nn.Module):
    """S heads of the same shape with stacked parameters: few tensors for the power iteration, the optimiser and DDP."""

    def __init__(self, count: int, width: int, ks: int, norm_type: str, spectral: bool) -> None:
        super().__init__()
        self.first = Convolutions(count, width, width, 1, spectral)
        self.first_norm = Norms(count, width)
        self.second = Convolutions(count, width, width, ks, spectral)
        self.second_norm = Norms(count, width)
        self.last = Convolutions(count, width, 1, 1, spectral)
        self.head = Head(norm_type)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits of S maps B x L x C, concatenated head by head: B x (S * L)."""
        layers = zip(maps, self.first(), self.first_norm(), self.second(), self.second_norm(), self.last(), strict=True)
        return torch.cat([self.head(*each) for each in layers], dim=1)

    def power_iteration(self) -> None:
        for convolutions in (self.first, self.second, self.last):
            convolutions.weights.power_iteration()


class Head(nn.Module):
    """[conv k=1, norm, LeakyReLU] -> (x + [conv k=ks circular, norm, LeakyReLU](x)) / sqrt 2 -> conv k=1 to a logit.

    A separate module, without parameters, for torch.compile. The memory layout stays B L C, as in the trunk.
    """

    def __init__(self, norm_type: str) -> None:
        super().__init__()
        self.norm_type = norm_type

    def forward(self, x: Tensor, first: Pair, first_norm: Pair, second: Pair, second_norm: Pair, last: Pair) -> Tensor:
        """Return the logits B L of a map B L C."""
        x = self._normalised(_convolve(x, *first), first_norm)
        y = self._normalised(_convolve(x, *second), second_norm)
        return _convolve((x + y) * 0.5**0.5, *last).flatten(1)

    def _normalised(self, x: Tensor, affine: Pair) -> Tensor:  # B L C
        return recomputed(partial(_normalise, self.norm_type), x, *affine)


class Convolutions(nn.Module):
    """Weights of S convolutions over L. Calling it returns a (weight, bias) for each head."""

    def __init__(self, count: int, width_in: int, width_out: int, ks: int, spectral: bool) -> None:
        super().__init__()
        convolutions = [nn.Conv1d(width_in, width_out, ks) for _ in range(count)]  # with PyTorch's initialisation
        weight = torch.stack([conv.weight.detach() for conv in convolutions])  # S O I ks
        self.weights = SpectralWeights(weight) if spectral else PlainWeights(weight)
        self.bias = nn.Parameter(torch.stack([conv.bias.detach() for conv in convolutions if conv.bias is not None]))

    def forward(self) -> list[Pair]:
        return list(zip(self.weights(), self.bias.unbind(0), strict=True))


class Norms(nn.Module):
    """Affine parameters of S norms. Calling it returns a (weight, bias) for each head."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self) -> list[Pair]:
        return list(zip(self.weight.unbind(0), self.bias.unbind(0), strict=True))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # B L C -> B L O
    pad = weight.shape[-1] // 2
    if not pad:
        return F.linear(x, weight.squeeze(2), bias)
    # As images of height 1, the maps are channels_last in memory, so conv2d needs no copy. The weights are marked channels_last
    # too, since a compiler may choose any stride for a height of 1.
    x = torch.cat((x[:, -pad:], x, x[:, :pad]), dim=1).unsqueeze(1)  # B 1 L+2pad C
    weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)  # O I 1 ks
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1).squeeze(1)


def _normalise(norm_type: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # B L C
    """Normalise each channel over L (`bn`), or each group of channels and L (`gn`), per sample; then apply LeakyReLU.

    Computed in float32 or wider, returned in the dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm_type == "gn":
        wide = F.group_norm(wide.transpose(1, 2), GROUPS, weight, bias, NORM_EPS).transpose(1, 2)
    else:
        variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        scale = weight * torch.rsqrt(variance + NORM_EPS)
        wide = torch.addcmul(bias - mean * scale, wide, scale)
    return F.leaky_relu(wide, SLOPE, inplace=True).to(x.dtype)
