"""What `src/eval_rfid.py` does: a model, any number of data sets, one pass over each.

Legend: B batch, C latent channels, h = w latent grid.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from src.core.errors import UserError
from src.core.processes import Place
from src.core.sheets import save_png
from src.core.weights import resolve
from src.data.loader import EvaluationLoader
from src.evaluation.image_pairs import FirstPairs, Pair, WorstPairs, contact_sheet, save_pairs
from src.evaluation.images import Images, open_images
from src.evaluation.networks import load_inception, load_lpips
from src.evaluation.per_image_files import CsvSpool, NpzSpool
from src.evaluation.protocol import ImageProtocol, choose_quantization, compare_precision, inception_path
from src.evaluation.reference_file import command_for
from src.evaluation.scoring_pass import Observer, score_images, shared_scores
from src.evaluation.variants import Reconstructions, Variant, variants_of
from src.formats.opening import ModelChoice, open_model
from src.metrics.fid import Moments
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import load_reference

log = logging.getLogger(__name__)

TRY_OUT = "For a try-out without the file: --inception_weights untrained (the score is then not called rFID)."
_LPIPS_FILES = {"vgg_path": "weights/vgg16-397923af.pth", "linear_path": "weights/lpips_vgg_v0.1.pth"}


class Evaluation:
    """A model and the networks that judge it, ready on the device of `place`. Options: `src/eval_rfid.py --help`.

    Use as a context: leaving it normally completes the files with an entry per image, an error removes their parts.
    """

    def __init__(self, options: Any, place: Place) -> None:
        self.options, self.place = options, place
        self.model = open_model(ModelChoice.of(options))
        config = self.model.description["config"] or {}
        self.trained_on: Mapping[str, Any] | None = config.get("data")
        self.image_protocol = ImageProtocol.choose(self.model.rae.geometry.image_size, options.exif, config)
        self.quantization = choose_quantization(options.quantization, config)
        compare_precision(options.precision, config)
        path = inception_path(options.inception_path, config)
        self.inception = load_inception(
            path, options.inception_weights, options.inception_width, "--inception_path", TRY_OUT
        )
        self.lpips = load_lpips(_lpips_arguments(options, config.get("model") or {}), "--vgg_path and --lpips_path")
        for part in (self.model.rae, self.inception, self.lpips):
            if part is not None:
                part.to(place.device)
        variants = variants_of(options.layers, options.noise_sigma, self.model.rae.encoder)
        self.reconstruct = Reconstructions(self.model.rae, variants, options.precision)
        spool = (place.rank, place.world)
        self.csv = CsvSpool(resolve(options.csv), self._lpips_name, *spool) if options.csv else None
        self.npz = (
            NpzSpool(resolve(options.save_npz), self.model.rae.geometry.image_size, *spool)
            if options.save_npz
            else None
        )
        self._warned = False

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        for spool in (self.csv, self.npz):
            if spool is not None:
                spool.finish() if kind is None else spool.abandon()

    @property
    def protocol(self) -> dict[str, Any]:
        """Whatever else a score depends on, as plain values."""
        rae, options = self.model.rae, self.options
        return {
            "model": {name: value for name, value in self.model.description.items() if name != "config"},
            "untrained_encoder": rae.encoder.untrained,
            "image_size": rae.geometry.image_size,
            "features": self.inception.name,
            "quantization": self.quantization,
            "exif": self.image_protocol.decoder.exif,
            "max_megapixels": self.image_protocol.decoder.max_megapixels,
            "precision": options.precision,
            "device": torch.cuda.get_device_name(self.place.device) if self.place.device.type == "cuda" else "cpu",
            "processes": self.place.world,
        }

    @property
    def _lpips_name(self) -> str | None:
        """Untrained networks are named as such."""
        return None if self.lpips is None else "lpips_untrained" if self.lpips.untrained else "lpips"

    def open(self, data_dir: str) -> Images:
        return open_images(data_dir, self.options.split, self.trained_on)

    def loader(self, images: Images) -> EvaluationLoader:
        return self.image_protocol.loader(images, self.options, self.place)

    def reference(self, images: Images, file: str | None) -> Moments | None:
        """What an npz holds, once it is known to fit `images`; None: the originals are the reference. On all ranks."""
        if file is None:
            return None
        wanted = self.image_protocol.preparation(images, self.options.num_samples)
        remedy = f"One for these images: `{command_for(self.options, images, wanted)}`; give its output as --reference."
        place, size = self.place, self.options.batch_size
        return load_reference(resolve(file), self.inception, size, wanted, remedy, place.rank, place.world)

    def score(
        self, images: Images, batches: Iterable[Mapping[str, Any]], reference: Moments | None, output: Path | None
    ) -> list[dict[str, Any]]:
        """Scores of each variant on rank 0, an empty list on the others. On all ranks.

        Args:
            batches: `loader(images)`, perhaps with a progress bar around it.
            reference: what to score against instead of the originals.
            output: folder for pairs and sheets; None: no pictures.
        """
        started = time.perf_counter()
        wanted = min(len(images.rows), self.options.num_samples)
        if wanted < 2:
            raise UserError(
                f"FID needs at least 2 images, got {wanted} of {images.folder} ({images.split}). Raise --num_samples, "
                "or choose another --split."
            )
        pairs, worst = FirstPairs(self.options.save_samples_count if output else 0), WorstPairs(self.options.worst)
        observers: list[Observer] = [o for o in (pairs, worst) if o.count]
        observers += [o for o in (self.csv, self.npz) if o is not None]
        if self.csv is not None:
            labels = [(v.label, f"{v.sigma:g}") for v in self.reconstruct.variants]
            self.csv.begin(str(images.folder), images.split, labels, images.source.name)
        first = ReconstructionScore(self.inception, self.options.batch_size, self.lpips, self.quantization, reference)
        scores = shared_scores(first, len(self.reconstruct.variants))
        place = self.place
        score_images(batches, self.reconstruct, scores, place.device, place.rank, place.world, observers)
        for score in scores:
            score.reduce()
        if scores[0].reconstructions.count < 2:  # on all ranks, so that none waits for the others
            raise UserError(
                f"FID needs at least 2 images; {scores[0].reconstructions.count} of {images.folder} could be decoded."
            )
        kept, found = (keeper.gather() if keeper.count else [] for keeper in (pairs, worst))
        if not place.main:
            return []
        self._save_pictures(output, kept, found)
        judged = zip(self.reconstruct.variants, scores, strict=True)
        results = [self._result(images, variant, score) for variant, score in judged]
        seconds = round(time.perf_counter() - started, 3)
        extra = {"worst": [{"index": p.row, "file": images.source.name(p.row)} for p in found]} if found else {}
        return [{**result, "seconds": seconds, **extra} for result in results]

    def _result(self, images: Images, variant: Variant, score: ReconstructionScore) -> dict[str, Any]:
        values: dict[str, Any] = score.compute(warn_of_few=not self._warned)
        self._warned = True
        if self.lpips is not None and self.lpips.untrained:
            values[str(self._lpips_name)] = values.pop("lpips")
        return {**images.description(), "layers": variant.label or None, "noise_sigma": variant.sigma, **values}

    def _save_pictures(self, output: Path | None, pairs: Sequence[Pair], worst: Sequence[Pair]) -> None:
        if output is None:
            return
        save_pairs(pairs, output)
        if worst:
            save_png(contact_sheet(worst), output / "worst.png")


def output_folders(output: str | None, data_dirs: Sequence[str]) -> list[Path | None]:
    """The folder itself for one data set, a folder below it for each of several."""
    if output is None:
        return [None] * len(data_dirs)
    root = resolve(output)
    if len(data_dirs) == 1:
        return [root]
    names = [Path(data_dir).resolve().name for data_dir in data_dirs]
    return [root / (name if names.count(name) == 1 else f"{i}_{name}") for i, name in enumerate(names)]


def references(given: Sequence[str] | None, data_dirs: Sequence[str]) -> list[str | None]:
    """One for each data set; one alone serves all."""
    if not given:
        return [None] * len(data_dirs)
    if len(given) not in (1, len(data_dirs)):
        raise UserError(
            f"--reference names {len(given)} files for {len(data_dirs)} data sets: expected one for all, or one for "
            "each."
        )
    return list(given) * (len(data_dirs) if len(given) == 1 else 1)


def _lpips_arguments(options: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    given = {"vgg_path": options.vgg_path, "linear_path": options.lpips_path}
    if any(given.values()):
        return {name: path or _LPIPS_FILES[name] for name, path in given.items()}
    return dict(model.get("lpips_arch") or _LPIPS_FILES)
