"""Store latents on disk for stage-2 training: safetensors shards and an index.

    index.json                                  origin of the latents, and the shards with their counts
    latents-RANK-NUMBER.safetensors             latents (n, C, h, w), rows (n,) int64, labels (n,) int64 (-1: none),
                                                crc (n,) int64, CRC-32 of each latent, row and label

`rows` are those of the dataset; `scale` in the index is `raw` (as the encoder returns the latents) or `normalized` (by the
model's statistics, as a diffusion model expects them).

Legend: B batch, n latents of a shard, C latent channels, h = w latent grid.
"""

import itertools
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.core.errors import UserError
from src.core.files import replacing, write_safetensors, write_text
from src.core.json_files import Document, check_json, read_json
from src.data.decode import BadImage
from src.data.packed import PackedIndex, PackedSource
from src.data.sources import short_digest

Scale = Literal["raw", "normalized"]
FORMAT, VERSION = "rae-latents", 1
INDEX = "index.json"
SHARD_BYTES = 512 * 2**20


class Shard(Document):
    """An entry of the index."""

    file: str = Field(pattern=r"^[\w.-]+$")
    count: int = Field(ge=0)


_SCHEMA: dict[str, Any] = {
    "count": Annotated[int, Field(ge=0)],
    "scale": Scale,
    "shape": Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)],
    "encoder": dict[str, Any],
    "statistics": str | None,
    "shards": list[Shard],
    "class_names": (list[str] | None, None),
}


