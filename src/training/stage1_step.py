"""One step of stage-1 training, in plain torch. Sources: RAE (arXiv 2510.11690), recipe section 2; the order of work is ours.

Legend: B batch, C latent channels, h = w grid, N = h*w tokens, D decoder width, P pixels of a patch (3 * px * px), H = W px.

The published step differentiates the whole chain image -> losses -> decoder several times. Here the losses see only
pixels and the decoder sees one gradient:

    x^ = head(trunk(z'))            one decoder forward
    g_R = d(L1 + LPIPS)/dx^         the loss graphs are built on x^ detached, one after the other, each freed at once
    g_G = d(GAN)/dx^
    w   = |dR/dW| / (|dG/dW| + 1e-6), W the head's weight: two matrix products, since the head is linear
    one decoder backward with g_R + disc_weight * w * g_G

In exact arithmetic this is the published step; `tests/test_step_parity.py` holds it against the plain formulation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from src.core.images import unit_to_signed
from src.losses.diffaug import DiffAug, Draws
from src.losses.gan import DiscriminatorLoss, GeneratorLoss, adaptive_weight
from src.losses.lpips import LPIPS
from src.models.decoder import ViTDecoder, patchify
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE

Backward = Callable[[Tensor, Tensor], None]
"""`backward(output, gradient)`: accumulate gradients of `output` (weighted by `gradient`) into the parameters."""
Average = Callable[[Tensor], Tensor]
"""Mean of a tensor over ranks."""


@dataclass(frozen=True)
class StepSettings:
    perceptual_weight: float
    disc_weight: float
    max_d_weight: float
    adaptive_weight: Literal["global", "per_rank"]
    """`per_rank`: each rank takes w from its own gradients, as published."""
    disc_fake: Literal["fresh", "reuse"]
    """`fresh`: D sees a reconstruction with the weights just updated and no noise, as published."""
    loss_chunk_size: int | None
    """Images that go through the loss networks at once; None is the whole batch."""


@dataclass(frozen=True)
class Phase:
    """What is switched on at a step; L1 always is."""

    lpips: bool
    gan: bool
    """The GAN term in the generator's loss."""
    disc: bool
    """Updates of the discriminator."""


@dataclass(frozen=True)
class NoiseDraws:
    """z' = z + sigma * normal. sigma: (B,), standard deviation; normal: B C h w."""

    sigma: Tensor
    normal: Tensor

    def add_to(self, latents: Tensor) -> Tensor:
        return torch.addcmul(latents, self.normal, self.sigma.view(-1, 1, 1, 1))


@dataclass
class GeneratorResult:
    terms: dict[str, Tensor]
    """Detached scalars by name: loss, l1, lpips, gan, adaptive_weight."""
    latents: Tensor
    """Clean raw latents, B C h w."""
    reconstruction: Tensor
    """B 3 H W in [0, 1] scale, not clamped, detached."""


