"""What a latent of several blocks costs beside that of the last block: time and memory of K = 1, 7, 23 on the CPU.

    python benchmarks/encoders.py [--size l] [--batch 2] [--image_size 256] [--repeats 7] [--threads 1] [--out FILE.json]

DINOv3 of the chosen size with untrained weights, fp32. Variants, each measured once a round, in turns in one process:
    k1 k7 k23   ours: the encoder with `layers` of that name, one accumulator
    stacked23   the plain way: transformers keeps every block's output, the normalised ones are stacked and averaged
Ratios are medians over rounds, to k1 of the same round; by wall clock and, for a busy machine, by CPU time of this process.
Memory is the peak of what torch has allocated during a call beyond what was there before it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.surroundings import surroundings, write

SIZES = {
    "tiny": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 24, "num_attention_heads": 3},
    # as released: hub, facebook/dinov3-vitl16-pretrain-lvd1689m
    "l": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
GOAL = 1.03  # k23 / k1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="l", help="of DINOv3 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=256, help="px (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds after one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    report = measure(args.size, args.batch, args.image_size, args.repeats, args.threads)
    for name, row in report["results"].items():
        goal = f"  (goal {GOAL})" if name == "k23" else ""
        print(
            f"{name:10} {row['seconds']:8.3f} s  x {row['ratio_wall']:.4f} wall  x {row['ratio_cpu']:.4f} CPU time  "
            f"peak {row['peak_mib']:7.1f} MiB{goal}"
        )
    write(report, args.out)
    return 0


def measure(size: str, batch: int, image_size: int, repeats: int, threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    calls, latents, parameters = variants(size, torch.randn(batch, 3, image_size, image_size))
    if not torch.allclose(latents["k23"], latents["stacked23"], atol=1e-4):
        raise AssertionError("ours and the plain formulation differ")
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, start_cpu = time.perf_counter(), time.process_time()
            calls[name]()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    results = {
        name: {
            "seconds": round(statistics.median(wall[name]), 4),
            "ratio_wall": round(_ratio(wall[name], wall["k1"]), 4),
            "ratio_cpu": round(_ratio(cpu[name], cpu["k1"]), 4),
            "peak_mib": round(peak_bytes(call) / 2**20, 2),
        }
        for name, call in calls.items()
    }
    return {
        "encoder": f"DINOv3 {size}, untrained, fp32, {parameters / 1e6:.1f} M parameters",
        "batch": batch,
        "image_size_px": image_size,
        "repeats": repeats,
        "threads": threads,
        "latent_mib": round(latents["k1"].nbytes / 2**20, 2),
        "results": results,
        "goal": {"k23 / k1": GOAL},
        **surroundings(),
    }


def variants(size: str, images: Any) -> tuple[dict[str, Callable[[], Any]], dict[str, Any], int]:
    """Return calls by name on one network, what each returns, and the network's number of parameters."""
    import torch
    from transformers import DINOv3ViTConfig

    from src.models.encoders import DINOv3wNorm

    with tempfile.TemporaryDirectory() as folder:
        DINOv3ViTConfig(**SIZES[size], image_size=images.shape[-1], num_register_tokens=4).save_pretrained(folder)
        depth = SIZES[size]["num_hidden_layers"]
        encoder = DINOv3wNorm(folder, layers="k23", weights="untrained")

    @torch.no_grad()
    def stacked() -> torch.Tensor:
        states = encoder.model(images, output_hidden_states=True).hidden_states[1:]
        chosen = [encoder.normalize(state[:, encoder.prefix_tokens :]) for state in states[depth - 23 :]]
        return torch.stack(chosen).mean(0) + chosen[-1].mean(1, keepdim=True)

    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: encoder(images, name) for name in ("k1", "k7", "k23")
    }
    calls["stacked23"] = stacked
    return calls, {name: call() for name, call in calls.items()}, sum(p.numel() for p in encoder.parameters())


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the largest sum of tensors that live at once during `call`, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


if __name__ == "__main__":
    sys.exit(main())
