"""Sample a set of images into one npz, in blocks and on several processes; an interrupted call can be resumed.

Legend: N images, K classes, C latent channels, h = w latent grid, H = W image px.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.core import random_streams as streams
from src.core.distributed import Process, wait_for_all
from src.core.errors import UserError
from src.core.files import check_writable, replacing, write_text
from src.core.folder_lock import NAME as LOCK
from src.core.folder_lock import take_lock
from src.core.images import save_png, sheet, unit_to_bytes
from src.core.json_files import read_json
from src.core.precision import float32_products, full_float32
from src.core.random_streams import Purpose
from src.evaluation.options import SampleOptions
from src.evaluation.sampler import Sampler, SamplerSettings
from src.formats.checkpoint import statistics_digest
from src.formats.stage2 import Generator
from src.metrics.npz import opened_npz, scalar
from src.models.dit import LatentTransformer
from src.models.rae import RAE

GRID_ROWS, GRID_COLUMNS = 8, 8
NOT_FINITE = "guidance is too strong for this model and its precision. Use smaller scales, more steps"
EXISTS = "--{} {} exists. Add --overwrite, or choose another name."


def check_files(points: Sequence[SampleOptions]) -> None:
    """Check the output files of a call, or of each point of a sweep, before any long work. Called on rank 0. Raises UserError
    for a file that exists (unless `sample` can resume or reuse it), is named twice or can't be written."""
    files = [(name, path, point) for point in points for name, path in point.files().items()]
    paths = [path.absolute() for _, path, _ in files]
    for number, (name, path, point) in enumerate(files):
        if path.absolute() in paths[:number]:
            raise UserError(
                f"--{name}: {path} would be written twice. Give each option its own file, and --cfg and --interval values that "
                "differ in six digits."
            )
        resumable = _parts_folder(point.output).exists() or (len(points) > 1 and point.output.exists())
        if path.exists() and not point.overwrite and not resumable:
            raise UserError(EXISTS.format(name, path))
        check_writable(path, f"--{name}")


def sample(
    generator: Generator,
    guide: Generator | None,
    options: SampleOptions,
    process: Process,
    update: Callable[[int, int], None],
) -> SamplerSettings:
    """Write the samples as npz and return the sampler settings. Called on all ranks. An existing npz that `check_files`
    accepted (in a sweep, or after a call that was stopped during its cleanup) is kept if its settings are the same.

    Raises:
        UserError: settings that the networks don't support, an unfinished or existing file with other settings, latents
            that aren't finite, a full disk.
    """
    settings = sampler_settings(generator, options)
    rae = generator.rae
    generator.network.to(process.device)
    rae.to(process.device)
    weaker = None if guide is None else (guide.network.to(process.device), guide.flow)
    sampler = Sampler(generator.network, settings, generator.flow, options.seed, weaker)
    labels = labels_of(options.labels, options.seed, options.num_images, generator.network)
    size = rae.geometry.image_size
    files: dict[str, Any] = {"images": (np.uint8, (size, size, 3))}
    files |= {"latents": (np.float32, rae.latent_shape)} if options.latents else {}
    work = Blocks(options.output, options.num_images, files, options.batch_size, process)
    settings_json = json.dumps({**settings.model_dump(), **_image_dependencies(generator, guide, options)}, default=str)
    if options.output.exists() and not options.overwrite:
        if _stored_settings(options.output) != settings_json:
            raise UserError(EXISTS.format("output", options.output))
        if process.main:
            shutil.rmtree(work.folder, ignore_errors=True)
        return settings
    with _disk_errors_as_user_errors(options.output):
        work.open(json.loads(settings_json), options.overwrite)
        mine = work.remaining()
        for number, indices in enumerate(mine):
            update(number * len(indices), sum(map(len, mine)))
            half = options.precision == "bf16"
            images, latents = draw(sampler, rae, indices, labels, process.device, options.decode_batch, half)
            if not latents.isfinite().all():
                raise UserError(f"Samples {indices[0]} to {indices[-1]} hold NaN or infinity: {NOT_FINITE}, or fp32.")
            work.write(indices, images, latents)
        wait_for_all()
        if process.main:  # the image npz comes last: if it exists, everything does
            if options.latents is not None:
                work.pack("latents", "latents", options.latents, labels, settings_json)
            if options.grid is not None:
                save_png(grid(work.content("images"), labels), options.grid)
            work.pack("images", "arr_0", options.output, labels, settings_json)
            work.remove()
    wait_for_all()
    return settings


