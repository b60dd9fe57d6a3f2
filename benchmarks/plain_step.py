"""A plain implementation of the published stage-1 step, in the published order of operations. docs/recipe.md, "Losses".

It is the baseline of `benchmarks/train_step.py`, and the reference that the step of `src/training/stage1_step.py` is tested
against. Nothing is optimised: every loss is differentiated through the whole chain, the encoder runs once for the generator
and once for the discriminator, attention is three projections and a softmax, and autograd saves whatever it needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.profiler import record_function

from src.core.weights import PROJECT_ROOT
from src.losses.diffaug import DiffAug, Draws
from src.losses.lpips import LPIPS
from src.models import decoder, dino
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE
from src.training.stage1_step import LatentNoise, Phase, StepSettings


@contextmanager
def published_layers() -> Iterator[None]:
    """Make the blocks of decoder and DINO trunk compute as the official ones do."""
    plain = (
        (decoder.SelfAttention, "forward", _decoder_attention),
        (decoder.Block, "forward", _decoder_block),
        (dino.Block, "_attention", _dino_attention),
    )
    ours = [(owner, name, getattr(owner, name)) for owner, name, _ in plain]
    try:
        for owner, name, function in plain:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in ours:
            setattr(owner, name, function)


def _decoder_attention(self: decoder.SelfAttention, x: Tensor) -> Tensor:
    query, key, value = (
        layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.attention.values()
    )  # B A N D/A
    return self.output["dense"](_softmax_attention(query, key, value).transpose(1, 2).flatten(2))


def _decoder_block(self: decoder.Block, x: Tensor) -> Tensor:
    x = x + self.attention(self.layernorm_before(x))
    return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


def _dino_attention(self: dino.Block, x: Tensor) -> Tensor:
    qkv = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1))  # B 1+L 3 heads C/heads
    mixed = _softmax_attention(*qkv.permute(2, 0, 3, 1, 4))
    return self.attn["proj"](mixed.transpose(1, 2).flatten(2))


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value


@dataclass(frozen=True)
class PlainStep:
    rae: RAE
    lpips: LPIPS
    discriminator: DinoDiscriminator
    augment: DiffAug
    perceptual_weight: float
    disc_weight: float
    max_d_weight: float

    @published_layers()
    def fake(self, images: Tensor) -> Tensor:
        """Return the fake images for D, B 3 H W in [-1, 1], from images in [0, 1]."""
        with torch.no_grad(), record_function("disc_decode"):
            fake = self.rae.decode(self._encode(images, None)) * 2 - 1
            return torch.round((fake.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1

    @published_layers()
    def generator(self, images: Tensor, noise: LatentNoise | None, augment: Draws, phase: Phase) -> dict[str, Tensor]:
        """Backpropagate the total loss into the decoder and return the terms. Images in [0, 1]."""
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

    @published_layers()
    def discriminate(self, images: Tensor, fake: Tensor, fake_draws: Draws, real_draws: Draws) -> dict[str, Tensor]:
        """Backpropagate D's hinge loss into its heads and return the terms. Images in [0, 1], `fake` in [-1, 1]."""
        self.discriminator.zero_grad()  # left over from the generator's backward pass
        with record_function("disc"):
            self.discriminator.power_iteration()
            logits_fake = self.discriminator(self.augment.apply(fake, fake_draws))
            # Torch's hook-based spectral_norm keeps the normalised weights of each forward, so finish the first backward here.
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
            "accuracy": 0.5 * ((logits_fake < 0).float().mean() + (logits_real > 0).float().mean()),
        }

    def _encode(self, images: Tensor, noise: LatentNoise | None) -> Tensor:
        latents = self.rae.encode_raw(images)
        if noise is not None:
            latents = latents + noise.sigma * noise.normal
        return self.rae.normalize(latents)

    def _lpips(self, x: Tensor, y: Tensor) -> Tensor:
        """Return LPIPS in its textbook form: both images go through the network with autograd, full-size float32 maps."""
        total: Tensor | float = 0.0
        for map_x, map_y, weight in zip(self.lpips.features(x), self.lpips.features(y), self.lpips.linear, strict=True):
            unit_x, unit_y = _unit(map_x.float()), _unit(map_y.float())
            total = total + ((unit_x - unit_y).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        assert isinstance(total, Tensor)
        return total.mean()


def step_settings(**changes: Any) -> StepSettings:
    """Return the settings of our step from configs/model/base.yaml, updated by `changes`."""
    defaults = yaml.safe_load((PROJECT_ROOT / "configs/model/base.yaml").read_text())
    return StepSettings.parse({name: defaults[name] for name in StepSettings.model_fields} | changes, "model")


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
