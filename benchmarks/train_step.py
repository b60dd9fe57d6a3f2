"""Compare speed and memory of the stage-1 training step with the published order of operations, interleaved in one process.

    python benchmarks/train_step.py --decoder ViTB --batch 4 --precision fp32 bf16 --out benchmarks/results/cpu.json
    python benchmarks/train_step.py --device cuda --decoder ViTXL --batch 64 --precision bf16 --variants plain ours compiled

`plain` is `benchmarks/plain_step.py` with the optimiser and EMA of the official code: eager attention in decoder and DINO
trunk, two encoder passes, every loss through the whole chain. `ours` is the step used in training. Weights are untrained,
shapes are the real ones. Not included: data loader, copies to the device, random draws and communication between processes.
Phases: warmup (L1 + LPIPS), disc (D is updated too), gan.
"""

import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.runners import (
    DTYPES,
    ENCODERS,
    PHASES,
    VARIANTS,
    Draws,
    build_models,
    make_inputs,
    make_runner,
    step_parser,
)  # fmt: skip
from benchmarks.surroundings import in_turns, surroundings, write
from src.core.errors import lacks_memory
from src.training.stage1_step import Phase

PARTS = ("encode", "decode", "lpips", "gan", "adaptive_weight", "backward", "disc_decode", "disc", "optimizer", "ema")


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(*shapes: Any, **_: Any) -> int:
    return sdpa_backward_flop_count(*shapes[:4])


ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOP formulas that torch's counter only has for fused attention on a GPU."""


def measure(
    runners: dict[str, Any], images: Tensor, draws: Draws, phase: Phase, precision: str, repeats: int, warm: int
) -> dict[str, Any]:
    """Time the runners in turns, so that changes of the machine's speed affect all alike, and profile a step of each."""
    device, found = images.device, {}
    steps = {name: partial(runner.run, images, draws, phase) for name, runner in runners.items()}
    with autocast(device, precision):
        seconds = in_turns(steps, warm, repeats, partial(clock, device))
    for name, step in steps.items():
        with autocast(device, precision):
            parts, kernels = part_times(step, device)
            flops = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)
            with torch.compiler.set_stance("force_eager"), flops:  # compiled kernels can't be counted
                step()
        median = statistics.median(seconds[name])
        total = flops.get_total_flops()
        found[name] = {
            "seconds": median, "seconds_all": seconds[name], "images_per_s": len(images) / median,
            "tflops": total / median / 1e12, "gflop_per_image": total / len(images) / 1e9, "ms": parts, "kernels_ms": kernels,
        }  # fmt: skip
    return found


def turns(variants: Sequence[str], device: torch.device) -> list[list[str]]:
    """Group the variants to measure together. A GPU has a steady speed and memory for one variant at a time."""
    return [[name] for name in variants] if device.type == "cuda" else [list(variants)]


def memory_alone(variant: str, precision: str) -> dict[str, float | None]:
    """Return the peak GB of each phase, measured in a separate process without the state of other variants; infinite if
    it did not fit, None if the system does not tell."""
    command = [sys.executable, *sys.argv, "--variants", variant, "--precision", precision, "--memory_only"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(runner: Any, images: Tensor, draws: Draws, phase: str, precision: str) -> float | None:
    """Return the peak GB of a runner's second step in a phase; infinite if it does not fit."""
    step = partial(runner.run, images, draws, PHASES[phase])
    try:
        with autocast(images.device, precision):
            step()
            return peak_memory(step, images.device)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
    free_memory(images.device)
    return math.inf


def free_memory(device: torch.device) -> None:
    """Free unreferenced memory, including compiled code of deleted networks."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(run: Any, device: torch.device) -> float | None:
    """Return the peak GB of a call: allocated memory on a GPU; on a CPU the resident set (its high-water mark is reset)."""
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


def part_times(run: Any, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Return the ms of each part of a step, by the labels in the code, and of the GPU kernels that take longest."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # A part's kernels are found through the thread that launched them, so the backward pass must stay in this one.
    with torch.autograd.set_multithreading_enabled(False), profile(activities=activities) as recorded:
        run()
        clock(device)
    parts, kernels = {}, {}
    for event in recorded.key_averages():
        if event.device_type != DeviceType.CPU:
            if not event.is_user_annotation:  # not a label, as the GPU records it
                kernels[f"{event.key[:120]} ({event.count} x)"] = round(event.self_device_time_total / 1e3, 3)
        elif event.key in PARTS:
            on_device = device.type == "cuda"
            parts[event.key] = (event.device_time_total if on_device else event.cpu_time_total) / 1e3
    longest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:80]
    return {part: round(parts[part], 2) for part in PARTS if part in parts}, {name: kernels[name] for name in longest}


def matmul_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """Measure TFLOP/s of a large matrix product in this precision, the peak that utilisation refers to."""
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = DTYPES[precision] or torch.float32
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        began = clock(device)
        a @ b
        best = min(best, clock(device) - began)
    return 2 * size**3 / best / 1e12


def main() -> None:
    parser = step_parser(__doc__, VARIANTS, list(PHASES))
    parser.set_defaults(variants=["plain", "ours"], repeats=5)
    parser.add_argument("--encoder", choices=ENCODERS, default="dinov2_b", help="tiny: all frozen networks are tiny")
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--disc_fake", choices=["fresh", "reuse"], default="fresh")
    parser.add_argument("--loss_chunk_size", type=int)
    parser.add_argument("--activation_checkpointing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    images, draws = make_inputs(arguments, device)
    options = {key: getattr(arguments, key) for key in ("disc_fake", "loss_chunk_size", "activation_checkpointing")}
    if arguments.memory_only:
        (precision,), (variant,) = arguments.precision, arguments.variants
        runner = make_runner(variant, build_models(arguments, device), device, options | {"dtype": DTYPES[precision]})
        print(json.dumps({phase: peak(runner, images, draws, phase, precision) for phase in arguments.phases}))
        return
    pairs = list(product(arguments.variants, arguments.precision))
    on_gpu = device.type == "cuda"  # a variant is alone in memory there, so its peak is measured in the same process
    memory = {pair: {} if on_gpu else memory_alone(*pair) for pair in pairs}
    record: dict[str, Any] = {
        **surroundings(device),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "results": {},
    }
    for precision in arguments.precision:
        options["dtype"] = DTYPES[precision]
        product_tflops = matmul_peak(device, precision)
        print(f"\n{precision}: a large matrix product runs at {product_tflops:.3g} TFLOP/s here")
        found: dict[str, dict[str, Any]] = {phase: {} for phase in arguments.phases}
        for names in turns(arguments.variants, device):
            runners = {name: make_runner(name, build_models(arguments, device), device, options) for name in names}
            for phase in arguments.phases:
                for name, runner in runners.items() if on_gpu else ():
                    memory[name, precision][phase] = peak(runner, images, draws, phase, precision)
                fitting = {
                    name: runner for name, runner in runners.items() if memory[name, precision][phase] != math.inf
                }
                found[phase] |= measure(
                    fitting, images, draws, PHASES[phase], precision, arguments.repeats, arguments.warm
                )
            del runners, fitting
            free_memory(device)
        for phase, rows in found.items():
            for variant, row in rows.items():
                row["peak_memory_gb"] = memory[variant, precision][phase]
            record["results"][f"{precision}/{phase}"] = {**rows, "matmul_tflops": product_tflops}
            show(phase, rows, product_tflops)
    write(record, arguments.out)


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


if __name__ == "__main__":
    main()
