"""Half precision for networks that are never trained."""

import torch
from torch import nn


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of linear and convolution layers in `dtype`, in place.

    Under autocast to `dtype` nothing changes but memory and time: these are the weights that autocast would cast anew
    at every call. Norms, positions and scales stay as they are, and so do their results. Not for use outside autocast.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            if any(p.requires_grad for p in layer.parameters()):
                raise ValueError("only frozen networks may lose precision for good")
            layer.to(dtype)
