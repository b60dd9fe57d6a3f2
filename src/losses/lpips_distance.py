"""Compute the distance between two feature maps in LPIPS, with a custom backward that saves memory.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, equation 1:

    d[b] = 1/(h w) sum_p sum_c  weight_c (x_c / (|x| + eps) - y_c / (|y| + eps))^2,    |x| = norm over channels at p

Autograd would save the normalised maps, their difference and its square, in float32 under autocast: the largest tensors
of the whole training step. The backward here saves only x and y in their own dtype (which the ReLU before saves anyway)
and one norm per pixel; float32 maps exist for a few samples at a time. When compiled, a fused kernel processes the whole
batch and writes no float32 map at all.

Legend: B batch, C channels, h w feature grid, P = h w pixels.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-10
PART_ON_CPU = 1 << 18
"""Elements per part, to fit a core's cache (unless one sample is larger)."""
PART_ON_DEVICE = 1 << 24
"""Elements per part, 64 MiB in float32: large enough for few kernel launches."""


def feature_distance(x: Tensor, y: Tensor, weight: Tensor, fused: bool = False) -> Tensor:
    """Return the distance per sample, (B,), float32 or wider: x, y B x C x h x w in any float dtype, weight (C,) >= 0.

    Differentiable in x and y, not in weight. The gradient of a pixel whose features are all zero is 0: the formula has
    none there, and a preceding ReLU would stop it. In float16 it is 0 up to a norm of 2^-10: such features are mostly
    rounding errors of the convolutions, and their gradient, ~ 1 / norm, overflows at any useful loss scale.
    `fused`: use kernels that torch.compile builds at first use.
    """
    return _FeatureDistance.apply(x, y, weight, fused)


class _FeatureDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, weight: Tensor, fused: bool) -> Tensor:
        weight = weight.detach().to(torch.promote_types(x.dtype, torch.float32))[:, None]
        flat_x, flat_y = x.flatten(2), y.flatten(2)  # B C P: views, whatever the memory format
        if fused:
            distance, norm_x, norm_y = _compiled(_measure)(_dynamic_batch(flat_x), _dynamic_batch(flat_y), weight)
        else:
            parts = [_measure(flat_x[part], flat_y[part], weight) for part in _batch_slices(x)]
            distance, norm_x, norm_y = (torch.cat(found) for found in zip(*parts, strict=True))
        ctx.save_for_backward(x, y, weight, norm_x, norm_y)
        ctx.fused = fused
        return distance / flat_x.shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, weight, norm_x, norm_y = ctx.saved_tensors
        scale = (grad.to(norm_x.dtype) * (2 / norm_x.shape[2]))[:, None, None] * weight  # B C 1
        grad_x = _gradient(x, y, norm_x, norm_y, scale, ctx.fused) if ctx.needs_input_grad[0] else None
        grad_y = _gradient(y, x, norm_y, norm_x, scale, ctx.fused) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None, None


def _gradient(x: Tensor, y: Tensor, norm_x: Tensor, norm_y: Tensor, scale: Tensor, fused: bool) -> Tensor:
    """Return the gradient of x in its dtype and memory format; by symmetry, swap x and y for that of y."""
    tensors = (x.flatten(2), y.flatten(2), norm_x, norm_y, scale)
    if fused:
        return _compiled(_pull_back)(*map(_dynamic_batch, tensors)).view_as(x)
    result = torch.empty_like(x)
    for part in _batch_slices(x):
        result.flatten(2)[part] = _pull_back(*(tensor[part] for tensor in tensors))
    return result


def _batch_slices(x: Tensor) -> list[slice]:
    """Split a batch of maps into slices of one sample or more."""
    samples = max(1, (PART_ON_CPU if x.device.type == "cpu" else PART_ON_DEVICE) // x[0].numel())
    return [slice(first, first + samples) for first in range(0, len(x), samples)]


def _measure(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over pixels of the weighted squared error (B,) and both norms B x 1 x P: x, y B x C x P, weight C x 1."""
    x, y = x.to(weight.dtype), y.to(weight.dtype)
    norm_x = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norm_y = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    # Over channels first, which are contiguous: summing both at once makes the compiler read them in another order.
    return (_normalised_difference(x, norm_x, y, norm_y).square_() * weight).sum(1).sum(1), norm_x, norm_y


def _pull_back(x: Tensor, y: Tensor, norm_x: Tensor, norm_y: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of x, B x C x P in the dtype of x; scale B x C x 1.

    The transposed Jacobian of x / (|x| + eps) times a gradient g to it is r g - x (g . x) r^2 / |x|, with r = 1 / (|x| + eps).
    """
    wide_x, wide_y = x.to(scale.dtype), y.to(scale.dtype)
    pull = _normalised_difference(wide_x, norm_x, wide_y, norm_y).mul_(scale)  # g
    nonzero = norm_x > (2**-10 if x.dtype == torch.float16 else 0)
    r = torch.where(nonzero, (norm_x + EPS).reciprocal(), 0)
    along = (pull * wide_x).sum(1, keepdim=True) * r * r / torch.where(nonzero, norm_x, 1)
    return (pull * r).addcmul_(wide_x, along, value=-1).to(x.dtype)


def _normalised_difference(x: Tensor, norm_x: Tensor, y: Tensor, norm_y: Tensor) -> Tensor:
    # Scale both maps by their reciprocals in the same way: equal inputs have distance exactly 0.
    return (x * (norm_x + EPS).reciprocal()).sub_(y * (norm_y + EPS).reciprocal())


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` compiled: one kernel per number of channels and pixels, for any batch size."""
    return torch.compile(function, dynamic=False)


def _dynamic_batch(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()  # else training and evaluation would compile separate kernels
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
