"""Find which process of a launch this one is, before a process group exists."""

import os
import shlex
import sys
from dataclasses import dataclass

from src.core.text import hydra_quoted, masked


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


def command_to_resume(checkpoint: str | os.PathLike[str]) -> str:
    """Return this process's command line, to be typed in a shell, with `ckpt_path` set to a checkpoint.

    What a launcher such as torchrun was told is unknown; it is left out behind its name.
    """
    start = {"torchrun": ["torchrun", "…"], "slurm": ["srun", "…", "python"]}.get(Launch.detect().kind, ["python"])
    given = [word for word in masked(list(sys.argv)) if not word.startswith("ckpt_path=")]
    return f"{' '.join(start)} {shlex.join(given)} ckpt_path={hydra_quoted(str(checkpoint))}"
