"""VGG16 up to relu5_3, the five maps that LPIPS looks at. Simonyan & Zisserman, arXiv 1409.1556, configuration D.

Legend: B batch, C channels, H W image.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS_PER_STAGE = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)

# torchvision numbers convolutions, ReLUs and poolings through; these are its convolutions, in order.
TORCHVISION_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
TORCHVISION_UNUSED = tuple(f"classifier.{i}.{name}" for i in (0, 3, 6) for name in ("weight", "bias"))


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages; ReLU after each, 2 x 2 max-pooling between stages."""

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        width = 3
        for stage, depth in zip(channels, CONVS_PER_STAGE, strict=True):
            for _ in range(depth):
                self.convs.append(nn.Conv2d(width, stage, kernel_size=3, padding=1))
                width = stage
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images B x 3 x H x W, H and W at least 16 -> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
        maps = []
        convs = iter(self.convs)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage, depth in enumerate(CONVS_PER_STAGE):
            if stage:
                x = F.max_pool2d(x, 2)
            for _ in range(depth):
                x = F.relu_(next(convs)(x))  # in place: a convolution's backward does not look at its output
            maps.append(x)  # B C H/2^stage W/2^stage
        return maps


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's VGG16 file -> ours. The classifier is left out; anything else unknown keeps its name."""
    names = {
        f"features.{theirs}.{kind}": f"convs.{ours}.{kind}"
        for ours, theirs in enumerate(TORCHVISION_CONVS)
        for kind in ("weight", "bias")
    }
    return {names.get(name, name): value for name, value in state.items() if name not in TORCHVISION_UNUSED}
