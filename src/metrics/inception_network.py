"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05, with the extra outputs for ADM's metrics.

Architecture: Szegedy et al., arXiv 1512.00567; layers are named as in the standard weights file (pytorch-fid,
torch-fidelity). It differs from the Inception-v3 for image classification in two ways:
  - average pools inside the blocks don't count their padding;
  - the last block (Mixed_7c) uses max pooling where Mixed_7b uses average pooling.

Legend: B batch, C channels, F features (2048), K classes (1008), S spatial features (7 x 17 x 17 = 2023).
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from src.metrics.features import FeatureOutputs

TF_CLASSES = 1008  # the network of 2015-12-05; torchvision's ImageNet Inception-v3 has 1000 and gives other scores
SPATIAL_BLOCK = "Mixed_6d"  # its first branch is `mixed_6/conv` of TensorFlow's graph
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
ROW, COLUMN, SQUARE = (1, 7), (7, 1), (3, 3)
FORK = (("a", (1, 3)), ("b", (3, 1)))


class Conv(NamedTuple):
    """Convolution, norm, ReLU. Stride 1 keeps the size unless `same` is false; stride 2 never pads."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3, running statistics), ReLU."""

    def __init__(self, inputs: int, spec: Conv, width: float) -> None:
        super().__init__()
        outputs = max(1, round(spec.outputs * width))
        padding = (spec.kernel[0] // 2, spec.kernel[1] // 2) if spec.same and spec.stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, spec.kernel, spec.stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def fuse(self) -> None:
        """Fold the norm into the convolution: same result up to rounding, one memory pass fewer."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.bn(self.conv(x)))


class InceptionNetwork(nn.Module):
    """B x 3 x 299 x 299 float in [-1, 1) -> B x F, the mean over the 8 x 8 positions of the last block.

    `width` scales every channel count (1.0 is the published network, F = 2048). Its weights are not initialised.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self._width: float | None = width
        with torch.device("meta"):  # a first forward, without data, creates the layers
            self.feature_dim = self(torch.empty(1, 3, 299, 299)).shape[1]
            self.fc = nn.Linear(self.feature_dim, TF_CLASSES, bias=False)
        self._width = None
        self.to_empty(device="cpu")

    def fuse(self) -> Self:
        """Fold every norm into its convolution (in eval mode, after the weights are loaded)."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fuse()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self._features(images)[0]

    def outputs(self, images: Tensor) -> FeatureOutputs:
        pool, spatial = self._features(images)
        # as a convolution, so that it has the precision set by `full_float32`
        logits = functional.conv2d(pool[:, :, None, None], self.fc.weight[:, :, None, None]).flatten(1)  # B K
        return FeatureOutputs(pool, spatial, logits)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self._chain("", images, ("Conv2d_1a_3x3", 32, SQUARE, 2), ("Conv2d_2a_3x3", 32, SQUARE, 1, False))
        x = functional.max_pool2d(self._chain("", x, ("Conv2d_2b_3x3", 64, SQUARE)), 3, 2)
        x = self._chain("", x, ("Conv2d_3b_1x1", 80), ("Conv2d_4a_3x3", 192, SQUARE, 1, False))
        x = functional.max_pool2d(x, 3, 2)  # B 192 35 35
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = self._block_5(name, x, pooled)
        double = ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, SQUARE), ("branch3x3dbl_3", 96, SQUARE, 2)
        x = self._shrink("Mixed_6a", x, (("branch3x3", 384, SQUARE, 2),), double)  # B 768 17 17
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = self._block_6(name, x, inner)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # B S
        seven = ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN)
        single = ("branch3x3_1", 192), ("branch3x3_2", 320, SQUARE, 2)
        x = self._shrink("Mixed_7a", x, single, (*seven, ("branch7x7x3_4", 192, SQUARE, 2)))  # B 1280 8 8
        x = self._block_7("Mixed_7b", x, _average)
        x = self._block_7("Mixed_7c", x, lambda x: functional.max_pool2d(x, 3, 1, padding=1))
        return x.mean(dim=(2, 3)), spatial  # B F, B S

    def _block_5(self, name: str, x: Tensor, pooled: int) -> Tensor:
        parts = [self._chain(name, x, ("branch1x1", 64))]
        parts += [self._chain(name, x, ("branch5x5_1", 48), ("branch5x5_2", 64, (5, 5)))]
        double = ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, SQUARE), ("branch3x3dbl_3", 96, SQUARE)
        parts += [self._chain(name, x, *double), self._chain(name, _average(x), ("branch_pool", pooled))]
        return torch.cat(parts, dim=1)

    def _block_6(self, name: str, x: Tensor, inner: int) -> Tensor:
        parts = [self._chain(name, x, ("branch1x1", 192))]
        seven = ("branch7x7_1", inner), ("branch7x7_2", inner, ROW), ("branch7x7_3", 192, COLUMN)
        double = ("branch7x7dbl_1", inner), ("branch7x7dbl_2", inner, COLUMN), ("branch7x7dbl_3", inner, ROW)
        parts += [self._chain(name, x, *seven)]
        parts += [self._chain(name, x, *double, ("branch7x7dbl_4", inner, COLUMN), ("branch7x7dbl_5", 192, ROW))]
        return torch.cat([*parts, self._chain(name, _average(x), ("branch_pool", 192))], dim=1)

    def _block_7(self, name: str, x: Tensor, pool: Any) -> Tensor:
        parts = [self._chain(name, x, ("branch1x1", 320))]
        single = self._chain(name, x, ("branch3x3_1", 384))
        parts += [self._chain(name, single, (f"branch3x3_2{end}", 384, kernel)) for end, kernel in FORK]
        double = self._chain(name, x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, SQUARE))
        parts += [self._chain(name, double, (f"branch3x3dbl_3{end}", 384, kernel)) for end, kernel in FORK]
        return torch.cat([*parts, self._chain(name, pool(x), ("branch_pool", 192))], dim=1)

    def _shrink(self, name: str, x: Tensor, *chains: Any) -> Tensor:
        parts = [self._chain(name, x, *chain) for chain in chains]
        return torch.cat([*parts, functional.max_pool2d(x, 3, 2)], dim=1)

    def _chain(self, block: str, x: Tensor, *convs: tuple[Any, ...]) -> Tensor:
        """Apply convolutions in sequence, each given as the arguments of `Conv`."""
        for conv in (Conv(*arguments) for arguments in convs):
            if self._width is not None:
                if block and block not in self._modules:
                    self.add_module(block, nn.Module())
                self.get_submodule(block).add_module(conv.name, ConvNorm(x.shape[1], conv, self._width))
            x = self.get_submodule(block).get_submodule(conv.name)(x)
        return x


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
