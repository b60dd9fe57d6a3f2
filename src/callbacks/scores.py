"""Shared base of the rFID and gFID callbacks, which score the EMA weights during training."""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, TypeVar

import pytorch_lightning as pl

from src.core.distributed import Process, RankRequests
from src.core.errors import UserError
from src.core.stopping import STOP
from src.core.weights import SizedWeights
from src.evaluation.networks import load_features
from src.evaluation.report_card import label
from src.metrics.features import INCEPTION, FeatureNetwork

log = logging.getLogger(__name__)

T = TypeVar("T")
GRACE_S = 15.0
"""How long an evaluation may continue after a request to stop. torchrun kills its processes 30 s after a signal."""


class _Overdue(Exception):
    """The evaluation did not end within GRACE_S after a request to stop."""


class ScoreCallback(pl.Callback):
    """Decides when to score, and logs the results. Subclasses are dataclasses of the keys of their config node."""

    score: ClassVar[str]
    """Name of the score and of its node in `callbacks:`; with pretrained Inception weights also the prefix of logged names."""
    scored: ClassVar[str]
    """What is scored, for log lines: images or samples."""
    script: ClassVar[str]
    """Script that computes the same score from a checkpoint."""
    off: ClassVar[str]
    """Overrides that switch the score off."""
    every_n_steps: int
    every_n_epochs: int
    features: Sequence[str]
    inception_path: str | None
    inception_weights: SizedWeights
    inception_width: float | None

    def __post_init__(self) -> None:
        if INCEPTION not in [name.partition("=")[0] for name in self.features]:
            raise UserError(
                f"callbacks.{self.score}.features={list(self.features)}: expected {INCEPTION} among them, for "
                f"{self.score}/score."
            )
        self.group = self.score if self.inception_weights == "pretrained" else f"{self.score}_untrained"
        """Prefix of the logged names."""
        self._networks: list[FeatureNetwork] = []
        self._scored_at = -1
        self._requests = RankRequests()

    @property
    def scores_checkpoints(self) -> bool:
        """Return whether scores are computed during training, so that `best.ckpt` can follow them."""
        return bool(self.every_n_steps or self.every_n_epochs)

    @property
    def in_use(self) -> bool:
        return self.scores_checkpoints

    @property
    def monitor(self) -> str:
        return f"{self.group}/score"

    def load_networks(self) -> list[FeatureNetwork]:
        """Return the feature networks on the CPU. Raises UserError if one is missing."""
        key, weights, width = f"callbacks.{self.score}.inception_path", self.inception_weights, self.inception_width
        return load_features(self.features, self.inception_path, weights, key, width)

    @abstractmethod
    def evaluate(self, trainer: pl.Trainer, pl_module: Any, name: str) -> None:
        """Set `_scored_at` to this step, score and publish. `name`: folder name for sample images."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (self.every_n_steps and pl_module.ends_update(batch_idx)) or trainer.global_step % self.every_n_steps:
            return
        if batch_idx + 1 < pl_module.batches_per_epoch or not self._at_end_of(trainer.current_epoch):
            with self.skipped_if_overdue(trainer):
                self.evaluate(trainer, pl_module, f"step_{trainer.global_step:07d}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._at_end_of(trainer.current_epoch) and self._scored_at != trainer.global_step:
            with self.skipped_if_overdue(trainer):
                self.evaluate(trainer, pl_module, f"epoch_{trainer.current_epoch + 1:03d}")

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._networks = []

    def _at_end_of(self, epoch: int) -> bool:
        return bool(self.every_n_epochs) and (epoch + 1) % self.every_n_epochs == 0

    @contextmanager
    def skipped_if_overdue(self, trainer: pl.Trainer) -> Iterator[None]:
        """Skip the rest of an evaluation that keeps a run from saving (`until_overdue`)."""
        try:
            yield
        except _Overdue:
            log.warning(
                "%s at step %d is skipped: the run was asked to stop and saves first. A checkpoint of this step can be scored "
                "with %s.",
                self.score, trainer.global_step, self.script,
            )  # fmt: skip

    def until_overdue(self, parts: Iterable[T], most: int, world: int) -> Iterator[T]:
        """Yield `parts`. Raises _Overdue on all ranks together. `most`: number of parts on the rank with the most."""
        parts = iter(parts)
        for _ in range(most):
            if self._requests.exchange([STOP.waiting_s > GRACE_S], world)[0]:
                raise _Overdue
            yield from islice(parts, 1)

    def broadcast_scores(self, trainer: pl.Trainer, values: Mapping[str, float]) -> dict[str, float]:
        """Broadcast the scores of rank 0; return them by logged name without its prefix."""
        values = trainer.strategy.broadcast(values)
        return {name.removesuffix("_untrained").replace(self.score, "score"): value for name, value in values.items()}

    def publish(
        self, trainer: pl.Trainer, pl_module: Any, group: str, values: Mapping[str, float], start: float
    ) -> None:
        """Record and log scores as `group`/NAME. `start`: `time.perf_counter` at the start of the evaluation."""
        figures = {**values, "seconds": time.perf_counter() - start}
        pl_module.record_scores({f"{group}/{name}": value for name, value in figures.items()})
        if trainer.is_global_zero:
            rest = ", ".join(f"{label(name)} {value:.4g}" for name, value in figures.items() if label(name))
            log.info(
                "step %d, %s: %.4f over %s %s%s in %.1f s", trainer.global_step, group, figures["score"],
                f"{figures['images']:,}", self.scored, rest and f" ({rest})", figures["seconds"],
            )  # fmt: skip


def process_of(trainer: pl.Trainer, pl_module: Any) -> Process:
    """Return the device and rank of this training process."""
    return Process(pl_module.device, trainer.global_rank, trainer.world_size)
