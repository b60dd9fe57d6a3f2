"""Base LightningModule of all training stages.

A stage defines its networks, the loss of a micro-batch and the updates; this file does everything around them. Optimisation
is manual, so gradient accumulation, clipping and skipping of bad steps, which Lightning then refuses, are done here. Every
step count is in updates, as counted by Lightning's `global_step`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.profiler import record_function

from src.callbacks.checkpoint import make_canonical
from src.core.distributed import gather
from src.core.ema import EMA
from src.core.errors import UserError
from src.core.nonfinite import NonFiniteCounter
from src.core.precision import cast_frozen
from src.core.weights import check_fit, read
from src.data.fingerprint import compare_fingerprints
from src.data.latents import LatentStore
from src.formats.checkpoint import FORMAT_VERSION, check_resumable
from src.models.frozen_encoder import identity_differences
from src.training.optimizers import step_optimizer
from src.training.settings import StageSettings

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class StageModule(pl.LightningModule):
    """Base of a training stage, which implements the abstract methods."""

    frozen: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of what is never trained: not in checkpoints, EMA or gradient all-reduce."""
    on_device: ClassVar[tuple[str, ...]] = ("image",)
    """Batch entries moved to the device; the others stay on the host as arrays."""
    sparse_terms: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of terms that may be NaN because no image contributed; NaN is then not logged."""
    restart_hint: ClassVar[str] = (
        " from its decoder: export it with src/export.py and set model.pretrained_decoder_path"
    )
    """How to start from the weights of a checkpoint that can't be resumed: follows `a new run` in the error message."""
    published_batch: ClassVar[int]
    """Images in a global batch of the published recipe."""
    sample_row_names: ClassVar[str]
    """Description of the rows of a sample image (`sample_rows`)."""
    ema: EMA
    """EMA of the network that is evaluated."""
    phase_override: Any = None
    """Phase used for every step while preflight times the parts of a run; None: the phase follows from the step number."""
    settings: StageSettings

    def __init__(self, settings: StageSettings) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings
        self.run_config: dict[str, Any] = {"model": settings.model_dump()}
        """Configuration of the run as plain values, for checkpoints; `build_run` sets the whole of it."""
        self.nonfinite = NonFiniteCounter(settings.max_skipped_steps)
        self.train_terms: dict[str, Tensor] = {}
        """Scalars of the latest step by their logged names, still on the device."""
        self.scores: dict[str, tuple[int, float]] = {}
        """Latest evaluation results by their logged names: (step, value)."""
        self.scores_at_start: dict[str, float] = {}
        """Results of the validation before training, if any (`trainer.num_sanity_val_steps=-1`)."""

    # -- defined by each stage

    @abstractmethod
    def compute_gradients(self, batch: Mapping[str, Any], batch_idx: int, step: int, share: float) -> dict[str, Tensor]:
        """Accumulate the gradients of a micro-batch, weighted by `share`; return the detached loss terms by name."""

    @abstractmethod
    def update(self, step: int, batch_idx: int, terms: Mapping[str, Tensor]) -> None:
        """Update the networks after the last micro-batch (`batch_idx`). `terms`: means over the micro-batches."""

    @abstractmethod
    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the learning rates in `step` by logged name; the same names and order as `scalers`."""

    @abstractmethod
    def identity(self) -> dict[str, dict[str, Any]]:
        """Return, by part, the plain values that a checkpoint must share with this model to be loaded into it."""

    @abstractmethod
    def cast_when_half(self) -> Sequence[nn.Module]:
        """Return the frozen networks that only run under the trainer's autocast, so can be cast to half precision."""

    @abstractmethod
    def parts_to_compile(self) -> Sequence[nn.Module]:
        """Return the modules worth compiling."""

    @abstractmethod
    def startup_rows(self) -> list[tuple[str, str]]:
        """Return (name, text) rows about the networks for the start-up table."""

    @abstractmethod
    def untrained_parts(self) -> list[str]:
        """Return the names of networks with random weights by request."""

    @abstractmethod
    def sample_rows(self, images: Tensor) -> list[Tensor]:
        """Return the rows of a sample image, each uint8 N x 3 x H x W. `images`: evaluation images, uint8 N x 3 x H x W."""

    def likely_mistakes(self, max_epochs: int | None) -> list[str]:
        """Return warnings about likely configuration mistakes, one text each."""
        return []

    def loss_phases(self, planned: int) -> list[tuple[str, int, Any]]:
        """Split a run of `planned` updates into parts with the same losses on: name, updates, value of `phase_override`."""
        return [("all", planned, None)]

    def training_flops(self) -> float | None:
        """Return the FLOPs of training on one image, without recomputation; None if this stage does not count them."""
        return None

    def scalers(self) -> dict[str, torch.amp.GradScaler | None]:
        """Return the fp16 loss scalers by network; the first belongs to the optimiser whose steps Lightning counts."""
        return {"network": getattr(self.trainer.precision_plugin, "scaler", None)}

    # -- training

    @property
    def steps_per_epoch(self) -> int:
        """Updates in an epoch; known once the trainer has its data loaders."""
        return int(self.trainer.num_training_batches) // self.settings.accumulate_grad_batches

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches in these updates; the remaining ones of an epoch are not trained on."""
        return self.steps_per_epoch * self.settings.accumulate_grad_batches

    def ends_update(self, batch_idx: int) -> bool:
        """Return whether micro-batch `batch_idx` of an epoch is the last one of an update."""
        return (batch_idx + 1) % self.settings.accumulate_grad_batches == 0

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if batch_idx >= self.batches_per_epoch:
            return
        accumulate = self.settings.accumulate_grad_batches
        step, number, last = self.global_step, batch_idx % accumulate, self.ends_update(batch_idx)
        strategy = self.trainer.strategy  # single-process strategies have no gradient sync to block
        exchanges = last or not hasattr(strategy, "block_backward_sync")
        with nullcontext() if exchanges else strategy.block_backward_sync():
            terms = self.compute_gradients(batch, batch_idx, step, 1 / accumulate)
        for name, value in terms.items():
            before = self.train_terms[f"train/{name}"] if number else 0
            self.train_terms[f"train/{name}"] = value * (1 / accumulate) + before
        if last:
            self.update(step, batch_idx, {name: self.train_terms[f"train/{name}"] for name in terms})
            with record_function("ema"):
                self.ema.update()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Lightning adds 1 and logs at that step; it would count micro-batches instead of updates.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step - 1

    def step_counted(self, step: int, watched: Mapping[str, Tensor]) -> None:
        """Step the first optimiser, whose steps Lightning counts. `watched`: see `step_optimizer`."""
        rate, scaler = (next(iter(named.values())) for named in (self.learning_rates(step), self.scalers()))
        clip, optimizer = self.settings.gradient_clip_val, self.optimizer_list()[0]
        norm = step_optimizer(optimizer, rate, self.nonfinite, step, watched, scaler=scaler, clip=clip)
        self.train_terms["train/grad_norm"] = norm

    def optimizer_list(self) -> list[Any]:
        """Return the optimisers in Lightning's wrappers: a step of any of them adds 1 to `global_step`."""
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def check_numbers(self) -> None:
        """Raise if too many losses or gradients were not finite. Waits for the device; called when logging and saving."""
        self.nonfinite.check()
        for name, scaler in self.scalers().items():
            if scaler is not None and scaler.is_enabled() and scaler.get_scale() < 1:
                raise UserError(
                    f"The fp16 loss scale of the {name} fell to {scaler.get_scale():g}: its gradients overflow at every "
                    "step. Use trainer.precision=bf16 or 32, or a lower learning rate."
                )

    # -- results

    def write_metrics(self, values: Mapping[str, float]) -> None:
        """Write to every logger at the current step, and to `callback_metrics` for Lightning's callbacks. Called on all ranks."""
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        if "train/loss" in values:  # shown by Lightning's progress bars
            self.trainer.progress_bar_metrics["train/loss"] = values["train/loss"]
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    def record_scores(self, values: Mapping[str, float]) -> None:
        """Store and log the results of an evaluation."""
        if self.trainer.sanity_checking:
            self.scores_at_start = dict(values)
        else:
            self.scores |= {name: (self.global_step, value) for name, value in values.items()}
        if self.trainer.state.fn == TrainerFn.VALIDATING:  # trainer.validate returns what was logged this way
            self.log_dict(dict(values))
        else:
            self.write_metrics(values)

    # -- setup

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in (expected := ["32-true", *HALF]):
            raise UserError(
                f"precision={self.trainer.precision!r}: expected {', '.join(expected)}. The weights stay in float32."
            )

    def exchange_gradients_of(self, prefix: str) -> None:
        """Let DistributedDataParallel exchange only the gradients of parameters whose names start with `prefix`."""
        names = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        self._ddp_params_and_buffers_to_ignore = [name for name in names if not name.startswith(prefix)]

    def accept_latents(self, store: LatentStore) -> None:
        """Check that this stage can train on stored latents. Raises UserError."""
        raise UserError(
            f"{store.path} (data.data_dir) holds stored latents, but this stage trains on images. Give it the images."
        )

    def on_fit_start(self) -> None:
        if not hasattr(self.trainer.datamodule, "fingerprint_state"):
            raise UserError(
                "Data order, random draws and resuming need a data module: call trainer.fit(module, datamodule=data) with an "
                "RAEDataModule or a subclass of it."
            )
        data = gather(self.trainer.datamodule.fingerprint_state)
        for rank, own in enumerate(data):
            if changes := compare_fingerprints(data[0], own):
                raise UserError(
                    f"Process {rank} has other data than process 0: {'; '.join(changes[:10])}. Copy the same files to all "
                    "machines."
                )
        if (store := self.trainer.datamodule.latent_store) is not None:
            self.accept_latents(store)
        if dtype := HALF.get(str(self.trainer.precision)):
            for network in self.cast_when_half():
                cast_frozen(network, dtype)
        if self.settings.compile:
            compile_in_place(self.parts_to_compile())

    def on_train_start(self) -> None:
        batches, accumulate = int(self.trainer.num_training_batches), self.settings.accumulate_grad_batches
        if batches < accumulate:
            raise UserError(
                f"An epoch has {batches} micro-batch(es) and an update takes {accumulate} (trainer.accumulate_grad_batches): "
                "nothing would be trained. Lower that, or data.batch_size, or raise trainer.limit_train_batches."
            )
        loop = self.trainer.fit_loop  # holds the position of a resumed run, where the loader starts
        done = loop.epoch_loop.batch_progress.current.ready
        if done > batches:
            raise UserError(
                f"The checkpoint was saved after micro-batch {done} of its epoch, but an epoch now has {batches}: the global "
                "batch has grown. Resume with the data.batch_size x processes x trainer.accumulate_grad_batches of that run."
            )
        self.trainer.train_dataloader.resume_at(loop.epoch_progress.current.processed, done)
        loop.epoch_loop._batches_that_stepped = self.global_step
        if torch.distributed.is_initialized():  # DDP does not broadcast what it ignores
            for tensor in self.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the `on_device` entries to the device, without waiting. The others become arrays: DDP would move tensors to the
        GPU, and reading them back would wait for all queued GPU work."""
        host = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return host | {name: batch[name].to(device, non_blocking=True) for name in self.on_device if name in batch}

    # -- checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **changes: Any) -> Self:  # type: ignore[override]
        """Return the module of a checkpoint, on the CPU. `changes`: arguments to override. Raises UserError for other files.

        `load_trained` returns only the model, frozen.
        """
        content = read(checkpoint_path)
        check_resumable(content, checkpoint_path)
        module = cls(**{k: v for k, v in content["config"]["model"].items() if k != "_target_"} | changes)
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        return module

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the state without the `frozen` networks."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(self.frozen)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returns. Raises UserError unless all names and shapes match."""
        check_fit(self.state_dict(), state_dict, "The checkpoint", "this model")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["format_version"] = FORMAT_VERSION
        checkpoint["config"] = self.run_config
        checkpoint["processes"] = self.trainer.world_size
        make_canonical(checkpoint["loops"], self.steps_per_epoch, self.settings.accumulate_grad_batches)
        checkpoint["skipped_steps"] = self.nonfinite.skipped
        checkpoint.update(self.identity())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters. Raises UserError with every difference if the checkpoint is of another model."""
        differing = [
            f"  {name}: checkpoint {(checkpoint.get(part) or {}).get(name)!r}, model {own[name]!r}"
            for part, own in self.identity().items()
            for name in identity_differences(checkpoint.get(part) or {}, own)
        ]
        if differing:
            raise UserError(
                "The checkpoint is of another model:\n" + "\n".join(differing) + "\nResume with the experiment and the "
                f"overrides of the run that wrote it, or start a new run{self.restart_hint}."
            )
        # Checkpoints are saved between updates, so these micro-batch counts are multiples of `was`.
        count = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        was, now = checkpoint["config"]["model"]["accumulate_grad_batches"], self.settings.accumulate_grad_batches
        count.update({name: value // was * now for name, value in count.items()})
        self.nonfinite.skipped = checkpoint["skipped_steps"]
        # Else Lightning's callbacks would restore the previous run's patience, and what was left of its trainer.max_time.
        checkpoint["callbacks"].pop("Timer", None)
        for callback in getattr(self._trainer, "early_stopping_callbacks", ()):
            checkpoint["callbacks"].get(callback.state_key, {})["patience"] = callback.patience


def encoder_fact(encoder: Any) -> tuple[str, str]:
    """Return the start-up table's row about an encoder."""
    untrained = " (UNTRAINED)" if encoder.untrained else ""
    return "encoder", f"{type(encoder).__name__} {encoder.source}, blocks {list(encoder.layers)}{untrained}"


def compile_in_place(parts: Sequence[nn.Module]) -> None:
    """Compile modules in place: parameter names, and so checkpoints, do not change. The EMA copy already exists."""
    # This would split graphs at DDP's gradient buckets; with one graph per block, communication overlaps the backward anyway.
    torch._dynamo.config.optimize_ddp = False
    # All blocks of a class share a limit of 8 graphs. Different widths, training, validation and float32 scores need more;
    # above the limit they would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for part in parts:
        part.compile()


def sizes(parts: Mapping[str, nn.Module | None]) -> str:
    """Return the number of parameters of each part as text."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return ", ".join(f"{name} {count / 1e6:.3g} M parameters" for name, count in counts.items())
