"""Layout of a diffusers `AutoencoderRAE` folder: files, keys, statistics, and the encoders that diffusers can build.

Legend: C latent channels, h = w latent grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from src.core.errors import UserError
from src.core.images import IMAGENET_MEAN, IMAGENET_STD
from src.core.json_files import check_json, read_json
from src.core.key_mapping import NameTable
from src.core.settings import Size

CLASS = "AutoencoderRAE"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STD_EPS = 1e-5
"""diffusers divides by std + STD_EPS, the official code by sqrt(var + STD_EPS)."""

DECODER = NameTable(
    [
        ("decoder_layers.*.attention.attention.query.*", "decoder_layers.*.attention.to_q.*"),
        ("decoder_layers.*.attention.attention.key.*", "decoder_layers.*.attention.to_k.*"),
        ("decoder_layers.*.attention.attention.value.*", "decoder_layers.*.attention.to_v.*"),
        ("decoder_layers.*.attention.output.dense.*", "decoder_layers.*.attention.to_out.0.*"),
    ]
)
"""Decoder names: ours (the official ones) and diffusers'. diffusers has no `decoder_pos_embed`."""

_DEFAULTS: dict[str, Any] = {
    "encoder_norm_mean": list(IMAGENET_MEAN),
    "encoder_norm_std": list(IMAGENET_STD),
    "latents_mean": None,
    "latents_std": None,
    "noise_tau": 0.0,
    "reshape_to_2d": True,
    "use_encoder_loss": False,
    "scaling_factor": 1.0,
    "num_channels": 3,
    "image_size": None,
}  # diffusers' defaults: a config may omit these keys
_REQUIRED = {
    "encoder_type", "encoder_hidden_size", "encoder_patch_size", "encoder_num_hidden_layers", "decoder_hidden_size",
    "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size", "patch_size", "encoder_input_size",
}  # fmt: skip
_SCHEMA: dict[str, Any] = {
    **dict.fromkeys(_REQUIRED - {"encoder_type"}, (Size, 1)),
    **dict.fromkeys(("encoder_norm_mean", "encoder_norm_std"), (list[float] | None, None)),
    "encoder_type": (str, ""),
    "noise_tau": (Annotated[float, Field(ge=0)], 0.0),
}
"""Types of the keys; `_REQUIRED` lists those that must be present."""
_FIXED = {"reshape_to_2d": True, "scaling_factor": 1.0, "num_channels": 3}


def std_from_var(var: Tensor) -> Tensor:
    """Return the std (float32) for which std + 1e-5 = sqrt(var + 1e-5)."""
    return ((var.double() + STD_EPS).sqrt() - STD_EPS).float().cpu()


def var_from_std(std: Tensor) -> Tensor:
    """Return the inverse of `std_from_var`, up to the rounding of std."""
    return ((std.double() + STD_EPS).square() - STD_EPS).float()


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` with diffusers' defaults filled in.

    Raises:
        UserError: another class, missing or unknown keys, values that our RAE does not support.
    """
    file = folder / "config.json"
    content = read_json(file, "A diffusers folder was expected.")
    if content.get("_class_name") != CLASS:
        raise UserError(f"{file} is for {content.get('_class_name') or content.get('model_type')!r}; expected {CLASS}.")
    check_json(content, file, **_SCHEMA)
    config = _DEFAULTS | {key: value for key, value in content.items() if not key.startswith("_")}
    missing, unknown = _REQUIRED - config.keys(), config.keys() - _REQUIRED - _DEFAULTS.keys()
    if missing or unknown:
        raise UserError(f"{file}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}.")
    for key in ("encoder_norm_mean", "encoder_norm_std"):
        config[key] = config[key] or _DEFAULTS[key]
    for key, value in _FIXED.items():
        if config[key] != value:
            raise UserError(f"{file}: {key}={config[key]!r} is not supported, only {value!r}.")
    if (config["latents_mean"] is None) != (config["latents_std"] is None):
        raise UserError(f"{file}: latents_mean and latents_std must both be given or both be null.")
    return config


def grid(config: Mapping[str, Any]) -> int:
    """Return the side of the latent grid."""
    return config["encoder_input_size"] // config["encoder_patch_size"]


def decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of our `DecoderConfig`; diffusers fixes `layer_norm_eps`."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {f"decoder_{key}": config[f"decoder_{key}"] for key in keys} | {"layer_norm_eps": 1e-12}


def statistics(state: Mapping[str, Tensor], source: object) -> tuple[Tensor, Tensor] | None:
    """Return mean and var, each C x h x w; None if the folder has none (mean 0 and std 1 up to STD_EPS).

    Raises:
        UserError: a single mean and std for all latents, which our RAE does not support.
    """
    mean, std = state.get("_latents_mean"), state.get("_latents_std")
    if mean is None or std is None:
        return None
    if mean.numel() == 1 and std.numel() == 1:
        if abs(mean.item()) < STD_EPS and abs(std.item() - 1) < 2 * STD_EPS:
            return None
        raise UserError(
            f"{source}: one mean ({mean.item():g}) and std ({std.item():g}) for all latents; expected C x h x w "
            "numbers."
        )
    return mean.float(), var_from_std(std)


# -- encoders

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Family:
    """One kind of encoder as diffusers builds it: with everything fixed but width, patch and depth."""

    name: str
    encoder_cls: str
    fixed: Mapping[str, Any]
    """Values of the transformers config."""
    names: NameTable
    """Names in transformers 5 (our encoder's) and in the hub's files (transformers 4)."""
    model_type: str
    """model_type in transformers."""
    unused_norm: str
    """The final LayerNorm, whose affine parameters diffusers removes and the recipe never uses."""


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
        {"image_size": 518, "mlp_ratio": 4, "num_register_tokens": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
         "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3},
        NameTable(_attention("encoder.layer", "encoder.layer")),
        "dinov2_with_registers",
        "layernorm",
    ),
    Family(
        "mae",
        "MAEwNorm",
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
        {"image_size": 256, "intermediate_size": 3072, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
         "num_channels": 3},
        NameTable([("**", "vision_model.**")]),
        "siglip_vision_model",
        "vision_model.post_layernorm",
    ),
)  # fmt: skip
