"""What one rank wishes and all have to do together: saving a checkpoint, stopping."""

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Wishes go round among the ranks while the next step runs, so that nobody waits for them.

    `exchange` returns, on all ranks alike, what somebody wished at the call before (at once where there is one process).
    They go from host to host (gloo): through nccl, each host would wait for all that its GPU still has to do.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._under_way: Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, wishes: list[bool], world_size: int) -> list[bool]:
        """On all ranks at the same places."""
        if world_size == 1:
            return wishes
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        heard = [False] * len(wishes)
        if self._work is not None and self._under_way is not None:
            self._work.wait()
            heard = [bool(value) for value in self._under_way.tolist()]
        self._under_way = torch.tensor([float(wish) for wish in wishes])
        self._work = dist.all_reduce(self._under_way, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return heard
