"""Stage-1 training of a representation autoencoder as a LightningModule. Source: RAE (arXiv 2510.11690).

The mathematics of a step is in `src/training/stage1_step.py`; this file says when it happens and to which weights.
Two optimisers take turns, so optimisation is manual; gradient accumulation, clipping and the skipping of bad steps, which
Lightning refuses then, are done here. Every count of steps is a count of generator updates.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from src.core.distributed import mean_over_ranks
from src.core.ema import EMA
from src.core.errors import UserError
from src.core.frozen_precision import cast_frozen
from src.core.images import bytes_to_unit, unit_to_bytes, unit_to_signed
from src.core.nonfinite import FiniteGuard
from src.core.weights import check_fit
from src.formats.checkpoint_content import describe, rescale, trained_state, verify
from src.losses.diffaug import DiffAug
from src.losses.gan import discriminator_loss, generator_loss
from src.losses.lpips import LPIPS
from src.metrics.quality import RunningMeans, psnr, ssim
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE
from src.training.optimisation import adamw, average_gradients, gradient_norm, scale_gradients
from src.training.settings import ModelSettings
from src.training.stage1_step import GeneratorResult, Phase, TrainingStep
from src.training.step_noise import StepDraws

FROZEN = ("rae.encoder.", "lpips.", "discriminator.trunk.")
"""Prefixes of what is never trained: in no checkpoint, no EMA, no gradient exchange."""
FORWARD_TERMS = ("l1", "lpips", "gan")
"""Terms that no gradient enters."""


class RAEModule(pl.LightningModule):
    """What trains and what is kept: the decoder, its EMA, the discriminator's heads. Arguments: the keys of `model:`."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = settings = ModelSettings.parse(config)
        self.run_config: dict[str, Any] = {}
        """The whole configuration of the run as plain values, for checkpoints; set by whoever builds the run."""
        self.rae = RAE(**vars(settings.rae))
        self.encoder_identity = self.rae.encoder.identity()  # of the weights as loaded, before any cast
        self.ema = EMA(self.rae.decoder, settings.loop.ema_decay)
        self.ema_decoder = self.ema.average
        self.lpips = LPIPS(**settings.lpips_arch) if settings.step.perceptual_weight > 0 else None
        self.discriminator: DinoDiscriminator | None = None
        augment = None
        if settings.step.disc_weight > 0:
            self.discriminator = DinoDiscriminator(**settings.disc_arch.arch, seed=settings.loop.seed)
            augment = DiffAug(**settings.disc_arch.augment)
        self.step = TrainingStep(
            self.rae,
            self.lpips,
            self.discriminator,
            augment,
            discriminator_loss(settings.loop.disc_loss),
            generator_loss(settings.loop.gen_loss),
            settings.step,
        )
        self.draws = StepDraws(settings, self.rae, augment)
        self.guard = FiniteGuard(settings.loop.max_skipped_steps)
        self.disc_scaler = torch.amp.GradScaler("cuda", enabled=False)
        self.train_terms: dict[str, Tensor] = {}
        """Scalars of the latest step by their logged names, still on the device."""
        self._micro_batches: list[tuple[Mapping[str, Any], GeneratorResult]] = []
        self.scores: dict[str, tuple[int, float]] = {}
        """Latest evaluation results by their logged names: (generator step, value)."""
        self.scores_at_start: dict[str, float] = {}
        """Of the validation before training, where there is one (`trainer.num_sanity_val_steps=-1`)."""
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in [*self.named_parameters(), *self.named_buffers()] if not name.startswith("rae.decoder.")
        ]  # read by DistributedDataParallel: it exchanges the decoder's gradients and nothing else

    # -- where training stands

    @property
    def steps_per_epoch(self) -> int:
        """Generator updates in an epoch; known once the trainer has its data."""
        return int(self.trainer.num_training_batches) // self.settings.loop.accumulate_grad_batches

    def phase(self, step: int) -> Phase:
        starts = self.settings.starts.steps(self.steps_per_epoch)
        adversarial = self.discriminator is not None
        return Phase(
            lpips=self.lpips is not None and step >= starts["lpips"],
            gan=adversarial and step >= starts["gan"],
            disc=adversarial and step >= starts["disc"],
        )

    def learning_rates(self, step: int) -> dict[str, float]:
        """Of the updates in `step`. The discriminator's schedule counts its own updates."""
        return {
            "generator": self.settings.scheduler.at(self.steps_per_epoch).lr(step),
            "discriminator": self._discriminator_lr(step, 0),
        }

    def _discriminator_lr(self, step: int, update: int) -> float:
        """`update`: of the discriminator, from 0 in each `step`."""
        first = self.settings.starts.steps(self.steps_per_epoch)["disc"]
        done = max(step - first, 0) * self.settings.loop.disc_updates + update
        return self.settings.disc_scheduler.at(self.steps_per_epoch).lr(done)

    # -- training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = [adamw(self.rae.decoder, self.settings.optimizer)]
        if self.discriminator is not None:
            optimizers.append(adamw(self.discriminator.heads, self.settings.disc_optimizer))
        return optimizers

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        accumulate = self.settings.loop.accumulate_grad_batches
        if batch_idx >= self.steps_per_epoch * accumulate:
            return  # fewer micro-batches than an update takes are left in this epoch
        step = self.global_step
        phase = self.phase(step)
        last = batch_idx % accumulate == accumulate - 1
        images = bytes_to_unit(batch["image"])
        draws = self.draws.generator(batch, batch_idx, step, images.device, phase)
        with nullcontext() if last else self._without_gradient_exchange():
            result = self.step.generator(
                images,
                draws.noise,
                draws.augment,
                phase,
                backward=lambda output, gradient: self.manual_backward(output, gradient=gradient),
                average=mean_over_ranks,
                loss_scale=self._loss_scale(),
                gradient_weight=1 / accumulate,
                layers=draws.layers,
            )
        self._collect(
            {f"train/{name}": value for name, value in result.terms.items()},
            1 / accumulate,
            batch_idx % accumulate == 0,
        )
        if phase.disc:
            self._micro_batches.append((batch, result))
        if last:
            self._update_generator(step, result.terms)
            if phase.disc:
                self._update_discriminator(step, batch_idx)

    def _update_generator(self, step: int, terms: Mapping[str, Tensor]) -> None:
        optimizer = self._lightning_optimizers()[0]
        parameters = [p for p in self.rae.decoder.parameters() if p.requires_grad]
        norm = gradient_norm(parameters) / self._loss_scale()
        self.train_terms["train/grad_norm"] = norm
        scaled = self._generator_scaler() is not None
        if scaled:  # then it is the scaler's task to skip gradients that overflow, and what is made of them
            found = self.guard.observe(step, {name: terms[name] for name in terms if name in FORWARD_TERMS})
        else:
            found = self.guard.observe(step, {**terms, "gradient": norm})
        if self.settings.loop.gradient_clip_val is not None:
            scale_gradients(parameters, (self.settings.loop.gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))
        with record_function("optimizer"):
            _prepare(optimizer.optimizer, self.learning_rates(step)["generator"], None if scaled else found)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with record_function("ema"):
            self.ema.update()

    def _update_discriminator(self, step: int, batch_idx: int) -> None:
        assert self.discriminator is not None
        optimizer = self._lightning_optimizers()[1].optimizer  # Lightning counts the steps of the other one only
        micro_batches, self._micro_batches = self._micro_batches, []
        first = batch_idx + 1 - len(micro_batches)
        fakes = [self.step.fake(result) for _, result in micro_batches]
        for update in range(self.settings.loop.disc_updates):
            scale = self.disc_scaler.scale(torch.ones((), device=self.device))
            terms: dict[str, Tensor] = {}
            for label in ("fake", "real"):  # the published order; the power iteration comes before each
                self.discriminator.power_iteration()
                for number, ((batch, _), fake) in enumerate(zip(micro_batches, fakes, strict=True)):
                    draws = self.draws.discriminator(label, batch, first + number, update, self.device)
                    values = self.step.discriminate(
                        fake if label == "fake" else unit_to_signed(bytes_to_unit(batch["image"])),
                        draws,
                        label,
                        backward=lambda loss, weight: loss.backward(weight),
                        loss_scale=scale,
                        gradient_weight=1 / len(micro_batches),
                    )
                    for name, value in values.items():
                        terms[name] = terms.get(name, 0) + value / len(micro_batches)
            self._step_discriminator(optimizer, step, update, terms)
        self._collect({f"disc/{name}": value for name, value in terms.items()}, 1.0, True)

    def _step_discriminator(
        self, optimizer: torch.optim.Optimizer, step: int, update: int, terms: Mapping[str, Tensor]
    ) -> None:
        assert self.discriminator is not None
        parameters = list(self.discriminator.heads.parameters())
        average_gradients(parameters)
        scaled = self.disc_scaler.is_enabled()
        norm = {} if scaled else {"discriminator gradient": gradient_norm(parameters)}
        found = self.guard.observe(step, {"discriminator loss": terms["loss"], **norm})
        _prepare(optimizer, self._discriminator_lr(step, update), None if scaled else found)
        self.disc_scaler.step(optimizer)
        self.disc_scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _collect(self, terms: Mapping[str, Tensor], share: float, first: bool) -> None:
        for name, value in terms.items():
            self.train_terms[name] = value * share + (0 if first else self.train_terms[name])

    def _without_gradient_exchange(self) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext()

    def _lightning_optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    # -- half precision

    def _generator_scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _loss_scale(self) -> Tensor | float:
        scaler = self._generator_scaler()
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def check_numbers(self) -> None:
        """Raise if losses or gradients have gone wrong too often. Waits for the device; called at logging and saving."""
        self.guard.check()
        for name, scaler in (("generator", self._generator_scaler()), ("discriminator", self.disc_scaler)):
            if scaler is not None and scaler.is_enabled() and scaler.get_scale() < 1:
                raise UserError(
                    f"The fp16 loss scale of the {name} fell to {scaler.get_scale():g}: its gradients overflow at every "
                    "step. Use trainer.precision=bf16 or 32, or a lower learning rate."
                )

    # -- evaluation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, weights: str = "ema") -> Tensor:
        """uint8 or [0, 1] images B 3 H W -> reconstructions, float, not clamped, without latent noise."""
        decoder = self.ema_decoder if weights == "ema" else self.rae.decoder
        return self.rae.decode_raw(self.rae.encode_raw(images), decoder).float()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        images = bytes_to_unit(batch["image"])
        output = self.reconstruct(images)
        values = {"l1": (output - images).abs().mean((1, 2, 3))}
        if self.lpips is not None:
            values["lpips"] = self.lpips(unit_to_signed(output), unit_to_signed(images))
        pixels = unit_to_bytes(output)
        values |= {"psnr": psnr(batch["image"], pixels), "ssim": ssim(batch["image"], pixels)}
        self._evaluation.update(values)

    def on_validation_epoch_start(self) -> None:
        self._evaluation = RunningMeans(["l1", "psnr", "ssim"] + ["lpips"] * (self.lpips is not None))

    def on_validation_epoch_end(self) -> None:
        means = self._evaluation.reduce().means()
        means["loss"] = means["l1"] + self.settings.step.perceptual_weight * means.get("lpips", 0.0)
        values = {f"val/{name}": value for name, value in means.items()}
        if self.trainer.sanity_checking:
            self.scores_at_start = values
        else:
            self.scores |= {name: (self.global_step, value) for name, value in values.items()}
        self.write_metrics(values)

    def write_metrics(self, values: Mapping[str, float]) -> None:
        """To every logger, at the current generator step."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    # -- set-up

    def on_fit_start(self) -> None:
        half = self._generator_scaler() is not None
        self.disc_scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if self._restored_scaler and half:
            self.disc_scaler.load_state_dict(self._restored_scaler)
        self._cast_frozen()
        if self.settings.loop.compile:
            compile_parts(self)

    def _cast_frozen(self) -> None:
        """What runs under the trainer's autocast only. LPIPS is also used in evaluation, in float32."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.trainer.precision))
        for network in (self.rae.encoder, getattr(self.discriminator, "trunk", None)):
            if dtype is not None and network is not None:
                cast_frozen(network, dtype)

    def on_train_start(self) -> None:
        require_updates(int(self.trainer.num_training_batches), self.settings.loop.accumulate_grad_batches)
        loop = self.trainer.fit_loop  # says where a resumed run stands; the loader starts there
        done, whole = loop.epoch_loop.batch_progress.current.ready, int(self.trainer.num_training_batches)
        if done > whole:
            raise UserError(
                f"The checkpoint stands behind micro-batch {done} of its epoch, but an epoch now has {whole}: the global "
                "batch has grown. Resume with the data.batch_size x processes x trainer.accumulate_grad_batches of that run."
            )
        self.trainer.train_dataloader.resume_at(
            loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
        )
        if torch.distributed.is_initialized():  # DDP leaves what it ignores to us
            for tensor in trained_state(self, FROZEN).values():
                torch.distributed.broadcast(tensor, src=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Images only, as bytes and without waiting. All else is for the host and leaves as arrays: tensors DDP would move
        to the GPU, and reading them back would wait for all that the GPU still has to do."""
        host = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in batch.items()}
        return {**host, "image": batch["image"].to(device, non_blocking=True)}

    # -- checkpoints

    _restored_scaler: Mapping[str, Any] | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What was trained and cannot be had elsewhere."""
        return trained_state(self, FROZEN, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        check_fit(self.state_dict(), state_dict, "The checkpoint", "this model")
        return nn.Module.load_state_dict(self, state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(describe(self))
        checkpoint["skipped_steps"] = self.guard.skipped
        checkpoint["disc_scaler"] = self.disc_scaler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        verify(self, checkpoint)
        was = checkpoint["config"]["model"]["accumulate_grad_batches"]
        rescale(checkpoint["loops"], was, self.settings.loop.accumulate_grad_batches)
        self.guard.skipped = checkpoint["skipped_steps"]
        self._restored_scaler = checkpoint["disc_scaler"]


def _prepare(optimizer: torch.optim.Optimizer, lr: float, found_inf: Tensor | None) -> None:
    """Set the learning rate; where `found_inf` is 1 the fused update leaves weights and moments as they are."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if found_inf is not None:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]


def require_updates(micro_batches: int, accumulate: int) -> None:
    """Raises UserError where an epoch has no whole update."""
    if micro_batches < accumulate:
        raise UserError(
            f"An epoch has {micro_batches} micro-batch(es) and an update takes {accumulate} (trainer.accumulate_grad_batches): "
            "nothing would be trained. Lower that, or data.batch_size, or raise trainer.limit_train_batches."
        )


def compile_parts(module: nn.Module) -> None:
    """Compile in place what pays: names, and so checkpoints, stay as they are, and the EMA was made before."""
    # DDP's graphs would be cut where its gradient buckets end; block by block, exchange and backward overlap as it is.
    torch._dynamo.config.optimize_ddp = False
    parts = [*module.rae.encoder.blocks(), *module.rae.decoder.decoder_layers, *module.ema_decoder.decoder_layers]
    if module.lpips is not None:
        parts.append(module.lpips.vgg)
        module.lpips.fused = True
    if module.discriminator is not None:
        parts.append(module.discriminator.trunk)
    for part in parts:
        part.compile()
