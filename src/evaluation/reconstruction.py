"""Reconstruct images (or decode stored latents) into image files, scores and latents. Used by `src/reconstruct.py`.

Legend: B batch, C latent channels, h = w latent grid, H = W image px.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.core.distributed import Process, gather_on_main
from src.core.errors import UserError
from src.core.images import save_png, unit_to_bytes
from src.core.precision import full_float32
from src.core.terminal import counted, progress
from src.core.weights import DTYPES
from src.data.dataset import EvaluationTransform
from src.data.decode import Decoder
from src.data.latents import LatentStore, LatentWriter, write_index
from src.evaluation.image_pairs import KeptPairs, contact_sheet, png_writer
from src.evaluation.images import MAX_MEGAPIXELS, evaluation_loader
from src.evaluation.networks import lpips_of
from src.evaluation.options import ReconstructionOptions
from src.evaluation.per_image_files import CsvTable, image_stack
from src.evaluation.reconstruction_inputs import Inputs
from src.evaluation.scoring_pass import Observer, ScoredBatch, score_images
from src.formats.checkpoint import LoadedModel, check_latents, statistics_digest
from src.metrics.npz import LatentNpz
from src.metrics.reconstruction import ReconstructionScore

log = logging.getLogger(__name__)

RECONSTRUCTIONS, SHEET, SCORES, NPZ, ORIGINALS_NPZ, LATENTS = (
    "reconstructions", "sheet.png", "scores.csv", "reconstructions.npz", "originals.npz", "latents",
)  # fmt: skip


Outcome = tuple[int, dict[str, float], list[Path]]
"""(number of images, mean scores, files written); the numbers are complete only on rank 0."""


def reconstruct(options: ReconstructionOptions, loaded: LoadedModel, inputs: Inputs, process: Process) -> Outcome:
    """Encode and decode images. Called on all ranks; each processes its share.

    Raises:
        UserError: none of the images can be read, or normalised latents requested of a model without statistics.
    """
    rae, size = loaded.rae, loaded.rae.geometry.image_size
    if options.latents == "normalized" and not rae.has_statistics:
        raise UserError(
            "--latents normalized: the model has no latent statistics. Use --latents raw, or give statistics "
            "(--stats, or an export that has them)."
        )
    transform = EvaluationTransform(size, Decoder(options.exif, MAX_MEGAPIXELS), options.fit)
    rows = inputs.rows[process.rank :: process.world]
    loader = evaluation_loader(inputs.source, rows, transform, options, process)
    scores = []
    if options.products:
        lpips = lpips_of(options, loaded.description.get("config") or {})
        scores = [ReconstructionScore(lpips=lpips if lpips is None else lpips.to(process.device))]
    writer = None
    if options.latents:
        dtype = DTYPES[options.latents_dtype]
        writer = LatentWriter(options.output / LATENTS, rae.latent_shape, dtype, process.rank)

    def encode_decode(images: Tensor, rows: Tensor) -> Iterator[Tensor]:
        latents = rae.encode_raw(images)  # B C h w
        if writer is not None:
            labels = [inputs.source.label(row) for row in rows.tolist()]
            stored = rae.normalize(latents) if options.latents == "normalized" else latents
            writer.write(stored, rows, torch.tensor([-1 if label is None else label for label in labels]))
        if scores:
            yield rae.decode_raw(latents)

    with ExitStack() as stack:
        stack.enter_context(full_float32(process.device))
        update = stack.enter_context(progress("batches", process.main))
        names = scores[0].quality_names if scores else ()
        files = _OutputFiles(stack, options, size, inputs.output_name, process, names)
        score_images(counted(loader, len(loader), update), encode_decode, scores, process, [files.observe])
        shards = [shard for part in gather_on_main(writer.close() if writer is not None else []) for shard in part]
        total = scores[0].reduce().count if scores else sum(shard["count"] for shard in shards)
        if process.main and not total:
            raise UserError(f"None of the {len(inputs.rows)} files of {inputs.place} is an image that can be decoded.")
        written = files.finish(inputs)
    if writer is not None:
        written.append(options.output / LATENTS)
        if process.main:
            write_index(options.output / LATENTS, shards, _latent_facts(options, loaded, inputs))
    means = scores[0].compute() if scores else {}
    means.pop("images", None)
    return total, means, written


def decode_latents(
    options: ReconstructionOptions, loaded: LoadedModel, store: LatentStore, process: Process
) -> Outcome:
    """Decode stored latents. There are no originals, so no scores; otherwise as `reconstruct`.

    Raises:
        UserError: latents of another encoder or size, or normalised with other statistics.
    """
    rae = loaded.rae
    check_store(store, loaded)
    count = 0
    batches = -(-sum(-(-shard["count"] // options.batch_size) for shard in store.about["shards"]) // process.world)
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(full_float32(process.device))
        update = stack.enter_context(progress("batches", process.main))
        files = _OutputFiles(stack, options, rae.geometry.image_size, lambda row: f"{row:07d}", process)
        parts = store.batches(options.batch_size, process.rank, process.world)
        for places, rows, latents in counted(parts, batches, update):
            latents = latents.to(process.device)
            decoded = unit_to_bytes(rae.decode(latents) if store.scale == "normalized" else rae.decode_raw(latents))
            files.observe([ScoredBatch(places, rows, decoded, decoded, {})])
            count += len(rows)
        total = sum(gather_on_main(count))
        return total, {}, files.finish(None)


class _OutputFiles:
    """Writes everything about decoded images to the output folder, except the latents."""

    def __init__(
        self,
        stack: ExitStack,
        options: ReconstructionOptions,
        size: int,
        name: Callable[[int], str],
        process: Process,
        quality_names: Sequence[str] = (),
    ) -> None:
        """`stack` closes after the pass. Empty `quality_names`: there are no originals to compare with."""
        self.output, self.wanted, self.name, self.process = options.output, options.products, name, process
        self.compared = bool(quality_names)
        self.pairs = KeptPairs(options.sheet_images if "sheet" in self.wanted else 0)
        self.table = CsvTable(quality_names)
        self.write_images = stack.enter_context(png_writer())
        kinds = {NPZ: False, ORIGINALS_NPZ: True} if self.compared else {NPZ: False}
        packed = [image_stack(self.output / file, size, process, kind) for file, kind in kinds.items()]
        self.packed = [stack.enter_context(part) for part in packed] if "npz" in self.wanted else []
        seen = [self.pairs, *self.packed, *([self.table] if "scores" in self.wanted else [])]
        self.observers: list[Observer] = [part.observe for part in seen]

    def observe(self, variants: Sequence[ScoredBatch]) -> None:
        if not variants:  # only latents are written
            return
        (batch,) = variants
        if "images" in self.wanted:
            files = [self.output / RECONSTRUCTIONS / f"{self.name(row)}.png" for row in batch.rows.tolist()]
            self.write_images(list(batch.decoded.cpu()), files)
        for observer in self.observers:
            observer(variants)

    def finish(self, inputs: Inputs | None) -> list[Path]:
        """Write the remaining files, and return the paths of all. Called on all ranks."""
        pairs = self.pairs.gather()
        if inputs is not None:
            self.table.gather(inputs.place, "", inputs.source, [("", "", "0")])
        for part in self.packed:
            part.finish()
        if self.process.main and pairs:
            save_png(contact_sheet(pairs, self.compared), self.output / SHEET)
        if self.process.main and "scores" in self.wanted:
            self.table.write(self.output / SCORES)
        files = {"images": RECONSTRUCTIONS, "sheet": SHEET, "scores": SCORES}
        written = [self.output / file for what, file in files.items() if what in self.wanted]
        return written + [part.target for part in self.packed]


def _latent_facts(options: ReconstructionOptions, loaded: LoadedModel, inputs: Inputs) -> dict[str, Any]:
    rae, names = loaded.rae, inputs.source.class_names
    return {
        "scale": options.latents,
        "shape": list(rae.latent_shape),
        "dtype": str(DTYPES[options.latents_dtype]).removeprefix("torch."),
        "image_size": rae.geometry.image_size,
        "encoder": dict(loaded.description["encoder"]),
        "statistics": statistics_digest(rae) if options.latents == "normalized" else None,
        "model": Path(loaded.description["source"]).name,
        "data": inputs.place,
        "fit": options.fit,
        "class_names": None if names is None else list(names),
    }


def check_store(store: LatentStore | LatentNpz, loaded: LoadedModel) -> None:
    """Check that a model can decode stored latents: their shape, encoder and statistics. Raises UserError."""
    statistics = store.about.get("statistics") if store.scale == "normalized" else None
    check_latents(store.path, loaded, store.shape[-3:], store.about.get("encoder"), statistics)
