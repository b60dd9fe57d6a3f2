"""Detect the launcher, join the process group, and sum or agree across ranks (gloo and nccl)."""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.terminal import answer_signals
from src.core.text import hydra_quoted, masked

T = TypeVar("T")
# Rank 0 computes distances (seconds) and writes files (minutes) while the others wait for the next dataset.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Launch:
    """Rank and launcher of this process, from the environment that torchrun, SLURM or Lightning's own launcher sets."""

    rank: int
    world: int
    kind: str
    """`single`, `torchrun` (or any launcher that sets RANK and WORLD_SIZE; LOCAL_RANK is optional), `slurm`, or `child` (started
    by Lightning from the first process; `world` is 0 then)."""

    @classmethod
    def detect(cls) -> "Launch":
        """Read the environment, before a process group exists. UserError under mpirun, which sets none of these variables."""
        env = os.environ
        by_others = int(env.get("WORLD_SIZE", "1")) > 1 and "SLURM_PROCID" not in env
        if {"RANK", "WORLD_SIZE"} <= env.keys() and ("LOCAL_RANK" in env or by_others):
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), "torchrun")
        tasks = int(env.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in env else 1
        if tasks > 1 and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            return cls(int(env["SLURM_PROCID"]), tasks, "slurm")
        if "LOCAL_RANK" in env:
            return cls(int(env.get("NODE_RANK", "0")) or int(env["LOCAL_RANK"]), 0, "child")
        if int(started := env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"mpirun started {started} processes, each of which would train on its own. Start them with torchrun, or set RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each."
            )
        return cls(0, 1, "single")

    @property
    def main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Process:
    """Device and rank of this process, and the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Join the process group if torchrun started several; `device` is cpu, cuda or cuda:N.

    Raises:
        UserError: no such device, or started by srun or mpirun, where each process would do and write everything.
    """
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for variable, launcher in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        if world == 1 and int(count := os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"{launcher} started {count} processes, each of which would do all of the work. Start one per machine and let it "
                "start the others: torchrun --nproc_per_node=8 SCRIPT …"
            )
    chosen = find_device(device, local)
    if world == 1:
        yield Process(chosen)
        return
    on_gpu = chosen.type == "cuda"
    handlers = answer_signals(signal.SIG_DFL)  # a Python handler would only run once all ranks have joined
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=chosen if on_gpu else None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield Process(chosen, rank, world)
    finally:
        dist.destroy_process_group()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called `name`; `cuda` is the GPU of this process. Raises UserError if there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
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
            f"--device {name}: process {local_rank} of this machine needs GPU {index}; number of visible GPUs: {count}. Start "
            f"at most {count}, or use --device cpu."
        )
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def is_distributed() -> bool:
    """Return whether a process group is running. Without one, every sum over ranks is the value itself."""
    return dist.is_available() and dist.is_initialized()


def wait_for_all() -> None:
    """Block until every rank has arrived."""
    if is_distributed():
        dist.barrier()


def gather_on_main(value: T) -> list[T]:
    """Return on rank 0 the value of every rank, in rank order; an empty list on the others. Call on all ranks."""
    if not is_distributed():
        return [value]
    found: list[T | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found or []  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return the value of every rank, in rank order. Call on all ranks."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def require_same_step(step: int, file: object) -> None:
    """Raise UserError if ranks read a checkpoint at different steps: training replaced it meanwhile. Call on all ranks."""
    if len(steps := sorted(set(gather(step)))) > 1:
        raise UserError(
            f"{file} was replaced while it was read: the processes read it at steps {', '.join(map(str, steps))}. Give a "
            "checkpoint that its run doesn't replace (epoch_XXX.ckpt, or a copy), or try again."
        )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum of `values` (same shape on all ranks) over the ranks. Call on all ranks.

    dtype and device are those of `values`; with nccl the sum itself runs on the GPU.
    """
    if not is_distributed():
        return values
    on = torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend()) else torch.device("cpu")
    total = values.detach().to(on, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its mean over ranks and return it; unchanged with one process."""
    if is_distributed() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over ranks with one all-reduce."""
    if not is_distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class RankRequests:
    """Agrees across ranks on requests to save or stop. The exchange overlaps the next step, so no rank waits for another.

    Uses gloo between the hosts: with nccl, each host would wait for all work queued on its GPU.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Tensor, dist.Work] | None = None

    def exchange(self, requests: list[int], world_size: int) -> list[int]:
        """Return the largest value of each request over ranks, as of the previous call (with one process: of this one).

        0: no request. Every rank must call it, at the same points.
        """
        if world_size == 1:
            return requests
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        agreed = [0] * len(requests)
        if self._pending is not None:
            values, work = self._pending
            work.wait()
            agreed = values.tolist()
        values = torch.tensor([int(request) for request in requests], dtype=torch.int32)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = values, work
        return agreed


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums of tensors on `device`: the same, or the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def command_to_resume(checkpoint: str | os.PathLike[str]) -> str:
    """Return this process's command line, quoted for a shell, with `ckpt_path` set to a checkpoint.

    The arguments of a launcher such as torchrun are unknown: `…` stands for them.
    """
    start = {"torchrun": ["torchrun", "…"], "slurm": ["srun", "…", "python"]}.get(Launch.detect().kind, ["python"])
    given = [word for word in masked(list(sys.argv)) if not word.startswith("ckpt_path=")]
    return f"{' '.join(start)} {shlex.join(given)} ckpt_path={hydra_quoted(str(checkpoint))}"
