"""Frozen networks kept in half precision give what autocast gives."""

from copy import deepcopy

import pytest
import torch

from src.core.precision import cast_frozen, full_float32
from src.models.discriminator import DinoDiscriminator
from tests.conftest import TINY_ENCODERS, make_rae


@pytest.mark.parametrize("encoder", TINY_ENCODERS)
def test_encoders_under_autocast_are_bit_equal(encoder):
    before = make_rae(encoder)
    after = deepcopy(before)
    cast_frozen(after.encoder, torch.bfloat16)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(before.encode(images), after.encode(images))
    assert sum(p.nbytes for p in after.encoder.parameters()) < 0.6 * sum(p.nbytes for p in before.encoder.parameters())


def test_discriminator_trunk_and_its_gradient_to_the_image_are_bit_equal():
    before = DinoDiscriminator(None, 5, (1, 3), "bn", using_spec_norm=True, recipe="S_8", weights="tiny")
    after = deepcopy(before)
    cast_frozen(after.trunk, torch.bfloat16)
    found = []
    for discriminator in (before, after):
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            discriminator(images).sum().backward()
        found.append(images.grad)
    assert torch.equal(*found)


def test_trained_networks_are_rejected():
    with pytest.raises(ValueError, match="frozen"):
        cast_frozen(make_rae().decoder, torch.bfloat16)


@pytest.mark.parametrize("products", ["highest", "high"])
def test_scores_are_computed_in_ieee_float32_whatever_the_run_uses(products):
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    torch.set_float32_matmul_precision(products)
    try:
        before = [setting.fp32_precision for setting in settings]
        with pytest.raises(KeyError), full_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest" and settings[1].fp32_precision == "ieee"
            raise KeyError
        assert torch.get_float32_matmul_precision() == products
        assert settings[1].fp32_precision == before[1] and before[0] in (settings[0].fp32_precision, "none")
        assert torch.backends.cudnn.allow_tf32 in (True, False)  # the older switch can still be read
    finally:
        torch.set_float32_matmul_precision("highest")
