"""Who this process is among those of one launch, before anything distributed has been set up."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Read from the environment that torchrun, SLURM or Lightning's own launcher leave."""

    rank: int
    world: int
    kind: str
    """`single`, `torchrun`, `slurm` or `child` (started by Lightning from the first process)."""

    @classmethod
    def detect(cls) -> "Launch":
        env = os.environ
        if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env and "LOCAL_RANK" in env):
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), "torchrun")
        if (
            "SLURM_PROCID" in env
            and int(env.get("SLURM_NTASKS", "1")) > 1
            and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
        ):
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), "slurm")
        if "LOCAL_RANK" in env:
            return cls(int(env.get("NODE_RANK", "0")) or int(env["LOCAL_RANK"]), 0, "child")
        return cls(0, 1, "single")

    @property
    def main(self) -> bool:
        return self.rank == 0
