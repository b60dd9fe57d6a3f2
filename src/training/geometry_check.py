"""Do the sizes of a configuration fit? Asked before data or weights are opened."""

from collections.abc import Mapping
from typing import Any

from src.models.rae import geometry_of
from src.training.settings import ModelSettings


def check_geometry(model: Mapping[str, Any]) -> None:
    """Raises UserError: an unknown or missing key of `model:`, or sizes that don't fit."""
    rae = ModelSettings.parse({key: value for key, value in model.items() if key != "_target_"}).rae
    geometry_of(rae.encoder_cls, rae.encoder_params, rae.decoder_patch_size, rae.image_size, rae.encoder_input_size)
