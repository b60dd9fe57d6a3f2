"""Operations of a forward pass, counted on the meta device: nothing is computed, and the weights are left alone."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Return the operations of `module(*inputs)`, 2 per multiply-add, of matrix products, convolutions and attention.

    inputs: their shapes and types count; where they lie does not.
    """
    state = dict(chain(module.named_parameters(), module.named_buffers()))
    empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    shapes = tuple(value.to("meta") for value in inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, empty, shapes)
    return counter.get_total_flops()
