"""Speed and memory of the training step against the published order of work, in one process, in turns.

    python benchmarks/train_step.py --decoder ViTB --batch 4 --precision fp32 bf16 --out benchmarks/results/cpu.json
    python benchmarks/train_step.py --device cuda --decoder ViTXL --batch 64 --precision bf16 --variants plain ours compiled

`plain` is `benchmarks/plain_step.py` with the optimiser, the average and the attention that the official code uses:
eager attention in decoder and DINO trunk, two encoder passes, every loss through the whole chain. `ours` is the step
that trains. All weights are untrained; shapes are the real ones. Phases: warmup (L1 + LPIPS), disc (D updates too), gan.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_step import PlainStep
from src.ema import EMA
from src.images import bytes_to_unit, unit_to_signed
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug
from src.losses.gan import discriminator_loss, generator_loss
from src.losses.lpips import LPIPS
from src.models.discriminator import DinoDiscriminator
from src.models.optimisation import adamw
from src.models.precision import cast_frozen
from src.models.rae import RAE
from src.models.rae_module import compile_parts
from src.models.settings import OptimizerSettings
from src.models.training_step import NoiseDraws, Phase, StepSettings, TrainingStep
from src.weights import PROJECT_ROOT

PHASES = {"warmup": Phase(True, False, False), "disc": Phase(True, False, True), "gan": Phase(True, True, True)}
PARTS = ("encode", "decode", "lpips", "gan", "adaptive_weight", "backward", "disc_decode", "disc", "optimizer", "ema")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = {
    "dinov2_b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3},
}


@dataclass
class Models:
    rae: RAE
    lpips: LPIPS
    discriminator: DinoDiscriminator
    augment: DiffAug


class PlainRunner:
    """The published step with its surroundings: two float copies of the images, unfused optimisers, a loop for the average."""

    def __init__(self, models: Models, device: torch.device) -> None:
        self.device = device
        self.models = models
        self.step = PlainStep(models.rae, models.lpips, models.discriminator, models.augment, 1.0, 0.75, 1e4)
        self.average = deepcopy(models.rae.decoder).requires_grad_(False)
        self.optimizers = [
            torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
            for module in (models.rae.decoder, models.discriminator.heads)
        ]  # fmt: skip

    def run(self, images: Tensor, draws: Any, phase: Phase) -> None:
        x = bytes_to_unit(images)
        with published_attention():
            self.step.generator(x, draws.noise, draws.augment[0], phase)
            with torch.profiler.record_function("optimizer"):
                self.optimizers[0].step()
                self.optimizers[0].zero_grad()
            with torch.no_grad(), torch.profiler.record_function("ema"):
                for kept, new in zip(self.average.parameters(), self.models.rae.decoder.parameters(), strict=True):
                    kept.mul_(0.9978).add_(new, alpha=1 - 0.9978)
            if phase.disc:
                self.step.discriminate(x, draws.augment[1], draws.augment[2])
                with torch.profiler.record_function("optimizer"):
                    self.optimizers[1].step()
            self.optimizers[1].zero_grad()


class OurRunner:
    """The step as `src/models/rae_module.py` runs it, without Lightning around it."""

    def __init__(self, models: Models, device: torch.device, options: dict[str, Any]) -> None:
        self.models = models
        settings = StepSettings(1.0, 0.75, 1e4, "global", options["disc_fake"], options["loss_chunk_size"])
        self.step = TrainingStep(
            models.rae,
            models.lpips,
            models.discriminator,
            models.augment,
            discriminator_loss("hinge"),
            generator_loss("hinge"),
            settings,
        )
        models.rae.decoder.activation_checkpointing = options["activation_checkpointing"]
        self.ema = EMA(models.rae.decoder, 0.9978)
        self.optimizers = [
            adamw(module, OptimizerSettings(2e-4, (0.9, 0.95), 0.0))
            for module in (models.rae.decoder, models.discriminator.heads)
        ]  # fmt: skip
        if options["dtype"] is not None:
            cast_frozen(models.rae.encoder, options["dtype"])
            cast_frozen(models.discriminator.trunk, options["dtype"])
        if options["compile"]:
            holder = nn.Module()
            holder.rae, holder.ema_decoder, holder.lpips, holder.discriminator = (
                models.rae,
                self.ema.average,
                models.lpips,
                models.discriminator,
            )
            compile_parts(holder)

    def run(self, images: Tensor, draws: Any, phase: Phase) -> None:
        x = bytes_to_unit(images)
        result = self.step.generator(
            x, draws.noise, draws.augment[0], phase, backward=lambda output, gradient: output.backward(gradient)
        )
        with torch.profiler.record_function("optimizer"):
            self.optimizers[0].step()
            self.optimizers[0].zero_grad(set_to_none=True)
        with torch.profiler.record_function("ema"):
            self.ema.update()
        if phase.disc:
            pairs = (("fake", self.step.fake(result), 1), ("real", unit_to_signed(x), 2))
            for label, pictures, number in pairs:
                self.models.discriminator.power_iteration()
                self.step.discriminate(
                    pictures, draws.augment[number], label, backward=lambda loss, weight: loss.backward(weight)
                )
            with torch.profiler.record_function("optimizer"):
                self.optimizers[1].step()
                self.optimizers[1].zero_grad(set_to_none=True)


@contextmanager
def published_attention():
    """Softmax attention in separate operations, as the official decoder and DINO trunk compute it."""
    import src.models.decoder as decoder
    import src.models.dino as dino

    class Eager:
        def __getattr__(self, name: str) -> Any:
            return getattr(F, name)

        @staticmethod
        def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            return scores.softmax(dim=-1) @ value

    decoder.F, dino.F = Eager(), Eager()  # type: ignore[assignment]
    try:
        yield
    finally:
        decoder.F, dino.F = F, F


@dataclass
class Draws:
    noise: NoiseDraws
    augment: list[Any]


def build_models(arguments: argparse.Namespace, device: torch.device) -> Models:
    folder = PROJECT_ROOT / "configs/encoder/dinov2_tiny"
    config = {**json.loads((folder / "config.json").read_text()), **ENCODERS[arguments.encoder], "image_size": 518}
    scratch = Path(arguments.scratch) / "encoder"
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "config.json").write_text(json.dumps(config))
    (scratch / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    torch.manual_seed(0)
    rae = RAE(
        "Dinov2withNorm",
        str(scratch),
        {"dinov2_path": str(scratch), "weights": "untrained"},
        f"configs/decoder/{arguments.decoder}",
        16,
        arguments.image_size,
    )
    small = arguments.encoder == "tiny"
    lpips = LPIPS(None, None, weights="untrained", **({"channels": (4, 8, 8, 16, 16)} if small else {}))
    discriminator = DinoDiscriminator(
        None, ks=5 if small else 9, key_depths=(1, 3) if small else (2, 5, 8, 11), norm_type="bn", using_spec_norm=True,
        recipe="tiny" if small else arguments.disc, weights="untrained",
    )  # fmt: skip
    for module in (rae, lpips, discriminator):
        module.to(device)
    return Models(rae, lpips, discriminator, DiffAug(prob=1.0, cutout=0.0))


def make_inputs(arguments: argparse.Namespace, models: Models, device: torch.device) -> tuple[Tensor, Draws]:
    rng = torch.Generator().manual_seed(1)
    batch = arguments.batch
    images = torch.randint(
        0, 256, (batch, 3, arguments.image_size, arguments.image_size), dtype=torch.uint8, generator=rng
    )
    noise = NoiseDraws(
        torch.rand(batch, generator=rng).to(device),
        torch.randn(batch, *models.rae.latent_shape, generator=rng).to(device),
    )
    augment = [
        models.augment.draw(
            torch.rand(UNIFORMS_PER_BATCH, generator=rng), torch.rand(batch, UNIFORMS_PER_SAMPLE, generator=rng)
        ).to(device)
        for _ in range(3)
    ]
    return images.to(device), Draws(noise, augment)


def measure(
    runners: dict[str, Any], images: Tensor, draws: Draws, phase: Phase, precision: str, repeats: int, warm: int
) -> dict[str, Any]:
    """Seconds per step of each variant, taken in turns, so that a change of the machine's speed meets all alike."""
    device = images.device
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(warm + repeats):
        for name, runner in runners.items():
            began = clock(device)
            with autocast(device, precision):
                runner.run(images, draws, phase)
            if turn >= warm:
                seconds[name].append(clock(device) - began)
    found = {}
    for name, runner in runners.items():
        with autocast(device, precision), FlopCounterMode(display=False) as flops:
            parts = part_times(lambda runner=runner: runner.run(images, draws, phase), device)
        median = statistics.median(seconds[name])
        total = flops.get_total_flops()
        found[name] = {
            "seconds": median, "seconds_all": seconds[name], "images_per_s": len(images) / median,
            "tflops": total / median / 1e12, "gflop_per_image": total / len(images) / 1e9, "ms": parts,
        }  # fmt: skip
    return found


