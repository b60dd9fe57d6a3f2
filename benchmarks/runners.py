"""Build and run the published step and ours, on the same untrained networks at their real sizes."""

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_step import PlainStep, step_settings
from benchmarks.surroundings import device_option
from src.core.ema import EMA
from src.core.images import bytes_to_unit
from src.core.nonfinite import NonFiniteCounter
from src.core.options import positive
from src.core.precision import cast_frozen
from src.core.weights import PROJECT_ROOT, SizedWeights
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug
from src.losses.lpips import LPIPS
from src.models.dino import RECIPES
from src.models.discriminator import DinoDiscriminator
from src.models.rae import RAE
from src.training.module import compile_in_place
from src.training.optimizers import adamw, loss_scale, step_optimizer
from src.training.settings import OptimizerSettings
from src.training.stage1 import parts_to_compile
from src.training.stage1_step import LatentNoise, Phase, TrainingStep

PHASES = {"warmup": Phase(True, False, False), "disc": Phase(True, False, True), "gan": Phase(True, True, True)}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = {
    "dinov2_b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3},
}
DECODERS = sorted(file.parent.name for file in (PROJECT_ROOT / "configs/decoder").glob("*/config.json"))
VARIANTS = ("plain", "ours", "compiled")
LR = 2e-4
PATCH = 16
"""Side of the decoder's patches, px."""
AUGMENT = DiffAug(prob=1.0, cutout=0.0)


@dataclass
class Models:
    rae: RAE
    lpips: LPIPS
    discriminator: DinoDiscriminator
    augment: DiffAug


class PlainRunner:
    """The published step with what surrounds it: float images, fused AdamW, an EMA loop over tensors."""

    def __init__(self, models: Models, device: torch.device) -> None:
        self.device = device
        self.models = models
        self.step = PlainStep(models.rae, models.lpips, models.discriminator, models.augment, 1.0, 0.75, 1e4)
        self.average = deepcopy(models.rae.decoder).requires_grad_(False)
        trained = models.rae.decoder, models.discriminator.heads
        trained = [[p for p in module.parameters() if p.requires_grad] for module in trained]
        self.optimizers = [torch.optim.AdamW(p, LR, (0.9, 0.95), weight_decay=0.0, fused=True) for p in trained]

    def run(self, images: Tensor, draws: Any, phase: Phase) -> None:
        x = bytes_to_unit(images)
        self.step.generator(x, draws.noise, draws.augment[0], phase)
        with torch.profiler.record_function("optimizer"):
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()
        with torch.no_grad(), torch.profiler.record_function("ema"):
            for kept, new in zip(self.average.parameters(), self.models.rae.decoder.parameters(), strict=True):
                kept.mul_(0.9978).add_(new, alpha=1 - 0.9978)
        if phase.disc:
            self.step.discriminate(x, self.step.fake(x), draws.augment[1], draws.augment[2])
            with torch.profiler.record_function("optimizer"):
                self.optimizers[1].step()
        self.optimizers[1].zero_grad()


class OurRunner:
    """The step as `src/training/stage1.py` runs it, without Lightning, data loader and random draws."""

    def __init__(self, models: Models, device: torch.device, options: dict[str, Any]) -> None:
        self.models = models
        settings = step_settings(disc_fake=options["disc_fake"], loss_chunk_size=options["loss_chunk_size"])
        self.step = TrainingStep(models.rae, models.lpips, models.discriminator, models.augment, settings)
        models.rae.decoder.activation_checkpointing = options["activation_checkpointing"]
        self.ema = EMA(models.rae.decoder, 0.9978)
        self.optimizers = [
            adamw(module, OptimizerSettings(lr=LR, betas=(0.9, 0.95), weight_decay=0.0))
            for module in (models.rae.decoder, models.discriminator.heads)
        ]
        self.counter, self.steps, self.accumulate = NonFiniteCounter(0), 0, 1
        self.device, scaled = device, options["dtype"] == torch.float16
        self.scalers = [torch.amp.GradScaler(device.type) if scaled else None for _ in self.optimizers]
        if options["dtype"] is not None:
            cast_frozen(models.rae.encoder, options["dtype"])
            cast_frozen(models.discriminator.trunk, options["dtype"])
        if options["compile"]:
            compile_in_place(parts_to_compile(models.rae, self.ema.average, models.lpips, models.discriminator))

    def run(self, images: Tensor, draws: Any, phase: Phase) -> None:
        terms, sources = {}, []
        for _ in range(self.accumulate):
            result = self.step.generator(
                bytes_to_unit(images), draws.noise, draws.augment[0], phase, self._backward, self._scale(0),
                1 / self.accumulate,
            )  # fmt: skip
            terms |= result.terms
            sources += [] if result.fake_source is None else [result.fake_source]
            del result
        self.update(0, terms)
        with torch.profiler.record_function("ema"):
            self.ema.update()
        if phase.disc:
            for terms in self.step.discriminator_updates(
                [images] * self.accumulate, sources, lambda label, *_: draws.augment[1 + (label == "real")],
                partial(self._scale, 1),
            ):  # fmt: skip
                self.update(1, terms)
        self.steps += 1

    def update(self, which: int, terms: dict[str, Tensor]) -> None:
        step_optimizer(self.optimizers[which], LR, self.counter, self.steps, terms, scaler=self.scalers[which])

    def _scale(self, which: int) -> Tensor | float:
        return loss_scale(self.scalers[which], self.device)

    def _backward(self, output: Tensor, gradient: Tensor) -> None:
        scaler = self.scalers[0]
        (output if scaler is None else scaler.scale(output)).backward(gradient)


