"""Find which process of a launch this one is, before a process group exists."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Read from the environment that torchrun, SLURM or Lightning's own launcher leave."""

    rank: int
    world: int
    kind: str
    """`single`, `torchrun`, `slurm` or `child` (started by Lightning from the first process; `world` is 0 then)."""

    @classmethod
    def detect(cls) -> "Launch":
        env = os.environ
        if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), "torchrun")
        tasks = int(env.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in env else 1
        if tasks > 1 and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            return cls(int(env["SLURM_PROCID"]), tasks, "slurm")
        if "LOCAL_RANK" in env:
            return cls(int(env.get("NODE_RANK", "0")) or int(env["LOCAL_RANK"]), 0, "child")
        return cls(0, 1, "single")

    @property
    def main(self) -> bool:
        return self.rank == 0
