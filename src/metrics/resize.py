"""The bilinear resize of TensorFlow 1, on which every published FID rests.

Legend: B batch, C channels, H, W input size, S output size.
"""

import torch
from torch import Tensor


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Resize B x C x H x W float -> B x C x S x S, as `tf.image.resize_bilinear(align_corners=False)` of TensorFlow 1.

    Output pixel i reads the input at i * H / S, not at (i + .5) * H / S - .5 as `torch.nn.functional.interpolate` does:
    no half-pixel centres, no antialias, the last row and column repeated beyond the edge.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    return _lerp(_lerp(images, -1, size), -2, size)  # TensorFlow blends along the row first


def _lerp(images: Tensor, axis: int, size: int) -> Tensor:
    length = images.shape[axis]
    # float32 positions, as TensorFlow computes them
    position = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
    low = position.long().clamp_(max=length - 1)
    high = (low + 1).clamp_(max=length - 1)
    weight = (position - low).to(images.dtype)
    if axis == -2:
        weight = weight[:, None]
    start = images.index_select(axis, low)
    return torch.addcmul(start, images.index_select(axis, high) - start, weight)
