"""Score models on any number of data sets, one pass over each. Used by `src/eval_rfid.py`."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from src.core.distributed import Process
from src.core.errors import UserError
from src.core.files import check_writable
from src.core.images import Quantization, save_png
from src.core.terminal import counted, progress
from src.core.weights import resolve
from src.evaluation import report_card
from src.evaluation.generation import Reference, common_size, decoded_set, score_sets
from src.evaluation.image_pairs import COLUMNS, KeptPairs, contact_sheet, save_pairs
from src.evaluation.images import Images, centre_crops, choose, decoder_of, open_images
from src.evaluation.networks import lpips_of, networks_of
from src.evaluation.options import EvaluationOptions
from src.evaluation.per_image_files import CsvTable, ImageStack, image_stack
from src.evaluation.reference_file import command_for
from src.evaluation.scoring_pass import score_images
from src.evaluation.variants import Reconstructions, share_encoders, variants_of
from src.formats.opening import open_model
from src.metrics.fid import Moments
from src.metrics.generation import load_reference
from src.metrics.reconstruction import ReconstructionScore

log = logging.getLogger(__name__)


def evaluate(options: EvaluationOptions, process: Process) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Score every variant on every data set and write all requested files but the JSON. Called on all ranks.

    Returns the results (on other ranks than 0: none) and everything else they depend on, as plain values.
    """
    for name in ("csv", "json", "save_npz"):
        if process.main and getattr(options, name):
            check_writable(resolve(getattr(options, name)), f"--{name}")
    if options.report_card and process.main:
        check_writable(resolve(options.report_card) / report_card.TABLE, "--report_card")
    folders, cards = (output_folders(root, options.data_dir) for root in (options.output_dir, options.report_card))
    files = references(options.reference, options.data_dir)
    evaluation = Evaluation(options, process)
    # report errors before the first long pass
    sets = [evaluation.open(data_dir) for data_dir in options.data_dir]
    moments = [evaluation.references(images, file) for images, file in zip(sets, files, strict=True)]
    if options.latents:
        evaluation.score_generated()
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        packed = None
        if options.save_npz:
            target = resolve(options.save_npz)
            packed = stack.enter_context(image_stack(target, evaluation.image_size, process))
        for images, against, folder, card in zip(sets, moments, folders, cards, strict=True):
            results += evaluation.score(images, against, folder, packed, card)
        if packed is not None:
            packed.finish()
    if options.csv and process.main:
        evaluation.table.write(resolve(options.csv))
    return results, evaluation.description()


