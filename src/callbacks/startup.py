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
    rae, loop, data = pl_module.rae, pl_module.settings.loop, trainer.datamodule
    geometry, starts = rae.geometry, pl_module.settings.starts.steps(pl_module.steps_per_epoch)
    batch = data.batch_size * trainer.world_size * loop.accumulate_grad_batches
    frozen = {"encoder": rae.encoder, "LPIPS": pl_module.lpips, "DINO trunk": getattr(pl_module.discriminator, "trunk", None)}
    trained = {"decoder": rae.decoder, "discriminator heads": getattr(pl_module.discriminator, "heads", None)}
    return [
        ("device", f"{trainer.world_size} x {device_name(pl_module.device)}"),
        ("precision", str(trainer.precision)),
        ("data", f"{data.train_size:,} training images, {data.val_size:,} held out; {data.data_dir}"),
        ("global batch", f"{data.batch_size} x {trainer.world_size} process(es) x {loop.accumulate_grad_batches} micro-batch(es) = {batch}" + _distance(batch)),
        ("geometry", f"{geometry.image_size} px image -> {geometry.encoder_input_size} px encoder -> {geometry.grid} x {geometry.grid} latents of "
                     f"{rae.latent_shape[0]} -> patches of {geometry.decoder_patch} px"),
        ("encoder", f"{pl_module.settings.rae.encoder_cls} {rae.encoder.source}, blocks {list(rae.encoder.layers)}" + _untrained(rae.encoder)),
        ("trained", _sizes(trained)),
        ("frozen", _sizes(frozen)),
        ("steps", f"{pl_module.steps_per_epoch:,} an epoch, {trainer.max_epochs} epoch(s)" + (f", at most {trainer.max_steps:,}" if trainer.max_steps > 0 else "")),
        ("starts", ", ".join(f"{label} at step {starts[name]:,}" for name, label in (("lpips", "LPIPS"), ("disc", "discriminator"), ("gan", "GAN term"))
                             if (pl_module.lpips if name == "lpips" else pl_module.discriminator) is not None) or "L1 only"),
        ("seed", str(loop.seed)),
        ("folder", trainer.default_root_dir),
    ]  # fmt: skip


def warn(trainer: pl.Trainer, pl_module: Any) -> None:
    starts, epochs = pl_module.settings.starts, trainer.max_epochs
    if pl_module.discriminator is not None and epochs and 0 < epochs <= starts.disc_start_epoch:
        log.warning(
            "The GAN term starts at epoch %g, but trainer.max_epochs=%d: this run trains without it. Lower model.disc_start_epoch "
            "and model.disc_upd_start_epoch, or set model.disc_weight=0 to do without the discriminator.",
            starts.disc_start_epoch, epochs,
        )  # fmt: skip
    untrained = [
        name
        for name, part in (("encoder", pl_module.rae.encoder), ("LPIPS", pl_module.lpips), ("discriminator trunk", pl_module.discriminator))
        if part is not None and part.untrained
    ]
    if untrained:
        log.warning("UNTRAINED by request: %s. Figures of this run say nothing of the method.", ", ".join(untrained))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _distance(batch: int) -> str:
    return " (as published)" if batch == PUBLISHED_BATCH else f" ({batch / PUBLISHED_BATCH:g} of the published {PUBLISHED_BATCH})"


def _sizes(parts: dict[str, nn.Module | None]) -> str:
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())


def _untrained(part: Any) -> str:
    return " (UNTRAINED)" if part.untrained else ""
