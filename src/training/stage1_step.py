"""Compute losses and gradients of a stage-1 step, in plain torch. Sources: RAE (arXiv 2510.11690); docs/recipe.md, "Losses".

Legend: B batch, C latent channels, h = w grid, N = h*w tokens, D decoder width, P values of a patch (3 * px * px), H = W px.
Losses: R = L1 + perceptual_weight * LPIPS, G the GAN term of the generator; D in prose is the discriminator.

The published step differentiates the chain decoder -> image -> losses several times. Here each loss is differentiated only
to the pixels, and the decoder gets one backward pass:

    x^ = head(trunk(z'))            one decoder forward
    g_R = dR/dx^                    loss graphs on detached x^, one at a time, each freed before the next
    g_G = dG/dx^
    w   = |dR/dW| / (|dG/dW| + 1e-6), W: weight of the head; two matrix products, since the head is linear
    one decoder backward with g_R + disc_weight * w * g_G

In exact arithmetic this is the published step; `tests/test_step_parity.py` compares it with the plain formulation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.profiler import record_function

from src.core.distributed import mean_over_ranks
from src.core.images import bytes_to_signed, bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.settings import Settings, one_of
from src.losses.diffaug import DiffAug, Draws
from src.losses.gan import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES
from src.losses.lpips import LPIPS
from src.models.decoder import patchify
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE

Backward = Callable[[Tensor, Tensor], None]
"""`backward(output, gradient)`: accumulate gradients of `output` (weighted by `gradient`) into the parameters."""
Scale = Tensor | float
"""Factor for half-precision gradients."""
Label = Literal["fake", "real"]
LossTerm = Callable[[Tensor, Tensor], Tensor]
"""(output, target), B x 3 x H x W in [0, 1] scale -> a tensor whose first dimension is B and whose mean is the term."""


class StepSettings(Settings):
    """Keys of `model:` that determine what a step computes."""

    perceptual_weight: float = Field(ge=0)
    disc_weight: float = Field(ge=0)
    disc_loss: Annotated[str, one_of(DISCRIMINATOR_LOSSES)]
    gen_loss: Annotated[str, one_of(GENERATOR_LOSSES)]
    disc_updates: int = Field(ge=1, le=100)
    """Discriminator updates for each generator update."""
    max_d_weight: float = Field(ge=0)
    adaptive_weight: Literal["global", "per_rank"]
    """`global`: w from gradients averaged over ranks; `per_rank`: from each rank's own, as published."""
    disc_fake: Literal["fresh", "reuse"]
    """`fresh`: D gets a noise-free reconstruction with the updated decoder, as published; `reuse`: the generator step's output."""
    loss_chunk_size: Annotated[int, Field(ge=1)] | None
    """Images per pass through the loss networks; None: the whole batch."""


@dataclass(frozen=True)
class Phase:
    """Losses and updates that are on at a step; L1 always is."""

    lpips: bool
    gan: bool
    """The GAN term in the generator's loss."""
    disc: bool
    """Updates of the discriminator."""


class LatentNoise(NamedTuple):
    """z' = z + sigma * normal. sigma: standard deviation, B 1 1 1 or, of each token, B 1 h w; normal: B C h w."""

    sigma: Tensor
    normal: Tensor


class Fake(NamedTuple):
    """Fake images for D, stored as bytes to save memory between micro-batches and updates."""

    pixels: Tensor
    """uint8 B 3 H W."""
    nan_flag: Tensor
    """Scalar to add to losses: 0, or NaN if the decoder's output was not finite, which bytes can't represent."""


@dataclass(frozen=True)
class GeneratorResult:
    """Results of the generator's step."""

    terms: dict[str, Tensor]
    """Detached scalars by name: those of `reconstruction_terms`, gan, adaptive_weight, loss."""
    fake_source: Tensor | Fake | None
    """Input of the discriminator's step, if it is on: clean raw latents B C h w, or with `disc_fake=reuse` the fake."""


