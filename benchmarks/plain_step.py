"""The published stage-1 step in its published order of work, written plainly. Recipe sections 2 and 5.

Kept for two purposes: the yardstick of `benchmarks/train_step.py`, and the oracle that the step of
`src/models/training_step.py` is held against. Nothing in it is clever: every loss is differentiated through the whole
chain, the encoder runs once for the generator and once for the discriminator.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from src.losses.diffaug import DiffAug, Draws
from src.losses.lpips import LPIPS
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE
from src.models.training_step import NoiseDraws, Phase


@dataclass(frozen=True)
class PlainStep:
    rae: RAE
    lpips: LPIPS
    discriminator: DinoDiscriminator
    augment: DiffAug
    perceptual_weight: float
    disc_weight: float
    max_d_weight: float

    def generator(self, images: Tensor, noise: NoiseDraws | None, augment: Draws, phase: Phase) -> dict[str, Tensor]:
        """Images in [0, 1]. Gradients of the total loss go into the decoder; returns the terms."""
        with record_function("encode"):
            latents = self._encode(images, noise)
        with record_function("decode"):
            output = self.rae.decode(latents)
        terms = {"l1": F.l1_loss(output, images)}
        reconstruction = terms["l1"]
        if phase.lpips:
            with record_function("lpips"):
                terms["lpips"] = self._lpips(output * 2 - 1, images * 2 - 1)
            reconstruction = reconstruction + self.perceptual_weight * terms["lpips"]
        terms["loss"] = reconstruction
        if phase.gan:
            with record_function("gan"):
                terms["gan"] = -self.discriminator(self.augment.apply(output * 2 - 1, augment)).mean()
            with record_function("adaptive_weight"):
                weight = self.rae.decoder.decoder_pred.weight
                (grad_r,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
                (grad_g,) = torch.autograd.grad(terms["gan"], weight, retain_graph=True)
                balance = (grad_r.norm() / (grad_g.norm() + 1e-6)).clamp(0, self.max_d_weight).detach()
            terms["adaptive_weight"] = balance
            terms["loss"] = reconstruction + self.disc_weight * balance * terms["gan"]
        with record_function("backward"):
            terms["loss"].backward()
        return {name: value.detach() for name, value in terms.items()}

    def discriminate(self, images: Tensor, fake_draws: Draws, real_draws: Draws) -> dict[str, Tensor]:
        """Images in [0, 1]. Gradients of D's hinge loss go into its heads."""
        self.discriminator.zero_grad()  # the generator's backward pass left some there
        with torch.no_grad(), record_function("disc_decode"):
            fake = self.rae.decode(self._encode(images, None)) * 2 - 1
            fake = torch.round((fake.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1
        with record_function("disc"):
            self.discriminator.power_iteration()
            logits_fake = self.discriminator(self.augment.apply(fake, fake_draws))
            # Torch's hook form keeps each forward's normalised weights; so the first graph is used up before the second.
            loss_fake = 0.5 * F.relu(1 + logits_fake).mean()
            loss_fake.backward()
            self.discriminator.power_iteration()
            logits_real = self.discriminator(self.augment.apply(images * 2 - 1, real_draws))
            loss_real = 0.5 * F.relu(1 - logits_real).mean()
            loss_real.backward()
        return {
            "loss": (loss_fake + loss_real).detach(),
            "logits_fake": logits_fake.detach().mean(),
            "logits_real": logits_real.detach().mean(),
        }

    def _encode(self, images: Tensor, noise: NoiseDraws | None) -> Tensor:
        latents = self.rae.encode_raw(images)
        if noise is not None:
            latents = latents + noise.sigma.view(-1, 1, 1, 1) * noise.normal
        return self.rae.normalize(latents)

    def _lpips(self, x: Tensor, y: Tensor) -> Tensor:
        """The textbook form of LPIPS: both images through the network with a graph, full-size float32 maps."""
        total: Tensor | float = 0.0
        for map_x, map_y, weight in zip(self.lpips.features(x), self.lpips.features(y), self.lpips.linear, strict=True):
            unit_x, unit_y = _unit(map_x.float()), _unit(map_y.float())
            total = total + ((unit_x - unit_y).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        assert isinstance(total, Tensor)
        return total.mean()


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
