"""The parts that `scripts/gpu_report.py` measures: on a GPU at real size, on a CPU at tiny size (`Job.dry`).

Networks are untrained. A part writes each result at once, because it is killed when its share of the time is over. Run as a
script, this trains `rae_dummy` for part (g): `python -m benchmarks.gpu_parts FOLDER RUN...`, with names from `RUNS`.
"""

import argparse
import importlib.util
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.memory import GIB, OVERHEAD
from benchmarks.plain_step import step_settings
from benchmarks.runners import DTYPES, PHASES, VARIANTS, Draws, build_models, make_inputs, make_runner
from benchmarks.surroundings import ROOT, surroundings
from benchmarks.train_step import autocast, clock, free_memory, matmul_peak, measure, peak
from src.core.errors import lacks_memory
from src.core.precision import cast_frozen, full_float32
from src.training.stage1_step import TrainingStep

OPTIONS = {"disc_fake": "fresh", "loss_chunk_size": None, "activation_checkpointing": False}
QUICK = [
    "data.image_size=64",
    "data.batch_size=4",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
]
COMMON = [
    "experiment=rae_dummy", "logger=csv", "model.disc_upd_start_epoch=0.3", "model.disc_start_epoch=0.6", "model.sample_every=0",
    "trainer.num_sanity_val_steps=0", "trainer.log_every_n_steps=1", "trainer.max_skipped_steps=1000",
    "trainer.limit_val_batches=1", "trainer.accelerator=gpu", "trainer.max_steps=30",
]  # fmt: skip
LONG = ["trainer.max_steps=200"]
RUNS = {
    "32": [],
    "bf16": ["trainer.precision=bf16", *LONG],
    "16": ["trainer.precision=16", *LONG],
    "deterministic": ["trainer.deterministic=true"],
    "deterministic again": ["trainer.deterministic=true"],
    "nccl": ["trainer.strategy=ddp", "trainer.devices=1"],
    "compiled": ["model.compile=true"],
    "compiled, 16, accumulation": ["model.compile=true", "trainer.precision=16", "trainer.accumulate_grad_batches=2"],
}
"""Runs of part (g): name -> overrides."""


