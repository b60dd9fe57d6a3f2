"""How the images of an evaluation are prepared: as on the command line, else as the checkpoint's training did it, whose
callback then gives the same score; without a checkpoint by the project's defaults."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from src.core.images import Quantization
from src.core.options import INCEPTION_FILE
from src.core.processes import Place
from src.data.decode import Decoder, Exif
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

    @classmethod
    def choose(cls, image_size: int, exif: Exif | None, config: Mapping[str, Any]) -> "ImageProtocol":
        """`exif` as on the command line, `config` that of a run; both may say nothing."""
        data = config.get("data") or {}
        chosen = _choose("exif", exif, data.get("exif"), "data.exif", "apply")
        return cls(image_size, Decoder(chosen, data.get("max_megapixels") or MAX_MEGAPIXELS))

    def loader(self, images: Images, options: Any, place: Place) -> EvaluationLoader:
        """This process's share of the first --num_samples centre crops."""
        o = options
        return evaluation_loader(
            images, self.image_size, o.num_samples, o.batch_size, o.num_workers, self.decoder, o.max_bad_share,
            place.device, place.rank, place.world,
        )  # fmt: skip

    def preparation(self, images: Images, num_samples: int | None) -> Preparation:
        """What a reference says of itself, and is asked for."""
        available = len(images.rows)
        return Preparation(
            image_size=self.image_size,
            exif=self.decoder.exif,
            split=images.split,
            fingerprint=images.source.fingerprint(),
            available=available,
            selected=available if num_samples is None else min(available, num_samples),
        )


def choose_quantization(given: Quantization | None, config: Mapping[str, Any]) -> Quantization:
    stored = ((config.get("callbacks") or {}).get("rfid") or {}).get("quantization")
    return _choose("quantization", given, stored, "callbacks.rfid.quantization", "round")


def compare_precision(chosen: str, config: Mapping[str, Any]) -> None:
    """Not followed, so that scores of different runs compare; but told."""
    trained = str((config.get("trainer") or {}).get("precision") or chosen)
    if not trained.startswith(chosen):
        log.info(
            "--precision %s (training's own scores were made in trainer.precision=%s and may differ a little)",
            chosen, trained,
        )  # fmt: skip


def inception_path(given: str | None, config: Mapping[str, Any]) -> str:
    return given or ((config.get("callbacks") or {}).get("rfid") or {}).get("inception_path") or INCEPTION_FILE


def _choose(option: str, given: T | None, stored: T | None, key: str, default: T) -> T:
    """The option, else the run's, else the default; the log says which."""
    if given is None:
        value, whence = (default, "by default") if stored is None else (stored, f"as in training, {key}")
    elif stored not in (None, given):
        value, whence = given, f"as given; the training of this checkpoint used {key}={stored}, its scores differ"
    else:
        value, whence = given, "as given"
    log.info("--%s %s (%s)", option, value, whence)
    return value
