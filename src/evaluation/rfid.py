"""Score a model on any number of data sets, one pass over each, as `src/eval_rfid.py` does."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from src.core.distributed import Process
from src.core.errors import UserError
from src.core.files import check_writable
from src.core.images import Quantization, save_png
from src.core.terminal import counted, progress
from src.core.weights import resolve
from src.evaluation.image_pairs import KeptPairs, contact_sheet, save_pairs
from src.evaluation.images import Images, centre_crops, open_images
from src.evaluation.networks import inception_of, lpips_of
from src.evaluation.options import EvaluationOptions
from src.evaluation.per_image_files import CsvTable, ImageStack, image_stack
from src.evaluation.protocol import choose, compare_precision, decoder_of
from src.evaluation.reference_file import command_for
from src.evaluation.scoring_pass import Observer, score_images
from src.evaluation.variants import Reconstructions, variants_of
from src.formats.opening import open_model
from src.metrics.fid import Moments
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import load_reference

log = logging.getLogger(__name__)

TRY_OUT = "For a try-out without the file: --inception_weights untrained (the score is then not called rFID)."


def evaluate(options: EvaluationOptions, process: Process) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Score every variant on every data set and write what the options ask for, but the JSON file. On all ranks.

    Returns the results (on rank 0, none on the others) and whatever else they depend on, as plain values.
    """
    for name in ("csv", "json", "save_npz"):
        if process.main and getattr(options, name):
            check_writable(resolve(getattr(options, name)), f"--{name}")
    folders = output_folders(options.output_dir, options.data_dir)
    files = references(options.reference, options.data_dir)
    evaluation = Evaluation(options, process)
    # before the first long pass, what is wrong is said
    sets = [evaluation.open(data_dir) for data_dir in options.data_dir]
    moments = [evaluation.reference(images, file) for images, file in zip(sets, files, strict=True)]
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        packed = None
        if options.save_npz:
            target = resolve(options.save_npz)
            packed = stack.enter_context(image_stack(target, evaluation.image_size, process))
        for images, reference, folder in zip(sets, moments, folders, strict=True):
            results += evaluation.score(images, reference, folder, packed)
        if packed is not None:
            packed.finish()
    if options.csv and process.main:
        evaluation.table.write(resolve(options.csv))
    return results, evaluation.description()


class Evaluation:
    """A model and the networks that judge it, on the device of `process`."""

    def __init__(self, options: EvaluationOptions, process: Process) -> None:
        self.options, self.process = options, process
        self.model = open_model(options)
        config: Mapping[str, Any] = self.model.description["config"] or {}
        self.trained_on = config.get("data")
        self.image_size, self.decoder = self.model.rae.geometry.image_size, decoder_of(options, config)
        self.quantization: Quantization = choose(
            "quantization", options.quantization, config, "callbacks.rfid.quantization", "round"
        )
        compare_precision(options.precision, config)
        self.inception = inception_of(options, config, TRY_OUT)
        self.lpips = lpips_of(options, config)
        for part in (self.model.rae, self.inception, self.lpips):
            if part is not None:
                part.to(process.device)
        self.variants = variants_of(options.layers, options.noise_sigma, self.model.rae.encoder)
        self.table = CsvTable(self._score(None).quality_names)
        self._warned = False

    def description(self) -> dict[str, Any]:
        """Return whatever else a score depends on."""
        rae, device = self.model.rae, self.process.device
        return {
            "model": {name: value for name, value in self.model.description.items() if name != "config"},
            "untrained_encoder": rae.encoder.untrained,
            "image_size": self.image_size,
            "features": self.inception.name,
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

    def reference(self, images: Images, file: str | None) -> Moments | None:
        """Read a reference once it is known to fit `images`; None: the originals are the reference. On all ranks."""
        if file is None:
            return None
        wanted = images.preparation(self.image_size, self.decoder.exif, self.options.num_samples)
        remedy = f"One for these images: `{command_for(self.options, images, wanted)}`; give its output as --reference."
        return load_reference(resolve(file), self.inception, self.options.batch_size, wanted, remedy, self.process)

    def score(
        self, images: Images, reference: Moments | None, output: Path | None, packed: ImageStack | None
    ) -> list[dict[str, Any]]:
        """Return the scores of each variant on rank 0, none on the others. On all ranks.

        Args:
            reference: what to score against instead of the originals.
            output: folder for pairs and sheets; None: no pictures.
            packed: takes the reconstructions.
        """
        started, process, options = time.perf_counter(), self.process, self.options
        pairs, worst = KeptPairs(options.save_samples_count if output else 0), KeptPairs(options.worst, worst=True)
        observers: list[Observer] = [pairs, worst, *([self.table] if options.csv else [])]
        observers += [packed] if packed is not None else []
        scores = [self._score(reference)]
        scores += [self._score(scores[0].reference) for _ in self.variants[1:]]  # they share the originals' features
        loader = centre_crops(images, self.image_size, self.decoder, options, process)
        with progress(images.folder.name, process.main) as update:
            reconstruct = Reconstructions(self.model.rae, self.variants, options.precision)
            score_images(counted(loader, len(loader), update), reconstruct, scores, process, observers)
        for score in scores:
            score.reduce()
        if scores[0].count < 2:  # on all ranks, so that none waits for the others
            raise UserError(f"FID needs at least 2 images; {scores[0].count} of {images.folder} could be decoded.")
        kept, found = pairs.gather(), worst.gather()
        labels = [(variant.label, f"{variant.sigma:g}") for variant in self.variants]
        self.table.gather(str(images.folder), images.split, images.source, labels)
        if not process.main:
            return []
        if output is not None:
            save_pairs(kept, output)
            if found:
                save_png(contact_sheet(found), output / "worst.png")
        results = [
            {
                **images.description(),
                "layers": variant.label or None,
                "noise_sigma": variant.sigma,
                **score.compute(warn_of_few=not self._warned and i == 0),
            }
            for i, (variant, score) in enumerate(zip(self.variants, scores, strict=True))
        ]
        self._warned = True
        more: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3)}
        if found:
            more["worst"] = [{"index": pair.row, "file": images.source.name(pair.row)} for pair in found]
        return [{**result, **more} for result in results]

    def _score(self, reference: Moments | None) -> ReconstructionScore:
        return ReconstructionScore(self.inception, self.options.batch_size, self.lpips, self.quantization, reference)


def output_folders(output: str | None, data_dirs: Sequence[str]) -> list[Path | None]:
    """Return the folder itself for one data set, a folder below it for each of several."""
    if output is None:
        return [None] * len(data_dirs)
    root = resolve(output)
    if len(data_dirs) == 1:
        return [root]
    names = [Path(data_dir).resolve().name for data_dir in data_dirs]
    return [root / (name if names.count(name) == 1 else f"{i}_{name}") for i, name in enumerate(names)]


def references(given: Sequence[str], data_dirs: Sequence[str]) -> Sequence[str | None]:
    """Return one for each data set; one alone serves all."""
    if not given:
        return [None] * len(data_dirs)
    if len(given) not in (1, len(data_dirs)):
        raise UserError(
            f"--reference names {len(given)} files for {len(data_dirs)} data sets: expected one for all, or one for "
            "each."
        )
    return list(given) * (len(data_dirs) if len(given) == 1 else 1)
