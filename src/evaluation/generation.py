"""Score generated images, or generated latents decoded by one or more models. Used by `src/eval_generation.py`.

Legend: B batch, S side of the images, px.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from src.core.distributed import Process
from src.core.errors import UserError, worded
from src.core.images import Quantization, unit_to_bytes
from src.core.options import LoadingOptions
from src.core.precision import full_float32
from src.core.terminal import progress
from src.core.weights import resolve
from src.data.dataset import EvaluationTransform
from src.data.decode import Decoder, Exif
from src.data.latents import LatentStore
from src.evaluation.images import MAX_MEGAPIXELS, Images, centre_crops, evaluation_loader, open_images
from src.evaluation.networks import networks_of
from src.evaluation.options import GenerationOptions
from src.evaluation.reconstruction import check_store
from src.evaluation.reconstruction_inputs import Inputs, open_inputs
from src.formats.checkpoint import LoadedModel
from src.formats.opening import open_model
from src.metrics.features import FeatureNetwork
from src.metrics.generation import (
    GenerationReference,
    ImageStatistics,
    compute_scores,
    load_reference,
)
from src.metrics.npz import ImageNpz, LatentNpz
from src.metrics.reference import Preparation

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor]]
"""(positions in the set (B,), images uint8 B x 3 x S x S)"""


@dataclass(frozen=True)
class GeneratedSet:
    """A set of images to score: `label` names it, `batches()` iterates over this rank's share."""

    label: str
    count: int
    image_size: int
    batches: Callable[[], Batches]


@dataclass(frozen=True)
class Reference:
    """The reference that generated images are scored against: an npz or a data set."""

    place: str
    split: str | None = None
    exif: Exif = "apply"
    key: str = "--reference"
    """The option or config key that sets it, for messages."""

    @cached_property
    def images(self) -> Images | None:
        """The images of a data set; None for an npz. Raises UserError if they are missing or fewer than two."""
        if resolve(self.place).suffix == ".npz":
            return None
        with worded({"data.data_dir": self.key, "--split": f"{self.key}_split"}):
            images = open_images(self.place, self.split, None)
        if len(images.rows) < 2:
            raise UserError(
                f"The reference {images.folder} ({images.split}) has {len(images.rows)} image: 2 or more are needed."
            )
        log.info("Reference: %s images of %s (%s).", f"{len(images.rows):,}", images.folder, images.split)
        return images


