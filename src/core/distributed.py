"""Sums over the processes of a torch.distributed group, in float64, with gloo and nccl alike."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group runs. Without one every sum over ranks is the value itself."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(values: Tensor, group: Any | None = None) -> Tensor:
    """The elementwise sum of `values` (same shape on all ranks) over the ranks of `group`; None is the default group.

    Every rank of the group must call it. dtype and device come back as they were; nccl takes a detour over the GPU.
    """
    if not is_distributed():
        return values
    backend = str(dist.get_backend(group))
    on = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    total = values.detach().to(on, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks in place; the tensor itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def float64_device(device: torch.device) -> torch.device:
    """Where float64 sums of tensors on `device` can be kept: there, or on the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
