"""What `src/eval_rfid.py` does: a model, any number of data sets, one pass over each.

Legend: B batch, C latent channels, h = w latent grid.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import UserError
from src.evaluation.images import Images, evaluation_loader, open_images
from src.evaluation.models import ModelChoice, open_model
from src.evaluation.networks import load_inception, load_lpips
from src.evaluation.options import INCEPTION_FILE
from src.evaluation.pairs import FirstPairs, Pair, WorstPairs, contact_sheet, save_pairs
from src.evaluation.passes import Observer, score_images, shared_scores
from src.evaluation.processes import Place
from src.evaluation.spool import CsvSpool, NpzSpool
from src.interop.checkpoint import LoadedModel
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import load_reference
from src.models.layers import parse_layers
from src.sheets import save_png
from src.stream import Purpose, normals
from src.weights import resolve

log = logging.getLogger(__name__)

TRY_OUT = "For a try-out without the file: --inception_weights untrained (the score is then not called rFID)."
_LPIPS_FILES = {"vgg_path": "weights/vgg16-397923af.pth", "linear_path": "weights/lpips_vgg_v0.1.pth"}
_NOISE_SEED = 0


@dataclass(frozen=True)
class Variant:
    """One way to reconstruct an image."""

    label: str
    """Of its blocks, as the user named them; empty: the model's own."""
    layers: tuple[int, ...] | None
    sigma: float
    """Standard deviation of the noise on raw latents, before latent normalisation."""


