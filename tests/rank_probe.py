"""Train with SGD and save what each rank saw. Tests start it, alone or on two ranks.

python tests/rank_probe.py OUT_FOLDER OVERRIDES…
"""

import hashlib
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytorch_lightning as pl
import torch

from src.core.distributed import Launch
from src.training import stage1 as rae_module
from src.training.record import RunRecord, make_folder
from src.training.run import build_run, fit
from tests.training import SMALL, composed

GRADIENTS: list[list[torch.Tensor]] = []


class RecordingSGD(torch.optim.SGD):
    """SGD that records its gradients. Adam would turn the rounding error of a zero gradient into a full step."""

    def step(self, closure=None):
        GRADIENTS.append([p.grad.detach().clone() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.digests: list[str] = []
        self.positions: list[list[int]] = []
        self.weights: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = pl_module.state_dict()
        self.digests.append(hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest())
        self.positions.append(batch["index"].tolist())
        self.weights.append(float(pl_module.train_terms.get("train/adaptive_weight", 0.0)))


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    rae_module.adamw = lambda module, settings: RecordingSGD(
        [p for p in module.parameters() if p.requires_grad], lr=settings.lr
    )
    config = composed([*SMALL, "~callbacks.rfid", "logger=csv", "callbacks=no_checkpoint", *overrides])
    launch = Launch.detect()
    folder = make_folder(config.paths.log_dir, None) if launch.main else None
    config.paths.run_dir = folder and str(folder)
    run = build_run(config, launch)
    for value in run.module.state_dict().values():  # as if each machine drew other weights: rank 0's must win
        value.add_(launch.rank)
    watch = Watch()
    run.trainer.callbacks.append(watch)
    fit(run, None, RunRecord(folder, "probe"))
    content = {
        "digests": watch.digests, "positions": watch.positions, "weights": watch.weights, "gradients": GRADIENTS,
        "state": run.module.state_dict(), "scores": run.module.scores,
    }  # fmt: skip
    torch.save(content, out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
