"""The judging networks of an evaluation, with errors that say what to type instead."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.options import INCEPTION_FILE, LPIPS_FILES, InceptionOptions, LpipsOptions
from src.core.weights import resolve
from src.evaluation.protocol import stored
from src.formats.checkpoint import with_current_keys
from src.losses.lpips import LPIPS
from src.metrics.inception import InceptionFeatures, InceptionWeights

log = logging.getLogger(__name__)


def load_inception(
    path: str | Path | None, weights: InceptionWeights, key: str, remedy: str, width: float | None = None
) -> InceptionFeatures:
    """Load the Inception network, or say what is missing.

    Args:
        key: the option or config key of the path.
        remedy: how to do without the file.
        width: `inception_width` of an older configuration or command; below 1 it makes untrained weights tiny.
    """
    if width not in (None, 1):
        if weights == "pretrained":
            raise UserError(
                f"An Inception width of {width:g} is for untrained weights only: the published network has width 1. "
                f"{remedy}"
            )
        weights = "tiny"
    if weights == "pretrained" and path is not None and not resolve(path).is_file():
        raise UserError(
            f"Inception weights for FID not found: {resolve(path)} (from {key}). Get them with `python "
            f"scripts/download_weights.py inception`, or set {key} to the place where you have them. {remedy}"
        )
    return InceptionFeatures(path, weights, key=key)


def inception_of(options: InceptionOptions, config: Mapping[str, Any], remedy: str) -> InceptionFeatures:
    """Load the Inception network that the options name, else that of a run's configuration, else the usual file."""
    path = options.inception_path or stored(config, "callbacks.rfid.inception_path") or INCEPTION_FILE
    return load_inception(path, options.inception_weights, "--inception_path", remedy, options.inception_width)


def lpips_of(options: LpipsOptions, config: Mapping[str, Any]) -> LPIPS | None:
    """Load the LPIPS that the options name, else that of a run's configuration, else that of the usual files.

    None, and a warning, where its files are missing: LPIPS stands beside the score, it is no part of it.
    """
    given = {"vgg_path": options.vgg_path, "linear_path": options.lpips_path}
    arguments = stored(config, "model.lpips_arch") or LPIPS_FILES
    if any(given.values()):
        arguments = {name: path or LPIPS_FILES[name] for name, path in given.items()}
    arguments = with_current_keys({"lpips_arch": arguments})["lpips_arch"]  # of a run of earlier versions, perhaps
    if arguments.get("weights", "pretrained") == "pretrained":
        files = [resolve(arguments[name]) for name in given if arguments.get(name)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            log.warning(
                "LPIPS is left out: %s not found. Get it with `python scripts/download_weights.py vgg16 lpips`, or "
                "say where it is with --vgg_path and --lpips_path.", " and ".join(missing),
            )  # fmt: skip
            return None
    return LPIPS(**arguments)
