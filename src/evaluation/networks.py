"""The judging networks of an evaluation, with errors that say what to type instead."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.weights import Weights, resolve
from src.formats.checkpoint_content import with_current_keys
from src.losses.lpips import LPIPS
from src.metrics.inception import InceptionFeatures

log = logging.getLogger(__name__)


def load_inception(path: str | Path | None, weights: Weights, width: float, key: str, remedy: str) -> InceptionFeatures:
    """`key` names the option of the path, `remedy` says how to do without the file."""
    if weights == "pretrained" and width != 1.0:
        raise UserError(
            f"An Inception width of {width:g} is for untrained weights only: the published network has width 1. "
            f"{remedy}"
        )
    if not 0 < width <= 1:
        raise UserError(
            f"An Inception width of {width:g}: expected a share of the published width, above 0 and up to 1."
        )
    if weights == "pretrained" and path is not None and not resolve(path).is_file():
        raise UserError(
            f"Inception weights for FID not found: {resolve(path)} (from {key}). Get them with `python "
            f"scripts/download_weights.py inception`, or set {key} to the place where you have them. {remedy}"
        )
    return InceptionFeatures(path, weights, width=width, key=key)


def load_lpips(arguments: Mapping[str, Any], key: str) -> LPIPS | None:
    """None, and a warning, where its files are missing: LPIPS stands beside the score, it is no part of it."""
    arguments = with_current_keys({"lpips_arch": arguments})["lpips_arch"]  # of a run of earlier versions, perhaps
    if arguments.get("weights", "pretrained") == "pretrained":
        missing = [
            str(resolve(arguments[name])) for name in ("vgg_path", "linear_path") if not _is_file(arguments.get(name))
        ]
        if missing:
            log.warning(
                "LPIPS is left out: %s not found. Get it with `python scripts/download_weights.py vgg16 lpips`, or "
                "say where "
                "it is with %s.", " and ".join(missing), key,
            )  # fmt: skip
            return None
    return LPIPS(**arguments)


def _is_file(path: Any) -> bool:
    return path is not None and resolve(path).is_file()
