"""Which curves a report shows, with what is said of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from src.reporting.reading import Run

_MAX_OTHERS = 24
_UNSHOWN = ("/images", "/seconds")  # of evaluations: they stand beside the scores


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    about: str
    tags: tuple[tuple[str, str], ...]
    """(logged name, name in the legend)."""
    better: str = ""
    """`low` or `high`: the best value is marked."""
    format: str = ""
    logarithmic: bool = False
    """Whether a logarithmic axis is offered."""


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "Of the generator in training, and L1 with weighted LPIPS on held-out images (EMA weights).",
        (("train/loss", "training"), ("val/loss", "held out")),
        logarithmic=True,
    ),
    Chart(
        "rfid",
        "rFID",
        "Fréchet distance of reconstructions and originals (EMA weights); lower is better.",
        (("rfid/score", "during training"), ("rfid_full/score", "all images")),
        "low",
        logarithmic=True,
    ),
    Chart(
        "rfid_untrained",
        "FID distance by an UNTRAINED Inception network",
        "Moves like rFID, but is no rFID and compares with nothing published.",
        (("rfid_untrained/score", "during training"), ("rfid_untrained_full/score", "all images")),
        "low",
        logarithmic=True,
    ),
    Chart(
        "psnr",
        "PSNR (dB)",
        "Of reconstructions by the EMA weights; higher is better.",
        (
            ("val/psnr", "held out"),
            ("rfid/psnr", "with rFID"),
            ("rfid_untrained/psnr", "with FID distance"),
            ("rfid_full/psnr", "all images"),
            ("rfid_untrained_full/psnr", "all images"),
        ),
        "high",
    ),
    Chart(
        "l1",
        "L1",
        "Mean absolute difference of images in [0, 1].",
        (("train/l1", "training"), ("val/l1", "held out")),
        logarithmic=True,
    ),
    Chart(
        "lpips",
        "LPIPS",
        "Perceptual distance; lower is better.",
        (
            ("train/lpips", "training"),
            ("val/lpips", "held out"),
            ("rfid/lpips", "with rFID"),
            ("rfid_untrained/lpips", "with FID distance"),
            ("rfid_full/lpips", "all images"),
            ("rfid_untrained_full/lpips", "all images"),
        ),
        logarithmic=True,
    ),
    Chart(
        "ssim",
        "SSIM",
        "Structural similarity; higher is better.",
        (
            ("val/ssim", "held out"),
            ("rfid/ssim", "with rFID"),
            ("rfid_untrained/ssim", "with FID distance"),
            ("rfid_full/ssim", "all images"),
            ("rfid_untrained_full/ssim", "all images"),
        ),
        "high",
    ),
    Chart("gan", "GAN term", "The generator's adversarial loss before weighting.", (("train/gan", "GAN term"),)),
    Chart(
        "weight",
        "Adaptive weight",
        "Ratio of gradient norms that scales the GAN term.",
        (("train/adaptive_weight", "adaptive weight"),),
        logarithmic=True,
    ),
    Chart(
        "disc",
        "Discriminator loss",
        "0 is a perfect discriminator, 1 (hinge) one that guesses.",
        (("disc/loss", "loss"),),
    ),
    Chart(
        "accuracy",
        "Discriminator accuracy",
        "Share of images told right; one half is guessing.",
        (("disc/accuracy", "accuracy"),),
        format=".3~p",
    ),
    Chart(
        "logits",
        "Discriminator logits",
        "Mean output for originals and reconstructions.",
        (("disc/logits_real", "originals"), ("disc/logits_fake", "reconstructions")),
    ),
    Chart(
        "grad",
        "Gradient norm",
        "Of the decoder, before clipping.",
        (("train/grad_norm", "gradient norm"),),
        logarithmic=True,
    ),
    Chart(
        "lr",
        "Learning rate",
        "",
        (("lr/generator", "generator"), ("lr/discriminator", "discriminator")),
        format="~e",
        logarithmic=True,
    ),
    Chart(
        "speed",
        "Throughput (images/s)",
        "All processes together; evaluation and pictures not counted.",
        (("perf/images_per_s", "images/s"),),
    ),
    Chart(
        "wait",
        "Waiting for data",
        "Share of the time; above a fifth, the data path is the bottleneck.",
        (("perf/data_wait", "waiting"),),
        format=".3~p",
    ),
    Chart(
        "memory",
        "Peak memory (GB)",
        "Of the first process's device; on a CPU, of the process.",
        (("perf/memory_gb", "memory"),),
    ),
)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Those with data in any run; names that nobody foresaw get a chart each. More than 24 of them are noted."""
    logged = sorted({name for run in runs for name in run.series})
    known = {tag for chart in CHARTS for tag, _ in chart.tags}
    others = [name for name in logged if name not in known and not name.endswith(_UNSHOWN)]
    if len(others) > _MAX_OTHERS:
        runs[0].notes.append(
            f"{len(others) - _MAX_OTHERS} more logged figures are not drawn: {', '.join(others[_MAX_OTHERS:])}."
        )
    found = [chart for chart in CHARTS if any(tag in logged for tag, _ in chart.tags)]
    return found + [Chart(f"other-{i}", name, "", ((name, name),)) for i, name in enumerate(others[:_MAX_OTHERS])]
