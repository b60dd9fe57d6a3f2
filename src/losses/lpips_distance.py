"""The distance between two feature maps inside LPIPS, with a backward of its own that keeps nothing large.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, equation 1:

    d[b] = 1/(h w) sum_p sum_c  weight_c (x_c / (|x| + eps) - y_c / (|y| + eps))^2,    |x| = norm over channels at p

Autograd would keep the normalised maps, their difference and its square, in float32 under autocast: the largest tensors
of the whole training step. Here the backward is written out. It keeps x and y as they came (which the ReLU in front
keeps anyway) and one norm per pixel; float32 exists for one tile of samples and pixels at a time.

Legend: B batch, C channels, h w feature grid, P = h w pixels.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-10
TILE_ON_CPU = 1 << 18
"""Elements of one tile: what stays in a core's cache."""
TILE_ON_DEVICE = 1 << 24
"""64 MiB in float32: large enough that few kernels are launched."""

Tile = tuple[slice, slice, slice]


def feature_distance(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Distance per sample: x, y B x C x h x w in any float dtype, weight (C,) >= 0 -> (B,), float32 or wider.

    Differentiable in x and in y, not in weight. Where a pixel's features are all zero the gradient is 0: the plain
    formula has none there, and a ReLU in front would stop it.
    """
    return _FeatureDistance.apply(x, y, weight)


class _FeatureDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = weight.detach().to(dtype)[:, None]
        flat_x, flat_y = x.flatten(2), y.flatten(2)  # B C P: views, whatever the memory format
        norm_x = x.new_empty(len(x), 1, flat_x.shape[2], dtype=dtype)
        norm_y = torch.empty_like(norm_x)
        distance = x.new_zeros(len(x), dtype=dtype)
        for tile in _tiles(flat_x):
            xs, ys = flat_x[tile].to(dtype), flat_y[tile].to(dtype)
            norm_x[tile] = torch.linalg.vector_norm(xs, dim=1, keepdim=True)
            norm_y[tile] = torch.linalg.vector_norm(ys, dim=1, keepdim=True)
            error = _error(xs, norm_x[tile], ys, norm_y[tile])
            distance[tile[0]] += (error.square_() * weight).sum((1, 2))
        ctx.save_for_backward(x, y, weight, norm_x, norm_y)
        return distance / flat_x.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, weight, norm_x, norm_y = ctx.saved_tensors
        dtype = norm_x.dtype
        flat_x, flat_y = x.flatten(2), y.flatten(2)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_y = torch.empty_like(y) if ctx.needs_input_grad[1] else None
        scale = (grad.to(dtype) * (2 / flat_x.shape[2]))[:, None, None] * weight  # B C 1
        for tile in _tiles(flat_x):
            xs, ys = flat_x[tile].to(dtype), flat_y[tile].to(dtype)
            pull = _error(xs, norm_x[tile], ys, norm_y[tile]).mul_(scale[tile[0]])  # d distance / d (x / |x|)
            if grad_x is not None:
                grad_x.flatten(2)[tile] = _through_norm(pull, xs, norm_x[tile])
            if grad_y is not None:
                grad_y.flatten(2)[tile] = _through_norm(pull.neg_(), ys, norm_y[tile])
        return grad_x, grad_y, None


def _error(x: Tensor, norm_x: Tensor, y: Tensor, norm_y: Tensor) -> Tensor:
    # Each map by its own reciprocal, in this order for both: equal inputs have distance exactly 0.
    return (x * (norm_x + EPS).reciprocal()).sub_(y * (norm_y + EPS).reciprocal())


def _through_norm(pull: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Transposed Jacobian of x / (|x| + eps) times `pull`: r pull - x (pull . x) r^2 / |x|, with r = 1 / (|x| + eps)."""
    nonzero = norm > 0
    r = torch.where(nonzero, (norm + EPS).reciprocal(), 0)
    along = (pull * x).sum(1, keepdim=True) * r * r / torch.where(nonzero, norm, 1)
    return (pull * r).addcmul_(x, along, value=-1)


def _tiles(flat: Tensor) -> list[Tile]:
    """Parts of B x C x P: whole samples where they fit, else runs of pixels of one sample. All channels each."""
    batch, channels, pixels = flat.shape
    at_once = max(1, (TILE_ON_CPU if flat.device.type == "cpu" else TILE_ON_DEVICE) // channels)
    samples = max(1, at_once // pixels)
    run = min(pixels, at_once)
    return [
        (slice(b, b + samples), slice(None), slice(p, p + run))
        for b in range(0, batch, samples)
        for p in range(0, pixels, run)
    ]
