"""Recompute cheap operations in the backward pass instead of saving their results."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(function: Callable[..., T], *x: Tensor) -> T:
    """Return `function(*x)`, saving only x for the backward pass. Bit-exact; `function` must not draw random numbers.

    Recomputation stops at the last tensor that is needed, so a final matrix product is not repeated. While compiling this
    is a plain call: the compiler chooses what to save.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(function, *x, use_reentrant=False, preserve_rng_state=False)
    return function(*x)
