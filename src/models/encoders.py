"""Frozen vision encoders by family: image in, patch tokens out. The networks are those of transformers.

Legend: B batch, T all tokens, N patch tokens, C channels, H = W encoder input px.
Images arrive B x 3 x H x W, normalised with the encoder's `image_mean` and `image_std`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from src.core.errors import UserError
from src.models.frozen_encoder import FrozenEncoder, local_place

log = logging.getLogger(__name__)


class Dinov2withNorm(FrozenEncoder):
    """DINOv2 with registers."""

    model_class, config_class = Dinov2WithRegistersModel, Dinov2WithRegistersConfig

    def __init__(self, dinov2_path: str, normalize: bool = True, **options: Any) -> None:
        if not normalize:
            raise UserError(
                "model.encoder_params.normalize=false: the latent of the recipe is normalised without affine parameters. "
                "Set it to true."
            )
        super().__init__(dinov2_path, **options)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images), {}

    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layer

    @property
    def prefix_tokens(self) -> int:
        return 1 + self.model.config.num_register_tokens


class DINOv3wNorm(FrozenEncoder):
    """DINOv3 ViT, rotary positions as the model computes them."""

    model_class, config_class = DINOv3ViTModel, DINOv3ViTConfig
    default_fusion = "mean_plus_spatial_mean"

    def __init__(self, model_name: str, **options: Any) -> None:
        super().__init__(model_name, **options)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images), {"position_embeddings": self.model.rope_embeddings(images)}

    def blocks(self) -> nn.ModuleList:
        return self.model.model.layer

    @property
    def prefix_tokens(self) -> int:
        return 1 + self.model.config.num_register_tokens


class SigLIP2wNorm(FrozenEncoder):
    """Vision tower of SigLIP and of SigLIP2 (the fixed-size ones, which share SigLIP's architecture)."""

    model_class, config_class = SiglipVisionModel, SiglipVisionConfig
    default_fusion = "mean_plus_spatial_mean"
    image_mean = image_std = (0.5, 0.5, 0.5)
    ignorable = ("text_model.", "logit_", "head.", "vision_model.head.")

    def __init__(self, model_name: str, num_tokens: int | None = None, **options: Any) -> None:
        """`num_tokens` is checked by the geometry and has no other effect."""
        super().__init__(model_name, **options)

    @classmethod
    def accepted_types(cls) -> tuple[str, ...]:
        return ("siglip",)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images, interpolate_pos_encoding=True), {"attention_mask": None}

    def blocks(self) -> nn.ModuleList:
        return self.model.encoder.layers

    @property
    def prefix_tokens(self) -> int:
        return 0


class MAEwNorm(FrozenEncoder):
    """ViT-MAE encoder with nothing masked and the patches in their order."""

    model_class, config_class = ViTMAEModel, ViTMAEConfig
    ignorable = ("decoder.",)

    def __init__(self, model_name: str, **options: Any) -> None:
        super().__init__(model_name, **options)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        parts = self.model.embeddings
        patches = parts.patch_embeddings(images)  # B N C
        cls_token = parts.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)  # B 1+N C
        return tokens + parts.interpolate_pos_encoding(tokens, *images.shape[2:]), {}

    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def prefix_tokens(self) -> int:
        return 1


ENCODERS: dict[str, type[FrozenEncoder]] = {
    cls.__name__: cls for cls in (Dinov2withNorm, DINOv3wNorm, SigLIP2wNorm, MAEwNorm)
}


def encoder_class(name: str) -> type[FrozenEncoder]:
    if name not in ENCODERS:
        raise UserError(f"model.encoder_cls={name!r} is unknown. Expected one of: {', '.join(ENCODERS)}.")
    return ENCODERS[name]


def preprocessing(source: str, default: type[FrozenEncoder]) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) from `preprocessor_config.json` of `source`, or the family's where there is no such file."""
    from transformers.utils import cached_file

    try:
        file = cached_file(
            local_place(source),
            "preprocessor_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.encoder_config_path={source}: {str(error).splitlines()[0]}. Expected a hub id, or a folder with "
            "preprocessor_config.json."
        ) from error
    if not file:
        log.info("%s has no preprocessor_config.json: mean and std are those of its family.", source)
    found = json.loads(Path(file).read_text()) if file else {}
    return found.get("image_mean", default.image_mean), found.get("image_std", default.image_std)
