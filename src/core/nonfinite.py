"""Detect NaN and infinity in losses, gradients and weights, without a device sync in every step.

A bad step is detected on the device, where the fused optimiser then skips its update. The host reads the counters only
now and then; the weights are safe in the meantime.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from src.core.errors import UserError

CAUSAL_ORDER = (
    "l1", "lpips", "gan", "adaptive_weight", "loss", "gradient", "discriminator loss", "discriminator gradient",
)  # fmt: skip
"""Names of watched values, each before those that it makes non-finite. Other names count as causes of all of these."""


REMEDY = (
    "Try a lower model.optimizer.lr, trainer.gradient_clip_val=1.0, trainer.precision=bf16 instead of 16, or allow more "
    "with trainer.max_skipped_steps."
)
FIRST_STEP = (
    "It is this run's first step, so look at what was loaded rather than at the optimisation: ckpt_path, "
    "model.pretrained_decoder_path, model.normalization_stat_path, the encoder's weights, trainer.precision=16."
)


class NonFiniteError(UserError):
    """Losses or gradients were NaN or infinite more often than allowed, or any weight is."""


def nonfinite_tensors(content: Any) -> list[str]:
    """Return the names (`state_dict.decoder.head.weight`) of tensors in nested containers that hold NaN or infinity.

    Checks the sums first: each tensor is read once, with one device sync for all.
    """
    found = [(name, value) for name, value in _tensors(content, "") if value.is_floating_point() or value.is_complex()]
    if not found:
        return []
    device = found[0][1].device
    sums = [value.sum().abs().to(device, torch.float32) for _, value in found]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return []
    return [name for name, value in found if not bool(torch.isfinite(value).all())]


def _tensors(content: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content.detach()
    elif isinstance(content, (Mapping, list, tuple)):
        parts = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in parts:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


class NonFiniteCounter:
    """Counts steps with non-finite values and records the first bad step of each named value."""

    def __init__(self, max_skipped_steps: int) -> None:
        self.max_skipped_steps = max_skipped_steps
        self._skipped: Tensor | None = None  # int64 scalar on the device
        self._last = torch.empty(0)  # the latest bad step
        self._first: dict[tuple[str, ...], Tensor] = {}  # names -> first bad step of each, -1: none, on the device
        self._restored = 0
        self._began: int | None = None  # the first step of this process

    def observe(self, step: int, values: Mapping[str, Tensor]) -> Tensor:
        """Return 1.0 if any of `values` (scalars) is not finite, else 0.0: float32 on the device."""
        flags = torch.stack([value.detach().float() for value in values.values()]).mul_(0).ne(0)  # inf * 0 is NaN
        bad = flags.any()
        self._began = step if self._began is None else self._began
        if self._skipped is None:
            self._skipped = torch.full((), self._restored, dtype=torch.int64, device=bad.device)
            self._last = torch.full_like(self._skipped, -1)
        self._skipped += bad & (self._last != step)  # a step counts once, even if both networks are non-finite
        self._last.masked_fill_(bad, step)
        first = self._first.get(names := tuple(values))
        if first is None:
            first = self._first[names] = torch.full_like(flags, -1, dtype=torch.int64)
        first.masked_fill_(flags & (first < 0), step)
        return bad.float()

    @property
    def skipped(self) -> int:
        """Steps skipped so far. Syncs with the device."""
        return self._restored if self._skipped is None else int(self._skipped)

    @skipped.setter
    def skipped(self, value: int) -> None:
        self._restored, self._skipped = value, None

    def check(self) -> None:
        """After too many bad steps, raise NonFiniteError with the cause and its first step. Syncs with the device."""
        skipped = self.skipped
        if skipped <= self.max_skipped_steps:
            return
        wrong: dict[str, int] = {}
        for names, steps in self._first.items():
            found = {name: step for name, step in zip(names, steps.tolist(), strict=True) if step >= 0}
            wrong |= {name: min(step, wrong.get(name, step)) for name, step in found.items()}
        if not wrong:  # all bad steps are from before the resume
            return
        order = {name: place for place, name in enumerate(CAUSAL_ORDER)}
        cause, *rest = sorted(wrong, key=lambda name: (wrong[name], order.get(name, -1)))
        step, also = wrong[cause], ", ".join(rest)
        raise NonFiniteError(
            f"{cause} is NaN or infinite at step {step}" + (f" (then: {also})" if also else "") + f"; {skipped} such "
            f"step(s), trainer.max_skipped_steps={self.max_skipped_steps}. Such steps change no weights. "
            + (FIRST_STEP if step == self._began else REMEDY)
        )
