"""Adversarial losses equal hand-computed values, and chunks of a batch add up."""

import math

import pytest
import torch

from src.losses.gan import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
SOFTPLUS = sum(math.log1p(math.exp(-x)) for x in (2, 0.5, -1, 0)) / 4


@pytest.mark.parametrize(
    ("name", "wanted"), [("hinge", (0 + 0.5 + 2 + 1) / 4), ("softplus", SOFTPLUS), ("vanilla", SOFTPLUS)]
)
def test_discriminator_losses_and_the_official_name(name: str, wanted: float) -> None:
    terms = DISCRIMINATOR_LOSSES[name]
    assert terms["real"](REAL).item() == pytest.approx(wanted, rel=1e-6)
    assert terms["fake"](-REAL).item() == pytest.approx(wanted, rel=1e-6)


def test_generator_losses_and_the_official_name() -> None:
    for name in ("hinge", "vanilla"):
        assert GENERATOR_LOSSES[name](1 - REAL).item() == pytest.approx(-(-1 + 0.5 + 2 + 1) / 4)
    assert GENERATOR_LOSSES["softplus"](REAL).item() == pytest.approx(SOFTPLUS, rel=1e-6)


def test_terms_add_up_over_chunks() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for term in (
        *GENERATOR_LOSSES.values(),
        *(term for loss in DISCRIMINATOR_LOSSES.values() for term in loss.values()),
    ):
        torch.testing.assert_close(term(logits[:2]) * (2 / 6) + term(logits[2:]) * (4 / 6), term(logits))
