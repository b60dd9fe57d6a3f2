"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05, with what ADM's metrics take of it, as a table.

Architecture: Szegedy et al., arXiv 1512.00567; names of the layers as in the standard weights file (pytorch-fid,
torch-fidelity). It differs from the Inception-v3 of image classification in two places:
  - average pools inside the blocks don't count their padding;
  - the last block (Mixed_7c) pools by maximum where Mixed_7b pools by average.

Legend: B batch, C channels, F features (2048), K classes (1008), S spatial features (7 x 17 x 17 = 2023).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

TF_CLASSES = 1008  # the network of 2015-12-05; torchvision's ImageNet Inception-v3 has 1000 and gives other scores
SPATIAL_BLOCK = "Mixed_6d"  # its first branch is `mixed_6/conv` of TensorFlow's graph
SPATIAL_CHANNELS = 7
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17


class InceptionOutputs(NamedTuple):
    """What ADM's evaluation suite takes of an image."""

    pool: Tensor
    """B F, for FID, precision and recall"""
    spatial: Tensor
    """B S, for sFID: 7 channels of `mixed_6/conv` after its ReLU, flattened as (row, column, channel)"""
    logits: Tensor
    """B K, for the Inception Score: without the bias"""


class Conv(NamedTuple):
    """Convolution, norm, ReLU. Stride 1 keeps the size unless `same` is false; stride 2 never pads."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


class Fork(NamedTuple):
    """Convolutions that read the same input; their outputs are concatenated."""

    convs: tuple[Conv, ...]


class Pool(NamedTuple):
    kind: str  # "max" or "average", window 3 x 3
    stride: int


Chain = tuple[Conv | Fork | Pool, ...]
SHRINK = Pool("max", 2)
AVERAGE = Pool("average", 1)
MAXIMUM = Pool("max", 1)

STEM: Chain = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2),
    Conv("Conv2d_2a_3x3", 32, (3, 3), same=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), same=False),
    SHRINK,
)


def _block_5(pooled: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (AVERAGE, Conv("branch_pool", pooled)),
    )


def _block_6(inner: int) -> tuple[Chain, ...]:
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, column),
            Conv("branch7x7dbl_3", inner, row),
            Conv("branch7x7dbl_4", inner, column),
            Conv("branch7x7dbl_5", 192, row),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )


def _block_7(pool: Pool) -> tuple[Chain, ...]:
    def fork(name: str) -> Fork:
        return Fork((Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


BLOCKS: dict[str, tuple[Chain, ...]] = {  # spatial size at 299 px input
    "Mixed_5b": _block_5(32),  # 35
    "Mixed_5c": _block_5(64),
    "Mixed_5d": _block_5(64),
    "Mixed_6a": (  # 17
        (Conv("branch3x3", 384, (3, 3), stride=2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), stride=2)),
        (SHRINK,),
    ),
    "Mixed_6b": _block_6(128),
    "Mixed_6c": _block_6(160),
    "Mixed_6d": _block_6(160),
    "Mixed_6e": _block_6(192),
    "Mixed_7a": (  # 8
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), stride=2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), stride=2),
        ),
        (SHRINK,),
    ),
    "Mixed_7b": _block_7(AVERAGE),
    "Mixed_7c": _block_7(MAXIMUM),
}


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3, running statistics), ReLU."""

    def __init__(self, inputs: int, outputs: int, spec: Conv) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in spec.kernel) if spec.same and spec.stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, spec.kernel, spec.stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def fuse(self) -> None:
        """Fold the norm into the convolution: the same function up to rounding, one pass over memory less."""
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu_(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains that read the same input, concatenated over the channels in the order of the table."""

    def __init__(self, inputs: int, chains: tuple[Chain, ...], width: float) -> None:
        super().__init__()
        self.chains = chains
        self.outputs = sum(_build(self, inputs, chain, width) for chain in chains)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([_run(self, chain, x) for chain in self.chains], dim=1)


class InceptionNetwork(nn.Module):
    """B x 3 x 299 x 299 float in [-1, 1) -> B x F, the mean over the 8 x 8 positions of the last block.

    `width` scales every channel count (1.0 is the published network, F = 2048).
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = _build(self, 3, STEM, width)
        for name, chains in BLOCKS.items():
            block = Block(channels, chains, width)
            self.add_module(name, block)
            channels = block.outputs
        self.feature_dim = channels
        self.fc = nn.Linear(channels, TF_CLASSES, bias=False)

    def fuse(self) -> "InceptionNetwork":
        """Fold every norm into its convolution (in eval mode, after the weights are loaded)."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fuse()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images).pool

    def outputs(self, images: Tensor) -> InceptionOutputs:
        x = _run(self, STEM, images)  # B 192 35 35
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # B S
        pool = x.mean(dim=(2, 3))  # B F
        # as a convolution, whose precision `full_float32` guards
        logits = functional.conv2d(pool[:, :, None, None], self.fc.weight[:, :, None, None]).flatten(1)  # B K
        return InceptionOutputs(pool, spatial, logits)


def _build(owner: nn.Module, channels: int, chain: Chain, width: float) -> int:
    """Register the convolutions of a chain in `owner` by name; return the channels that come out."""
    for step in chain:
        if isinstance(step, Conv):
            outputs = max(1, round(step.outputs * width))
            owner.add_module(step.name, ConvNorm(channels, outputs, step))
            channels = outputs
        elif isinstance(step, Fork):
            channels = sum(_build(owner, channels, (conv,), width) for conv in step.convs)
    return channels


def _run(owner: nn.Module, chain: Chain, x: Tensor) -> Tensor:
    for step in chain:
        if isinstance(step, Conv):
            x = owner.get_submodule(step.name)(x)
        elif isinstance(step, Fork):
            x = torch.cat([owner.get_submodule(conv.name)(x) for conv in step.convs], dim=1)
        elif step.kind == "average":
            x = functional.avg_pool2d(x, 3, step.stride, padding=1, count_include_pad=False)
        else:
            x = functional.max_pool2d(x, 3, step.stride, padding=1 if step.stride == 1 else 0)
    return x
