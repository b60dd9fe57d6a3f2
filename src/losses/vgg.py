"""VGG16 up to relu5_3, the five maps that LPIPS looks at. Simonyan & Zisserman, arXiv 1409.1556, configuration D.

Legend: B batch, C channels, H W image.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

CONVS_PER_STAGE = (2, 2, 3, 3, 3)
CHANNELS = (64, 128, 256, 512, 512)
TINY_CHANNELS = (4, 8, 8, 16, 16)


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions in five stages; ReLU after each, 2 x 2 max-pooling between stages.

    `features` has the layers and so the names of torchvision's VGG16 file, without its last pooling.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.taps: list[int] = []
        """Numbers of the layers whose results are looked at: the last ReLU of each stage."""
        width = 3
        for stage, (depth, wide) in enumerate(zip(CONVS_PER_STAGE, channels, strict=True)):
            if stage:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(depth):
                self.features.append(nn.Conv2d(width, wide, kernel_size=3, padding=1))
                self.features.append(nn.ReLU(inplace=True))  # a convolution's backward does not look at its output
                width = wide
            self.taps.append(len(self.features) - 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return relu1_2, ..., relu5_3, B x C x H/2^stage x W/2^stage, of normalised images of at least 16 px a side."""
        maps = []
        x = x.contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


def without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what torchvision's file has besides its classifier."""
    return {name: value for name, value in state.items() if not name.startswith("classifier.")}
