"""LightningModule for stage-1 training of a representation autoencoder. Source: RAE (arXiv 2510.11690).

The mathematics of a step is in `src/training/stage1_step.py`; this file schedules the losses and updates the weights. Two
optimisers alternate; every step count is in generator updates.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.core.distributed import average_gradients
from src.core.ema import EMA
from src.core.errors import UserError
from src.core.images import bytes_to_unit, unit_to_bytes
from src.core.random_streams import Purpose
from src.core.requirements import USERS_CHOICE
from src.formats.checkpoint import RAESettings
from src.losses.lpips import LPIPS
from src.metrics.quality import RunningMeans, psnr, ssim
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE, geometry_of
from src.training.generated_latents import GeneratedLatents
from src.training.module import StageModule, encoder_fact, sizes
from src.training.optimizers import adamw, loss_scale, step_optimizer
from src.training.settings import ModelSettings
from src.training.stage1_step import Fake, Label, Phase, TrainingStep
from src.training.step_noise import StepNoise

log = logging.getLogger(__name__)

PURPOSES = {"fake": Purpose.AUGMENT_FAKE, "real": Purpose.AUGMENT_REAL}


class RAEModule(StageModule):
    """Trains and checkpoints the decoder, its EMA and the discriminator's heads. Arguments: the keys of `model:`."""

    frozen: ClassVar[tuple[str, ...]] = ("rae.encoder.", "lpips.", "discriminator.trunk.", "generated.")
    published_batch: ClassVar[int] = 512
    sample_row_names: ClassVar[str] = "originals above reconstructions"
    settings: ModelSettings

    def __init__(self, **config: Any) -> None:
        settings = ModelSettings.parse(config)
        super().__init__(settings)
        arch, augment, seed = settings.disc_arch.arch, settings.disc_arch.augment, settings.seed
        self.rae = RAE(**{name: getattr(settings, name) for name in RAESettings.model_fields})
        self.encoder_identity = self.rae.encoder.identity()  # of the loaded weights, before any cast
        self.ema = EMA(self.rae.decoder, settings.ema_decay)
        self.ema_decoder = self.ema.average
        self.lpips = LPIPS(**vars(settings.lpips_arch)) if settings.perceptual_weight > 0 else None
        self.discriminator = DinoDiscriminator(**vars(arch), seed=seed) if settings.disc_weight > 0 else None
        self.step = TrainingStep(self.rae, self.lpips, self.discriminator, augment, settings)
        self.noise = StepNoise(self.rae, augment, settings.noise, settings.layer_subset, seed)
        chosen = settings.generated.checkpoint is not None
        if chosen and settings.layer_subset.kind != "none":
            raise UserError(
                "model.generated.checkpoint and model.layer_subset exclude each other: generated latents hold all blocks. Set "
                "model.layer_subset.kind=none."
            )
        self.generated = GeneratedLatents(settings.generated, self.rae, seed) if chosen else None
        self.disc_scaler = torch.amp.GradScaler("cuda", enabled=False)
        self._restored_scaler: Mapping[str, Any] = {}
        self._micro_batches: list[tuple[Mapping[str, Any], Tensor | Fake]] = []
        self.exchange_gradients_of("rae.decoder.")

    # -- schedule

    def phase(self, step: int) -> Phase:
        """Return which losses and updates are on at `step`."""
        if self.phase_override is not None:
            return self.phase_override
        starts = self.settings.start_steps(self.steps_per_epoch)
        adversarial = self.discriminator is not None
        return Phase(
            lpips=self.lpips is not None and step >= starts["lpips"],
            gan=adversarial and step >= starts["gan"],
            disc=adversarial and step >= starts["disc"],
        )

    def learning_rates(self, step: int) -> dict[str, float]:
        return {
            "generator": self.settings.scheduler.lr(step, self.steps_per_epoch),
            "discriminator": self._discriminator_lr(step, 0),
        }

    def _discriminator_lr(self, step: int, update: int) -> float:
        """Return the learning rate of an update of D, whose schedule counts only these; `update`: from 0 in each `step`."""
        first = self.settings.start_steps(self.steps_per_epoch)["disc"]
        done = int(max(step - first, 0)) * self.settings.disc_updates + update
        return self.settings.disc_scheduler.lr(done, self.steps_per_epoch)

    # -- training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = [adamw(self.rae.decoder, self.settings.optimizer)]
        if self.discriminator is not None:
            optimizers.append(adamw(self.discriminator.heads, self.settings.disc_optimizer))
        return optimizers

    def scalers(self) -> dict[str, torch.amp.GradScaler | None]:
        return {"generator": super().scalers()["network"], "discriminator": self.disc_scaler}

    def compute_gradients(self, batch: Mapping[str, Any], batch_idx: int, step: int, share: float) -> dict[str, Tensor]:
        phase = self.phase(step)
        draws = self.noise.augment(Purpose.AUGMENT_GENERATOR, batch, batch_idx, 0, self.device) if phase.gan else None
        result = self.step.generator(
            bytes_to_unit(batch["image"]),
            self.noise.latents(batch, self.device),
            draws,
            phase,
            backward=self.manual_backward,
            loss_scale=loss_scale(self.scalers()["generator"], self.device),
            share=share,
            layers=self.noise.blocks(step),
            resample=None if self.generated is None else partial(self.generated, self.rae, batch=batch),
        )
        if result.fake_source is not None:
            self._micro_batches.append((batch, result.fake_source))
        return result.terms

    def update(self, step: int, batch_idx: int, terms: Mapping[str, Tensor]) -> None:
        if self.scalers()["generator"] is not None:
            # These come from scaled gradients, whose overflows the scaler handles.
            terms = {name: value for name, value in terms.items() if name not in ("adaptive_weight", "loss")}
        self.step_counted(step, terms)
        if self._micro_batches:
            self._update_discriminator(step, batch_idx)

    def _update_discriminator(self, step: int, batch_idx: int) -> None:
        assert self.discriminator is not None
        batches, sources = map(list, zip(*self._micro_batches, strict=True))
        self._micro_batches = []
        first = batch_idx + 1 - len(batches)

        def draws(label: Label, number: int, update: int) -> Any:
            return self.noise.augment(PURPOSES[label], batches[number], first + number, update, self.device)

        scale = partial(loss_scale, self.disc_scaler, self.device)
        images = [batch["image"] for batch in batches]
        for update, terms in enumerate(self.step.discriminator_updates(images, sources, draws, scale)):
            average_gradients(self.discriminator.heads.parameters())
            step_optimizer(
                self.optimizer_list()[1].optimizer,  # bare, so that Lightning does not count its steps
                self._discriminator_lr(step, update),
                self.nonfinite,
                step,
                {"loss": terms["loss"]},
                prefix="discriminator ",
                scaler=self.disc_scaler,
            )
            self.train_terms |= {f"disc/{name}": value for name, value in terms.items()}

    # -- evaluation

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return noise-free reconstructions with the EMA weights, float, not clamped. images: B 3 H W, uint8 or in [0, 1]."""
        return self.rae.decode_raw(self.rae.encode_raw(images), self.ema_decoder).float()

    def on_validation_epoch_start(self) -> None:
        everything = Phase(lpips=self.lpips is not None, gan=True, disc=True)
        self._terms = self.step.reconstruction_terms(everything)
        self._means = RunningMeans([*self._terms, "psnr", "ssim"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        images = bytes_to_unit(batch["image"])
        output = self.reconstruct(images)
        values = {
            name: term(output, images).reshape(len(images), -1).mean(1) for name, (_, term) in self._terms.items()
        }
        pixels = unit_to_bytes(output)
        self._means.update(values | {"psnr": psnr(batch["image"], pixels), "ssim": ssim(batch["image"], pixels)})

    def on_validation_epoch_end(self) -> None:
        means = self._means.reduce().means()
        means["loss"] = sum(weight * means[name] for name, (weight, _) in self._terms.items())
        del self._terms  # its functions can't be pickled
        self.record_scores({f"val/{name}": value for name, value in means.items()})

    def sample_rows(self, images: Tensor) -> list[Tensor]:
        return [images, unit_to_bytes(self.reconstruct(images))]

    # -- checks and start-up table

    @classmethod
    def check_arguments(cls, config: Mapping[str, Any]) -> None:
        """Raise UserError for wrong keys and values, sizes that don't fit, and values an experiment leaves to the user."""
        if config.get("pretrained_decoder_path") == USERS_CHOICE:  # `???` would lose to the base's null
            raise UserError(
                "This experiment starts from a decoder: add model.pretrained_decoder_path=PATH to the command. PATH is a "
                "decoder file with the official names (model.pt), a folder that src/export.py wrote, a diffusers "
                "AutoencoderRAE folder, or a .ckpt of a run."
            )
        rae = ModelSettings.parse(config)
        geometry_of(rae.encoder_cls, rae.encoder_params, rae.decoder_patch_size, rae.image_size, rae.encoder_input_size)

    def startup_rows(self) -> list[tuple[str, str]]:
        rae, geometry, encoder = self.rae, self.rae.geometry, self.rae.encoder
        heads = self.discriminator.heads if self.discriminator is not None else None
        trunk = self.discriminator.trunk if self.discriminator is not None else None
        steps = self.settings.start_steps(self.steps_per_epoch)
        parts = {"LPIPS": (self.lpips, "lpips"), "discriminator": (heads, "disc"), "GAN term": (heads, "gan")}
        begin = {name: steps[key] for name, (part, key) in parts.items() if part is not None and steps[key] < math.inf}
        images = f"{geometry.image_size} px image -> {geometry.encoder_input_size} px encoder input"
        latents = f"{geometry.grid} x {geometry.grid} latents, width {rae.latent_shape[0]}"
        frozen = {"encoder": encoder, "LPIPS": self.lpips, "DINO trunk": trunk, "sampler": self.generated}
        return [
            ("geometry", f"{images} -> {latents} -> decoder patches of {geometry.decoder_patch} px"),
            encoder_fact(encoder),
            ("trained", sizes({"decoder": rae.decoder, "discriminator heads": heads})),
            ("frozen", sizes(frozen)),
            ("starts", ", ".join(f"{name} at step {step:,}" for name, step in begin.items()) or "L1 only"),
        ]

    def likely_mistakes(self, max_epochs: int | None) -> list[str]:
        starts, found = self.settings, []
        if self.discriminator is None:
            return []
        if max_epochs and 0 < max_epochs <= starts.disc_start_epoch < math.inf:
            found.append(
                f"The GAN term starts at epoch {starts.disc_start_epoch:g}, but trainer.max_epochs={max_epochs}: this run trains "
                "without it. Lower model.disc_start_epoch and model.disc_upd_start_epoch, or set model.disc_weight=0 to "
                "train without the discriminator."
            )
        if starts.disc_start_epoch < starts.disc_upd_start_epoch:
            found.append(
                f"The GAN term starts at epoch {starts.disc_start_epoch:g}, the discriminator's updates only at epoch "
                f"{starts.disc_upd_start_epoch:g}: until then the decoder trains against an untrained discriminator. Set "
                f"model.disc_upd_start_epoch to {starts.disc_start_epoch:g} or less."
            )
        return found

    def untrained_parts(self) -> list[str]:
        parts = {"encoder": self.rae.encoder, "LPIPS": self.lpips, "discriminator trunk": self.discriminator}
        return [name for name, part in parts.items() if part is not None and part.untrained]

    def loss_phases(self, planned: int) -> list[tuple[str, int, Any]]:
        starts = self.settings.start_steps(self.steps_per_epoch)
        borders = sorted({0, planned, *(min(step, planned) for step in starts.values())})
        found = []
        for first, end in pairwise(int(border) for border in borders):
            phase = self.phase(first)
            names = ["L1"] + ["LPIPS"] * phase.lpips + ["D"] * phase.disc + ["GAN"] * phase.gan
            found.append((" + ".join(names), end - first, phase))
        return found

    # -- setup and checkpoints

    def on_fit_start(self) -> None:
        if self.generated is not None:
            self.generated.check_labels(self.trainer.datamodule.num_classes)
        half = self.scalers()["generator"] is not None
        self.disc_scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if half and self._restored_scaler:
            self.disc_scaler.load_state_dict(dict(self._restored_scaler))
        super().on_fit_start()

    def cast_when_half(self) -> Sequence[nn.Module]:
        return [self.rae.encoder, *([self.discriminator.trunk] if self.discriminator is not None else [])]

    def parts_to_compile(self) -> Sequence[nn.Module]:
        return parts_to_compile(self.rae, self.ema_decoder, self.lpips, self.discriminator)

    def identity(self) -> dict[str, dict[str, Any]]:
        geometry, decoder, arch = self.rae.geometry, self.rae.decoder, self.settings.disc_arch.arch
        architecture = {
            "data.image_size": geometry.image_size,
            "model.decoder_patch_size": geometry.decoder_patch,
            "encoder patch": geometry.encoder_patch,
            "latent channels": self.rae.latent_shape[0],
            "model.decoder_denormalize": self.rae.decoder_denormalize,
            "model.train_positions": decoder.decoder_pos_embed.requires_grad,
            **{f"decoder config: {name}": value for name, value in vars(decoder.config).items()},
            "discriminator": None if self.discriminator is None else arch.name,
        }
        return {"architecture": architecture, "encoder": self.encoder_identity}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["disc_scaler"] = self.disc_scaler.state_dict()
        if self.generated is not None:
            checkpoint["generator_step"] = self.generated.trained_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._restored_scaler = checkpoint["disc_scaler"]
        was, now = checkpoint.get("generator_step"), self.generated and self.generated.trained_steps
        if None not in (was, now) and was != now:
            log.warning(
                "The file of model.generated.checkpoint was of step %s and is now of step %s: this run differs from the one it "
                "resumes.", was, now,
            )  # fmt: skip


def parts_to_compile(
    rae: RAE, ema_decoder: nn.Module, lpips: LPIPS | None, discriminator: DinoDiscriminator | None
) -> list[nn.Module]:
    """Return the modules worth compiling."""
    losses = [lpips, *((discriminator.trunk, discriminator.heads.head) if discriminator is not None else ())]
    blocks = [*rae.encoder.blocks(), *rae.decoder.decoder_layers, *ema_decoder.decoder_layers]
    return [*blocks, *(part for part in losses if part is not None)]