class TrainingStep:
    def __init__(
        self,
        rae: RAE,
        lpips: LPIPS | None,
        discriminator: DinoDiscriminator | None,
        augment: DiffAug | None,
        disc_loss: DiscriminatorLoss,
        gen_loss: GeneratorLoss,
        settings: StepSettings,
    ) -> None:
        self.rae = rae
        self.lpips = lpips
        self.discriminator = discriminator
        self.augment = augment
        self.disc_loss = disc_loss
        self.gen_loss = gen_loss
        self.settings = settings

    # -- generator

    def generator(
        self,
        images: Tensor,
        noise: NoiseDraws | None,
        augment: Draws | None,
        phase: Phase,
        backward: Backward,
        average: Average = lambda tensor: tensor,
        loss_scale: Tensor | float = 1.0,
        gradient_weight: float = 1.0,
        layers: tuple[int, ...] | None = None,
    ) -> GeneratorResult:
        """Gradients of the generator's total loss into the decoder.

        Args:
            images: B 3 H W, float in [0, 1].
            average: over ranks, for the adaptive weight.
            loss_scale: factor for half-precision gradients inside the loss networks; taken out again.
            gradient_weight: 1 / number of micro-batches.
            layers: blocks of the encoder to use instead of its own choice.
        """
        decoder: ViTDecoder = self.rae.decoder
        with record_function("encode"):
            latents = self.rae.encode_raw(images, layers)
        with record_function("decode"):
            noisy = noise.add_to(latents) if noise is not None else latents
            features = decoder.trunk(self.rae.to_tokens(noisy))  # B N D
            output = self.rae.to_images(decoder.decoder_pred(features)).float()
        reconstruction = output.detach()

        terms, gradient = self.reconstruction_gradient(reconstruction, images, phase, loss_scale)
        if phase.gan:
            terms["gan"], gan_gradient = self.gan_gradient(reconstruction, augment, loss_scale)
            with record_function("adaptive_weight"):
                terms["adaptive_weight"] = self.balance(features.detach(), gradient, gan_gradient, average)
            factor = self.settings.disc_weight * terms["adaptive_weight"]
            terms["loss"] = terms["loss"] + factor * terms["gan"]
            gradient = torch.addcmul(gradient, gan_gradient, factor)
        with record_function("backward"):
            backward(output, gradient * gradient_weight if gradient_weight != 1.0 else gradient)
        return GeneratorResult(terms, latents, reconstruction)

    def reconstruction_gradient(
        self, reconstruction: Tensor, images: Tensor, phase: Phase, loss_scale: Tensor | float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """R = L1 + perceptual_weight * LPIPS: its terms, and dR/d(reconstruction), B 3 H W."""
        difference = reconstruction - images
        terms = {"l1": difference.abs().mean()}
        gradient = difference.sign_().div_(difference.numel())
        terms["loss"] = terms["l1"]
        if phase.lpips:
            assert self.lpips is not None
            weight = self.settings.perceptual_weight
            total = reconstruction.new_zeros(())
            with record_function("lpips"):
                for part in self._chunks(len(images)):
                    target = self.lpips.target(unit_to_signed(images[part]))
                    leaf = reconstruction[part].requires_grad_()
                    value = self.lpips.distance(unit_to_signed(leaf), target).sum() / len(images)
                    gradient[part].add_(_gradient(value, leaf, loss_scale), alpha=weight)
                    total += value.detach()
            terms["lpips"] = total
            terms["loss"] = terms["l1"] + weight * total
        return terms, gradient

    def gan_gradient(
        self, reconstruction: Tensor, augment: Draws | None, loss_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The generator's GAN term and its gradient to the reconstruction. D's state is not changed."""
        assert self.discriminator is not None and self.augment is not None and augment is not None
        gradient = torch.empty_like(reconstruction)
        total = reconstruction.new_zeros(())
        with record_function("gan"):
            for part in self._chunks(len(reconstruction)):
                leaf = reconstruction[part].requires_grad_()
                with self.discriminator.heads_frozen():
                    logits = self.discriminator(self.augment.apply(unit_to_signed(leaf), augment[part]))
                value = self.gen_loss.term(logits) * (len(leaf) / len(reconstruction))
                gradient[part] = _gradient(value, leaf, loss_scale)
                total += value.detach()
        return total, gradient

    def balance(self, features: Tensor, grad_r: Tensor, grad_g: Tensor, average: Average) -> Tensor:
        """Adaptive weight w of recipe section 2, from the gradients of both terms to the head's weight (P x D each)."""
        device = features.device.type
        # As the published backward does under autocast; but pixel gradients of a mean lie below the range of fp16.
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        features = features.flatten(0, 1).to(torch.bfloat16 if half else torch.float32)  # B*N D
        with torch.autocast(device, enabled=False):
            weights = torch.stack([self._head_gradient(features, g) for g in (grad_r, grad_g)])
        if self.settings.adaptive_weight == "global":
            weights = average(weights)
        norm_r, norm_g = torch.linalg.vector_norm(weights.float(), dim=(1, 2))
        return adaptive_weight(norm_r, norm_g, self.settings.max_d_weight)

    def _head_gradient(self, features: Tensor, image_gradient: Tensor) -> Tensor:
        if self.rae.decoder_denormalize:
            image_gradient = image_gradient * self.rae.image_std
        patches = patchify(image_gradient, self.rae.decoder.patch_size).flatten(0, 1)  # B*N P
        return (patches.to(features.dtype).T @ features).float()

    # -- discriminator

    @torch.no_grad()
    def fake(self, result: GeneratorResult) -> Tensor:
        """What D judges: B 3 H W in [-1, 1], clamped and on the 8-bit grid."""
        with record_function("disc_decode"):
            images = (
                result.reconstruction if self.settings.disc_fake == "reuse" else self.rae.decode_raw(result.latents)
            )
        return images.float().clamp(0, 1).mul_(255).round_().div_(127.5).sub_(1)

    def discriminate(
        self,
        images: Tensor,
        augment: Draws,
        label: Literal["fake", "real"],
        backward: Backward,
        loss_scale: Tensor | float = 1.0,
        gradient_weight: float = 1.0,
    ) -> dict[str, Tensor]:
        """Half of D's loss, for images in [-1, 1]; gradients go into D's heads. Call `power_iteration` on D before it.

        The two halves have graphs of their own, so the first is freed before the second is built.
        """
        assert self.discriminator is not None and self.augment is not None
        term = self.disc_loss.real_term if label == "real" else self.disc_loss.fake_term
        terms: dict[str, Tensor] = {}
        with record_function("disc"):
            for part in self._chunks(len(images)):
                with torch.no_grad():
                    maps = self.discriminator.features(self.augment.apply(images[part], augment[part]))
                logits = self.discriminator.heads(maps)
                share = len(logits) / len(images)
                half = 0.5 * term(logits)
                backward(half, half.new_full((), share * gradient_weight) * loss_scale)
                right = logits.detach() > 0 if label == "real" else logits.detach() < 0
                for name, value in {
                    "loss": half.detach(),
                    "accuracy": 0.5 * right.float().mean(),
                    f"logits_{label}": logits.detach().float().mean(),
                }.items():
                    terms[name] = terms.get(name, 0) + value * share
        return terms

    def _chunks(self, batch: int) -> Iterator[slice]:
        size = self.settings.loss_chunk_size or batch
        return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _gradient(value: Tensor, leaf: Tensor, loss_scale: Tensor | float) -> Tensor:
    (gradient,) = torch.autograd.grad(value * loss_scale, leaf)
    return gradient / loss_scale
