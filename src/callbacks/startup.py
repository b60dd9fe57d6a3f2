"""The start-up table: everything about a run that people would otherwise have to work out, before its first step."""

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

log = logging.getLogger(__name__)

PUBLISHED_BATCH = 512


class StartupTable(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            rows = describe(trainer, pl_module)
            width = max(len(name) for name, _ in rows)
            log.info("This run:\n%s", "\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
            warn(trainer, pl_module)


def describe(trainer: pl.Trainer, pl_module: Any) -> list[tuple[str, str]]:
    """(name, text) rows about a run that is about to start."""
    rae, data = pl_module.rae, trainer.datamodule
    discriminator = pl_module.discriminator
    frozen = {"encoder": rae.encoder, "LPIPS": pl_module.lpips, "DINO trunk": getattr(discriminator, "trunk", None)}
    trained = {"decoder": rae.decoder, "discriminator heads": getattr(discriminator, "heads", None)}
    return [
        ("device", f"{trainer.world_size} x {device_name(trainer.strategy.root_device)}"),
        ("precision", str(trainer.precision)),
        ("data", f"{data.train_size:,} training images, {data.val_size:,} held out; {data.data_dir}"),
        ("global batch", _batch(trainer, pl_module)),
        ("geometry", _geometry(rae)),
        (
            "encoder",
            f"{type(rae.encoder).__name__} {rae.encoder.source}, blocks {list(rae.encoder.layers)}{_untrained(rae.encoder)}",
        ),
        ("trained", _sizes(trained)),
        ("frozen", _sizes(frozen)),
        ("steps", _steps(trainer, pl_module)),
        ("starts", _starts(pl_module)),
        ("seed", str(pl_module.settings.loop.seed)),
        ("folder", trainer.default_root_dir),
    ]


def warn(trainer: pl.Trainer, pl_module: Any) -> None:
    starts, epochs = pl_module.settings.starts, trainer.max_epochs
    if pl_module.discriminator is not None and epochs and 0 < epochs <= starts.disc_start_epoch < float("inf"):
        log.warning(
            "The GAN term starts at epoch %g, but trainer.max_epochs=%d: this run trains without it. Lower model.disc_start_epoch "
            "and model.disc_upd_start_epoch, or set model.disc_weight=0 to do without the discriminator.",
            starts.disc_start_epoch, epochs,
        )  # fmt: skip
    if pl_module.discriminator is not None and starts.disc_start_epoch < starts.disc_upd_start_epoch:
        log.warning(
            "The GAN term starts at epoch %g, the discriminator's updates only at epoch %g: until then the decoder follows a "
            "discriminator that has learnt nothing. Set model.disc_upd_start_epoch to %g or less.",
            starts.disc_start_epoch, starts.disc_upd_start_epoch, starts.disc_start_epoch,
        )  # fmt: skip
    if trainer.strategy.root_device.type == "cpu" and not pl_module.rae.encoder.untrained:
        log.warning(
            "No GPU is used (torch is built for CUDA %s). trainer=gpu makes that an error.",
            torch.version.cuda or "none",
        )
    untrained = [
        name
        for name, part in (
            ("encoder", pl_module.rae.encoder),
            ("LPIPS", pl_module.lpips),
            ("discriminator trunk", pl_module.discriminator),
        )
        if part is not None and part.untrained
    ]
    if untrained:
        log.warning("UNTRAINED by request: %s. Random weights: not a result.", ", ".join(untrained))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _batch(trainer: pl.Trainer, pl_module: Any) -> str:
    each, accumulate = trainer.datamodule.batch_size, pl_module.settings.loop.accumulate_grad_batches
    batch = each * trainer.world_size * accumulate
    distance = (
        "as published"
        if batch == PUBLISHED_BATCH
        else f"{batch / PUBLISHED_BATCH:g} of the published {PUBLISHED_BATCH}"
    )
    return f"{each} x {trainer.world_size} process(es) x {accumulate} micro-batch(es) = {batch} ({distance})"


def _geometry(rae: Any) -> str:
    sizes = rae.geometry
    return (
        f"{sizes.image_size} px image -> {sizes.encoder_input_size} px encoder -> {sizes.grid} x {sizes.grid} latents of "
        f"{rae.latent_shape[0]} -> patches of {sizes.decoder_patch} px"
    )


def _steps(trainer: pl.Trainer, pl_module: Any) -> str:
    limit = f", at most {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    return f"{pl_module.steps_per_epoch:,} an epoch, {trainer.max_epochs} epoch(s){limit}"


def _starts(pl_module: Any) -> str:
    steps = pl_module.settings.starts.steps(pl_module.steps_per_epoch)
    parts = {
        "LPIPS": (pl_module.lpips, steps["lpips"]),
        "discriminator": (pl_module.discriminator, steps["disc"]),
        "GAN term": (pl_module.discriminator, steps["gan"]),
    }
    return (
        ", ".join(
            f"{name} at step {step:,}"
            for name, (part, step) in parts.items()
            if part is not None and step < float("inf")
        )
        or "L1 only"
    )


def _sizes(parts: dict[str, nn.Module | None]) -> str:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())


def _untrained(part: Any) -> str:
    return " (UNTRAINED)" if part.untrained else ""