class Evaluation:
    """A model and the networks that judge it, ready on the device of `place`. Options: `src/eval_rfid.py --help`.

    Use as a context: leaving it normally completes the files with an entry per image, an error removes their parts.
    """

    def __init__(self, options: Any, place: Place) -> None:
        self.options, self.place = options, place
        self.model = open_model(ModelChoice.of(options))
        config = self.model.description["config"] or {}
        self.trained_on: Mapping[str, Any] | None = config.get("data")
        path = options.inception_path or ((config.get("callbacks") or {}).get("rfid") or {}).get("inception_path") or INCEPTION_FILE
        self.inception = load_inception(path, options.inception_weights, options.inception_width, "--inception_path", TRY_OUT)
        self.lpips = load_lpips(_lpips_arguments(options, config.get("model") or {}), "--vgg_path and --lpips_path")
        for part in (self.model.rae, self.inception, self.lpips):
            if part is not None:
                part.to(place.device)
        self.variants = _variants(options, self.model)
        spool = (place.rank, place.world)
        self.csv = CsvSpool(resolve(options.csv), self._lpips_name, *spool) if options.csv else None
        self.npz = NpzSpool(resolve(options.save_npz), self.model.rae.geometry.image_size, *spool) if options.save_npz else None
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
            "quantization": options.quantization,
            "exif": options.exif,
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

    def loader(self, images: Images) -> Any:
        o = self.options
        return evaluation_loader(
            images, self.model.rae.geometry.image_size, o.num_samples, o.batch_size, o.num_workers, o.exif, o.max_bad_share,
            self.place.device, self.place.rank, self.place.world,
        )  # fmt: skip

    def score(self, images: Images, batches: Iterable[Mapping[str, Any]], reference: str | None, output: Path | None) -> list[dict[str, Any]]:
        """Scores of each variant on rank 0, an empty list on the others. On all ranks.

        Args:
            batches: `loader(images)`, perhaps with a progress bar around it.
            reference: npz to score against instead of the originals.
            output: folder for pairs and sheets; None: no pictures.
        """
        started = time.perf_counter()
        wanted = min(len(images.rows), self.options.num_samples)
        if wanted < 2:
            raise UserError(f"FID needs at least 2 images, got {wanted} of {images.folder} ({images.split}). Raise --num_samples, or choose another --split.")
        pairs, worst = FirstPairs(self.options.save_samples_count if output else 0), WorstPairs(self.options.worst)
        observers: list[Observer] = [o for o in (pairs, worst) if o.count]
        observers += [o for o in (self.csv, self.npz) if o is not None]
        if self.csv is not None:
            labels = [(v.label, f"{v.sigma:g}") for v in self.variants]
            self.csv.begin(str(images.folder), images.split, labels, images.source.name)
        scores = shared_scores(self._first_score(reference), len(self.variants))
        place = self.place
        score_images(batches, self._reconstruct, scores, place.device, place.rank, place.world, observers)
        for score in scores:
            score.reduce()
        if scores[0].reconstructions.count < 2:  # on all ranks, so that none waits for the others
            raise UserError(f"FID needs at least 2 images; {scores[0].reconstructions.count} of {images.folder} could be decoded.")
        kept, found = (keeper.gather() if keeper.count else [] for keeper in (pairs, worst))
        if not place.main:
            return []
        self._save_pictures(output, kept, found)
        results = [self._result(images, variant, score) for variant, score in zip(self.variants, scores, strict=True)]
        seconds = round(time.perf_counter() - started, 3)
        extra = {"worst": [{"index": p.row, "file": images.source.name(p.row)} for p in found]} if found else {}
        return [{**result, "seconds": seconds, **extra} for result in results]

    def _first_score(self, reference: str | None) -> ReconstructionScore:
        size = self.options.batch_size
        moments = None
        if reference is not None:
            moments = load_reference(resolve(reference), self.inception, size, self.place.rank, self.place.world)
        return ReconstructionScore(self.inception, size, self.lpips, self.options.quantization, moments)

    def _result(self, images: Images, variant: Variant, score: ReconstructionScore) -> dict[str, Any]:
        values: dict[str, Any] = score.compute(warn_of_few=not self._warned)
        self._warned = True
        if self.lpips is not None and self.lpips.untrained:
            values[str(self._lpips_name)] = values.pop("lpips")
        return {**images.description(), "layers": variant.label or None, "noise_sigma": variant.sigma, **values}

    def _reconstruct(self, images: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """uint8 B 3 H W -> float images B 3 H W, one batch for each variant in their order."""
        rae, latents, chosen = self.model.rae, None, object()
        noise: Tensor | None = None
        for variant in self.variants:
            if variant.layers != chosen:
                chosen = variant.layers
                with self._autocast():
                    latents = rae.encode_raw(images, chosen)  # B C h w
                latents = latents.float()
            assert latents is not None
            noisy = latents
            if variant.sigma:
                if noise is None:  # the same for all variants: what differs is their doing
                    noise = normals(_NOISE_SEED, Purpose.LATENT_NOISE, 0, rows.tolist(), rae.latent_shape, images.device)
                noisy = latents + variant.sigma * noise
            with self._autocast():
                output = rae.decode_raw(noisy)
            yield output.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"32": None, "bf16": torch.bfloat16, "16": torch.float16 if self.place.device.type == "cuda" else torch.bfloat16}
        dtype = dtypes[self.options.precision]
        return nullcontext() if dtype is None else torch.autocast(self.place.device.type, dtype)

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
        raise UserError(f"--reference names {len(given)} files for {len(data_dirs)} data sets: expected one for all, or one for each.")
    return list(given) * (len(data_dirs) if len(given) == 1 else 1)


def _variants(options: Any, model: LoadedModel) -> list[Variant]:
    encoder = model.rae.encoder
    choices: list[tuple[str, tuple[int, ...] | None]] = [("", None)]
    if options.layers:
        choices = [(text, parse_layers(text, encoder.depth, "--layers")) for text in options.layers]
        for text, layers in choices:
            if layers is not None and not set(layers) <= set(encoder.layers):
                log.warning("--layers %s: the decoder was trained on the blocks %s and has never seen these.", text, list(encoder.layers))
    return [Variant(text, layers, sigma) for text, layers in choices for sigma in options.noise_sigma]


def _lpips_arguments(options: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    given = {"vgg_path": options.vgg_path, "linear_path": options.lpips_path}
    if any(given.values()):
        return {name: path or _LPIPS_FILES[name] for name, path in given.items()}
    return dict(model.get("lpips_arch") or _LPIPS_FILES)