def memory_alone(variant: str, precision: str) -> dict[str, float | None]:
    """Peak of each phase in a process of its own, where no other variant's state lies beside."""
    command = [sys.executable, *sys.argv, "--variants", variant, "--precision", precision, "--memory_only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(run: Any, device: torch.device) -> float | None:
    """GB at the peak of a call: allocations on a GPU; on a CPU the resident set, whose mark is reset before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def part_times(run: Any, device: torch.device) -> dict[str, float]:
    """ms of each part of one step, from the labels in the code."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        run()
        clock(device)
    found = {}
    for event in recorded.key_averages():
        if event.key in PARTS:
            on_device = device.type == "cuda"
            found[event.key] = (event.device_time_total if on_device else event.cpu_time_total) / 1e3
    return {part: round(found[part], 2) for part in PARTS if part in found}


def matmul_peak(device: torch.device, precision: str) -> float:
    """TFLOP/s of a large matrix product in this precision: what the share is a share of."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = DTYPES[precision] or torch.float32
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        began = clock(device)
        a @ b
        best = min(best, clock(device) - began)
    return 2 * size**3 / best / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", choices=ENCODERS, default="dinov2_b", help="tiny: all frozen parts tiny")
    parser.add_argument("--decoder", default="ViTB", help="a folder of configs/decoder")
    parser.add_argument("--disc", default="S_8", help="DINO trunk of the discriminator")
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--variants", nargs="+", choices=["plain", "ours", "compiled"], default=["plain", "ours"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--disc_fake", choices=["fresh", "reuse"], default="fresh")
    parser.add_argument("--loss_chunk_size", type=int)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", default="logs/benchmark", help="folder for the untrained encoder's config")
    parser.add_argument(
        "--memory_only", action="store_true", help="print peaks as JSON; what the program calls itself with"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    models = build_models(arguments, device)
    images, draws = make_inputs(arguments, models, device)
    options = {key: getattr(arguments, key) for key in ("disc_fake", "loss_chunk_size", "activation_checkpointing")}
    if arguments.memory_only:
        peaks = {}
        (precision,) = arguments.precision
        options["dtype"] = DTYPES[precision]
        runners = {name: make_runner(name, models, device, options) for name in arguments.variants}
        for phase in arguments.phases:
            with autocast(device, precision):
                step = partial(runners[arguments.variants[0]].run, images, draws, PHASES[phase])
                step()
                peaks[phase] = peak_memory(step, device)
        print(json.dumps(peaks))
        return
    memory = {(v, p): memory_alone(v, p) for v in arguments.variants for p in arguments.precision}
    record = {
        "command": " ".join(["python", *sys.argv]),
        **surroundings(device),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "results": {},
    }
    for precision in arguments.precision:
        options["dtype"] = DTYPES[precision]
        runners = {name: make_runner(name, deepcopy(models), device, options) for name in arguments.variants}
        peak = matmul_peak(device, precision)
        print(f"\n{precision}: a large matrix product runs at {peak:.3g} TFLOP/s here")
        for phase in arguments.phases:
            found = measure(runners, images, draws, PHASES[phase], precision, arguments.repeats, arguments.warm)
            for variant, row in found.items():
                row["peak_memory_gb"] = memory[variant, precision][phase]
            record["results"][f"{precision}/{phase}"] = {**found, "matmul_tflops": peak}
            show(phase, found, peak)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {arguments.out}")


def make_runner(name: str, models: Models, device: torch.device, options: dict[str, Any]) -> Any:
    if name == "plain":
        for conv in models.lpips.vgg.convs:
            conv.weight.data = conv.weight.data.contiguous()
        return PlainRunner(models, device)
    return OurRunner(models, device, {**options, "compile": name == "compiled"})


def show(phase: str, found: dict[str, Any], peak: float) -> None:
    for name, row in found.items():
        memory = "" if row["peak_memory_gb"] is None else f", peak {row['peak_memory_gb']:.2f} GB"
        print(f"{phase:7s} {name:9s} {row['seconds']:.3f} s/step, {row['images_per_s']:.3g} images/s{memory}, "
              f"{row['tflops']:.3g} TFLOP/s ({100 * row['tflops'] / peak:.0f} % of the product's), "
              f"{row['gflop_per_image']:.0f} GFLOP/image")  # fmt: skip
        print("        ms: " + ", ".join(f"{part} {ms:.0f}" for part, ms in row["ms"].items()))
    if "plain" in found:
        for name, row in found.items():
            if name != "plain":
                turns = [a / b for a, b in zip(found["plain"]["seconds_all"], row["seconds_all"], strict=True)]
                text = f"        {name} / plain: {statistics.median(turns):.2f} x images/s"
                text += f" (turn by turn {min(turns):.2f} to {max(turns):.2f})"
                if row["peak_memory_gb"] is not None:
                    text += f", {row['peak_memory_gb'] / found['plain']['peak_memory_gb']:.2f} x peak memory"
                print(text)


def surroundings(device: torch.device) -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=PROJECT_ROOT, capture_output=True, text=True).stdout.strip()

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "HEAD"),
        "clean": not git("status", "--porcelain"),
    }


def cpu_name() -> str:
    try:
        return next(
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
