"""Count the FLOPs of a forward pass on the meta device: nothing is computed, and the weights are not touched."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Return the FLOPs of `module(*inputs)`, 2 per multiply-add, for matrix products, convolutions and attention.

    Only the shapes and dtypes of `inputs` matter; they may be on any device.
    """
    state = dict(chain(module.named_parameters(), module.named_buffers()))
    empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    shapes = tuple(value.to("meta") for value in inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, empty, shapes)
    return counter.get_total_flops()
