"""LightningModule for stage-2 training of a diffusion transformer on RAE latents. Sources: RAE (arXiv 2510.11690), RAEv2 (arXiv
2605.18324). The mathematics of a step is in `src/training/stage2_step.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from src.core.distributed import sum_over_ranks
from src.core.ema import EMA
from src.core.errors import UserError
from src.core.geometry import Pixels
from src.core.images import unit_to_bytes
from src.core.schedules import Schedule
from src.core.weights import freeze
from src.data.latents import LatentStore
from src.evaluation.reconstruction import check_store
from src.evaluation.sampler import Sampler, SamplerSettings
from src.formats.checkpoint import statistics_digest, stored
from src.formats.opening import open_autoencoder
from src.formats.stage2 import load_pretrained
from src.losses.flow_matching import FlowSettings, quartile_sums
from src.models import flops
from src.models.dit import build_network, forward_flops
from src.models.dit_layers import LABEL_STD
from src.training.module import StageModule, encoder_fact, sizes
from src.training.optimizers import MuonWithAdamW, adamw
from src.training.settings import OptimizerSettings, StageSettings
from src.training.stage2_step import FlowDraws, FlowStep

log = logging.getLogger(__name__)

QUARTERS = 4
NO_LABELS = (
    "The data has no labels, and a diffusion transformer is trained on classes. Use a data set with a label column (data.label "
    "names it), class folders, or .cls members of tars. For images of a single kind, use one class folder and "
    "model.num_classes=1."
)
STUCK_AFTER = 500
"""Updates after which a run is warned if its loss is still that of an untrained network."""
STUCK_SHARE = 0.97
"""Share of the loss of an all-zero output above which the run counts as not learning."""


class TransformerOptimizer(OptimizerSettings):
    """The node `model.optimizer`."""

    name: Literal["adamw", "muon"]
    """muon: Muon for matrices, AdamW for the rest (RAEv2)."""


class Stage2Settings(StageSettings):
    """The node `model:` of stage 2."""

    typed_as: ClassVar[Mapping[str, str]] = {**StageSettings.typed_as, "image_size": "data.image_size"}

    autoencoder: str | Mapping[str, Any] | None = Field(description="a path, or {encoder, decoder, statistics}")
    """See `open_autoencoder`."""
    statistics: str | None
    image_size: Pixels
    network: Mapping[str, Any]
    """`name`, a class of src/models/dit.py, and its arguments."""
    num_classes: int = Field(ge=1)
    label_dropout: float = Field(ge=0, le=1)
    label_std: float = Field(gt=0)
    """Standard deviation of the label table's initial values."""
    pretrained_path: str | None = None
    flip_probability: float = Field(ge=0, le=1)
    flow: FlowSettings
    sampler: SamplerSettings
    sample_classes: Annotated[int, Field(ge=1)]
    optimizer: TransformerOptimizer
    scheduler: Schedule


