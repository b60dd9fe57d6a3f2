"""The encoders that diffusers' `AutoencoderRAE` can build: what it fixes of each, and how their parameters are named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.core.key_mapping import NameTable

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Family:
    """One kind of encoder as diffusers builds it: everything but width, patch and depth is fixed there."""

    name: str
    encoder_cls: str
    source_key: str
    """The argument of our class that names the folder."""
    fixed: Mapping[str, Any]
    """Values of the transformers config."""
    names: NameTable
    """transformers 5 (what our encoder has) to the names of the hub's files (transformers 4)."""
    model_type: str
    """Of transformers."""
    unused_norm: str
    """The final LayerNorm, whose affine parameters diffusers takes away and the recipe never uses."""


def _attention(ours: str, theirs: str) -> list[tuple[str, str]]:
    parts = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    return [(f"{ours}.*.attention.{a}.*", f"{theirs}.*.attention.{b}.*") for a, b in parts.items()]


FAMILIES = (
    Family(
        "dinov2",
        "Dinov2withNorm",
        "dinov2_path",
        {"image_size": 518, "mlp_ratio": 4, "num_register_tokens": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
         "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3},
        NameTable(_attention("encoder.layer", "encoder.layer")),
        "dinov2_with_registers",
        "layernorm",
    ),
    Family(
        "mae",
        "MAEwNorm",
        "model_name",
        {"image_size": 224, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True,
         "num_channels": 3},
        NameTable(
            [
                *_attention("layers", "encoder.layer"),
                ("layers.*.mlp.fc1.*", "encoder.layer.*.intermediate.dense.*"),
                ("layers.*.mlp.fc2.*", "encoder.layer.*.output.dense.*"),
                ("layers.*.layernorm_before.*", "encoder.layer.*.layernorm_before.*"),
                ("layers.*.layernorm_after.*", "encoder.layer.*.layernorm_after.*"),
            ]
        ),
        "vit_mae",
        "layernorm",
    ),
    Family(
        "siglip2",
        "SigLIP2wNorm",
        "model_name",
        {"image_size": 256, "intermediate_size": 3072, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
         "num_channels": 3},
        NameTable([("**", "vision_model.**")]),
        "siglip_vision_model",
        "vision_model.post_layernorm",
    ),
)  # fmt: skip
