"""One pass of images (or stored latents) through a model into pictures, scores and latents.

Legend: B batch, C latent channels, h = w latent grid, H = W image px.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.images import bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.precision import full_float32
from src.core.processes import Place, gather_on_main
from src.core.sheets import save_png, sheet
from src.data.dataset import EvaluationDataset
from src.data.latents import LatentStore, LatentWriter, Scale, write_index
from src.data.loader import EvaluationLoader, WorkerOptions
from src.evaluation.image_pairs import FirstPairs, contact_sheet
from src.evaluation.per_image_files import CsvSpool, NpzSpool
from src.evaluation.reconstruction_inputs import FitTransform, Inputs
from src.evaluation.reconstruction_writers import PngWriter
from src.evaluation.scoring_pass import ScoredBatch
from src.formats.checkpoint import LoadedModel
from src.losses.lpips import LPIPS
from src.metrics.means import RunningMeans
from src.metrics.quality import psnr, ssim
from src.models.frozen_encoder import identity_differences
from src.models.rae import RAE

log = logging.getLogger(__name__)

RECONSTRUCTIONS, SHEET, SCORES, NPZ, ORIGINALS_NPZ, LATENTS = (
    "reconstructions", "sheet.png", "scores.csv", "reconstructions.npz", "originals.npz", "latents",
)  # fmt: skip
_BAD_SHARE = 1.0  # bad images are left out and counted, however many there are
_COLUMNS = 8


@dataclass(frozen=True)
class Products:
    """What is written below the output folder."""

    images: bool = False
    sheet_images: int = 0
    """Images on the contact sheet; 0: no sheet."""
    scores: bool = False
    npz: bool = False
    latents: Scale | None = None
    latents_dtype: torch.dtype = torch.float32

    @property
    def decode(self) -> bool:
        return self.images or self.sheet_images > 0 or self.scores or self.npz


@dataclass
class Outcome:
    """What the first process can say of a pass; empty on the others."""

    images: int = 0
    means: dict[str, float] = field(default_factory=dict)
    written: list[Path] = field(default_factory=list)


Track = Callable[[Iterable[Any], int], Iterable[Any]]
"""Batches and their number -> the batches, with progress shown or not."""


def reconstruct(
    loaded: LoadedModel, inputs: Inputs, transform: FitTransform, lpips: LPIPS | None, products: Products, output: Path,
    batch_size: int, num_workers: int, place: Place, track: Track,
) -> Outcome:  # fmt: skip
    """Images through encoder and decoder. On all processes; each takes every world-th image.

    Raises:
        UserError: no image that can be decoded, or latents asked for in a scale that the model does not have.
    """
    rae = loaded.rae
    if products.latents == "normalized" and not rae.has_statistics:
        raise UserError(
            "--latents normalized: the model has no latent statistics. Use --latents raw, or give statistics "
            "(--stats, or an export that has them)."
        )
    rows = inputs.rows[place.rank :: place.world]
    workers = WorkerOptions(min(num_workers, len(rows)), place.device.type == "cuda")
    loader = EvaluationLoader(
        EvaluationDataset(inputs.source, rows, transform), batch_size, workers, _BAD_SHARE, persistent=False
    )
    size = rae.geometry.image_size
    observers = _Observers(products, output, size, inputs.output_name, place, compared=True, lpips=lpips_name(lpips))
    if observers.csv is not None:
        observers.csv.begin(inputs.place, "", [("", "0")], inputs.source.name)
    writer = (
        LatentWriter(output / LATENTS, rae.latent_shape, products.latents_dtype, place.rank)
        if products.latents
        else None
    )
    means = RunningMeans(["psnr", "ssim"] + ["lpips"] * (lpips is not None))
    count = 0
    with observers, torch.no_grad(), full_float32(place.device):
        for batch in track(loader, len(loader)):
            images = batch["image"].to(place.device, non_blocking=True)
            latents = rae.encode_raw(images)
            count += len(images)
            if writer is not None:
                labels = torch.tensor([_label(inputs, row) for row in batch["index"].tolist()])
                writer.write(
                    rae.normalize(latents) if products.latents == "normalized" else latents, batch["index"], labels
                )
            if products.decode:
                scored = _score(
                    images, rae.decode_raw(latents), batch["position"] * place.world + place.rank, batch["index"], lpips
                )
                means.update(scored.values)
                observers.observe(scored)
    total = sum(gather_on_main(count))
    shards = gather_on_main(writer.close()) if writer is not None else []
    means.reduce()
    if place.main and not total:
        raise UserError(f"None of the {len(inputs.rows)} files of {inputs.place} is an image that can be decoded.")
    if not place.main:
        return Outcome()
    if writer is not None:
        facts = {
            **_latent_facts(loaded, products),
            "data": inputs.place,
            "fit": transform.fit,
            "class_names": _class_names(inputs),
        }
        write_index(output / LATENTS, [shard for part in shards for shard in part], facts)
    values = means.means() if products.decode else {}
    if lpips is not None and lpips.untrained and values:
        values["lpips_untrained"] = values.pop("lpips")
    return Outcome(total, values, _written(products, output, observers))


def decode_latents(
    loaded: LoadedModel,
    store: LatentStore,
    products: Products,
    output: Path,
    batch_size: int,
    place: Place,
    track: Track,
) -> Outcome:
    """Stored latents through the decoder; there are no originals, so no scores.

    Raises:
        UserError: latents of another encoder or size, or normalised with other statistics.
    """
    rae = loaded.rae
    _check_store(store, loaded)
    observers = _Observers(products, output, rae.geometry.image_size, lambda row: f"{row:07d}", place, compared=False)
    count = 0
    batches = sum(-(-shard["count"] // batch_size) for shard in store.index["shards"])
    with observers, torch.no_grad(), full_float32(place.device):
        for places, rows, latents in track(
            store.batches(batch_size, place.rank, place.world), -(-batches // place.world)
        ):
            latents = latents.to(place.device)
            decoded = unit_to_bytes(rae.decode(latents) if store.scale == "normalized" else rae.decode_raw(latents))
            count += len(rows)
            observers.observe(ScoredBatch(places, rows, decoded, decoded, {}))
    total = sum(gather_on_main(count))
    return Outcome(total, {}, _written(products, output, observers)) if place.main else Outcome()


class _Observers:
    """Everything that sees decoded images; completes its files at the end of the block, or drops them after an error."""

    def __init__(
        self,
        products: Products,
        output: Path,
        size: int,
        name: Callable[[int], str],
        place: Place,
        compared: bool,
        lpips: str | None = None,
    ) -> None:
        """`compared`: there are originals beside the decoded images. `lpips`: name of its column."""
        self.compared = compared
        self.pairs = FirstPairs(products.sheet_images) if products.sheet_images else None
        self.png = PngWriter(output / RECONSTRUCTIONS, name) if products.images else None
        self.csv = CsvSpool(output / SCORES, lpips, place.rank, place.world) if products.scores else None
        self.npz = NpzSpool(output / NPZ, size, place.rank, place.world) if products.npz else None
        self.originals = (
            NpzSpool(output / ORIGINALS_NPZ, size, place.rank, place.world) if products.npz and compared else None
        )
        self.sheet: list[Any] = []

    def observe(self, batch: ScoredBatch) -> None:
        for observer in (self.pairs, self.png, self.csv, self.npz):
            if observer is not None:
                observer.observe([batch])
        if self.originals is not None:
            self.originals.write(batch.places, batch.original)

    def __enter__(self) -> "_Observers":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for part in (self.png, self.csv, self.npz, self.originals):
            if part is not None:
                part.finish() if kind is None else part.abandon()
        if kind is None and self.pairs is not None:
            self.sheet = self.pairs.gather()


def lpips_name(lpips: LPIPS | None) -> str | None:
    return None if lpips is None else "lpips_untrained" if lpips.untrained else "lpips"


def _score(images: Tensor, output: Tensor, places: Tensor, rows: Tensor, lpips: LPIPS | None) -> ScoredBatch:
    decoded = unit_to_bytes(output)
    values = {"psnr": psnr(images, decoded), "ssim": ssim(images, decoded)}
    if lpips is not None:
        x, y = (unit_to_signed(bytes_to_unit(pixels)) for pixels in (images, decoded))
        values["lpips"] = lpips(x, y).flatten()
    return ScoredBatch(places, rows, images, decoded, values)


def _written(products: Products, output: Path, observers: _Observers) -> list[Path]:
    if observers.sheet:
        save_png(
            contact_sheet(observers.sheet) if observers.compared else _plain_sheet(observers.sheet), output / SHEET
        )
    names = [(products.images, RECONSTRUCTIONS), (products.sheet_images, SHEET), (products.scores, SCORES), (products.npz, NPZ),
             (observers.originals is not None, ORIGINALS_NPZ), (products.latents, LATENTS)]  # fmt: skip
    return [output / name for wanted, name in names if wanted]


def _plain_sheet(pairs: Sequence[Any]) -> Tensor:
    rows = [pairs[start : start + _COLUMNS] for start in range(0, len(pairs), _COLUMNS)]
    return sheet([torch.stack([pair.reconstruction for pair in row]) for row in rows])


def _label(inputs: Inputs, row: int) -> int:
    label = inputs.source.label(row)
    return -1 if label is None else label


def _class_names(inputs: Inputs) -> list[str] | None:
    names = inputs.source.class_names
    return None if names is None else list(names)


def _latent_facts(loaded: LoadedModel, products: Products) -> dict[str, Any]:
    rae = loaded.rae
    return {
        "scale": products.latents,
        "shape": list(rae.latent_shape),
        "dtype": str(products.latents_dtype).removeprefix("torch."),
        "image_size": rae.geometry.image_size,
        "encoder": dict(loaded.description["encoder"]),
        "statistics": statistics_digest(rae) if products.latents == "normalized" else None,
        "model": Path(loaded.description["source"]).name,
    }


def statistics_digest(rae: RAE) -> str | None:
    """16 hex digits of the mean and variance that latents are normalised with; None without."""
    if not rae.has_statistics:
        return None
    mean = torch.zeros(rae.latent_shape) if rae.latent_mean is None else rae.latent_mean
    var = torch.ones(rae.latent_shape) if rae.latent_var is None else rae.latent_var
    data = torch.stack([mean, var]).float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _check_store(store: LatentStore, loaded: LoadedModel) -> None:
    rae, own = loaded.rae, loaded.description["encoder"]
    if store.shape != rae.latent_shape:
        raise UserError(
            f"{store.folder} holds latents of {store.shape}, the model of {loaded.description['source']} takes "
            f"{rae.latent_shape} (C x h x w)."
        )
    theirs: Mapping[str, Any] = store.index["encoder"]
    differing = identity_differences(theirs, own)
    if differing:
        raise UserError(
            f"{store.folder} was made with another encoder ({', '.join(differing)} differ): {theirs} there, {own} here."
        )
    if store.scale == "normalized" and store.index["statistics"] != statistics_digest(rae):
        raise UserError(
            f"{store.folder} was normalised with statistics {store.index['statistics']}, the model has "
            f"{statistics_digest(rae)}. Use the model that wrote the latents."
        )
