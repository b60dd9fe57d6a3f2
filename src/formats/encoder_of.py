"""The encoding half of a model: from a configuration, a checkpoint or an export."""

from typing import Any

from src.core.weights import freeze
from src.formats.checkpoint_content import RAESettings
from src.models.encoder_presets import expand_encoder
from src.models.rae import RAE

# Statistics don't depend on the decoder, so the smallest one stands in for it.
_SMALL_DECODER = "configs/decoder/tiny"


def encoder_of(config: dict[str, Any]) -> RAE:
    """A frozen RAE with the encoder and the sizes of a configuration. Its decoder is a stand-in."""
    model = expand_encoder(config["model"])
    settings = {name: model[name] for name in RAESettings.field_names()}
    settings |= {
        "decoder_config_path": _SMALL_DECODER,
        "pretrained_decoder_path": None,
        "normalization_stat_path": None,
    }
    rae = RAE(**settings)
    freeze(rae)
    return rae
