"""Agree across ranks on requests to save a checkpoint or to stop."""

import torch
import torch.distributed as dist
from torch import Tensor


class RankRequests:
    """Exchanges requests while the next step runs, so that no rank waits for another one.

    Goes from host to host (gloo): through nccl, each host would wait for all that its GPU still has to do.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Tensor, dist.Work] | None = None

    def exchange(self, requests: list[int], world_size: int) -> list[int]:
        """Return, on all ranks alike, the largest value of each request at the call before; at once with one process.

        0: no request. Every rank must call it, at the same places.
        """
        if world_size == 1:
            return requests
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        heard = [0] * len(requests)
        if self._pending is not None:
            values, work = self._pending
            work.wait()
            heard = values.tolist()
        values = torch.tensor([int(request) for request in requests], dtype=torch.int32)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = values, work
        return heard