def evaluate(options: GenerationOptions, process: Process) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the scores of each set of images (on other ranks than 0: none), and what they depend on. Called on all ranks.

    Raises:
        UserError: missing or broken files, fewer than two images, images whose size differs from the reference's, latents
            that a model can't decode.
    """
    sets = _open_sets(options, process)
    networks = [network.to(process.device) for network in networks_of(options, {})]
    reference = Reference(options.reference, options.reference_split, options.exif)
    scores = score_sets(sets, reference, networks, options, process)
    names = [network.name for network in networks]
    features = names[0] if len(names) == 1 else names
    facts = {"reference": options.reference, "features": features, "batch_size": options.batch_size}
    if reference.images is not None:
        facts["reference_images"] = reference.images.description() | {"exif": reference.exif}
    if options.latents:
        facts["quantization"] = options.quantization
    if not process.main:
        return [], facts
    pairs = zip(sets, scores, strict=True)
    return [{"images_of": s.label, "image_size": s.image_size, **values} for s, values in pairs], facts


def score_sets(
    sets: Sequence[GeneratedSet],
    reference: Reference,
    networks: Sequence[FeatureNetwork],
    options: LoadingOptions,
    process: Process,
) -> list[dict[str, float | int]]:
    """Return the scores of each set; empty ones on other ranks than 0. Called on all ranks. Raises UserError as `evaluate`."""
    for images in sets:
        if images.count < 2:
            raise UserError(
                f"{images.label} has {images.count} image: a Frechet distance needs at least 2. Generate more."
            )
    size = common_size({images.label: images.image_size for images in sets})
    references = load_references(reference, size, networks, options, process)
    results = []
    for images in sets:
        statistics = [ImageStatistics(network, options.batch_size, images.count) for network in networks]
        _collect(statistics, images.batches(), images.count, images.label, process)
        results.append(all_scores(statistics, references, process.device) if process.main else {})
    return results


def common_size(sizes: Mapping[str, int]) -> int:
    """Return the image size, in px, that all models or sets (by name) share. Raises UserError if they differ."""
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size} px" for name, size in sizes.items())
        raise UserError(f"The models make images of different sizes ({found}): score them in separate calls.")
    return next(iter(sizes.values()))


def all_scores(
    statistics: Sequence[ImageStatistics], references: Sequence[GenerationReference], device: torch.device
) -> dict[str, float | int]:
    """Return the scores of all feature networks. Called on rank 0."""
    pairs = zip(statistics, references, strict=True)
    return {name: value for pair in pairs for name, value in compute_scores(*pair, device).items()}


def load_references(
    reference: Reference, size: int, networks: Sequence[FeatureNetwork], options: LoadingOptions, process: Process
) -> list[GenerationReference]:
    """Return the reference for images of `size` px, one per feature network. Called on all ranks; complete on rank 0.

    Raises:
        UserError: missing or broken files, another size, statistics of another network, fewer than two images.
    """
    images = reference.images
    if images is None:
        path = resolve(reference.place)
        remedy = (
            f"To make one: `python src/make_reference.py --kind images --image_size {size} --data_dir DATA --output "
            f"reference_{size}px.npz`, or give the data set itself as reference."
        )
        wanted, batch = Preparation(image_size=size), options.batch_size
        return [load_reference(path, network, batch, wanted, remedy, process) for network in networks]
    decoder = Decoder(reference.exif, MAX_MEGAPIXELS)
    loader = centre_crops(images, size, decoder, replace(options, num_samples=None), process)
    batches = ((batch["position"], batch["image"]) for batch in loader)
    statistics = [ImageStatistics(network, options.batch_size) for network in networks]
    _collect(statistics, batches, len(images.rows), Path(images.folder).name, process)
    return [GenerationReference.of(part) for part in statistics]


def _collect(statistics: Sequence[ImageStatistics], batches: Batches, count: int, label: str, process: Process) -> None:
    done = 0
    with progress(label, process.main) as update:
        for positions, images in batches:
            for part in statistics:
                part.update(images, positions)
            done += len(images)
            update(done, -(-count // process.world))
    for part in statistics:
        part.reduce()


def _open_sets(options: GenerationOptions, process: Process) -> list[GeneratedSet]:
    if options.latents:
        path, models = resolve(options.latents), [open_model(model) for model in options.models()]
        return [decoded_set(path, model, options, options.quantization, process) for model in models]
    path = resolve(options.samples or "")
    if path.suffix == ".npz":
        return [_npz_set(options, path, process)]
    if not path.is_dir():
        raise UserError(
            f"--samples {path}: not a folder and not an .npz. Expected an npz with images in `arr_0`, or a folder."
        )
    return [_folder_set(options, path, process)]


def _npz_set(options: GenerationOptions, path: Path, process: Process) -> GeneratedSet:
    archive = ImageNpz(path)
    count, height, width, _ = archive.shape
    if height != width:
        raise UserError(f"{path} has images of {height} x {width} px: expected squares.")
    taken = min(count, options.num_samples or count)
    return GeneratedSet(
        str(path),
        taken,
        height,
        lambda: _drop_after(taken, archive.batches(options.batch_size, process.rank, process.world)),
    )


def _folder_set(options: GenerationOptions, path: Path, process: Process) -> GeneratedSet:
    inputs = open_inputs([str(path)], None, options.num_samples)
    size = _image_side(inputs)
    rows = inputs.rows[process.rank :: process.world]
    transform = EvaluationTransform(size, Decoder("ignore", MAX_MEGAPIXELS))

    def batches() -> Batches:
        for batch in evaluation_loader(inputs.source, rows, transform, options, process):
            yield batch["position"] * process.world + process.rank, batch["image"]

    return GeneratedSet(str(path), len(inputs.rows), size, batches)


def _image_side(inputs: Inputs) -> int:
    """Return the side, in px, that all images share; the loader deals with broken files."""
    sizes: dict[tuple[int, int], str] = {}
    for row in inputs.rows.tolist():
        name = inputs.source.name(row)
        try:
            with Image.open(name) as image:
                sizes.setdefault(image.size, name)
        except Exception:  # Pillow raises all kinds of errors on damaged files
            continue
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        found = ", ".join(f"{w} x {h} px ({name})" for (w, h), name in list(sizes.items())[:3]) or "nothing readable"
        raise UserError(f"{inputs.place}: expected square images of one size, found {found}.")
    return next(iter(sizes))[0]


def decoded_set(
    path: Path, loaded: LoadedModel, options: LoadingOptions, quantization: Quantization, process: Process
) -> GeneratedSet:
    """Return the images that a model decodes from generated latents. Raises UserError if it can't decode them."""
    rae = loaded.rae
    latents: LatentNpz | LatentStore = LatentNpz(path) if path.suffix == ".npz" else LatentStore(path)
    check_store(latents, loaded)
    decode = rae.decode_raw if latents.scale == "raw" else rae.decode
    taken = min(len(latents), options.num_samples or len(latents))

    def batches() -> Batches:
        home = rae.image_mean.device  # several models take turns on the device
        rae.to(process.device)
        with torch.no_grad(), full_float32(process.device):
            parts = latents.batches(options.batch_size, process.rank, process.world)
            for places, z in _drop_after(taken, ((places, z) for places, *_, z in parts)):
                yield places, unit_to_bytes(decode(z.to(process.device)), quantization)
        rae.to(home)

    return GeneratedSet(str(loaded.description["source"]), taken, rae.geometry.image_size, batches)


def _drop_after(count: int, batches: Batches) -> Batches:
    """Drop images at positions of `count` and above."""
    for positions, rows in batches:
        if (kept := positions < count).any():
            yield positions[kept], rows[kept]