@dataclass
class Draws:
    noise: LatentNoise
    augment: list[Any]


def build_models(arguments: argparse.Namespace, device: torch.device) -> Models:
    """Create untrained networks, the same at each call. Weights are drawn on the device: on a CPU this takes long."""
    folder = PROJECT_ROOT / "configs/encoder/dinov2_tiny"
    config = {**json.loads((folder / "config.json").read_text()), **ENCODERS[arguments.encoder], "image_size": 518}
    scratch = Path(arguments.scratch) / "encoder"
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(config))
    (scratch / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    torch.manual_seed(0)
    params = {"dinov2_path": str(scratch), "weights": "untrained"}
    small = arguments.encoder == "tiny"
    weights: SizedWeights = "tiny" if small else "untrained"
    with device:
        rae = RAE(
            "Dinov2withNorm", str(scratch), params, f"configs/decoder/{arguments.decoder}", PATCH, arguments.image_size
        )
        lpips = LPIPS(None, None, weights)
        discriminator = DinoDiscriminator(
            None, ks=5 if small else 9, key_depths=(1, 3) if small else (2, 5, 8, 11), norm_type="bn", using_spec_norm=True,
            recipe=arguments.disc, weights=weights,
        )  # fmt: skip
    return Models(rae, lpips, discriminator, AUGMENT)


def make_inputs(arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Draws]:
    """Draw the images and random numbers of a step on a device, the same at each call."""
    rng = torch.Generator(device).manual_seed(1)
    uniform = partial(torch.rand, generator=rng, device=device)
    batch, size, grid = arguments.batch, arguments.image_size, arguments.image_size // PATCH
    latents = batch, ENCODERS[arguments.encoder]["hidden_size"], grid, grid
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=rng, device=device)
    noise = LatentNoise(uniform(batch, 1, 1, 1), torch.randn(latents, generator=rng, device=device))
    augment = [AUGMENT.draw(uniform(UNIFORMS_PER_BATCH).cpu(), uniform(batch, UNIFORMS_PER_SAMPLE)) for _ in range(3)]
    return images, Draws(noise, augment)


def step_parser(description: str | None, variants: Sequence[str], phases: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks of the stage-1 step share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_option, default="cpu", help="cpu or cuda")
    parser.add_argument("--decoder", choices=DECODERS, default="ViTB", help="folder in configs/decoder")
    parser.add_argument("--disc", choices=sorted(RECIPES), default="S_8", help="DINO trunk of the discriminator")
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", default="logs/benchmark", help="folder for untrained files")
    parser.add_argument("--memory_only", action="store_true", help="print peaks as JSON (internal use)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def make_runner(name: str, models: Models, device: torch.device, options: dict[str, Any]) -> Any:
    """Create a runner for one of VARIANTS. `options`: disc_fake, loss_chunk_size, activation_checkpointing, autocast `dtype`."""
    if name == "plain":
        for parameter in models.lpips.vgg.parameters():
            parameter.data = parameter.data.contiguous()
        return PlainRunner(models, device)
    return OurRunner(models, device, {**options, "compile": name == "compiled"})
