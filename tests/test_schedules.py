"""docs/recipe.md, "Optimisation": linear warm-up, cosine (or linear) to final_lr, constant after that."""

import math

import pytest

from src.core.errors import UserError
from src.core.schedules import Schedule

BASE = {
    "type": "cosine", "base_lr": 2e-4, "final_lr": 2e-5, "warmup_epochs": 1, "decay_end_epoch": 11, "warmup_from_zero": True,
}  # fmt: skip


@pytest.mark.parametrize(("changes", "step", "expected"), [
    ({}, 0, 2e-5), ({}, 4, 1e-4), ({}, 9, 2e-4), ({}, 10, 2e-4), ({}, 60, 1.1e-4),
    ({}, 35, 2e-5 + 1.8e-4 * 0.5 * (1 + math.cos(math.pi / 4))), ({}, 110, 2e-5), ({}, 10**6, 2e-5),
    ({"type": "linear"}, 60, 1.1e-4), ({"type": "linear"}, 35, 2e-5 + 1.8e-4 * 0.75), ({"type": "constant"}, 5000, 2e-4),
    ({"warmup_from_zero": False}, 0, 2e-4), ({"warmup_from_zero": False}, 9, 2e-4), ({"warmup_epochs": 0.26}, 1, 2e-4 * 2 / 3),
    ({"warmup_epochs": 0}, 0, 2e-4), ({"warmup_epochs": 0, "decay_end_epoch": 0}, 0, 2e-5), ({"type": "constant", "final_lr": 1}, 0, 2e-5),
])  # fmt: skip
def test_learning_rates_with_ten_steps_an_epoch(changes, step, expected):
    assert Schedule.parse(BASE | changes, "s").lr(step, steps_per_epoch=10) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("changes", "said"), [
    ({"type": "step"}, "s.type='step': expected cosine, linear or constant"), ({"base_lr": 0}, "s.base_lr=0: expected more than 0"),
    ({"final_lr": 3e-4}, "s: final_lr=0.0003 exceeds the learning rate 0.0002"), ({"warmup_epochs": 12}, r"the warm-up \(12 epochs\) ends after"),
    ({"decay_end_epoch": math.inf}, "a finite number"),
])  # fmt: skip
def test_contradictions_are_rejected(changes, said):
    with pytest.raises(UserError, match=said):
        Schedule.parse(BASE | changes, "s")
