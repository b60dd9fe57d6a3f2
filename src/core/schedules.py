"""Learning-rate schedules as pure functions of a step number. Source: recipe of arXiv 2510.11690, appendix on stage 1."""

import math
from dataclasses import dataclass
from typing import Literal

from src.core.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay to `final_lr`, then constant.

    `multiplier` is what a `LambdaLR` wants; steps are counted from 0 and the last decaying step is `decay_steps`.
    """

    kind: Literal["cosine", "linear", "constant"]
    base_lr: float
    final_lr: float
    """Absolute, not a factor."""
    warmup_steps: int
    decay_steps: int
    """Step at which `final_lr` is reached; warm-up included."""
    warmup_from_zero: bool
    """False: the learning rate is `base_lr` all through the warm-up."""

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "constant"):
            raise UserError(f"model.scheduler.type={self.kind!r}: expected 'cosine', 'linear' or 'constant'.")
        if self.base_lr <= 0 or self.final_lr < 0:
            raise UserError(f"Learning rates must be positive: base_lr={self.base_lr}, final_lr={self.final_lr}.")
        if self.kind != "constant" and self.final_lr > self.base_lr:
            raise UserError(
                f"model.scheduler.final_lr={self.final_lr:g} exceeds the learning rate {self.base_lr:g}: the schedule "
                f"would rise. final_lr is absolute; set model.scheduler.final_lr={self.base_lr / 10:g}, say."
            )
        if self.kind != "constant" and self.decay_steps < self.warmup_steps:
            raise UserError(
                f"The warm-up ({self.warmup_steps} steps) ends after the decay ({self.decay_steps} steps). Lower "
                "model.scheduler.warmup_epochs or raise model.scheduler.decay_end_epoch."
            )

    def lr(self, step: int) -> float:
        """Learning rate of the update number `step` (0 is the first)."""
        if step < self.warmup_steps:
            return self.base_lr * (step + 1) / self.warmup_steps if self.warmup_from_zero else self.base_lr
        if self.kind == "constant":
            return self.base_lr
        span = self.decay_steps - self.warmup_steps
        done = min((step - self.warmup_steps) / span, 1.0) if span else 1.0
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.final_lr + (self.base_lr - self.final_lr) * share