class Evaluation:
    """Models and evaluation networks on the device of `process`. The first model's config sets the protocol."""

    def __init__(self, options: EvaluationOptions, process: Process) -> None:
        self.options, self.process = options, process
        if not options.models():
            raise UserError(
                "Give one of --checkpoint (written by training) and --decoder (third-party decoders, or exports)."
            )
        self.models = [open_model(model) for model in options.models()]
        share_encoders(self.models)
        config: Mapping[str, Any] = self.models[0].description["config"] or {}
        self.trained_on = config.get("data")
        sizes = {str(model.description["source"]): model.rae.geometry.image_size for model in self.models}
        self.image_size, self.decoder = common_size(sizes), decoder_of(options, config)
        self.quantization: Quantization = choose(
            "quantization", options.quantization, config, "callbacks.rfid.quantization", "round"
        )
        self.networks = networks_of(options, config)
        self.lpips = lpips_of(options, config)
        for part in (*(model.rae for model in self.models), *self.networks, self.lpips):
            if part is not None:
                part.to(process.device)
        found = [variants_of(model, options.layers, options.noise_sigma) for model in self.models]
        self.variants = [variant for part in found for variant in part]
        self.table = CsvTable(self._score({}).quality_names)
        self.generated: dict[str, dict[str, float | int | str]] = {}
        self._warned = False

    def description(self) -> dict[str, Any]:
        """Return what the scores depend on besides the images."""
        device = self.process.device
        models = [{k: v for k, v in model.description.items() if k != "config"} for model in self.models]
        names = [network.name for network in self.networks]
        return {
            **({"model": models[0]} if len(models) == 1 else {"models": models}),
            "untrained_encoder": any(model.rae.encoder.untrained for model in self.models),
            "image_size": self.image_size,
            "features": names[0] if len(names) == 1 else names,
            "quantization": self.quantization,
            "exif": self.decoder.exif,
            "max_megapixels": self.decoder.max_megapixels,
            "precision": self.options.precision,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": self.process.world,
        }

    def open(self, data_dir: str) -> Images:
        images = open_images(data_dir, self.options.split, self.trained_on)
        wanted = min(len(images.rows), self.options.num_samples)
        if wanted < 2:
            raise UserError(
                f"FID needs at least 2 images, got {wanted} of {images.folder} ({images.split}). Raise --num_samples, "
                "or choose another --split."
            )
        return images

    def references(self, images: Images, file: str | None) -> dict[str, Moments]:
        """Load a reference that fits `images`, for each network; without a file: none. Called on all ranks."""
        found: dict[str, Moments] = {}
        for network in self.networks if file is not None else ():
            wanted = images.preparation(self.image_size, self.decoder.exif, self.options.num_samples)
            command = command_for(self.options, images, wanted, network.space)
            remedy = f"To make one for these images: `{command}`; pass its output as --reference."
            path, batch = resolve(str(file)), self.options.batch_size
            found[network.space] = load_reference(
                path, network, batch, wanted, remedy, self.process, pool_only=True
            ).pool
        return found

    def score(
        self,
        images: Images,
        references: Mapping[str, Moments],
        output: Path | None,
        packed: ImageStack | None,
        card: Path | None,
    ) -> list[dict[str, Any]]:
        """Return the scores of each variant; none on other ranks than 0. Called on all ranks.

        Args:
            references: moments to score against instead of the originals, by feature network.
            output: folder for image pairs and sheets; None: don't save any.
            packed: receives the reconstructions.
            card: folder for the sheet of all variants; None: don't save it.
        """
        started, process, options = time.perf_counter(), self.process, self.options
        pairs, worst = KeptPairs(options.save_samples_count if output else 0), KeptPairs(options.worst, worst=True)
        side_by_side = KeptPairs(COLUMNS if card else 0, variants=len(self.variants))
        observers = [pairs.observe, worst.observe, side_by_side.observe, *([self.table.observe] if options.csv else [])]
        observers += [packed.observe] if packed is not None else []
        scores = [self._score(references)]
        scores += [self._score(scores[0].references) for _ in self.variants[1:]]  # share the originals' features
        loader = centre_crops(images, self.image_size, self.decoder, options, process)
        with progress(Path(images.folder).name, process.main) as update:
            reconstruct = Reconstructions(self.variants, options.precision)
            score_images(counted(loader, len(loader), update), reconstruct, scores, process, observers)
        for score in scores:
            score.reduce()
        if scores[0].count < 2:  # raise on all ranks, so that none waits for the others
            raise UserError(f"FID needs at least 2 images; {scores[0].count} of {images.folder} could be decoded.")
        kept, found, compared = pairs.gather(), worst.gather(), side_by_side.gather()
        labels = [(variant.model, variant.label, f"{variant.sigma:g}") for variant in self.variants]
        self.table.gather(str(images.folder), images.split, images.source, labels)
        if not process.main:
            return []
        if output is not None:
            save_pairs(kept, output)
            if found:
                save_png(contact_sheet(found), output / "worst.png")
        if card is not None:
            report_card.save_sheet(compared, labels, card / "sheet.png")
        firsts = {variant.model: variant for variant in reversed(self.variants)}
        results = [
            {
                **images.description(),
                "model": variant.model,
                "layers": variant.label or None,
                "noise_sigma": variant.sigma,
                **score.compute(warn_of_few=not self._warned and i == 0),
                **(self.generated.get(variant.model, {}) if variant is firsts[variant.model] else {}),
            }
            for i, (variant, score) in enumerate(zip(self.variants, scores, strict=True))
        ]
        self._warned = True
        more: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3)}
        if found:
            more["worst"] = [{"index": pair.row, "file": images.source.name(pair.row)} for pair in found]
        return [{**result, **more} for result in results]

    def score_generated(self) -> None:
        """Score the generated latents as decoded by each model, for the model's first result. Called on all ranks."""
        options: Any = replace(self.options, num_samples=None)  # type: ignore[arg-type]  # use all latents
        path = resolve(str(options.latents))
        reference = Reference(str(options.generation_reference), exif=self.decoder.exif, key="--generation_reference")
        sets = [decoded_set(path, model, options, self.quantization, self.process) for model in self.models]
        scores = score_sets(sets, reference, self.networks, options, self.process)
        against = f"{reference.place} ({reference.images.split})" if reference.images else reference.place
        for images, values in zip(sets, scores, strict=True):
            named = {{"images": "generated"}.get(name, name): value for name, value in values.items()}
            self.generated[images.label] = named | {"generated_against": against}

    def _score(self, references: Mapping[str, Moments]) -> ReconstructionScore:
        return ReconstructionScore(self.networks, self.options.batch_size, self.lpips, self.quantization, references)


def output_folders(output: str | None, data_dirs: Sequence[str]) -> list[Path | None]:
    """Return an output folder for each data set: the given one if there is a single data set, else subfolders of it."""
    if output is None:
        return [None] * len(data_dirs)
    root = resolve(output)
    if len(data_dirs) == 1:
        return [root]
    names = [Path(data_dir).resolve().name for data_dir in data_dirs]
    return [root / (name if names.count(name) == 1 else f"{i}_{name}") for i, name in enumerate(names)]


def references(given: Sequence[str], data_dirs: Sequence[str]) -> Sequence[str | None]:
    """Return a reference for each data set; a single one is used for all."""
    if not given:
        return [None] * len(data_dirs)
    if len(given) not in (1, len(data_dirs)):
        raise UserError(
            f"--reference names {len(given)} files for {len(data_dirs)} data sets: expected one for all, or one for "
            "each."
        )
    return list(given) * (len(data_dirs) if len(given) == 1 else 1)
