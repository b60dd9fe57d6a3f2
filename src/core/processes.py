"""The processes of one evaluation: who they are, on which device, and how rank 0 gets what the others found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from src.core.distributed import is_distributed
from src.core.errors import UserError

T = TypeVar("T")
# Rank 0 works out distances (seconds) and writes files (minutes) while the others wait for the next data set.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Place:
    """This process among those of its launch."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, where it did; `device` is cpu, cuda or cuda:N.

    Raises:
        UserError: no such device.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    chosen = find_device(device, local)
    if world == 1:
        yield Place(chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=chosen if chosen.type == "cuda" else None)
    try:
        yield Place(chosen, rank, world)
    finally:
        dist.destroy_process_group()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """`cuda` is the GPU of this process among those of the machine. UserError where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(
            f"--device {name}, but no CUDA device is visible. Use --device cpu, or check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES."
        )
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise UserError(
            f"--device {name}: process {local_rank} of this machine wants GPU {index}, there are {count}. Start at "
            f"most {count}, or use --device cpu."
        )
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def gather_on_main(value: T) -> list[T]:
    """What each rank holds, in the order of ranks, on rank 0; an empty list on the others. On all ranks."""
    if not is_distributed():
        return [value]
    found: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found or []  # type: ignore[return-value]
