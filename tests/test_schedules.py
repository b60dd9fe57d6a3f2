"""Recipe section 4: linear warm-up, cosine (or linear) to final_lr, constant after that."""

import math

import pytest

from src.core.errors import UserError
from src.core.schedules import Schedule


def make(kind="cosine", base=2e-4, final=2e-5, warmup=10, decay=110, from_zero=True):
    return Schedule(kind, base, final, warmup, decay, from_zero)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-5),
        (4, 1e-4),
        (9, 2e-4),
        (10, 2e-4),
        (60, 1.1e-4),
        (35, 2e-5 + 1.8e-4 * 0.5 * (1 + math.cos(math.pi / 4))),
        (110, 2e-5),
        (10**6, 2e-5),
    ],
)
def test_cosine(step, expected):
    assert make().lr(step) == pytest.approx(expected, rel=1e-12)


def test_linear_constant_and_a_flat_warm_up():
    assert make("linear").lr(60) == pytest.approx(1.1e-4)
    assert make("constant").lr(5000) == 2e-4
    assert [make(from_zero=False).lr(s) for s in (0, 9)] == [2e-4, 2e-4]
    assert make(warmup=0).lr(0) == 2e-4
    assert make(warmup=0, decay=0).lr(0) == 2e-5


@pytest.mark.parametrize("changes", [{"kind": "step"}, {"final": 3e-4}, {"base": 0}, {"warmup": 20, "decay": 10}])
def test_contradictions(changes):
    with pytest.raises(UserError):
        make(**changes)