@torch.no_grad()
def draw(
    sampler: Sampler,
    rae: RAE,
    indices: np.ndarray,
    labels: np.ndarray,
    device: torch.device,
    decode_batch: int,
    half: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample a block of indices (B,): images, uint8 B x 3 x H x W, and latents, float32 B x C x h x w.

    `labels`: of all images. `half`: run the transformer under bf16 autocast; otherwise with TF32 matmuls on a GPU, as
    published. The decoder runs in float32. Precision settings of the caller have no effect.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=half), float32_products(device, "high"):
        latents = sampler.latents(indices, torch.from_numpy(labels[indices]), device).float()
    with full_float32(device):
        return torch.cat([unit_to_bytes(rae.decode(z)) for z in latents.split(decode_batch)]), latents


def blocks(num_images: int, size: int) -> list[np.ndarray]:
    """Split the indices of all images into blocks of `size`; the last one may be shorter."""
    return [np.arange(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def sampler_settings(generator: Generator, options: SampleOptions) -> SamplerSettings:
    """Return the sampler settings of the model's config, overridden by the options."""
    values = dict(generator.sampler)
    given = {"num_steps": options.steps, "grid": options.time_grid, "method": options.method,
             "internal": options.internal, "auto": options.auto}  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}
    if options.cfg:
        values["cfg"] = options.cfg[0]
    if options.interval:
        values["t_min"], values["t_max"] = interval_of(options.interval[0])
    return SamplerSettings.parse(values, "sampler")


def describe(generator: Generator, options: SampleOptions) -> str:
    """Describe the model in one line."""
    step = "" if generator.step is None else f", step {generator.step:,}"
    random = " UNTRAINED encoder: random weights, not a result." if generator.rae.encoder.untrained else ""
    return f"{generator.source}{step}, seed {options.seed}, labels {options.labels}.{random}"


class Blocks:
    """The unfinished output: files of images (and latents), and a journal of the blocks of `size` indices that are done."""

    def __init__(
        self, output: Path, count: int, files: dict[str, tuple[type, tuple[int, int, int]]], size: int, process: Process
    ) -> None:
        """`files`: dtype and shape of an image's entry, by file name."""
        self.count, self.files, self.size, self.process = count, files, size, process
        self.folder = _parts_folder(output)
        self._bytes = {name: int(np.prod(shape)) * np.dtype(kind).itemsize for name, (kind, shape) in files.items()}
        self._journal = self.folder / f"done.{process.rank}"

    def open(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, or reopen that of an interrupted run with the same settings. Called on all ranks."""
        wanted = {**settings, "batch_size": self.size}
        if self.process.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.folder, "Wait until it ends, or choose another --output.")
            found = _json_or_none(self.folder / "settings.json")
            if found is not None and found != wanted and not overwrite:
                other = ", ".join(
                    f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here"
                    for key in sorted(wanted.keys() | found.keys())
                    if wanted.get(key) != found.get(key)
                )
                raise UserError(
                    f"{self.folder} holds an unfinished run with other settings ({other}). Continue with those settings, "
                    "or start over with --overwrite."
                )
            sizes = {self.folder / name: self.count * entry for name, entry in self._bytes.items()}
            if found != wanted or any(not p.is_file() or p.stat().st_size != size for p, size in sizes.items()):
                for path in self.folder.iterdir():
                    if path.name != LOCK:
                        path.unlink()
                for path, size in sizes.items():
                    with open(path, "wb") as file:
                        file.truncate(size)
                write_text(self.folder / "settings.json", json.dumps(wanted))
        wait_for_all()
        self._open = {name: open(self.folder / name, "r+b") for name in self.files}  # noqa: SIM115

    def remaining(self) -> list[np.ndarray]:
        """Return this rank's share of the blocks that are not done yet."""
        lines = {line for file in self.folder.glob("done.*") for line in file.read_bytes().split(b"\n")[:-1]}
        wait_for_all()  # all ranks have read before any writes
        left = [block for block in blocks(self.count, self.size) if b"%d" % block[0] not in lines]
        return left[self.process.rank :: self.process.world]

    def write(self, indices: np.ndarray, images: Tensor, latents: Tensor) -> None:
        """Write a block (images uint8 B x 3 x H x W, latents float32 B x C x h x w), then record it as done."""
        data = {"images": images.permute(0, 2, 3, 1), "latents": latents}
        for name, file in self._open.items():
            file.seek(int(indices[0]) * self._bytes[name])
            file.write(data[name].contiguous().cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self._journal, "a") as journal:
            journal.write(f"{int(indices[0])}\n")
            journal.flush()
            os.fsync(journal.fileno())

    def content(self, name: str) -> np.ndarray:
        """Return one of `files` as a memory map with N rows."""
        kind, shape = self.files[name]
        return np.memmap(self.folder / name, kind, "r", shape=(self.count, *shape))

    def pack(self, name: str, key: str, target: Path, labels: np.ndarray, settings: str) -> None:
        """Write one of `files` as array `key` of an npz, with `labels` and the settings. Called on rank 0."""
        with replacing(target) as file:
            np.savez(file, **{key: self.content(name)}, labels=labels, settings=settings)  # type: ignore[arg-type]  # numpy's stub

    def remove(self) -> None:
        """Delete the folder. Called on rank 0."""
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def grid(images: np.ndarray, labels: np.ndarray) -> Tensor:
    """Return a sheet, uint8 3 x height x width, of up to 8 classes, a row each, from images uint8 N x H x W x 3."""
    chosen = [np.flatnonzero(labels == label)[:GRID_COLUMNS] for label in np.unique(labels)[:GRID_ROWS]]
    return sheet([torch.from_numpy(images[rows]).permute(0, 3, 1, 2) for rows in chosen])


def labels_of(which: str, seed: int, num_images: int, network: LatentTransformer, key: str = "--labels ") -> np.ndarray:
    """Return the label of each image, int64 (N,).

    Args:
        which: `equal`: class counts differ by at most one; the seed decides the order, and which classes get one more.
            `random`: uniform; the label of an index does not depend on `num_images`. `null`. Or classes, repeated in turn.
        key: the option or config key, for messages.

    Raises:
        UserError: classes that `network` does not have, or no null label.
    """
    num_classes = network.num_classes
    if which == "equal":
        numbers, (rounds, rest) = streams.generator(seed, Purpose.SAMPLE_LABELS), divmod(num_images, num_classes)
        labels = np.concatenate([np.tile(np.arange(num_classes), rounds), numbers.permutation(num_classes)[:rest]])
        return numbers.permutation(labels).astype(np.int64)
    if which == "random":
        return streams.generator(seed, Purpose.SAMPLE_LABELS, 1).integers(num_classes, size=num_images)
    if which == "null":
        if network.null_label is None:
            raise UserError(f"{key}null: the model has no null label: it was trained with model.label_dropout=0.")
        return np.full(num_images, network.null_label, np.int64)
    try:
        classes = np.array([int(label) for label in which.split(",")], np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{key}{which}: expected equal, random, null or classes such as 207,360.") from error
    if classes.min() < 0 or classes.max() >= num_classes:
        raise UserError(f"{key}{which}: the model has classes 0 to {num_classes - 1}.")
    return classes[np.arange(num_images) % len(classes)]


@contextmanager
def _disk_errors_as_user_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {output}: {error.strerror or error}. Free some space and run the same command again to resume."
        ) from error


def _parts_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.parts")


def _json_or_none(file: Path) -> dict[str, Any] | None:
    try:
        return read_json(file)
    except UserError:  # missing, or damaged by a crash: start over
        return None


def _stored_settings(file: Path) -> str | None:
    """Return the settings stored in an npz of samples; None if it holds none."""
    try:
        with opened_npz(file) as archive:
            return scalar(archive, "settings", str)
    except UserError:
        return None


def interval_of(text: str) -> tuple[float, float]:
    """Parse T_MIN:T_MAX, the interval of times in which guidance applies. Raises UserError."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError(f"--interval {text}: expected T_MIN:T_MAX, such as 0.1:1.") from error
    if not 0 <= low <= high <= 1:
        raise UserError(f"--interval {text}: expected 0 <= T_MIN <= T_MAX <= 1.")
    return low, high


def _image_dependencies(generator: Generator, guide: Generator | None, options: SampleOptions) -> dict[str, Any]:
    """Return what the images depend on besides the sampler settings."""

    def digest(network: torch.nn.Module) -> str:
        parts = (
            value.detach().flatten()[:64].float().cpu().numpy().tobytes() for value in network.state_dict().values()
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    return {
        "seed": options.seed, "num_images": options.num_images, "labels": options.labels, "precision": options.precision,
        "network": digest(generator.network), "flow": generator.flow.model_dump(),
        "decoder": digest(generator.rae.decoder), "encoder": generator.rae.encoder.identity(),
        "statistics": statistics_digest(generator.rae),
        "guide": None if guide is None else digest(guide.network), "latents": options.latents is not None,
    }  # fmt: skip
