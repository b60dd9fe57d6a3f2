"""Compute again in the backward pass what costs less than keeping it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *x: Tensor) -> T:
    """Return `function(*x)`, keeping x alone for the backward pass; bit-equal, and nothing random may be in it.

    The second computation ends with the last tensor that is needed: a matrix product at the end is not repeated. Compilers
    find by themselves what to keep.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(function, *x, use_reentrant=False, preserve_rng_state=False)
    return function(*x)
