"""Networks that are never trained: always frozen; untrained weights are seeded and leave the global generator alone."""

import pytest
import torch
from torch import nn

from src.losses.lpips import LPIPS
from src.metrics.inception import InceptionFeatures
from src.models.dino import TINY, DinoTrunk
from src.models.discriminator import DinoDiscriminator
from src.models.encoders import ENCODERS
from tests.conftest import TINY_ENCODERS
from tests.test_discriminator import ARCH

FROZEN = {
    **{name: lambda seed=0, name=name: ENCODERS[name](**TINY_ENCODERS[name], weights="untrained", seed=seed) for name in TINY_ENCODERS},
    "LPIPS": lambda seed=0: LPIPS(None, None, "tiny", seed),
    "DINO": lambda seed=0: DinoTrunk(TINY, None, "tiny", seed),
    "Inception": lambda seed=0: InceptionFeatures(None, "tiny", seed),
}  # fmt: skip
UNTRAINED = FROZEN | {"discriminator": lambda seed=0: DinoDiscriminator(None, **ARCH, seed=seed)}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_stays_frozen(name):
    network = FROZEN[name]()
    nn.Sequential(network.train()).train(True)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    if name in ENCODERS:
        images = torch.randn(1, 3, 8 * network.patch_size, 8 * network.patch_size, requires_grad=True)
        assert not network(images).requires_grad and torch.equal(network(images), network(images))
    if name == "Inception":
        assert not network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize("name", UNTRAINED)
def test_untrained_weights_are_seeded_and_leave_the_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (UNTRAINED[name](seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.untrained
    one, same, another = (torch.cat([p.reshape(-1) for p in network.parameters()]) for network in (first, again, other))
    assert torch.equal(one, same) and not torch.equal(one, another)
    if name in ENCODERS:
        assert first.identity() == again.identity() != other.identity()
        assert first.identity()["weights"].startswith("untrained")
