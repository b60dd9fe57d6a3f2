"""What formats and training agree on about a checkpoint: its version, and the arguments of the RAE in its configuration."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from src.core.settings import Settings

FORMAT_VERSION = 1
_TINY_CHANNELS = (4, 8, 8, 16, 16)


class RAESettings(Settings):
    """Arguments of `RAE`, by the same names."""

    typed_as: ClassVar[Mapping[str, str]] = {"image_size": "data.image_size"}

    encoder_cls: str
    encoder_config_path: str
    encoder_params: Mapping[str, Any]
    encoder_input_size: int | None
    image_size: int
    decoder_config_path: str
    decoder_patch_size: int
    decoder_denormalize: bool
    pretrained_decoder_path: str | None
    normalization_stat_path: str | None
    noise_tau: float = Field(ge=0)
    train_positions: bool
    activation_checkpointing: bool


def with_current_keys(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node `model:` of a configuration without keys that earlier versions had, in the words of today."""
    current = dict(model)
    lpips, disc = _node(model, "lpips_arch"), _node(model, "disc_arch")
    arch = _node(disc, "arch")
    if "channels" in lpips:  # those of an untrained network were free
        tiny = lpips.get("weights") == "untrained" and tuple(lpips["channels"]) == _TINY_CHANNELS
        del lpips["channels"]
        current["lpips_arch"] = lpips | {"weights": "tiny"} if tiny else lpips
    if arch.get("recipe") == "tiny":
        current["disc_arch"] = disc | {"arch": arch | {"recipe": "S_8", "weights": "tiny"}}
    if "noise_tau" in model:
        current.setdefault("noise", {"level": "uniform", "mu": 0.0, "s": 1.0, "per": "image"})
    return current


def _node(owner: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = owner.get(name)
    return dict(value) if isinstance(value, Mapping) else {}
