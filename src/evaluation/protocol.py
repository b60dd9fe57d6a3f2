"""What an evaluation does as on the command line, else as the checkpoint's training did it, whose callback then gives the
same score; without a checkpoint by the project's defaults."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from src.core.options import DataOptions
from src.data.decode import Decoder, Exif
from src.evaluation.images import MAX_MEGAPIXELS
from src.formats.checkpoint import stored

log = logging.getLogger(__name__)

T = TypeVar("T")


def choose(option: str, given: T | None, config: Mapping[str, Any], key: str, default: T) -> T:
    """Return the option, else the run's own value, else the default; the log says which."""
    trained = stored(config, key)
    if given is None:
        value, source = (default, "by default") if trained is None else (trained, f"as in training, {key}")
    elif trained not in (None, given):
        value, source = given, f"as given; the training of this checkpoint used {key}={trained}, its scores differ"
    else:
        value, source = given, "as given"
    log.info("--%s %s (%s)", option, value, source)
    return value


def compare_precision(chosen: str, config: Mapping[str, Any]) -> None:
    """Log where training's precision is another one; it is not followed, so that scores of different runs compare."""
    trained = str(stored(config, "trainer.precision") or chosen)
    if not trained.startswith(chosen):
        log.info(
            "--precision %s (training's own scores were made in trainer.precision=%s and may differ a little)",
            chosen, trained,
        )  # fmt: skip


def decoder_of(options: DataOptions, config: Mapping[str, Any]) -> Decoder:
    """Return how image files are read."""
    exif: Exif = choose("exif", options.exif, config, "data.exif", "apply")
    return Decoder(exif, stored(config, "data.max_megapixels") or MAX_MEGAPIXELS)
