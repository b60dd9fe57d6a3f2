"""Adversarial losses by hand-worked numbers and autograd."""

import math

import pytest
import torch

from src.core.errors import UserError
from src.losses.gan import adaptive_weight, discriminator_loss, generator_loss

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([[-2.0, -0.5], [1.0, 0.0]])


def test_hinge() -> None:
    terms = discriminator_loss("hinge")(REAL, FAKE)
    assert terms["real"].item() == pytest.approx((0 + 0.5 + 2 + 1) / 4)
    assert terms["fake"].item() == pytest.approx((0 + 0.5 + 2 + 1) / 4)
    assert terms["loss"].item() == pytest.approx(0.5 * (0.875 + 0.875))


def test_softplus_and_its_official_name() -> None:
    wanted = sum(math.log1p(math.exp(-x)) for x in (2, 0.5, -1, 0)) / 4
    for name in ("softplus", "vanilla"):
        assert discriminator_loss(name)(REAL, FAKE)["loss"].item() == pytest.approx(wanted, rel=1e-6)
    assert discriminator_loss("vanilla").name == "softplus"


def test_generator_losses_and_the_official_name() -> None:
    for name in ("hinge", "vanilla"):
        assert generator_loss(name)(FAKE + 1)["loss"].item() == pytest.approx(-(-1 + 0.5 + 2 + 1) / 4)
    assert generator_loss("vanilla").name == "hinge"
    assert generator_loss("softplus")(torch.zeros(2, 2))["loss"].item() == pytest.approx(math.log(2))


def test_terms_add_up_over_chunks_and_are_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5)
    for name in ("hinge", "softplus"):
        term = discriminator_loss(name).fake_term
        parts = term(logits[:2]) * (2 / 6) + term(logits[2:]) * (4 / 6)
        torch.testing.assert_close(parts, term(logits))
        assert term(logits.bfloat16()).dtype == torch.float32


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(UserError, match=r"disc_loss=hing.*hinge, softplus.*vanilla \(= softplus\)"):
        discriminator_loss("hing")
    with pytest.raises(UserError, match=r"gen_loss=x.*vanilla \(= hinge\)"):
        generator_loss("x")


@pytest.mark.parametrize(("r", "g", "w"), [(1.0, 2.0, 0.5), (1.0, 0.0, 1e4), (0.0, 1.0, 0.0), (1e-3, 1e-6, 500.0)])
def test_adaptive_weight(r: float, g: float, w: float) -> None:
    norm = torch.tensor(r, requires_grad=True)
    got = adaptive_weight(norm, torch.tensor(g), 1e4)
    assert got.item() == pytest.approx(w, rel=1e-5) and not got.requires_grad
