"""Turn rows into samples for training and evaluation, and collate them into batches.

Legend: B batch, S image_size. Images are returned as uint8 0..255, 3 x S x S, RGB.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.core import random_streams as stream
from src.core.errors import UserError
from src.data import crops
from src.data.arrow_writer import UNKNOWN_LABEL
from src.data.decode import BadImage, Decoder
from src.data.order import Item, Rows
from src.data.sources import Source

TrainCrop = Literal["random", "center", "adm"]
ATTEMPTS = 16
"""Replacements tried for one bad image. With half of the images bad, all 16 fail once in 65,000 times."""


@dataclass(frozen=True)
class Failure:
    """An image that could not be read or decoded. source: index of its source in a mix."""

    row: int
    name: str
    reason: str
    source: int = 0


@dataclass(frozen=True)
class Sample:
    image: Tensor | None
    """uint8 3 x S x S, or a stored latent, float32 C x h x w; None if it could not be read."""
    item: Item
    failures: tuple[Failure, ...] = ()
    label: int | None = None
    """-1: no class; None: the source has no labels."""
    source: int | None = None
    """Index of the source in a mix; None: not a mix."""


@dataclass(frozen=True)
class TrainTransform:
    """The training crop. train_crop `random`: resize the shorter side to resize_shorter_px, crop a random square (RAE);
    `center`: resize it to image_size, crop the centre (RAEv2); `adm`: as in evaluation (stage 2 of RAE). resize_shorter_px
    null: 1.5 times image_size."""

    image_size: int
    train_crop: TrainCrop
    resize_shorter_px: int | None
    decoder: Decoder
    seed: int

    def __post_init__(self) -> None:
        if self.resize_shorter_px is None:
            return
        if self.train_crop != "random":
            raise UserError(
                f"data.train_crop={self.train_crop} resizes the shorter side to data.image_size={self.image_size}; "
                f"data.resize_shorter_px={self.resize_shorter_px} has no effect with it. Set "
                "data.resize_shorter_px=null."
            )
        if self.resize_shorter_px < self.image_size:
            raise UserError(
                f"data.resize_shorter_px={self.resize_shorter_px} leaves no square of "
                f"data.image_size={self.image_size}: expected at least that, or null for "
                f"{crops.default_shorter_px(self.image_size)}."
            )

    @property
    def shorter_px(self) -> int:
        if self.train_crop != "random":
            return self.image_size
        return self.resize_shorter_px or crops.default_shorter_px(self.image_size)

    def __call__(self, data: bytes | memoryview, epoch: int, position: int) -> np.ndarray:
        """Decode and crop an encoded image to uint8 S x S x 3. The crop depends on (seed, epoch, position). Raises BadImage."""
        if self.train_crop == "adm":
            return crops.adm_center_crop(self.decoder.decode(data).pixels, self.image_size)
        picture = self.decoder.decode(data, min_shorter_px=self.shorter_px)
        if self.train_crop == "center":
            window = crops.center_window(picture.width, picture.height, self.image_size)
        else:
            u, v = stream.generator(self.seed, stream.Purpose.CROP, epoch, position).random(2)
            window = crops.random_window(picture.width, picture.height, self.image_size, self.shorter_px, u, v)
        return crops.cut(picture, window)


@dataclass(frozen=True)
class EvaluationTransform:
    """The evaluation crop. fit `crop`: the ADM centre crop of the whole decoded image, bit-equal to the published reference
    images; `pad` and `resize` (`src/reconstruct.py --fit`): the whole image, see `crops.whole`."""

    image_size: int
    decoder: Decoder
    fit: Literal["crop", "pad", "resize"] = "crop"

    def __call__(self, data: bytes | memoryview) -> np.ndarray:
        """Decode and crop an encoded image to uint8 S x S x 3. Raises BadImage."""
        pixels = self.decoder.decode(data).pixels
        if self.fit == "crop":
            return crops.adm_center_crop(pixels, self.image_size)
        return crops.whole(pixels, self.image_size, pad=self.fit == "pad")


class _Rows(Dataset[Sample]):
    def __init__(self, source: Source, rows: Rows, transform: Any) -> None:
        self.source, self.rows, self.transform = source, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def _sample(self, item: Item, *place: int) -> Sample:
        """Return the sample of `item.row`, a row of the source. place: (epoch, position) for a transform with random draws."""
        row, label = item.row, None
        if self.source.num_classes is not None and (label := self.source.label(row)) is None:
            label = UNKNOWN_LABEL
        try:
            image = self.transform(self.source.encoded(row), *place)
            if isinstance(image, np.ndarray):
                image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # S S 3 -> 3 S S
            return Sample(image, item, label=label)
        except BadImage as error:
            return Sample(None, item, (Failure(row, self.source.name(row), str(error)),), label)


class TrainDataset(_Rows):
    """Rows of a source through a TrainTransform. A bad image is replaced by a row drawn from (seed, epoch, position)."""

    def __init__(self, source: Source, rows: Rows, transform: Any, seed: int) -> None:
        super().__init__(source, rows, transform)
        self.seed = seed

    def __getitem__(self, item: Item) -> Sample:
        place = item.epoch, item.position
        first = sample = self._sample(item._replace(row=int(self.rows[item.row])), *place)
        failures, draws = sample.failures, None
        for _ in range(ATTEMPTS):
            if sample.image is not None:
                break
            draws = draws or stream.generator(self.seed, stream.Purpose.REPLACEMENT, *place)
            sample = self._sample(item._replace(row=int(self.rows[int(draws.integers(len(self.rows)))])), *place)
            failures += sample.failures
        return replace(first if sample.image is None else sample, failures=failures)


class MixDataset(Dataset[Sample]):
    """Rows of several sources, numbered one source after the other, each with its own transform. A bad image is replaced by
    one from its own source."""

    def __init__(self, parts: Sequence[TrainDataset]) -> None:
        self.parts = parts
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))
        self._labelled = any(part.source.num_classes is not None for part in parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, item: Item) -> Sample:
        number = bisect.bisect_right(self._starts, item.row) - 1
        sample = self.parts[number][item._replace(row=item.row - self._starts[number])]
        failures = tuple(replace(failure, source=number) for failure in sample.failures)
        label = UNKNOWN_LABEL if sample.label is None and self._labelled else sample.label
        return replace(sample, source=number, failures=failures, label=label)


class EvaluationDataset(_Rows):
    """Rows of a source, in the given order, through an EvaluationTransform or another function of a file's bytes. A bad
    image is skipped, never replaced."""

    def __getitem__(self, position: int) -> Sample:
        return self._sample(Item(0, position, int(self.rows[position])))


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Collate samples into a batch. Samples without an image are dropped (B may be 0); their failures are kept.

    image (B, 3, S, S) uint8, or latent (B, C, h, w) float32; position and index (row of the source) (B,) int64; bad (B,)
    bool, True where the image is a replacement; label (B,) int64, -1 for no class, if the source has labels; epoch int;
    failures tuple[Failure, ...]. In a mix also source (B,) int64; index is then the row within that source.
    """
    kept = [s for s in samples if s.image is not None]
    labels = [s.label for s in kept if s.label is not None]
    labelled, of_mix = samples[0].label is not None, samples[0].source is not None
    images = [s.image for s in kept if s.image is not None]
    name = "latent" if images and images[0].is_floating_point() else "image"
    return {
        name: torch.stack(images) if images else torch.empty(0, dtype=torch.uint8),
        "position": torch.tensor([s.item.position for s in kept], dtype=torch.int64),
        "index": torch.tensor([s.item.row for s in kept], dtype=torch.int64),
        "bad": torch.tensor([bool(s.failures) for s in kept], dtype=torch.bool),
        **({"label": torch.tensor(labels, dtype=torch.int64)} if labelled else {}),
        **({"source": torch.tensor([s.source for s in kept], dtype=torch.int64)} if of_mix else {}),
        "epoch": samples[0].item.epoch,
        "failures": tuple(f for s in samples for f in s.failures),
    }
