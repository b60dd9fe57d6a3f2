"""Set the precision of frozen networks: full float32 for published scores, half precision where autocast would cast anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 on `device`: no autocast, no TF32 in convolutions (PyTorch's default) or matrix products
    (`trainer.float32_matmul_precision=high`). Restores the caller's settings.

    TF32 rounds inputs to 10 bits, which changes Inception features by about 1e-3 and makes the error of E[x^2] - E[x]^2 in
    SSIM as large as its constant c2.
    """
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False), float32_products(device, "highest"):
            yield
    finally:
        conv.fp32_precision = before


@contextmanager
def float32_products(device: torch.device, precision: Literal["highest", "high"]) -> Iterator[None]:
    """Compute float32 matrix products exactly or, with `high`, in TF32, which is faster. No effect except on a GPU."""
    if device.type != "cuda":
        yield
        return
    # Read through the newer API: the older one raises once the newer one was used to set it.
    fast = torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("high" if fast else "highest")


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear and convolution layers to `dtype`, in place. For use under autocast to `dtype` only.

    Under autocast this only saves memory and time: these are the weights that it would cast again at every call. Norms,
    positional embeddings and scales keep their dtype, and so do their results.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if any(p.requires_grad for p in layer.parameters()):
                raise ValueError("only frozen networks may lose precision for good")
            layer.to(dtype)
