"""Plain float32 for networks whose numbers are published: no autocast, no TF32, whatever the caller has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within it convolutions on `device` compute in IEEE float32; the caller's settings are given back afterwards.

    PyTorch lets cuDNN round the inputs of convolutions to TF32 (10 bits) by default, which moves Inception features by
    about 1e-3 and makes E[x^2] - E[x]^2 in SSIM as large as its constant c2.
    """
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        conv.fp32_precision = before