class LatentWriter:
    """Write the shards of one process, each atomically; `close` writes the rest."""

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, rank: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.dtype, self.rank = folder, dtype, rank
        self.shards: list[dict[str, Any]] = []
        """{file, count} of each written shard, for the index."""
        one = shape[0] * shape[1] * shape[2] * torch.finfo(dtype).bits // 8
        self._capacity = max(1, shard_bytes // one)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, latents: Tensor, rows: Tensor, labels: Tensor) -> None:
        """Add latents B C h w with rows (B,) and labels (B,). Raises UserError on NaN or infinity."""
        stored = latents.detach().to("cpu", self.dtype)
        if bad := rows[~finite_rows(stored)].tolist():
            raise UserError(
                f"The latents of row {bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} hold NaN or infinity in "
                f"{self.dtype}. Nothing of this batch was written: the image, the weights or the range of the dtype is at fault."
            )
        self._waiting.append((stored, rows.cpu(), labels.cpu()))
        self._count += len(rows)
        while self._count >= self._capacity:
            self._flush(self._capacity)

    def close(self) -> list[dict[str, Any]]:
        if self._count:
            self._flush(self._count)
        return self.shards

    def _flush(self, count: int) -> None:
        latents, rows, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        file = self.folder / f"latents-{self.rank:03d}-{len(self.shards):05d}.safetensors"
        tensors = {"latents": latents[:count], "rows": rows[:count], "labels": labels[:count]}
        data = tensors["latents"].contiguous().view(torch.uint8).numpy()
        numbers = zip(data, rows.tolist(), labels.tolist(), strict=False)
        tensors["crc"] = torch.tensor([checksum(one.data, row, label) for one, row, label in numbers])
        with replacing(file) as out:
            write_safetensors(out.name, {name: value.contiguous() for name, value in tensors.items()})
        self.shards.append({"file": file.name, "count": count})
        self._waiting = [(latents[count:], rows[count:], labels[count:])] if len(rows) > count else []
        self._count -= count


def write_index(folder: Path, shards: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write the index. `facts`: scale, shape, dtype, image_size, encoder, statistics and anything else the latents depend on."""
    count = sum(shard["count"] for shard in shards)
    content = {"format": FORMAT, "version": VERSION, "count": count, **facts, "shards": list(shards)}
    write_text(folder / INDEX, json.dumps(content, indent=2) + "\n")


class LatentStore(PackedSource):
    """Stored latents, by their folder or its index: read in batches, or as rows for training. Pickles as its path.

    Raises:
        UserError: no index, another format, or shards that are missing, truncated or of another shape than in the index.
    """

    def __init__(self, path: str | Path) -> None:
        self._arguments = (path,)
        self.path = folder = Path(path).parent if Path(path).name == INDEX else Path(path)
        remedy = "Expected a folder that `src/reconstruct.py --latents` wrote; the index is written at its end."
        self.about = read_json(folder / INDEX, remedy, format=Literal[FORMAT], version=Literal[VERSION])
        """Content of the index."""
        check_json(self.about, folder / INDEX, remedy, **_SCHEMA)
        shards = self.about["shards"]
        counts = [shard["count"] for shard in shards]
        if self.about["count"] != sum(counts):
            raise UserError(f"{folder / INDEX}: count={self.about['count']} is not the sum of its shards. {remedy}")
        if missing := [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:4])}. Copy them again."
            )
        self.scale: Scale = self.about["scale"]
        self.shape: tuple[int, int, int] = tuple(self.about["shape"])
        files = [folder / shard["file"] for shard in shards]
        layouts = [_layout(file, (count, *self.shape)) for file, count in zip(files, counts, strict=True)]
        self.dtype = layouts[0].dtype if layouts else torch.float32
        size = math.prod(self.shape) * self.dtype.itemsize
        starts = np.cumsum([0, *counts])
        offsets = [layout.first + size * np.arange(count) for layout, count in zip(layouts, counts, strict=True)]
        numbers = np.concatenate([np.empty((0, 3), np.int64), *(layout.numbers for layout in layouts)])
        self._rows, self._labels, self._crc = np.ascontiguousarray(numbers.T)
        labels = self._labels if self._labels.max(initial=-1) >= 0 else None
        index = PackedIndex(starts, np.concatenate([starts[:0], *offsets]), np.full(starts[-1], size), labels)
        super().__init__(files, index, self.about.get("class_names"))

    def encoded(self, index: int) -> bytes:
        """Return a latent's bytes as stored in its shard. Raises BadImage if the CRC doesn't match."""
        data = super().encoded(index)
        if (crc := self._crc[index]) >= 0 and crc != checksum(data, self._rows[index], self._labels[index]):
            raise BadImage("not what was written (CRC-32)")
        return data

    def decoded(self, data: bytes | memoryview, *_: int) -> Tensor:
        """Decode a latent's bytes to float32 C h w; serves as a dataset's transform. Raises BadImage if a number is not finite."""
        latent = torch.frombuffer(bytearray(data), dtype=self.dtype).view(self.shape).float()
        if not latent.isfinite().all():
            raise BadImage("not finite (NaN or infinity)")
        return latent

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (positions in the store (B,), dataset rows (B,), latents float32 B C h w), every world-th batch.

        Raises:
            UserError: damaged latents.
        """
        batches = [
            range(start, min(start + batch_size, stop))
            for first, stop in itertools.pairwise(self._starts)
            for start in range(first, stop, batch_size)
        ]
        for places in batches[rank::world]:
            try:
                latents = torch.stack([self.decoded(self.encoded(place)) for place in places])
            except BadImage as error:
                number = self.file_of(places[0])
                first = places[0] - self._starts[number]
                raise UserError(
                    f"{self.files[number]} is damaged: latents {first} to {first + len(places) - 1} are {error}. Copy it again."
                ) from error
            yield torch.tensor(places), torch.from_numpy(self._rows[places[0] : places[-1] + 1].copy()), latents

    def name(self, index: int) -> str:
        number = self.file_of(index)
        return f"latent {index - self._starts[number]} of {self.files[number]}"

    def fingerprint(self) -> str:
        facts = {key: value for key, value in self.about.items() if key not in ("model", "data")}
        return short_digest(json.dumps(facts, sort_keys=True).encode())


def finite_rows(latents: Tensor) -> Tensor:
    """Return which latents are finite: B C h w -> (B,) bool."""
    return latents.isfinite().flatten(1).all(1)


def checksum(data: bytes | memoryview, row: int, label: int) -> int:
    """Return the CRC-32 of a latent's bytes, its dataset row and its label."""
    return zlib.crc32(struct.pack("<qq", row, label), zlib.crc32(data))


class _Layout(NamedTuple):
    """Layout of a shard. first: byte offset of its first latent; numbers: rows, labels, CRC-32 (-1: none), int64 n x 3."""

    dtype: torch.dtype
    first: int
    numbers: np.ndarray


def _layout(file: Path, shape: tuple[int, ...]) -> _Layout:
    try:
        with safe_open(file, "pt") as tensors:
            found = tensors.get_slice("latents")
            rows, labels = (tensors.get_tensor(name) for name in ("rows", "labels"))
            crc = tensors.get_tensor("crc") if "crc" in tensors.keys() else torch.full_like(rows, -1)  # noqa: SIM118
            own, dtype = tuple(found.get_shape()), found[:0].dtype
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            first = 8 + length + json.loads(content.read(length))["latents"]["data_offsets"][0]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} can't be read: {error}. It may be cut short; copy it again.") from error
    if not dtype.is_floating_point or {rows.dtype, labels.dtype, crc.dtype} != {torch.int64}:
        kinds = f"{dtype}, {rows.dtype}, {labels.dtype} and {crc.dtype}"
        raise UserError(
            f"{file}: latents, rows, labels and crc are {kinds}; expected floats and torch.int64. Write them again with "
            "src/reconstruct.py --latents."
        )
    if own != shape or not len(labels) == len(rows) == len(crc) == shape[0]:
        raise UserError(
            f"{file}: latents {own} with {len(labels)} labels, but the index lists {shape}. Write them again."
        )
    return _Layout(dtype, first, torch.stack([rows, labels, crc], 1).numpy())
