"""What a run ends with: the figures that people look for first."""

import logging
from typing import Any

import pytorch_lightning as pl

from src.callbacks.progress import TrainingProgress
from src.callbacks.samples import SampleImages
from src.callbacks.throughput import Throughput

log = logging.getLogger(__name__)


def summary(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Last values by logged name, and where the picture is; printed as a short table by the first process."""
    progress, samples, throughput = (_find(trainer, kind) for kind in (TrainingProgress, SampleImages, Throughput))
    result: dict[str, Any] = {"step": trainer.global_step, "epochs": trainer.current_epoch}
    if progress is not None:
        result |= progress.latest
    result |= {name: value for name, (_, value) in module.scores.items()}
    rows = [
        (name, f"{result[name]:.4f}")
        for name in sorted(result)
        if name.startswith(("train/l", "train/gan", "disc/loss", "val/", "rfid"))
    ]
    if "val/psnr" in module.scores_at_start and "val/psnr" in result:
        result["psnr_before"] = module.scores_at_start["val/psnr"]
        rows.append(
            (
                "PSNR before -> after",
                f"{result['psnr_before']:.2f} -> {result['val/psnr']:.2f} dB (EMA, held-out images)",
            )
        )
    if throughput is not None and throughput.mean_images_per_s:
        result["images_per_s"] = throughput.mean_images_per_s
        rows.append(("images/s", f"{result['images_per_s']:.1f}"))
    if samples is not None and samples.last_file is not None:
        result["picture"] = str(samples.last_file)
        rows.append(("originals above reconstructions", str(samples.last_file)))
    if trainer.is_global_zero:
        width = max(len(name) for name, _ in rows) if rows else 0
        log.info(
            "Done after %s steps:\n%s",
            f"{trainer.global_step:,}",
            "\n".join(f"  {name:<{width}}  {value}" for name, value in rows),
        )
    return result


def _find(trainer: pl.Trainer, kind: type) -> Any:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