class DiffusionModule(StageModule):
    """Trains and checkpoints the transformer and its EMA. Arguments: the keys of `model:`."""

    frozen: ClassVar[tuple[str, ...]] = ("rae.",)
    on_device: ClassVar[tuple[str, ...]] = ("image", "latent", "label")
    published_batch: ClassVar[int] = 1024
    sample_row_names: ClassVar[str] = "a row for each class"
    restart_hint: ClassVar[str] = " from its transformer: set model.pretrained_path to that checkpoint"
    sparse_terms: ClassVar[tuple[str, ...]] = ("train/loss_q",)
    settings: Stage2Settings

    def __init__(self, **config: Any) -> None:
        settings = Stage2Settings.parse(config, "model")
        super().__init__(settings)
        self.autoencoder = loaded = open_autoencoder(settings.autoencoder, settings.statistics, settings.image_size)
        self.rae = loaded.rae
        self.autoencoder_identity = {
            "encoder": dict(loaded.description["encoder"]),
            "statistics": {"digest": statistics_digest(self.rae)},
        }
        self.network = build_network(
            settings.network, self.rae.latent_shape, settings.num_classes, settings.label_dropout, settings.seed
        )
        with torch.no_grad():
            self.network.label_table.mul_(settings.label_std / LABEL_STD)
        if settings.pretrained_path is not None:
            load_pretrained(self.network, settings.pretrained_path)
        self.ema = EMA(self.network, settings.ema_decay)
        self.ema_network = self.ema.average
        self.step = FlowStep(
            self.rae, settings.flow, settings.num_classes, settings.label_dropout, settings.flip_probability
        )
        freeze(self.rae)
        self._window: Tensor | None = None
        self._window_updates = 0
        self._warned = False
        self.sampler()  # fail before training on guidance that the network does not support
        self.exchange_gradients_of("network.")

    # -- training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = self.settings.optimizer
        if settings.name == "adamw":
            return [adamw(self.network, settings)]
        parameters = (p for p in self.network.parameters() if p.requires_grad)
        return [MuonWithAdamW(parameters, settings.lr, settings.betas, settings.weight_decay)]

    def learning_rates(self, step: int) -> dict[str, float]:
        return {"network": self.settings.scheduler.lr(step, self.steps_per_epoch)}

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Check labels on the host, so that nothing waits for the device."""
        if "label" not in batch:
            raise UserError(NO_LABELS)
        return batch | {"label": self.network.known(batch["label"])}

    def compute_gradients(self, batch: Mapping[str, Any], batch_idx: int, step: int, share: float) -> dict[str, Tensor]:
        draws = FlowDraws.at(self.settings.seed, batch, self.rae.latent_shape, self.device, training=True)
        latents, labels = self.step.latents(batch, draws, training=True), self.step.dropped(batch["label"], draws)
        terms = self.step.losses(self.network, latents, labels, draws)
        self.manual_backward(terms["loss"].mean() * share)
        self._add_to_window(step, terms, draws)
        return {name: value.detach().mean() for name, value in terms.items() if name != "zero"}

    def update(self, step: int, batch_idx: int, terms: Mapping[str, Tensor]) -> None:
        self.step_counted(step, {"loss": terms["loss"]})
        assert self._window is not None
        sums, counts = self._window[:QUARTERS], self._window[QUARTERS : 2 * QUARTERS]
        for number, value in enumerate(sums / counts, 1):
            self.train_terms[f"train/loss_q{number}"] = value

    def _add_to_window(self, step: int, terms: Mapping[str, Tensor], draws: FlowDraws) -> None:
        """Add to the sums since the last log entry, on the device: 4 losses and 4 counts by quartile of t, zero output's loss."""
        if self._window is None or (step % self.settings.log_every_n_steps == 0 and step != self._window_updates):
            self._window = torch.zeros(2 * QUARTERS + 1, device=self.device)
            self._window_updates = step
        self._window[:-1] += quartile_sums(terms["loss"].detach(), draws.time)
        self._window[-1] += terms["zero"].sum()

    def check_numbers(self) -> None:
        super().check_numbers()
        if self._warned or self._window is None or self.global_step < STUCK_AFTER:
            return
        loss, zero = float(self._window[:QUARTERS].sum()), float(self._window[-1])
        if loss > STUCK_SHARE * zero:
            self._warned = True
            log.warning(
                "After %d updates the loss is still %.0f %% of that of an untrained network: this run is not learning. Is the "
                "network at least as wide as the latent (%d channels)? Are the statistics those of this encoder? Is the "
                "learning rate right?",
                self.global_step, 100 * loss / zero, self.rae.latent_shape[0],
            )  # fmt: skip

    # -- evaluation

    def on_validation_epoch_start(self) -> None:
        self._totals = torch.zeros(2 * QUARTERS, dtype=torch.float64)

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        batch = {
            **batch,
            "position": batch["position"] * self.trainer.world_size + self.global_rank,
        }  # in the whole set, not on this rank
        draws = FlowDraws.at(self.settings.seed, batch, self.rae.latent_shape, self.device, training=False)
        latents = self.step.latents(batch, draws, training=False)
        losses = self.step.losses(self.ema_network, latents, batch["label"], draws)["loss"]
        self._totals += quartile_sums(losses.cpu().double(), draws.time)

    def on_validation_epoch_end(self) -> None:
        sums, counts = sum_over_ranks(self._totals).chunk(2)
        values = {"val/loss": float(sums.sum() / counts.sum())}
        quarters = zip(range(1, QUARTERS + 1), sums.tolist(), counts.tolist(), strict=True)
        self.record_scores(values | {f"val/loss_q{n}": total / count for n, total, count in quarters if count})

    def sampler(self, settings: SamplerSettings | None = None, seed: int | None = None) -> Sampler:
        """Return a sampler of the EMA network, by default with the run's settings and seed."""
        own = self.settings
        return Sampler(self.ema_network, settings or own.sampler, own.flow, own.seed if seed is None else seed)

    @torch.no_grad()
    def sample_rows(self, images: Tensor) -> list[Tensor]:
        """Return a row of samples for each of `sample_classes` classes, from fixed noise; as many columns as `images`."""
        count, classes = len(images), self.settings.num_classes
        chosen = torch.linspace(0, classes - 1, min(self.settings.sample_classes, classes)).long().unique().tolist()
        sampler, rows = self.sampler(), []
        for row, label in enumerate(chosen):
            indices = range(row * count, (row + 1) * count)
            latents = sampler.latents(indices, torch.full((count,), label), self.device)
            rows.append(unit_to_bytes(self.rae.decode(latents)))
        return rows

    # -- checks and start-up table

    @classmethod
    def check_arguments(cls, config: Mapping[str, Any]) -> None:
        Stage2Settings.parse(config, "model")

    def startup_rows(self) -> list[tuple[str, str]]:
        channels, grid, _ = self.rae.latent_shape
        encoder = self.rae.encoder
        forward, size = forward_flops(self.network) / 1e9, self.rae.geometry.image_size
        return [
            ("latents", f"{size} px image -> {channels} x {grid} x {grid}, time shift {self.step.shift:.4g}"),
            encoder_fact(encoder),
            ("trained", f"{sizes({type(self.network).__name__: self.network})}, {forward:.3g} GFLOP forward per image"),
            ("frozen", sizes({"encoder": encoder, "decoder": self.rae.decoder})),
            ("classes", f"{self.settings.num_classes}, dropped with probability {self.settings.label_dropout:g}"),
        ]

    def training_flops(self) -> float:
        """Return the FLOPs of three forward passes of the transformer, plus one of the encoder unless latents are stored."""
        size = self.rae.geometry.encoder_input_size
        stored = self.trainer.datamodule.latent_store is not None
        encoder = 0 if stored else flops.forward_flops(self.rae.encoder, torch.empty(1, 3, size, size, device="meta"))
        return 3 * forward_flops(self.network) + encoder

    def likely_mistakes(self, max_epochs: int | None) -> list[str]:
        width, channels = self.network.final_layer.linear.in_features, self.rae.latent_shape[0]
        if width >= channels:
            return []
        return [
            f"The network's last width is {width}, the latent has {channels} channels: a narrower network can't fit the latents "
            "(arXiv 2510.11690). Raise model.network.hidden_size."
        ]

    def untrained_parts(self) -> list[str]:
        return ["encoder"] * self.rae.encoder.untrained

    # -- setup and checkpoints

    def accept_latents(self, store: LatentStore) -> None:
        check_store(store, self.autoencoder)
        self.step.normalize_stored = store.scale == "raw"
        if self.settings.flip_probability and self.trainer.is_global_zero:
            log.warning(
                "Stored latents can't be mirrored: model.flip_probability=%g has no effect.",
                self.settings.flip_probability,
            )

    def on_fit_start(self) -> None:
        data = self.trainer.datamodule
        classes, known = data.num_classes, self.settings.num_classes
        if classes is None:
            raise UserError(NO_LABELS)
        if classes > known:
            raise UserError(
                f"The data has {classes} classes, but model.num_classes={known}: set model.num_classes={classes}."
            )
        first = next(iter(data.evaluation_sets.values()), None)
        if first is not None and first.source.num_classes is None and self.trainer.limit_val_batches:
            raise UserError(
                f"The evaluation images ({first.source.name(0)}, ...) have no labels, which the validation loss needs. Sort them "
                "into class folders as the training images, or train without validation: trainer.limit_val_batches=0."
            )
        super().on_fit_start()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        was, now = stored(checkpoint, "config.model.optimizer.name"), self.settings.optimizer.name
        if was != now:
            raise UserError(
                f"model.optimizer.name was {was} and is now {now}: their optimiser states are not compatible. Resume with "
                f"model.optimizer.name={was}."
            )

    def cast_when_half(self) -> Sequence[nn.Module]:
        return []  # the encoder runs in float32

    def parts_to_compile(self) -> Sequence[nn.Module]:
        return [*self.network.blocks, *self.ema_network.blocks, *self.rae.encoder.blocks()]

    def identity(self) -> dict[str, dict[str, Any]]:
        channels, grid, _ = self.rae.latent_shape
        computed = {name: value for name, value in self.settings.network.items() if name != "activation_checkpointing"}
        network = {f"model.network.{name}": value for name, value in computed.items()}
        latents = {"latent channels": channels, "latent grid": grid, "model.num_classes": self.settings.num_classes}
        flow = {"model.flow.prediction": self.settings.flow.prediction, "time shift": self.step.shift}
        return {"architecture": {"stage": 2, **latents, **network, **flow}, **self.autoencoder_identity}
