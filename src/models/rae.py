"""Representation autoencoder: a frozen encoder and a trained decoder. Source: arXiv 2510.11690; docs/recipe.md, "Encoding".

Legend: B batch, C latent channels, h = w latent grid, N = h*w tokens, H = W image px. Images are RGB in [0, 1].
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.geometry import Geometry
from src.core.images import bytes_to_unit
from src.core.settings import check_arguments
from src.models.decoder import DecoderConfig, ViTDecoder, unpatchify
from src.models.encoder_presets import PRESETS, source_key
from src.models.encoders import encoder_class
from src.models.frozen_encoder import FrozenEncoder, local_place

log = logging.getLogger(__name__)

VARIANCE_EPS = 1e-5
TOLERANCE = 1e-2
"""How far image values may be outside [0, 1], as after resizing."""


class RAE(nn.Module):
    """`encode(images) -> latents`, `decode(latents) -> images`; `forward` does both.

    Noise is added only if a call asks for it, regardless of train/eval mode; `decode` does not clamp.
    """

    encoder: FrozenEncoder
    decoder: ViTDecoder
    image_mean: Tensor
    image_std: Tensor
    latent_mean: Tensor | None
    latent_var: Tensor | None

    def __init__(
        self,
        encoder_cls: str,
        encoder_config_path: str,
        encoder_params: Mapping[str, Any],
        decoder_config_path: str | Path | Mapping[str, Any],
        decoder_patch_size: int,
        image_size: int | None = None,
        encoder_input_size: int | None = None,
        pretrained_decoder_path: str | Path | None = None,
        noise_tau: float = 0.0,
        normalization_stat_path: str | Path | None = None,
        decoder_denormalize: bool = True,
        train_positions: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            encoder_cls: name or import path, see `src.models.encoders.encoder_class`.
            encoder_config_path: hub id or folder to read the pixel statistics from.
            encoder_params: arguments of the encoder class, including the path or hub id of its weights.
            decoder_config_path: JSON file, its folder, or the parsed content of such a file.
            image_size: px; None derives it from `encoder_input_size`. One of the two must be given.
            pretrained_decoder_path: a decoder in any form that `src/formats/decoder_files.py` reads; loaded strictly, with
                positions adapted to another grid by `fit_positions`.
            noise_tau: scale of the latent noise in training; stored, not applied.
            normalization_stat_path: file with `mean` and `var`, each C x h x w; or an export or checkpoint that has them.
            decoder_denormalize: whether the decoder outputs the encoder's normalised pixels (RAE: true, RAEv2: false).

        Raises:
            UserError: sizes that don't fit (before any weight is read), missing or unfitting files.
        """
        from src.formats.decoder_files import load_decoder, read_statistics

        super().__init__()
        kind = encoder_class(encoder_cls)
        self.geometry = geometry_of(encoder_cls, encoder_params, decoder_patch_size, image_size, encoder_input_size)
        decoder_config = DecoderConfig.read(decoder_config_path)
        self.noise_tau = noise_tau
        self.encoder = kind(**encoder_params)
        mean, std = self.encoder.pixel_statistics(encoder_config_path)
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.decoder_denormalize = decoder_denormalize
        self.decoder = ViTDecoder(
            decoder_config,
            latent_channels=self.encoder.hidden_size,
            grid=self.geometry.grid,
            patch_size=decoder_patch_size,
            train_positions=train_positions,
            activation_checkpointing=activation_checkpointing,
        )
        self.register_buffer("latent_mean", None)
        self.register_buffer("latent_var", None)
        if normalization_stat_path is not None:
            self.set_statistics(*read_statistics(normalization_stat_path, self.latent_shape, self.encoder.identity()))
        if pretrained_decoder_path is not None:
            load_decoder(self.decoder, pretrained_decoder_path, decoder_denormalize, self.encoder.identity())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of a latent: C, h, w."""
        return self.encoder.hidden_size, self.geometry.grid, self.geometry.grid

    # -- the public pair

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        noise_tau: float = 0.0,
        layers: Sequence[int] | None = None,
        resize: bool = False,
        check: bool = True,
    ) -> Tensor:
        """Encode images B x 3 x image_size x image_size, uint8 or float in [0, 1], to latents B x C x h x w, normalised
        if the model has statistics.

        Args:
            noise_tau: above 0: add noise with a standard deviation drawn from U(0, noise_tau) per image.
            layers: encoder blocks to use instead of the configured ones.
            resize: resize images of another size to image_size px first, bicubically.
            check: False: accept any size and values, and skip the device synchronisation that the check costs.

        Raises:
            ValueError: wrong shape or dtype, or values outside [-0.01, 1.01], such as images in [0, 255] or [-1, 1].
        """
        size = self.geometry.image_size
        if resize and images.shape[-2:] != (size, size):
            images = bytes_to_unit(images) if images.dtype == torch.uint8 else images
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        if check:
            check_images(images, size)
        latents = self.encode_raw(images, layers)
        if noise_tau > 0:
            sigma = noise_tau * torch.rand(len(latents), 1, 1, 1, device=latents.device)
            latents = latents + sigma * torch.randn_like(latents)
        return self.normalize(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents B C h w, as returned by `encode` -> images B 3 H W in the decoder's dtype, not clamped. Another grid is
        resampled. Raises ValueError for a wrong shape."""
        channels = self.latent_shape[0]
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"expected latents B x {channels} x h x w, got {tuple(latents.shape)}")
        return self.decode_raw(self.denormalize(latents).to(self.decoder.decoder_embed.weight.dtype))

    def forward(self, images: Tensor, noise_tau: float = 0.0, resize: bool = False, check: bool = True) -> Tensor:
        """Encode and decode; arguments and errors as in `encode`, output as in `decode`."""
        return self.decode(self.encode(images, noise_tau, resize=resize, check=check))

    # -- building blocks, used directly by training

    @torch.no_grad()
    def encode_raw(self, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Encode images -> B C h w before noise and latent normalisation."""
        if images.dtype == torch.uint8:
            images = bytes_to_unit(images)
        size = self.geometry.encoder_input_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode=self.encoder.resize, align_corners=False)
        tokens = self.encoder((images - self.image_mean) / self.image_std, layers)  # B N C
        return tokens.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def decode_raw(self, latents: Tensor, decoder: ViTDecoder | None = None) -> Tensor:
        """Decode latents B C h w in the encoder's own scale -> images; `decoder`: used instead of the model's, e.g. its EMA."""
        decoder = decoder or self.decoder
        return self.to_images(decoder(self.to_tokens(latents)))

    def to_tokens(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)  # B C h w -> B N C

    def to_images(self, patches: Tensor) -> Tensor:
        """Assemble the decoder's patches B N (P*P*3) -> images B 3 H W in [0, 1] scale."""
        images = unpatchify(patches, self.decoder.patch_size)
        return images * self.image_std + self.image_mean if self.decoder_denormalize else images

    @property
    def has_statistics(self) -> bool:
        return self.latent_mean is not None or self.latent_var is not None

    def normalize(self, latents: Tensor) -> Tensor:
        """Return (z - mean) / sqrt(var + 1e-5); a missing mean counts as 0, a missing var as 1."""
        if self.latent_mean is not None:
            latents = latents - self.latent_mean
        return latents if self.latent_var is None else latents / (self.latent_var + VARIANCE_EPS).sqrt()

    def denormalize(self, latents: Tensor) -> Tensor:
        if self.latent_var is not None:
            latents = latents * (self.latent_var + VARIANCE_EPS).sqrt()
        return latents if self.latent_mean is None else latents + self.latent_mean

    def set_statistics(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Set the per-element mean and variance of raw latents, each C x h x w; None: not used."""
        self.latent_mean = None if mean is None else mean.float()
        self.latent_var = None if var is None else var.float()


def check_images(images: Tensor, size: int) -> None:
    """Raise ValueError unless `images` are B x 3 x size x size, uint8 or float in [0, 1] (tolerance 0.01)."""
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(
            f"expected images B x 3 x {size} x {size}, got {tuple(images.shape)}; resize=True brings other sizes to {size} px"
        )
    if images.dtype == torch.uint8 or not len(images):
        return
    if not images.is_floating_point():
        raise ValueError(f"expected images as float in [0, 1] or uint8, got {images.dtype}")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN too
        raise ValueError(
            f"expected float images in [0, 1], got values from {low:.4g} to {high:.4g}. Divide 0..255 by 255, turn [-1, 1] "
            "into (x + 1) / 2; check=False accepts them unchanged"
        )


def geometry_of(
    encoder_cls: str,
    encoder_params: Mapping[str, Any],
    decoder_patch_size: int,
    image_size: int | None,
    encoder_input_size: int | None,
) -> Geometry:
    """Compute the sizes without weights: from the encoder's config, or the preset table if it is not downloaded yet."""
    kind = encoder_class(encoder_cls)
    check_arguments(kind, encoder_params, "model.encoder_params")
    source = str(encoder_params[source_key(encoder_cls)])
    known = {preset.patch for preset in PRESETS.values() if preset.hub_id == source and local_place(source) == source}
    patch = known.pop() if len(known) == 1 else kind.read_config(source).patch_size
    if image_size is None:
        if encoder_input_size is None:
            raise UserError("Neither image_size nor encoder_input_size is given: set one of them.")
        if encoder_input_size % patch:
            below = encoder_input_size // patch * patch
            raise UserError(
                f"encoder_input_size={encoder_input_size} is not a multiple of the encoder's patch of {patch} px; "
                f"nearest: {below} and {below + patch}."
            )
        image_size = encoder_input_size // patch * decoder_patch_size
    return Geometry.of(image_size, decoder_patch_size, patch, encoder_input_size, encoder_params.get("num_tokens"))
