"""Learning-rate schedules as pure functions of a step number. Source: recipe of arXiv 2510.11690, appendix on stage 1."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from src.core.settings import Settings


class Schedule(Settings):
    """Linear warm-up, then decay to `final_lr`, then constant. Lengths are in epochs, rounded to whole steps."""

    type: Literal["cosine", "linear", "constant"]
    warmup_epochs: float = Field(ge=0)
    decay_end_epoch: float
    """Epoch at which `final_lr` is reached, counted from the start of training."""
    base_lr: float = Field(gt=0)
    final_lr: float = Field(ge=0)
    """Absolute, not a factor of `base_lr`."""
    warmup_from_zero: bool
    """False: the learning rate is `base_lr` throughout the warm-up."""

    def lr(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of update number `step` (0 is the first)."""
        warmup, end = (round(epochs * steps_per_epoch) for epochs in (self.warmup_epochs, self.decay_end_epoch))
        if step < warmup:
            return self.base_lr * (step + 1) / warmup if self.warmup_from_zero else self.base_lr
        if self.type == "constant":
            return self.base_lr
        done = min((step - warmup) / (end - warmup), 1.0) if end > warmup else 1.0
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.type == "cosine" else 1 - done
        return self.final_lr + (self.base_lr - self.final_lr) * share

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type != "constant" and self.final_lr > self.base_lr:
            raise ValueError(
                f"final_lr={self.final_lr:g} exceeds the learning rate {self.base_lr:g}: the schedule would rise. final_lr is "
                f"absolute; set it to {self.base_lr / 10:g}, say."
            )
        if self.type != "constant" and self.decay_end_epoch < self.warmup_epochs:
            raise ValueError(
                f"the warm-up ({self.warmup_epochs:g} epochs) ends after the decay ({self.decay_end_epoch:g}). Lower "
                "warmup_epochs or raise decay_end_epoch."
            )
        return self
