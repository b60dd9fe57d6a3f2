"""Score samples of a diffusion transformer during training, with the code of `src/sample.py` and `src/eval_generation.py`."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field

from src.callbacks.progress import training_paused
from src.callbacks.scores import ScoreCallback, process_of
from src.core.distributed import sum_over_ranks
from src.core.errors import UserError
from src.core.options import LoadingOptions
from src.core.settings import checked
from src.core.text import typed
from src.core.weights import SizedWeights, resolve
from src.evaluation.generation import Reference, all_scores, load_references
from src.evaluation.sampler import SamplerSettings
from src.evaluation.samples import NOT_FINITE, blocks, draw, labels_of
from src.metrics.generation import GenerationReference, ImageStatistics

log = logging.getLogger(__name__)


@checked("callbacks.gfid")
@dataclass(eq=False)
class GFIDCallback(ScoreCallback):
    """Samples from the EMA transformer, split over all ranks, and scores the images. Arguments: configs/callbacks/gfid.yaml.

    Logs `gfid/{score,sfid,inception_score,precision,recall,images,seconds}` (those that the reference allows), and
    `gfid/gfd_NAME` for further feature networks; with untrained Inception weights the prefix is `gfid_untrained`. Sampling
    uses the default precision of `src/sample.py`, whatever the run's precision. Does not affect training results.
    """

    score = "gfid"
    scored = "samples"
    script = "src/eval_generation.py"
    off = "callbacks.gfid.every_n_steps=0 callbacks.gfid.every_n_epochs=0"
    inception_width = None

    every_n_steps: Annotated[int, Field(ge=0)]
    every_n_epochs: Annotated[int, Field(ge=0)]
    num_images: Annotated[int, Field(ge=2, le=10_000_000)]
    batch_size: Annotated[int, Field(ge=1)]
    decode_batch: Annotated[int, Field(ge=1)]
    labels: Annotated[str | int, Field(description="text or one class")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    sampler: Mapping[str, Any]
    reference: str | None
    reference_split: str | None
    features: Sequence[str]
    inception_path: str | None
    inception_weights: SizedWeights

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = str(self.labels)  # a single class is parsed as a number
        self._references: list[GenerationReference] = []

    # -- schedule

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Check before training for anything that would fail at the first evaluation. Raises UserError."""
        if stage != "fit" or not self.in_use:
            return
        if not hasattr(pl_module, "sampler"):
            raise UserError("callbacks.gfid scores samples of stage 2, but this model generates none: remove it.")
        if self.reference is None or not resolve(self.reference).exists():
            raise UserError(
                f"callbacks.gfid.reference={typed(self.reference)}: expected an npz (ADM's, or of src/make_reference.py) or a data "
                f"set to score samples against. To train without gFID: {self.off}."
            )
        own = pl_module.settings.sampler.model_dump()
        given = {name: value for name, value in self.sampler.items() if value is not None}
        self._settings = SamplerSettings.parse(own | given, "callbacks.gfid.sampler")
        pl_module.sampler(self._settings)
        network, key = pl_module.network, "callbacks.gfid.labels="
        self._labels = labels_of(self.labels, self.seed, self.num_images, network, key)
        self._networks = self.load_networks()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Load the reference, so that an incompatible one fails before training."""
        if not self.in_use:
            return
        self._networks = [network.to(pl_module.device) for network in self._networks]
        size, loading = pl_module.rae.geometry.image_size, LoadingOptions(batch_size=self.batch_size)
        process = process_of(trainer, pl_module)
        reference = Reference(str(self.reference), self.reference_split, key="callbacks.gfid.reference")
        self._references = load_references(reference, size, self._networks, loading, process)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._references = []

    # -- evaluation

    def evaluate(self, trainer: pl.Trainer, pl_module: Any, name: str) -> None:
        start, self._scored_at = time.perf_counter(), trainer.global_step
        with training_paused(trainer):
            values = self._score(trainer, pl_module)
        self.publish(trainer, pl_module, self.group, values, start)

    def _score(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        """Score samples of the EMA network; all ranks take part and get the same result."""
        process, count = process_of(trainer, pl_module), self.num_images
        sampler = pl_module.sampler(self._settings, self.seed)
        statistics = [ImageStatistics(network, self.batch_size, count) for network in self._networks]
        broken = torch.zeros((), device=process.device)
        parts = blocks(count, self.batch_size)
        mine, most = parts[process.rank :: process.world], len(parts[:: process.world])
        for indices in self.until_overdue(mine, most, process.world):
            images, latents = draw(sampler, pl_module.rae, indices, self._labels, process.device, self.decode_batch)
            broken += latents.flatten(1).isfinite().logical_not().any(1).sum()
            for part in statistics:
                part.update(images, torch.from_numpy(indices))
        for part in statistics:
            part.reduce()
        values = all_scores(statistics, self._references, process.device) if process.main else {}
        if broken := int(sum_over_ranks(broken)):
            log.warning("gFID is NaN: %d of %d samples hold NaN or infinity: %s.", broken, count, NOT_FINITE)
            values = dict.fromkeys(values, math.nan)
        return self.broadcast_scores(trainer, values)
