"""Frozen vision encoders, one class per family: images in, patch tokens out. The networks are from transformers or timm.

Legend: B batch, N patch tokens, C channels, H = W encoder input px.
Images are B x 3 x H x W, normalised with the encoder's pixel statistics.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Aimv2VisionModel,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    IJepaModel,
    MetaClip2VisionModel,
    RadioModel,
    SiglipVisionModel,
    ViTMAEModel,
    ViTModel,
    ViTMSNModel,
)

from src.core.errors import UserError
from src.core.settings import class_at
from src.models.frozen_encoder import FrozenEncoder, resample_positions
from src.models.timm_encoder import TimmViT


class Dinov2withNorm(FrozenEncoder):
    """DINOv2 with and without registers, and WebSSL's DINO models, which have the same layout."""

    models = {"dinov2_with_registers": Dinov2WithRegistersModel, "dinov2": Dinov2Model}
    blocks_at = "encoder.layer"

    def __init__(
        self,
        dinov2_path: str,
        normalize: bool = True,
        antialias_positions: bool = False,
        position_offset: float = 0.0,
        **options: Any,
    ) -> None:
        """Set how models without registers resample their positions. `antialias_positions`: as models with registers do, and
        RAEv2. `position_offset`: see `resample_positions`; 0.1 in the DINOv2 authors' code, 0 in transformers."""
        if not normalize:
            raise UserError(
                "model.encoder_params.normalize=false: the latent of the recipe is normalised without affine parameters. "
                "Set it to true (norm=affine or norm=none are the other choices)."
            )
        super().__init__(dinov2_path, **options)
        plain = isinstance(self.model, Dinov2Model)
        self.antialias, self.offset = plain and antialias_positions, position_offset if plain else 0.0
        self.other_choices += ["antialias_positions"] * self.antialias
        self.other_choices += [f"position_offset {self.offset:g}"] if self.offset else []

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if not self.antialias and not self.offset:
            return super().embed(images)
        parts, side = self.model.embeddings, images.shape[-1] // self.patch_size
        positions = resample_positions(parts.position_embeddings[:, 1:], side, self.antialias, self.offset)
        patches = parts.patch_embeddings(images) + positions  # B N C
        cls_token = (parts.cls_token + parts.position_embeddings[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([cls_token, patches], dim=1), {}


class DINOv3wNorm(FrozenEncoder):
    """DINOv3 ViT, with the model's own rotary positions."""

    models = {"dinov3_vit": DINOv3ViTModel}
    blocks_at, final_norm = "model.layer", "norm"
    default_fusion = "mean_plus_spatial_mean"

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images), {"position_embeddings": self.model.rope_embeddings(images)}


class SigLIP2wNorm(FrozenEncoder):
    """Vision tower of SigLIP and of fixed-size SigLIP2, which has the same architecture."""

    models = {"siglip_vision_model": SiglipVisionModel, "siglip": SiglipVisionModel}
    blocks_at, final_norm, cls_tokens = "encoder.layers", "post_layernorm", 0
    default_fusion, statistics = "mean_plus_spatial_mean", "half"
    ignorable = ("text_model.", "logit_", "head.", "vision_model.head.")

    def __init__(self, model_name: str, num_tokens: int | None = None, **options: Any) -> None:
        """Accept `num_tokens`, which has no effect here: the geometry checks it."""
        super().__init__(model_name, **options)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images, interpolate_pos_encoding=True), {"attention_mask": None}


class MAEwNorm(FrozenEncoder):
    """ViT-MAE encoder without masking or shuffling."""

    models = {"vit_mae": ViTMAEModel}
    blocks_at = "layers"
    ignorable = ("decoder.",)

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        parts = self.model.embeddings
        patches = parts.patch_embeddings(images)  # B N C
        cls_token = parts.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)  # B 1+N C
        return tokens + parts.interpolate_pos_encoding(tokens, *images.shape[2:]), {}