@dataclass
class TrainingStep:
    """Computes losses and gradients of both networks. `lpips`, `discriminator`: None if the run never uses them."""

    rae: RAE
    lpips: LPIPS | None
    discriminator: DinoDiscriminator | None
    augment: DiffAug
    settings: StepSettings

    def reconstruction_terms(self, phase: Phase) -> dict[str, tuple[float, LossTerm]]:
        """Return weight and function of each term of R by name, for training and validation."""
        terms: dict[str, tuple[float, LossTerm]] = {"l1": (1.0, lambda output, target: (output - target).abs())}
        if phase.lpips and self.lpips is not None:
            lpips = self.lpips
            terms["lpips"] = (
                self.settings.perceptual_weight,
                lambda output, target: lpips(unit_to_signed(output), unit_to_signed(target)),
            )
        return terms

    # -- generator

    def generator(
        self,
        images: Tensor,
        noise: LatentNoise | None,
        augment: Draws | None,
        phase: Phase,
        backward: Backward = Tensor.backward,
        loss_scale: Scale = 1.0,
        share: float = 1.0,
        layers: tuple[int, ...] | None = None,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> GeneratorResult:
        """Accumulate the gradients of the generator's total loss in the decoder.

        Args:
            images: B 3 H W, float in [0, 1].
            augment: draws for DiffAug, if the GAN term is on.
            loss_scale: factor for half-precision gradients inside the loss networks; divided out again.
            share: weight of this micro-batch in the update, 1 / number of micro-batches.
            layers: encoder blocks to use instead of all its chosen ones.
            resample: maps raw latents B C h w to those that replace them, for both networks.
        """
        decoder = self.rae.decoder
        with record_function("encode"):
            latents = self.rae.encode_raw(images, layers)
            if resample is not None:
                latents = resample(latents)
        with record_function("decode"):
            noisy = latents if noise is None else torch.addcmul(latents, noise.normal, noise.sigma)
            features = decoder.trunk(self.rae.to_tokens(noisy))  # B N D
            del noise, noisy
            output = self.rae.to_images(decoder.decoder_pred(features)).float()
        reconstruction = output.detach()

        terms: dict[str, Tensor] = {}
        loss = reconstruction.new_zeros(())
        grad_r = torch.zeros_like(reconstruction)
        for name, (weight, term) in self.reconstruction_terms(phase).items():
            with record_function(name):
                terms[name], term_gradient = self.reconstruction_gradient(term, reconstruction, images, loss_scale)
            grad_r.add_(term_gradient, alpha=weight)
            loss = loss + weight * terms[name]
        del images, term_gradient  # the GAN term needs the most memory
        gradient = grad_r
        if phase.gan:
            with record_function("gan"):
                terms["gan"], grad_g = self.gan_gradient(reconstruction, augment, loss_scale)
            with record_function("adaptive_weight"):
                terms["adaptive_weight"] = self.adaptive_weight(features.detach(), grad_r, grad_g)
            factor = self.settings.disc_weight * terms["adaptive_weight"]
            loss = loss + factor * terms["gan"]
            gradient = grad_r.addcmul_(grad_g, factor)
        terms["loss"] = loss
        with record_function("backward"):
            backward(output, gradient * share)
        if not phase.disc:
            return GeneratorResult(terms, None)
        if self.settings.disc_fake == "reuse":
            return GeneratorResult(terms, as_fake(reconstruction))
        half = torch.is_autocast_enabled(latents.device.type)  # the decoder's first layer casts them to half anyway
        return GeneratorResult(terms, latents.to(torch.get_autocast_dtype(latents.device.type)) if half else latents)

    def reconstruction_gradient(
        self, term: LossTerm, reconstruction: Tensor, images: Tensor, loss_scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Return one term of R and its gradient with respect to the reconstruction, B 3 H W."""

        def part_of_mean(leaf: Tensor, part: slice) -> Tensor:
            values = term(leaf, images[part])
            return values.sum() / (values[0].numel() * len(images))

        return self._pixel_gradient(part_of_mean, reconstruction, loss_scale)

    def gan_gradient(self, reconstruction: Tensor, augment: Draws | None, loss_scale: Scale) -> tuple[Tensor, Tensor]:
        """Return the GAN term -mean D(aug(x^)) and its gradient with respect to the reconstruction. Does not change D."""
        assert self.discriminator is not None and augment is not None
        discriminator, term = self.discriminator, GENERATOR_LOSSES[self.settings.gen_loss]

        def part_of_mean(leaf: Tensor, part: slice) -> Tensor:
            with discriminator.heads_frozen():
                logits = discriminator(self.augment.apply(unit_to_signed(leaf), augment[part]))
            return term(logits.float()) * (len(leaf) / len(reconstruction))

        return self._pixel_gradient(part_of_mean, reconstruction, loss_scale)

    def _pixel_gradient(
        self, part_of_mean: Callable[[Tensor, slice], Tensor], reconstruction: Tensor, loss_scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Return a loss and its gradient with respect to the pixels, summed over chunks of the batch with one graph each."""
        gradient = torch.empty_like(reconstruction)
        total = reconstruction.new_zeros(())
        for part in self._chunks(len(reconstruction)):
            leaf = reconstruction[part].requires_grad_()
            value = part_of_mean(leaf, part)
            gradient[part] = torch.autograd.grad(value * loss_scale, leaf)[0] / loss_scale
            total += value.detach()
        return total, gradient

    def adaptive_weight(self, features: Tensor, grad_r: Tensor, grad_g: Tensor) -> Tensor:
        """Return w = |dR/dW| / (|dG/dW| + 1e-6), at most `max_d_weight`, a scalar. Esser et al., arXiv 2012.09841, equation 7.

        Args:
            features: input of the head, B N D.
            grad_r, grad_g: gradients of both terms with respect to the reconstruction, B 3 H W.
        """
        device = features.device.type
        # bf16 as in the published backward under autocast; not fp16, whose range the pixel gradients of a mean underflow.
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        features = features.flatten(0, 1).to(torch.bfloat16 if half else torch.float32)  # B*N D
        with torch.autocast(device, enabled=False):
            gradients = torch.stack([self._head_gradient(features, g) for g in (grad_r, grad_g)])  # 2 P D
        if self.settings.adaptive_weight == "global":
            gradients = mean_over_ranks(gradients)
        norm_r, norm_g = torch.linalg.vector_norm(gradients, dim=(1, 2))
        return (norm_r / (norm_g + 1e-6)).clamp(0, self.settings.max_d_weight)

    def _head_gradient(self, features: Tensor, image_gradient: Tensor) -> Tensor:
        """Return the gradient of the head's weight, P x D, from that of the image: everything after the features is linear."""
        if self.rae.decoder_denormalize:
            image_gradient = image_gradient * self.rae.image_std
        patches = patchify(image_gradient, self.rae.decoder.patch_size).flatten(0, 1)  # B*N P
        return (patches.to(features.dtype).T @ features).float()

    # -- discriminator

    def discriminator_updates(
        self,
        images: Sequence[Tensor],
        fake_sources: list[Tensor | Fake],
        draws: Callable[[Label, int, int], Draws],
        loss_scale: Callable[[], Scale] = lambda: 1.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Accumulate the gradients of D's loss in its heads and yield its terms, once per update; the caller steps the optimiser.

        Loss: 0.5 (mean of the real term + mean of the fake term). Each half has its own graph, so the first is freed before
        the second is built; the power iteration runs before each, in the published order.

        Args:
            images: of the generator's micro-batches, after its update: uint8 B 3 H W each.
            fake_sources: one per micro-batch; each is replaced by its fake when needed, which frees the latents.
            draws: returns the augmentation draws for (label, micro-batch, update).
        """
        assert self.discriminator is not None
        labels: tuple[Label, Label] = ("fake", "real")
        for update in range(self.settings.disc_updates):
            scale = loss_scale()
            terms: dict[str, Tensor] = {}
            for label in labels:
                self.discriminator.power_iteration()
                for number, real in enumerate(images):
                    if label == "fake":
                        fake_sources[number] = self.fake(fake_sources[number])
                    judged = fake_sources[number] if label == "fake" else real
                    augment = draws(label, number, update)
                    with record_function("disc"):
                        self._discriminate(judged, augment, label, scale, 1 / len(images), terms)
            yield terms

    @torch.no_grad()
    def fake(self, source: Tensor | Fake) -> Fake:
        """Return the fake images of a `fake_source`, decoded if it holds latents."""
        if isinstance(source, Fake):
            return source
        with record_function("disc_decode"):
            return as_fake(self.rae.decode_raw(source))

    def _discriminate(
        self, judged: Tensor | Fake, augment: Draws, label: Label, scale: Scale, share: float, terms: dict[str, Tensor]
    ) -> None:
        """Accumulate gradients and terms of half of D's loss, for a fake or for real images (uint8 B 3 H W)."""
        assert self.discriminator is not None
        term = DISCRIMINATOR_LOSSES[self.settings.disc_loss][label]
        images, nan_flag = judged if isinstance(judged, Fake) else (judged, 0.0)
        for part in self._chunks(len(images)):
            with torch.no_grad():
                # To [-1, 1] as published: fakes from bytes directly, real images through [0, 1], which rounds differently.
                signed = (
                    bytes_to_signed(images[part]) if label == "fake" else unit_to_signed(bytes_to_unit(images[part]))
                )
                maps = self.discriminator.features(self.augment.apply(signed, augment[part]))
            logits = self.discriminator.heads(maps)
            half = 0.5 * term(logits.float()) + nan_flag
            weight = share * len(logits) / len(images)
            half.backward(half.new_full((), weight) * scale + nan_flag)
            logits = logits.detach().float()
            right = logits > 0 if label == "real" else logits < 0
            for name, value in {
                "loss": half.detach(),
                "accuracy": 0.5 * right.float().mean(),
                f"logits_{label}": logits.mean(),
            }.items():
                terms[name] = terms.get(name, 0) + value * weight

    def _chunks(self, batch: int) -> Iterator[slice]:
        """Yield slices of a batch. A smaller last one runs without compilation: a new size would compile a new graph."""
        size = self.settings.loss_chunk_size or batch
        for start in range(0, batch, size):
            odd = 0 < start > batch - size
            with torch.compiler.set_stance("force_eager") if odd else nullcontext():
                yield slice(start, min(start + size, batch))


def as_fake(images: Tensor) -> Fake:
    """Clamp images in [0, 1] scale and round them to bytes."""
    return Fake(unit_to_bytes(images), images.detach().sum(dtype=torch.float32) * 0)
