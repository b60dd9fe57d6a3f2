"""Compose the configuration of `src/train.py` outside of it. The only file below training that knows Hydra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that `python src/train.py OVERRIDES` would run, as plain values.

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