@dataclass
class Job:
    """State of a part while it is measured."""

    dry: bool
    deadline: float
    """When the part is killed, in terms of `time.monotonic`, a clock that all processes share."""
    scratch: Path
    checkouts: dict[str, str]
    """Folders of `rae` and `raev2`."""
    earlier: dict[str, Any]
    """Results of other parts by letter."""
    write: Callable[[dict[str, Any]], None]
    result: dict[str, Any] = field(default_factory=lambda: {"summary": []})
    status: str = "done"

    def __post_init__(self) -> None:
        self.device = torch.device("cpu" if self.dry else "cuda")
        real = {"encoder": "dinov2_b", "decoder": "ViTXL", "image_size": 256, "batch": 64}
        tiny = {"encoder": "tiny", "decoder": "tiny", "image_size": 64, "batch": 2}
        self.sizes = argparse.Namespace(**(tiny if self.dry else real), disc="S_8", scratch=str(self.scratch))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, name: str, value: Any, line: str = "") -> None:
        """Store a result and, if given, its line of the table."""
        self.result[name] = value
        self.result["summary"] += [line] if line else []
        self.write(self.result)

    def runner(self, variant: str, precision: str) -> Any:
        options = OPTIONS | {"dtype": DTYPES[precision]}
        return make_runner(variant, build_models(self.sizes, self.device), self.device, options)

    def inputs(self, batch: int | None = None) -> tuple[Tensor, Draws]:
        sizes = argparse.Namespace(**(vars(self.sizes) | {"batch": batch or self.sizes.batch}))
        return make_inputs(sizes, self.device)

    def product(self, precision: str) -> float:
        """Measure TFLOP/s of a large matrix product."""
        return matmul_peak(self.device, precision, 128 if self.dry else None)

    def call(self, *command: str, **environment: str) -> str:
        """Run a Python script of the project and return its output; kill it in time to write that output."""
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment}
        # A pipe would stay open as long as any child of the script lives.
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=output, stderr=output)
            try:
                process.wait(max(self.left - 5, 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.status = "out of time"
                output.write("\nended: its share of the time was over")
            output.seek(0)
            return output.read()


def environment(job: Job) -> None:
    """(a) Describe the machine and measure a large matrix product on it."""
    facts: dict[str, Any] = {**surroundings(job.device), "cores": len(os.sched_getaffinity(0))}
    if not job.dry:
        properties = torch.cuda.get_device_properties(job.device)
        taken = properties.total_memory - torch.cuda.mem_get_info(job.device)[0]
        facts |= {"memory_gib": properties.total_memory / GIB, "taken_gib": taken / GIB}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,persistence_mode", "--format=csv"]
        with suppress(OSError):
            facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    job.add("machine", facts, f"{facts['device']}, torch {facts['torch']}, {facts['cores']} cores")
    products = {precision: job.product(precision) for precision in DTYPES}
    with _set(torch.backends.cuda.matmul, "allow_tf32", True):
        products["tf32"] = job.product("fp32")
    text = ", ".join(f"{name} {value:.3g}" for name, value in products.items())
    job.add("product_tflops", products, f"TFLOP/s of a large matrix product: {text}")


def step(job: Job) -> None:
    """(b) Measure speed, memory and FLOPs of the step, one variant at a time because GPU memory only fits one."""
    sizes = {k: str(v) for k, v in vars(job.sizes).items() if k != "scratch"}
    job.add("arguments", sizes | {"device": job.device.type})
    results: dict[str, dict[str, Any]] = {}
    images, draws = job.inputs()
    few = [("bf16", "plain"), ("bf16", "ours"), ("fp16", "ours")]
    # Compiling takes longest: in fp16 it comes last, where time may run out.
    every = [*product(("bf16",), VARIANTS), *product(("fp16",), ("ours", "plain", "compiled"))]
    for precision, variant in few if job.dry else every:
        try:
            runner = job.runner(variant, precision)
            for phase in ("gan",) if job.dry else ("gan", "warmup"):
                name, tflops = f"{precision}/{phase}", job.product(precision)
                rows, memory = results.setdefault(name, {}), peak(runner, images, draws, phase, precision)
                if memory == float("inf"):
                    rows[variant] = {"out_of_memory": True}
                    job.add("results", results, f"{name} {variant}: out of memory")
                    continue
                repeats = 1 if job.dry else 6
                row = measure({variant: runner}, images, draws, PHASES[phase], precision, repeats, 0)[variant]
                rows[variant] = row | {"peak_memory_gb": memory, "matmul_tflops": tflops}
                job.add("results", results, _step_line(name, variant, rows))
        except RuntimeError as error:  # for example of a compiler: continue with the others
            job.status = "failed"
            job.add(f"{precision} {variant}", str(error)[-2000:], f"{precision} {variant}: {str(error).strip()[:100]}")
        runner = None
        free_memory(job.device)


def _step_line(name: str, variant: str, rows: dict[str, Any]) -> str:
    row, plain, ours = rows[variant], rows.get("plain", {}), rows.get("ours", {})
    memory = row["peak_memory_gb"] or float("nan")
    text = f"{name} {variant}: {row['images_per_s']:.3g} images/s, {memory:.1f} GB"
    if variant != "plain" and "seconds" in plain:
        against = plain["seconds"] / row["seconds"], memory / (plain["peak_memory_gb"] or float("nan"))
        text += f", {against[0]:.2f} x plain with {against[1]:.2f} x its memory"
    if "gflop_per_image" in ours:  # counts each product of the step once, without those that the plain step repeats
        row["share_of_product"] = ours["gflop_per_image"] * row["images_per_s"] / 1e3 / row["matmul_tflops"]
        text += f", {100 * row['share_of_product']:.0f} % of a product"
        text += " (goal: 45 %)" if (name, variant) == ("bf16/gan", "compiled") else ""
    return text


def largest_batch(job: Job) -> None:
    """(c) Find the largest batch that fits, to compare with the one computed from tensor sizes."""
    total = 80.0 if job.dry else torch.cuda.get_device_properties(job.device).total_memory / GIB
    stored = json.loads((ROOT / "benchmarks/results/memory_computed.json").read_text())
    runner, found, ends = job.runner("ours", "bf16"), {}, {}
    for phase in ("gan", "warmup"):
        known = stored["results"][phase]["ours"]
        constant = known["peak_gib"] - known["gib_per_image"] * stored["batch"]
        computed = int((total - OVERHEAD - constant) / known["gib_per_image"])
        found[phase] = {"computed": computed, "gib": {}}
        # The first attempt is a little below the computed batch.
        ends[phase] = (2, 6) if job.dry else (computed * 2 // 3, computed * 6 // 5)
    # Phases alternate, so that each is tried before time runs out; both ends are assumed until they are tried.
    while left := [phase for phase, (low, high) in ends.items() if high - low > max(2, low // 50)]:
        if job.left < 8:
            job.status = "out of time"
            break
        phase = min(left, key=lambda phase: len(found[phase]["gib"]))
        low, high = ends[phase]
        middle = (low + high) // 2
        fits, found[phase]["gib"][middle] = _fits(job, runner, middle, phase)
        found[phase]["fits" if fits else "does_not_fit"] = middle
        ends[phase] = (middle, high) if fits else (low, middle)
        job.result["summary"] = [_batch_line(*each) for each in found.items()]
        job.add(phase, found[phase])


def _batch_line(phase: str, found: dict[str, Any]) -> str:
    words = {"fits": "fit", "does_not_fit": "don't"}
    tried = ", ".join(f"{found[key]} {word}" for key, word in words.items() if key in found)
    return f"{phase}: {tried or 'none tried'}; computed {found['computed']} (goal on 80 GB: 200)"


def _fits(job: Job, runner: Any, batch: int, phase: str) -> tuple[bool, dict[str, float]]:
    """Return whether a batch fits, and the peak GiB: allocated to tensors, and reserved including fragmentation."""
    fits, gib = True, {}
    if not job.dry:
        torch.cuda.reset_peak_memory_stats()
    try:
        images, draws = job.inputs(batch)
        with autocast(job.device, "bf16"):
            for _ in range(2):  # moments exist from the first update on
                runner.run(images, draws, PHASES[phase])
        clock(job.device)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        fits = False
    if not job.dry:
        gib = {"allocated": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}
    images = draws = None  # type: ignore[assignment]
    for network in (runner.models.rae, runner.models.discriminator):
        network.zero_grad(set_to_none=True)
    free_memory(job.device)
    return fits, gib


def tests(job: Job) -> None:
    """(d) Run the tests that need a GPU."""
    processes = min(len(os.sched_getaffinity(0)) // 2, 6)  # they need little GPU time, and much in Python and compilers
    many = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    output = job.call("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *many, "tests/test_gpu.py")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    job.add("failed", failed)
    job.add("pytest", output[-20000:], (output.strip().splitlines() or ["no output"])[-1].strip("= "))


def half_precision(job: Job) -> None:
    """(e) Measure the error of half precision in latents, LPIPS and D, relative to float32's largest entry and norm."""
    images, draws = job.inputs(min(job.sizes.batch, 8))
    x = images.float() / 255
    other = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)).clamp(0, 1)

    def quantities(precision: str, scale: float) -> dict[str, Tensor]:
        models = build_models(job.sizes, job.device)
        if (dtype := DTYPES[precision]) is not None:
            cast_frozen(models.rae.encoder, dtype)
            cast_frozen(models.discriminator.trunk, dtype)
        of_step = TrainingStep(models.rae, models.lpips, models.discriminator, models.augment, step_settings())
        term = of_step.reconstruction_terms(PHASES["gan"])["lpips"][1]
        with autocast(job.device, precision):
            lpips, lpips_gradient = of_step.reconstruction_gradient(term, other, x, scale)
            gan, gan_gradient = of_step.gan_gradient(other, draws.augment[0], scale)
            with torch.no_grad():
                latents = models.rae.encode_raw(x)
        values = {"latents": latents, "LPIPS": lpips, "its gradient": lpips_gradient, "GAN": gan, "its": gan_gradient}
        return {name: value.double().cpu() for name, value in values.items()}

    with full_float32(job.device):
        exact = quantities("fp32", 1.0)
    for precision, scale in (("bf16", 1.0),) if job.dry else (("bf16", 1.0), ("fp16", 2.0**16)):
        errors = {}
        for name, value in quantities(precision, scale).items():
            off, whole = value - exact[name], exact[name]
            errors[name] = {
                "largest": float(off.abs().max() / whole.abs().max()),
                "norm": float(off.norm() / whole.norm()),
            }
        text = ", ".join(f"{name} {error['norm']:.1e}" for name, error in errors.items())
        job.add(precision, errors, f"{precision}, norm of the error: {text}")


def evaluation(job: Job) -> None:
    """(f) Compare the scores of the same images and networks on the GPU and on the CPU."""
    from src.metrics.inception import InceptionFeatures
    from src.metrics.reconstruction import ReconstructionScore

    images, models = job.inputs(4 if job.dry else 8)[0].cpu(), build_models(job.sizes, job.device)
    inception = InceptionFeatures(None, weights="tiny" if job.dry else "untrained")
    scores = []
    for device in (job.device, torch.device("cpu")):
        rae, lpips = models.rae.to(device), models.lpips.to(device)
        score = ReconstructionScore([inception.to(device)], 8, lpips)
        with torch.no_grad(), full_float32(device):
            score.update(images, rae.decode_raw(rae.encode_raw(images.to(device))))
        scores.append(score.compute(warn_of_few=False))
        job.add(device.type, scores[-1])
    here, on_cpu = scores
    errors = {name: abs(here[name] - value) / abs(value) for name, value in on_cpu.items()}
    job.add("relative_difference", errors, ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))


def runs(job: Job) -> None:
    """(g) Run src/train.py: precisions, compilation, determinism, nccl; any synchronisation in an update is an error."""
    folder = job.scratch / "runs"
    few = ["16", "deterministic", "deterministic again"]
    groups = [few] if job.dry else [[name] for name in RUNS]  # a process each; on the CPU imports cost most
    switches = {"GPU_REPORT_DRY": "1", "TORCHDYNAMO_DISABLE": "1"} if job.dry else {}
    pool = ThreadPoolExecutor(len(groups))
    outputs = pool.map(lambda names: job.call("-m", "benchmarks.gpu_parts", str(folder), *names, **switches), groups)
    for names, output in zip(groups, outputs, strict=True):
        for name in names:
            file = folder / name / "found.json"
            found = json.loads(file.read_text()) if file.is_file() else {"error": output[-3000:]}
            if "error" in found:
                line = f"{name}: FAILED: {found['error'].strip().splitlines()[-1][:160]}"
            else:
                line = f"{name}: {found['updates']} updates, loss {found['loss']:.4g}, skipped {found['skipped']}"
                line += f", loss scale {found['scale']}, lowered at {found['lowered_at']}" if found["scale"] else ""
            job.add(name, found, line)
    first, second = (folder / name / "checkpoints/last.ckpt" for name in ("deterministic", "deterministic again"))
    if first.is_file() and second.is_file():
        a, b = (torch.load(file, weights_only=False)["state_dict"] for file in (first, second))
        equal = all(torch.equal(a[name], b[name]) for name in a)
        job.add("deterministic_bit_equal", equal, f"two deterministic runs are {'' if equal else 'NOT '}bit-equal")


def train(folder: Path, name: str) -> dict[str, Any]:
    """Run src/train.py in this process and return a summary of the run."""
    from src.core import metrics_file
    from src.training.module import StageModule
    from src.training.optimizers import loss_scale

    dry, scales, seen = "GPU_REPORT_DRY" in os.environ, [], {}
    original = StageModule.training_step

    def scale(module: Any) -> Any:
        scaler = next(iter(module.scalers().values()))
        return 0.0 if scaler is None else loss_scale(scaler, module.device).clone()

    def watched(module: Any, batch: Any, batch_idx: int) -> None:
        if not scales:
            scales.append(scale(module))
        phase = module.phase(module.global_step)
        seen[phase] = seen.get(phase, 0) + 1
        settled = seen[phase] > 2 * module.settings.accumulate_grad_batches  # libraries are initialised at first use
        settled = settled and not torch.are_deterministic_algorithms_enabled()  # some of these may sync
        with no_synchronisation() if settled and module.device.type == "cuda" else nullcontext():
            original(module, batch, batch_idx)
        if module.ends_update(batch_idx):
            scales.append(scale(module))

    words = [*COMMON, *RUNS[name], *(QUICK if dry else []), f"paths.run_dir='{folder / name}'"]
    with patch.object(StageModule, "training_step", watched), patch.object(sys, "argv", ["src/train.py", *words]):
        try:
            runpy.run_path(str(ROOT / "src/train.py"), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                log = folder / name / "run.log"
                return {"error": log.read_text()[-3000:] if log.is_file() else f"exit code {ended.code}"}
    rows = list(metrics_file.read(folder / name / "metrics.csv"))
    latest = {metric: value for _, metric, value, _ in rows}
    values = [float(scale) for scale in scales]
    return {
        "updates": max(at for at, *_ in rows),
        "loss": latest["train/loss"],
        "skipped": latest.get("train/skipped_steps", 0),
        "scale": values[-1],
        "lowered_at": [number for number, (a, b) in enumerate(zip(values, values[1:], strict=False), 1) if b < a],
        "images_per_s": latest.get("perf/images_per_s"),
    }


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise an error when the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peers(job: Job) -> None:
    """(h) Time the official code and RAEv2, from checkouts. With GAN the official step needs over 80 GB at batch 64."""
    given = [f"--{name}={path}" for name, path in job.checkouts.items()]
    given += [f"--device={job.device.type}", "--precision=bf16", f"--scratch={job.scratch}", "--repeats=3"]
    given += ["--decoder=ViTB", "--warm=0"] if job.dry else ["--decoder=ViTXL", "--warm=2"]
    both = ["--variants", "official", "ours"]
    every = ["--variants", "official", "compiled", "raev2_compile", "ours", "raev2"]
    for batch, words in ({1: both} if job.dry else {48: ["--phases=gan", *both], 64: every}).items():
        out = job.scratch / f"peers_{batch}.json"
        output = job.call("benchmarks/peers.py", *given, f"--batch={batch}", f"--out={out}", *words)
        job.add("output", job.result.get("output", "") + output[-5000:])
        if not out.is_file():
            if job.status == "done":
                raise RuntimeError(output[-2000:])
            return
        content = json.loads(out.read_text())
        found = {key: content[key] for key in ("arguments", "results")}
        lines = [line for line in output.splitlines() if line.startswith(("gan ", "warmup ")) or "not measured" in line]
        job.result["summary"] += [f"batch {batch}, {line}" for line in dict.fromkeys(lines)]
        for key, value in ({"batch 48": found} if batch == 48 else found).items():
            job.add(key, value)


def data_path(job: Job) -> None:
    """(i) Measure images/s of the loader on all cores, on JPEG files of ImageNet's usual size in the page cache."""
    from PIL import Image

    from src.data import dummy
    from src.data.datamodule import RAEDataModule
    from src.training.preflight import LOADER_BATCHES, loader_seconds

    folder, cores = job.scratch / "images" / "train", len(os.sched_getaffinity(0))
    workers = 1 if job.dry else cores
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8 if job.dry else 256):
        picture = Image.open(io.BytesIO(dummy.jpeg(number))).convert("RGB")
        picture.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    config = yaml.safe_load((ROOT / "configs/data/imagenet.yaml").read_text())
    batch = job.sizes.batch
    config |= {"data_dir": None, "sources": {"made": {"data_dir": str(folder.parent)}}, "accumulate": 1, "seed": 0}
    config |= {"epoch_images": batch * workers * (LOADER_BATCHES + 1), "batch_size": batch, "num_workers": workers}
    config |= {"image_size": job.sizes.image_size, "hf_validation_split": None}
    data = RAEDataModule(**{key: value for key, value in config.items() if key != "_target_"})
    rate = batch / loader_seconds(data.train_dataloader(), workers)
    data.teardown()
    line = f"{rate:.4g} images/s from {workers} processes"
    rows = job.earlier.get("b", {}).get("results", {}).get("bf16/gan", {})
    eaten = max((row["images_per_s"] for row in rows.values() if "images_per_s" in row), default=None)
    job.add("images_per_s", rate, line + (f", {rate / eaten:.1f} x what the step of part b takes" if eaten else ""))
    job.add("cores", cores)


def switches(job: Job) -> None:
    """(j) Measure the effect of single switches on our step (bf16, GAN phase), and of Inception's memory format."""
    from src.metrics.inception import InceptionFeatures

    runner, (images, draws) = job.runner("ours", "bf16"), job.inputs()
    inception = InceptionFeatures(None, weights="tiny" if job.dry else "untrained").to(job.device)

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(1 if job.dry else 6):
            began = clock(job.device)
            run()
            times.append(clock(job.device) - began)
        return statistics.median(times[len(times) // 2 :])

    def of_step() -> float:
        with autocast(job.device, "bf16"):
            return seconds(partial(runner.run, images, draws, PHASES["gan"]))

    def setting(**change: Any) -> AbstractContextManager[Any]:
        return _set(runner.step, "settings", runner.step.settings.model_copy(update=change))

    @contextmanager
    def contiguous(network: torch.nn.Module) -> Iterator[None]:
        """Undo `channels_last`, both in the network and in the code that requests it."""
        network.to(memory_format=torch.contiguous_format)
        with _set(torch, "channels_last", torch.contiguous_format):
            yield

    changes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "cudnn.benchmark": lambda: _set(torch.backends.cudnn, "benchmark", True),
        "disc_fake=reuse": lambda: setting(disc_fake="reuse"),
        **{f"loss_chunk_size={n}": partial(setting, loss_chunk_size=n) for n in ((1,) if job.dry else (8, 16, 32))},
        **{
            f"attention: {name.lower()}": partial(sdpa_kernel, getattr(SDPBackend, name))
            for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
        },
        "VGG without channels_last": lambda: contiguous(runner.models.lpips.vgg),  # last, since it is not undone
    }
    base = min(of_step(), of_step())
    job.add("base", base, f"as it is: {len(images) / base:.3g} images/s")
    for name, change in changes.items():
        try:
            with change():
                taken = of_step()
        except RuntimeError as error:  # not available, or out of memory
            job.add(name, str(error)[:300], f"{name}: {str(error).splitlines()[0][:80]}")
            free_memory(job.device)
            continue
        job.add(name, {"seconds": taken, "times_as_fast": base / taken}, f"{name}: {base / taken:.3f} x as fast")
    for layout, change in (("channels_last", nullcontext()), ("contiguous", contiguous(inception))):
        with change, torch.no_grad():
            rate = len(images) / seconds(lambda: inception(images))
        job.add(f"Inception {layout}", rate, f"Inception, {layout}: {rate:.4g} images/s")


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for each in sys.argv[2:]:
        found = train(place, each)
        (place / each).mkdir(parents=True, exist_ok=True)
        (place / each / "found.json").write_text(json.dumps(found))
