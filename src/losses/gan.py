"""Adversarial losses on patch logits, by name.

Legend: B batch, K logits per image. The official configuration calls two different things `vanilla`: for the
discriminator the softplus loss, for the generator -mean(logits). Both are accepted under that name.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Term = Callable[[Tensor], Tensor]
"""Logits B x K, float32 -> scalar, a mean: chunks of a batch add up when weighted by their share of it."""

DISCRIMINATOR_LOSSES: dict[str, dict[str, Term]] = {
    # Lim & Ye, arXiv 1705.02894: the published choice of RAE.
    "hinge": {"real": lambda x: F.relu(1 - x).mean(), "fake": lambda x: F.relu(1 + x).mean()},
    # Goodfellow et al., arXiv 1406.2661: cross-entropy on logits.
    "softplus": {"real": lambda x: F.softplus(-x).mean(), "fake": lambda x: F.softplus(x).mean()},
}
"""Terms for real and fake images; the loss is half their sum."""
DISCRIMINATOR_LOSSES["vanilla"] = DISCRIMINATOR_LOSSES["softplus"]

GENERATOR_LOSSES: dict[str, Term] = {
    # The generator of the hinge GAN: the published choice of RAE, there called `vanilla`.
    "hinge": lambda x: -x.mean(),
    # Goodfellow et al., the non-saturating form: the partner of the softplus discriminator.
    "softplus": lambda x: F.softplus(-x).mean(),
}
"""Term for the generator's images."""
GENERATOR_LOSSES["vanilla"] = GENERATOR_LOSSES["hinge"]
