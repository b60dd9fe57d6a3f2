"""The encoding half of a model: from a configuration, a checkpoint or an export. Hydra composes the configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.models.rae import RAE
from src.models.settings import RAESettings
from src.weights import PROJECT_ROOT, freeze

# Statistics don't depend on the decoder, so the smallest one stands in for it.
_SMALL_DECODER = "configs/decoder/tiny"


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that `python src/train.py OVERRIDES` would run, as plain values.

    Raises:
        UserError: an experiment or a key that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(PROJECT_ROOT / "configs"), version_base="1.3"):
            config = hydra_compose("train", overrides=list(overrides))
            return {node: OmegaConf.to_container(config[node], resolve=True) for node in ("data", "model")}
    except (HydraException, OmegaConfBaseException) as error:
        known = ", ".join(sorted(path.stem for path in Path(PROJECT_ROOT, "configs", "experiment").glob("*.yaml")))
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--config {' '.join(overrides)}: {reason} Expected overrides as for src/train.py; experiments: {known}."
        ) from error


def encoder_of(config: dict[str, Any]) -> RAE:
    """A frozen RAE with the encoder and the sizes of a configuration. Its decoder is a stand-in."""
    settings = {name: config["model"][name] for name in RAESettings.__dataclass_fields__}
    settings |= {
        "decoder_config_path": _SMALL_DECODER,
        "pretrained_decoder_path": None,
        "normalization_stat_path": None,
    }
    rae = RAE(**settings)
    freeze(rae)
    return rae
