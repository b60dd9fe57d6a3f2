"""Adversarial losses on patch logits, by name.

Legend: B batch, K logits per image. The official configuration calls two different things `vanilla`: for the
discriminator the softplus loss, for the generator -mean(logits). Both are accepted under that name.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Term = Callable[[Tensor], Tensor]
"""Logits B x K, float32 -> scalar mean: chunks of a batch add up when weighted by their share of the batch."""

DISCRIMINATOR_LOSSES: dict[str, dict[str, Term]] = {
    # Lim & Ye, arXiv 1705.02894; used by the published RAE.
    "hinge": {"real": lambda x: F.relu(1 - x).mean(), "fake": lambda x: F.relu(1 + x).mean()},
    # Goodfellow et al., arXiv 1406.2661: cross-entropy on logits.
    "softplus": {"real": lambda x: F.softplus(-x).mean(), "fake": lambda x: F.softplus(x).mean()},
}
"""Terms for real and fake images; the loss is half their sum."""
DISCRIMINATOR_LOSSES["vanilla"] = DISCRIMINATOR_LOSSES["softplus"]

GENERATOR_LOSSES: dict[str, Term] = {
    # The generator loss of the hinge GAN; used by the published RAE, which calls it `vanilla`.
    "hinge": lambda x: -x.mean(),
    # Goodfellow et al., the non-saturating form; goes with the softplus discriminator.
    "softplus": lambda x: F.softplus(-x).mean(),
}
"""Loss term for the generator's images."""
GENERATOR_LOSSES["vanilla"] = GENERATOR_LOSSES["hinge"]
