"""LPIPS v0.1 on VGG16: a perceptual distance between images. Zhang et al., CVPR 2018 (arXiv 1801.03924).

Legend: B batch, H height, W width. Images are B x 3 x H x W, RGB, float in [-1, 1].
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.weights import Weights, freeze, load_strict, read, require
from src.losses.lpips_distance import feature_distance
from src.losses.vgg import CHANNELS, VGG16, from_torchvision

log = logging.getLogger(__name__)

# The "scaling layer" of LPIPS: ImageNet mean and deviation, seen from [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
MIN_SIZE = 16
"""px: four poolings leave one pixel."""


class LPIPS(nn.Module):
    """`LPIPS(...)(x, y)`: distance per image, (B,), float32; symmetric, 0 for equal images.

    Frozen: always in eval mode, no gradient to its weights; gradients flow to the images. In training, the target's
    features need no graph and need computing once: `lpips.distance(x, lpips.target(y))`.

    `untrained` is True for seeded random weights, and whatever shows a number must say so then.

    Raises:
        UserError: a file is missing or does not fit, or `weights` is neither `pretrained` nor `untrained`.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        vgg_path: str | Path | None,
        linear_path: str | Path | None,
        weights: Weights = "pretrained",
        channels: Sequence[int] = CHANNELS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if weights not in ("pretrained", "untrained"):
            raise UserError(f"weights={weights!r} of LPIPS: expected 'pretrained' or 'untrained'.")
        self.untrained = weights == "untrained"
        self.fused = False
        """True: `distance` uses kernels that torch.compile makes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vgg = VGG16(channels)
            self.linear = nn.ParameterList(torch.rand(width) for width in channels)  # (C,) each, not negative
            if self.untrained:
                _initialise(self.vgg)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        if self.untrained:
            log.warning("LPIPS is untrained (seed %d): its distances are no LPIPS scores.", seed)
        else:
            self._load(vgg_path, linear_path)
        freeze(self)

    def train(self, mode: bool = True) -> "LPIPS":
        """Frozen: stays in eval mode whatever is asked."""
        return super().train(False)

    def target(self, y: Tensor) -> list[Tensor]:
        """Five feature maps of y, without a graph, for `distance`."""
        with torch.no_grad():
            return self.features(y)

    def distance(self, x: Tensor, target: Sequence[Tensor]) -> Tensor:
        """Distance of images x to the features that `target` gave: (B,). No gradient to the target."""
        return self._distance(self.features(x), target, self.fused)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair: (B,). Differentiable in both."""
        if x.shape != y.shape:
            raise ValueError(f"LPIPS compares images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        return self._distance(self.features(x), self.features(y))

    def features(self, images: Tensor) -> list[Tensor]:
        """relu1_2 ... relu5_3 of images in [-1, 1], B x C x h x w each, in the dtype of the convolutions."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
            raise ValueError(f"LPIPS takes B x 3 x H x W of at least {MIN_SIZE} px a side, got {tuple(images.shape)}")
        return self.vgg((images - self.shift) / self.scale)

    def _distance(self, maps_x: Sequence[Tensor], maps_y: Sequence[Tensor], fused: bool = False) -> Tensor:
        layers = zip(maps_x, maps_y, self.linear, strict=True)
        return torch.stack([feature_distance(x, y, weight, fused) for x, y, weight in layers]).sum(0)

    def _load(self, vgg_path: str | Path | None, linear_path: str | Path | None) -> None:
        if vgg_path is None or linear_path is None:
            raise UserError(
                f"LPIPS with weights='pretrained' needs both files, got vgg_path={vgg_path} and "
                f"linear_path={linear_path}. Give both, or ask for weights='untrained' by name."
            )
        vgg_file = require(vgg_path, "The VGG16 weights of LPIPS", "vgg_path")
        linear_file = require(linear_path, "The linear weights of LPIPS", "linear_path")
        load_strict(self.vgg, from_torchvision(read(vgg_file)), vgg_file)
        load_strict(self.linear, linear_from_file(read(linear_file)), linear_file)


def linear_from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`lin0.model.1.weight` (1 x C x 1 x 1), ... -> `0` (C,), ...; other names stay, for the strict load to refuse."""
    names = {f"lin{i}.model.1.weight": str(i) for i in range(len(CHANNELS))}
    return {names.get(name, name): value.flatten() if name in names else value for name, value in state.items()}


def _initialise(vgg: VGG16) -> None:
    # He initialisation keeps the scale through 13 ReLUs; PyTorch's default lets the signal drown in the biases.
    for conv in vgg.convs:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
