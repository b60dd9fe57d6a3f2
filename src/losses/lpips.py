"""LPIPS v0.1 on VGG16: a perceptual distance between images. Zhang et al., CVPR 2018 (arXiv 1801.03924).

Legend: B batch, H height, W width. Images are B x 3 x H x W, RGB, float in [-1, 1].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.core.settings import Settings
from src.core.weights import Frozen, SizedWeights, freeze, load_strict, read, require
from src.losses.lpips_distance import feature_distance

CONVS_PER_STAGE = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
TINY_CHANNELS = (4, 8, 8, 16, 16)
# The "scaling layer" of LPIPS: ImageNet mean and standard deviation, in the range [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
MIN_SIZE = 16
"""Smallest side in px: four poolings leave one pixel."""


class LPIPSSettings(Settings):
    """The node `model.lpips_arch`: arguments of `LPIPS`."""

    vgg_path: str | None
    linear_path: str | None
    weights: SizedWeights


class LPIPS(Frozen):
    """`LPIPS(...)(x, y)`: distance per image, (B,), float32; symmetric, 0 for equal images.

    Frozen: always in eval mode, no gradient to its weights; gradients flow to the images.
    `untrained` is True for seeded random weights; any reported number must then be marked as such.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        vgg_path: str | Path | None,
        linear_path: str | Path | None,
        weights: SizedWeights = "pretrained",
        seed: int = 0,
    ) -> None:
        """Read both files, or draw random weights from `seed`. Raises UserError if a file is missing or does not fit."""
        super().__init__()
        self.untrained = weights != "pretrained"
        self.fused = False  # whether the distance uses kernels from torch.compile
        channels = TINY_CHANNELS if weights == "tiny" else CHANNELS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vgg = VGG16(channels)
            self.linear = nn.ParameterList(torch.rand(width) for width in channels)  # (C,) each, not negative
            if self.untrained:
                _initialise(self.vgg)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        if not self.untrained:
            vgg_file = require(vgg_path, "The VGG16 weights of LPIPS", "vgg_path")
            linear_file = require(linear_path, "The linear weights of LPIPS", "linear_path")
            vgg_state = read(vgg_file)
            kept = {name: value for name, value in vgg_state.items() if not name.startswith("classifier.")}
            load_strict(self.vgg, kept, vgg_file)
            load_strict(self.linear, linear_from_file(read(linear_file)), linear_file)
        freeze(self)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile VGG16 in place, and fuse the kernels of the distance."""
        self.vgg.compile(*args, **kwargs)
        self.fused = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images, (B,). Differentiable in both."""
        if x.shape != y.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        maps_y = self.features(y)  # first: its activations are freed before those of x are saved for the backward
        layers = zip(self.features(x), maps_y, self.linear, strict=True)
        return torch.stack([feature_distance(a, b, weight, self.fused) for a, b, weight in layers]).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return relu1_2 ... relu5_3 of images in [-1, 1], B x C x h x w each, in the dtype of the convolutions."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(f"LPIPS takes B x 3 x H x W of at least {MIN_SIZE} px a side, got {tuple(images.shape)}")
        return self.vgg((images - self.shift) / self.scale)


class VGG16(nn.Module):
    """VGG16 up to relu5_3: thirteen 3 x 3 convolutions in five stages; ReLU after each, 2 x 2 max-pooling between stages.

    Simonyan & Zisserman, arXiv 1409.1556, configuration D. `features` has the layers and parameter names of torchvision's
    VGG16, without the last pooling.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.taps: list[int] = []
        """Indices of the layers whose outputs are returned: the last ReLU of each stage."""
        width = 3
        for stage, (depth, wide) in enumerate(zip(CONVS_PER_STAGE, channels, strict=True)):
            if stage:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(depth):
                self.features.append(nn.Conv2d(width, wide, kernel_size=3, padding=1))
                self.features.append(nn.ReLU(inplace=True))  # a convolution's backward doesn't need its output
                width = wide
            self.taps.append(len(self.features) - 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return relu1_2, ..., relu5_3, B x C x H/2^stage x W/2^stage, of normalised images of at least 16 px a side."""
        maps = []
        x = x.contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


def linear_from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename `lin0.model.1.weight` (1 x C x 1 x 1), ... to `0` (C,), ...; other names are kept, so the strict load fails."""
    names = {f"lin{i}.model.1.weight": str(i) for i in range(len(CHANNELS))}
    return {names.get(name, name): value.flatten() if name in names else value for name, value in state.items()}


def _initialise(vgg: VGG16) -> None:
    # He initialisation keeps the scale through 13 ReLUs; with PyTorch's default the biases would dominate the signal.
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
