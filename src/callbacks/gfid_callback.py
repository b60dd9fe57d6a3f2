"""Scores of samples while a diffusion transformer trains, by the code of `src/sample.py` and `src/eval_generation.py`."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field

from src.callbacks.progress import training_paused
from src.callbacks.rfid_callback import due, evaluation_mode
from src.core.distributed import Process
from src.core.errors import UserError
from src.core.options import LoadingOptions
from src.core.settings import checked
from src.core.weights import resolve
from src.evaluation.generate import SamplerSettings
from src.evaluation.generation import Reference, all_scores, load_references
from src.evaluation.networks import load_features, load_inception
from src.evaluation.report_card import label
from src.evaluation.samples import blocks, draw, labels_of
from src.metrics.features import INCEPTION, FeatureNetwork
from src.metrics.generation import GenerationReference, GenerationStatistics
from src.metrics.inception import InceptionFeatures, InceptionWeights

log = logging.getLogger(__name__)

REMEDY = (
    "To train without gFID: callbacks.gfid.every_n_steps=0 callbacks.gfid.every_n_epochs=0. For a try-out: "
    "callbacks.gfid.inception_weights=untrained (the score is then called gfid_untrained/score)."
)


@checked("callbacks.gfid")
@dataclass(eq=False)
class GFIDCallback(pl.Callback):
    """Samples from the EMA transformer and scores the images; every process takes its share of the blocks. Arguments:
    configs/callbacks/gfid.yaml.

    Logs `gfid/{score,sfid,inception_score,precision,recall,images,seconds}` (what the reference allows), and
    `gfid/gfd_NAME` for further feature networks; with untrained Inception weights the first part is `gfid_untrained`.
    Training loses nothing but time. In float32, whatever the run's precision.
    """

    every_n_steps: Annotated[int, Field(ge=0)]
    every_n_epochs: Annotated[int, Field(ge=0)]
    num_images: Annotated[int, Field(ge=2)]
    batch_size: Annotated[int, Field(ge=1)]
    decode_batch: Annotated[int, Field(ge=1)]
    labels: Annotated[str | int, Field(description="text or one class")]
    seed: Annotated[int, Field(ge=0)]
    sampler: Mapping[str, Any]
    reference: str | None
    reference_split: str | None
    features: Sequence[str]
    inception_path: str | None
    inception_weights: InceptionWeights

    def __post_init__(self) -> None:
        if INCEPTION not in [name.partition("=")[0] for name in self.features]:
            raise UserError(
                f"callbacks.gfid.features={list(self.features)}: expected {INCEPTION} among them, for gfid/score."
            )
        self.labels = str(self.labels)  # one class is a number
        self.group = "gfid" if self.inception_weights == "pretrained" else "gfid_untrained"
        """First part of the logged names."""
        self._networks: list[FeatureNetwork] = []
        self._references: list[GenerationReference] = []
        self._scored_at = -1

    @property
    def in_use(self) -> bool:
        return bool(self.every_n_steps or self.every_n_epochs)

    @property
    def scores_checkpoints(self) -> bool:
        """Tell whether there are scores during training that `best.ckpt` can follow."""
        return self.in_use

    @property
    def monitor(self) -> str:
        return f"{self.group}/score"

    def load_networks(self) -> list[FeatureNetwork]:
        """Return the feature networks on the CPU. UserError where one is missing."""

        def inception(place: str | None) -> InceptionFeatures:
            key, path = "callbacks.gfid.inception_path", place or self.inception_path
            return load_inception(path, self.inception_weights, key, REMEDY)

        return load_features(self.features, inception)

    # -- when

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check before training what would fail at the first evaluation. Raises UserError."""
        if stage != "fit" or not self.in_use:
            return
        if not hasattr(pl_module, "sampler"):
            raise UserError("callbacks.gfid scores the samples of a stage-2 run, and this model makes none: drop it.")
        if self.reference is None or not resolve(self.reference).exists():
            raise UserError(
                f"callbacks.gfid.reference={self.reference}: expected an npz (ADM's, or of src/make_reference.py) or a data "
                f"set to score samples against. {REMEDY}"
            )
        own = pl_module.settings.sampler.model_dump()
        given = {name: value for name, value in self.sampler.items() if value is not None}
        self._settings = SamplerSettings.parse(own | given, "callbacks.gfid.sampler")
        pl_module.sampler(self._settings)
        labels_of(self.labels, self.seed, self.num_images, pl_module.network.num_classes)
        self._networks = self.load_networks()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Read the reference, so that one that doesn't fit is told before training."""
        if not self.in_use:
            return
        self._networks = [network.to(pl_module.device) for network in self._networks]
        size, loading = pl_module.rae.geometry.image_size, LoadingOptions(batch_size=self.batch_size)
        reference, process = Reference(str(self.reference), self.reference_split), _process(trainer, pl_module)
        self._references = load_references(reference, size, self._networks, loading, process)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if due(trainer, pl_module, batch_idx, self.every_n_steps, self._at_end_of(trainer.current_epoch)):
            self._evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._at_end_of(trainer.current_epoch) and self._scored_at != trainer.global_step:
            self._evaluate(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._networks, self._references = [], []

    def _at_end_of(self, epoch: int) -> bool:
        return bool(self.every_n_epochs) and (epoch + 1) % self.every_n_epochs == 0

    # -- what

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any) -> None:
        start, self._scored_at = time.perf_counter(), trainer.global_step
        with training_paused(trainer), evaluation_mode(pl_module.ema_network, pl_module.rae):
            values = self._score(trainer, pl_module)
        figures = {**values, "seconds": time.perf_counter() - start}
        pl_module.record_scores({f"{self.group}/{name}": value for name, value in figures.items()})
        if trainer.is_global_zero:
            rest = ", ".join(f"{label(name)} {value:.4g}" for name, value in figures.items() if label(name))
            log.info(
                "step %d, %s: %.4f over %s samples%s in %.1f s", trainer.global_step, self.group, figures["score"],
                f"{figures['images']:,}", rest and f" ({rest})", figures["seconds"],
            )  # fmt: skip

    def _score(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """Score samples of the averaged network on all ranks, with the same result on all of them."""
        process, count = _process(trainer, pl_module), self.num_images
        sampler = pl_module.sampler(self._settings, self.seed)
        labels = labels_of(self.labels, self.seed, count, pl_module.network.num_classes)
        statistics = [GenerationStatistics(network, self.batch_size, count) for network in self._networks]
        for indices in blocks(count, self.batch_size)[process.rank :: process.world]:
            images, _ = draw(sampler, pl_module.rae, indices, labels, process.device, self.decode_batch)
            for part in statistics:
                part.update(images, torch.from_numpy(indices))
        for part in statistics:
            part.reduce()
        values = all_scores(statistics, self._references, process.device) if process.main else {}
        values = dict(trainer.strategy.broadcast(values))
        return {
            "score" if name.startswith("gfid") else name.removesuffix("_untrained"): v for name, v in values.items()
        }


def _process(trainer: pl.Trainer, pl_module: Any) -> Process:
    return Process(pl_module.device, trainer.global_rank, trainer.world_size)
