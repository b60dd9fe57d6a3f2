"""Adversarial losses on patch logits, and the weight that balances them against reconstruction.

Legend: B batch, K logits per image. The official configuration calls two different things `vanilla`: for the
discriminator the softplus loss, for the generator -mean(logits). Both are accepted under that name.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from src.core.errors import UserError

Loss = TypeVar("Loss")
Term = Callable[[Tensor], Tensor]
"""Logits B x K -> float32 scalar, a mean: chunks of a batch add up when weighted by their share of it."""


class DiscriminatorLoss(NamedTuple):
    """0.5 * (real + fake). The halves are apart so that each graph can be freed before the next one is built."""

    name: str
    real_term: Term
    fake_term: Term

    def __call__(self, logits_real: Tensor, logits_fake: Tensor) -> dict[str, Tensor]:
        """`loss` to minimise and its halves `real` and `fake`, scalars."""
        real, fake = self.real_term(logits_real), self.fake_term(logits_fake)
        return {"loss": 0.5 * (real + fake), "real": real, "fake": fake}


class GeneratorLoss(NamedTuple):
    """What the generator minimises over the logits of its images."""

    name: str
    term: Term

    def __call__(self, logits_fake: Tensor) -> dict[str, Tensor]:
        """`loss`, a scalar."""
        return {"loss": self.term(logits_fake)}


DISCRIMINATOR_LOSSES = {
    # Lim & Ye, arXiv 1705.02894: the published choice of RAE.
    "hinge": DiscriminatorLoss("hinge", lambda x: F.relu(1 - x.float()).mean(), lambda x: F.relu(1 + x.float()).mean()),
    # Goodfellow et al., arXiv 1406.2661: cross-entropy on logits.
    "softplus": DiscriminatorLoss(
        "softplus", lambda x: F.softplus(-x.float()).mean(), lambda x: F.softplus(x.float()).mean()
    ),
}
GENERATOR_LOSSES = {
    # The generator of the hinge GAN: the published choice of RAE, there called `vanilla`.
    "hinge": GeneratorLoss("hinge", lambda x: -x.float().mean()),
    # Goodfellow et al., the non-saturating form: the partner of the softplus discriminator.
    "softplus": GeneratorLoss("softplus", lambda x: F.softplus(-x.float()).mean()),
}
OFFICIAL_DISCRIMINATOR_NAMES = {"vanilla": "softplus"}
OFFICIAL_GENERATOR_NAMES = {"vanilla": "hinge"}


def discriminator_loss(name: str) -> DiscriminatorLoss:
    """By its name or the official one. Raises UserError with the list."""
    return _by_name(name, "disc_loss", DISCRIMINATOR_LOSSES, OFFICIAL_DISCRIMINATOR_NAMES)


def generator_loss(name: str) -> GeneratorLoss:
    """By its name or the official one. Raises UserError with the list."""
    return _by_name(name, "gen_loss", GENERATOR_LOSSES, OFFICIAL_GENERATOR_NAMES)


@torch.no_grad()
def adaptive_weight(norm_r: Tensor, norm_g: Tensor, max_weight: float) -> Tensor:
    """w = |dR/dW| / (|dG/dW| + 1e-6), at most `max_weight`. Esser et al., arXiv 2012.09841, equation 7.

    `norm_r`, `norm_g`: norms of the gradients of the reconstruction and the generator loss in the same weight.
    """
    return (norm_r / (norm_g + 1e-6)).clamp(0, max_weight)


def _by_name(name: str, key: str, losses: Mapping[str, Loss], official: Mapping[str, str]) -> Loss:
    loss = losses.get(official.get(name, name))
    if loss is None:
        also = ", ".join(f"{theirs} (= {ours})" for theirs, ours in official.items())
        raise UserError(f"{key}={name}: no such loss. Choose one of {', '.join(losses)}; official names: {also}.")
    return loss
