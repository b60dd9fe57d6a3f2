"""How the images of an evaluation are prepared: as on the command line, else as the checkpoint's training did it, whose
callback then gives the same score; without a checkpoint by the project's defaults."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from src.core.distributed import Process
from src.core.options import INCEPTION_FILE, DataOptions
from src.data.dataset import EvaluationTransform
from src.data.decode import Decoder
from src.data.loader import EvaluationLoader
from src.evaluation.images import MAX_MEGAPIXELS, Images, evaluation_loader
from src.metrics.reference import Preparation

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ImageProtocol:
    """From rows of a data set to the squares that are compared."""

    image_size: int
    decoder: Decoder
    options: DataOptions

    @classmethod
    def of(cls, image_size: int, options: DataOptions, config: Mapping[str, Any]) -> "ImageProtocol":
        """Choose by the options and the configuration of a run (or none)."""
        exif = choose("exif", options.exif, config, "data.exif", "apply")
        return cls(image_size, Decoder(exif, stored(config, "data.max_megapixels") or MAX_MEGAPIXELS), options)

    def loader(self, images: Images, process: Process) -> EvaluationLoader:
        """Return this process's share of the first --num_samples centre crops."""
        rows = images.share(self.options.num_samples, process)
        transform = EvaluationTransform(self.image_size, self.decoder)
        return evaluation_loader(images.source, rows, transform, self.options, process)

    def preparation(self, images: Images) -> Preparation:
        """Return what a reference says of itself, and is asked for."""
        available = len(images.rows)
        return Preparation(
            image_size=self.image_size,
            exif=self.decoder.exif,
            split=images.split,
            fingerprint=images.source.fingerprint(),
            available=available,
            selected=min(available, self.options.num_samples or available),
        )


def stored(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key of a run's configuration; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = (value or {}).get(part)
    return value


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


def inception_path(given: str | None, config: Mapping[str, Any]) -> str:
    return given or stored(config, "callbacks.rfid.inception_path") or INCEPTION_FILE