class ViTwNorm(FrozenEncoder):
    """Supervised ViT (arXiv 2010.11929) and ViT-MSN (arXiv 2204.07141)."""

    models = {"vit": ViTModel, "vit_msn": ViTMSNModel}
    blocks_at = "layers"
    statistics = "half"
    ignorable = ("pooler.", "classifier.")

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(images, interpolate_pos_encoding=True), {}


class IJEPAwNorm(ViTwNorm):
    """I-JEPA (arXiv 2301.08243): a ViT without CLS token."""

    models = {"ijepa": IJepaModel}
    cls_tokens, statistics = 0, "imagenet"


class CLIPTower(FrozenEncoder):
    """Vision tower of CLIP and MetaCLIP 2. No final norm by default: post_layernorm is for the CLS token only."""

    models = {
        "clip_vision_model": CLIPVisionModel,
        "clip": CLIPVisionModel,
        "metaclip_2_vision_model": MetaClip2VisionModel,
        "metaclip_2": MetaClip2VisionModel,
    }
    embedding_parts = ("embeddings", "pre_layrnorm")
    blocks_at, final_norm = "encoder.layers", "post_layernorm"
    default_norm, statistics = "none", "clip"
    ignorable = ("text_model.", "logit_", "text_projection.", "visual_projection.")

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        tokens = self.model.embeddings(images, interpolate_pos_encoding=True)
        return self.model.pre_layrnorm(tokens), {"attention_mask": None}


class AIMv2wNorm(FrozenEncoder):
    """AIMv2 (arXiv 2411.14402): no CLS token, RMSNorm. Learned positions are resampled bicubically for other sizes."""

    models = {"aimv2_vision_model": Aimv2VisionModel, "aimv2": Aimv2VisionModel}
    blocks_at, final_norm, cls_tokens = "encoder.layers", "rms_norm", 0
    statistics = "clip"
    ignorable = ("text_model.", "logit_", "text_projection.", "visual_projection.", "head.", "vision_model.head.")

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        parts = self.model.embeddings
        if self.model.config.is_native:
            return parts(images), {}
        patches = parts.rms_norm(parts.patch_embed(images).flatten(2).transpose(1, 2))  # B N C
        positions = resample_positions(parts.position_embedding.weight[None], images.shape[-1] // self.patch_size)
        return patches + positions, {}

    def normalize(self, tokens: Tensor) -> Tensor:
        if self.norm == "plain":
            return F.rms_norm(tokens, (self.hidden_size,), eps=self.norm_eps)
        return super().normalize(tokens)


class RADIO(FrozenEncoder):
    """C-RADIO (arXiv 2412.07679): several CLS and register tokens, no final norm; the model normalises the pixels."""

    models = {"radio": RadioModel}
    blocks_at, final_norm = "encoder.layer", None
    default_norm, statistics = "none", "none"

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.model.embeddings(self.model.input_conditioner(images)), {}

    @property
    def prefix_tokens(self) -> int:
        return self.model.config.num_summary_tokens


FAMILIES = (
    Dinov2withNorm,
    DINOv3wNorm,
    SigLIP2wNorm,
    MAEwNorm,
    ViTwNorm,
    IJEPAwNorm,
    CLIPTower,
    AIMv2wNorm,
    RADIO,
    TimmViT,
)
ENCODERS: dict[str, type[FrozenEncoder]] = {cls.__name__: cls for cls in FAMILIES}


def encoder_class(name: str) -> type[FrozenEncoder]:
    """Return the encoder class by name, or by import path (`package.module.Class`). Raises UserError if there is none."""
    if "." in name:
        return class_at(name, FrozenEncoder, "model.encoder_cls")
    if name not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise UserError(f"model.encoder_cls={name!r} is unknown. Expected one of: {known}, or package.module.Class.")
    return ENCODERS[name]


def encoder_name(encoder: FrozenEncoder) -> str:
    """Return the name under which `encoder_class` finds the class of an encoder."""
    kind = type(encoder)
    return kind.__name__ if kind in FAMILIES else f"{kind.__module__}.{kind.__qualname__}"
