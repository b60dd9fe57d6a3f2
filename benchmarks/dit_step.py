"""Compare our stage-2 training step with those of the official code and RAEv2 (their own code), interleaved in one process.

    python benchmarks/dit_step.py --rae ../RAE --network ditdh_s dit_b --batch 2
    python benchmarks/dit_step.py --raev2 ../RAEv2 --network raev2_s --batch 2 --compile
    python benchmarks/dit_step.py --rae ../RAE --network ditdh_xl --batch 32 --device cuda --precision bf16 --compile
    python benchmarks/dit_step.py --rae ../RAE --network ditdh_xl --batch 32 --computed

`--rae` and `--raev2` are checkouts of github.com/bytetriper/RAE and github.com/nanovisionx/RAEv2; no code of theirs is part of
this project. A step starts from latents (the frozen encoder costs the same for all) and includes random draws, loss, backward,
clipping, AdamW and EMA. Their networks, transport and `update_ema` run unmodified, with equivalent stand-ins for timm's
PatchEmbed and Mlp; `loss.item()` is included because their loops call it. On a GPU float32 matmuls use TF32 in both, as in
their trainers, and only one variant at a time is in memory. `--computed` derives the GPU memory in bf16 from tensor sizes, as
`benchmarks/memory.py` does, without running the step.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import GIB, GpuAutocast, LiveBytes, make_fake
from benchmarks.peers import stand_in
from benchmarks.runners import DTYPES
from benchmarks.surroundings import device_option, in_turns, surroundings, write
from benchmarks.train_step import clock, free_memory, peak_memory
from src.core.ema import EMA
from src.core.nonfinite import NonFiniteCounter
from src.core.precision import float32_products
from src.losses.flow_matching import FlowSettings, time_shift
from src.models.dit import build_network
from src.training.module import compile_in_place
from src.training.optimizers import adamw, step_optimizer
from src.training.settings import OptimizerSettings
from src.training.stage2_step import FlowDraws, FlowStep

CLASSES, DROPOUT, LR, CLIP, DECAY = 1000, 0.1, 2e-4, 1.0, 0.9995
HEAD = {"hidden_size": [384, 2048], "depth": [12, 2], "num_heads": [6, 16]}
NETWORKS: dict[str, dict[str, Any]] = {
    "ditdh_s": {"name": "DiTDH", **HEAD},
    "ditdh_xl": {"name": "DiTDH", "hidden_size": [1152, 2048], "depth": [28, 2], "num_heads": [16, 16]},
    "dit_b": {"name": "LightningDiT", "hidden_size": 768, "depth": 12, "num_heads": 12},
    "raev2_s": {"name": "RAEv2DiT", "patch_size": 1, "base_model_depth": 8, **HEAD},
    "tiny": {"name": "DiTDH", "hidden_size": [32, 48], "depth": [1, 1], "num_heads": [2, 2]},
    "raev2_tiny": {
        "name": "RAEv2DiT", "patch_size": 1, "base_model_depth": 1, "hidden_size": [32, 48], "depth": [1, 1], "num_heads": [2, 2],
    },
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "linear", "convolution", "scaled_dot_product", "mkldnn")
"""Substrings of the names of operations that are matrix products."""


class Ours:
    """The step as `src/training/stage2.py` runs it, without Lightning and data loader."""

    def __init__(self, arguments: argparse.Namespace, network: str, compiled: bool) -> None:
        shape, v2 = arguments.shape, NETWORKS[network]["name"] == "RAEv2DiT"
        self.network = build_network(NETWORKS[network], shape, CLASSES, DROPOUT, 0)
        values = {"prediction": "x", "t_eps": 0.05} if v2 else {"prediction": "velocity", "t_eps": 0.0}
        flow = FlowSettings(
            time="truncated_logit_normal", time_mu=0.0, time_sigma=1.0, shift=None, base_weight=1.0, **values
        )
        self.step = FlowStep(SimpleNamespace(latent_shape=shape), flow, CLASSES, DROPOUT, 0.0)  # type: ignore[arg-type]
        self.ema = EMA(self.network, DECAY)
        self.optimizer = adamw(self.network, OptimizerSettings(lr=LR, betas=(0.9, 0.95), weight_decay=0.0))
        self.counter, self.number = NonFiniteCounter(0), 0
        self.draws: FlowDraws | None = None
        if compiled:
            compile_in_place(list(self.network.blocks))

    def modules(self) -> list[nn.Module]:
        return [self.network]

    def run(self, latents: Tensor, labels: Tensor) -> None:
        where = {"epoch": 0, "position": torch.arange(len(latents)) + self.number * len(latents)}
        draws = self.draws or FlowDraws.at(0, where, tuple(latents.shape[1:]), latents.device, True)  # type: ignore[arg-type]
        loss = self.step.losses(self.network, latents, self.step.dropped(labels, draws), draws)["loss"].mean()
        loss.backward()
        step_optimizer(self.optimizer, LR, self.counter, self.number, {"loss": loss.detach()}, clip=CLIP)
        self.ema.update()
        self.number += 1


class Theirs:
    """What the training steps of both repositories have in common."""

    model: nn.Module
    losses: Callable[..., Any]
    fake = False

    def prepare(self, root: Path) -> None:
        self.model.requires_grad_(True).train()
        self.average = deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0, fused=True
        )
        source = ast.parse((root / "src/utils/train_utils.py").read_text())
        function = [n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == "update_ema"]
        names: dict[str, Any] = {"torch": torch, "OrderedDict": OrderedDict}
        exec(compile(ast.Module(function, []), "update_ema", "exec"), names)
        self.update_ema = names["update_ema"]

    def modules(self) -> list[nn.Module]:
        return [self.model, self.average]

    def arguments(self, labels: Tensor) -> tuple[dict[str, Any], ...]:
        raise NotImplementedError

    def run(self, latents: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.losses(self.model, latents, *self.arguments(labels))["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.update_ema(self.average, self.model, decay=DECAY)
        if not self.fake:
            loss.item()


class Official(Theirs):
    def __init__(self, arguments: argparse.Namespace, network: str, compiled: bool) -> None:
        sizes = {key: value for key, value in NETWORKS[network].items() if key != "name"}
        sizes |= {"input_size": arguments.shape[1], "in_channels": arguments.shape[0]}
        models, transport = modules_of(arguments.rae, "stage2", "stage2.transport")
        cls = models.DiTwDDTHead if NETWORKS[network]["name"] == "DiTDH" else models.LightningDiT
        more = {} if cls is models.DiTwDDTHead else {"patch_size": 1}
        more |= {"use_rmsnorm": True, "use_swiglu": True, "use_rope": True}
        self.model = cls(**sizes, **more, num_classes=CLASSES, class_dropout_prob=DROPOUT)
        self.losses = transport.create_transport(
            time_dist_type="logit-normal_0_1", time_dist_shift=time_shift(arguments.shape)
        ).training_losses
        self.prepare(arguments.rae)
        if compiled:
            self.model.forward = torch.compile(self.model.forward)  # type: ignore[method-assign]

    def arguments(self, labels: Tensor) -> tuple[dict[str, Any], ...]:
        return ({"y": labels},)


class RAEv2(Theirs):
    def __init__(self, arguments: argparse.Namespace, network: str, compiled: bool) -> None:
        sizes = {key: value for key, value in NETWORKS[network].items() if key not in ("name", "patch_size")}
        stand_in("configs.stage2", Stage2Config=None)
        stand_in("utils.dist_utils", main_process_first=None)
        models, transport = modules_of(arguments.raev2, "stage2.models.DDT", "stage2.transport.transport")
        self.model = models.DiTwDDTHeadIG(
            input_size=arguments.shape[1], in_channels=arguments.shape[0], patch_size=[1, 1], num_classes=CLASSES,
            cond_arch=SimpleNamespace(num_t_tokens=4, num_c_tokens=8), **sizes,
        )  # fmt: skip
        self.losses = transport.Transport("x", "logit-normal_0_1", time_shift(arguments.shape)).training_losses
        self.prepare(arguments.raev2)
        if compiled:
            self.losses = torch.compile(self.losses)

    def arguments(self, labels: Tensor) -> tuple[dict[str, Any], ...]:
        null = {"context": torch.full_like(labels, CLASSES), "attn_mask": None}
        return {"context": labels, "attn_mask": None}, null


class PatchEmbed(nn.Module):
    """Stand-in for timm's PatchEmbed: same convolution and token order."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.num_patches, self.patch_size = (img_size // patch_size) ** 2, (patch_size, patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Sequential):
    """Stand-in for timm's Mlp; the measured networks use SwiGLU instead."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float = 0.0) -> None:
        super().__init__(nn.Linear(in_features, hidden_features), act_layer(), nn.Linear(hidden_features, in_features))


def modules_of(root: Path, *names: str) -> list[types.ModuleType]:
    """Import modules of a checkout. Both repositories use the same names, so those of the other one are removed first."""
    for name in [name for name in sys.modules if name.split(".")[0] == "stage2"]:
        del sys.modules[name]
    stand_in("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Mlp=Mlp, Attention=nn.Identity)
    stand_in("torchdiffeq", odeint=None)  # only used by their samplers
    sys.path.insert(0, str(root / "src"))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.pop(0)


def variants(arguments: argparse.Namespace, network: str) -> dict[str, tuple[type, bool]]:
    """Return the variants to measure by name, and print what is missing for others."""
    v2 = NETWORKS[network]["name"] == "RAEv2DiT"
    option, root, theirs = ("--raev2", arguments.raev2, RAEv2) if v2 else ("--rae", arguments.rae, Official)
    found: dict[str, tuple[type, bool]] = {"ours": (Ours, False)}
    missing = [f"{option} CHECKOUT"] if root is None or not (root / "src/stage2").is_dir() else []
    missing += [] if importlib.util.find_spec("einops") else ["the package einops (pip install einops)"]
    if missing:
        print(f"{network}: the published step is left out; missing: {', '.join(missing)}")
    else:
        found["theirs"] = (theirs, False)
    return found | {f"{name} compiled": (cls, True) for name, (cls, _) in found.items() if arguments.compile}


def measure(arguments: argparse.Namespace, network: str) -> dict[str, dict[str, Any]]:
    chosen = variants(arguments, network)
    if arguments.device.type == "cuda":
        return {name: measure_on_gpu(arguments, network, *which) for name, which in chosen.items()}
    latents, labels = inputs(arguments)
    steps = {name: cls(arguments, network, compiled) for name, (cls, compiled) in chosen.items()}
    runs = {name: partial(step.run, latents, labels) for name, step in steps.items()}
    times = in_turns(
        runs, arguments.warm, arguments.repeats, lambda: np.array([time.perf_counter(), time.process_time()])
    )
    found = {}
    for name in steps:
        seconds, processor = np.median(times[name], axis=0).tolist()
        found[name] = {"seconds": seconds, "images_per_s": len(latents) / seconds, "processor_s": processor}
        if not name.endswith("compiled"):
            outside = [outside_products(runs[name]) for _ in range(arguments.repeats)]
            found[name]["outside_products_s"] = min(outside)  # wall time of one thread, which includes other load
    for name in [*steps]:
        del steps[name], runs[name]
        command = [sys.executable, *sys.argv, "--network", network, "--memory_of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name]["peak_gb"] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_on_gpu(arguments: argparse.Namespace, network: str, cls: type, compiled: bool) -> dict[str, Any]:
    device, dtype = arguments.device, DTYPES[arguments.precision]
    free_memory(device)  # of the previous variant
    with device:
        step = cls(arguments, network, compiled)
    for module in step.modules():
        module.to(device)
    latents, labels = (tensor.to(device) for tensor in inputs(arguments))

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=cls is not Ours):
            step.run(latents, labels)

    with float32_products(device, "high"):
        run()
        peak = peak_memory(run, device)  # of the second step: AdamW's moments exist by then
        times = in_turns({"step": run}, arguments.warm, arguments.repeats, partial(clock, device))
    median = statistics.median(times["step"])
    return {"seconds": median, "images_per_s": len(latents) / median, "peak_gb": peak}


def outside_products(run: Callable[[], None]) -> float:
    """Return the seconds that a call spends outside matrix products, convolutions and attention."""
    with torch.autograd.set_multithreading_enabled(False), profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    others = (e for e in recorded.key_averages() if not any(name in e.key for name in PRODUCTS))
    return sum(event.self_cpu_time_total for event in others) / 1e6


def computed(arguments: argparse.Namespace, network: str) -> dict[str, dict[str, Any]]:
    """Compute the GPU memory in bf16, in GiB, between steps and at the peak of a step."""
    found = {}
    torch.distributions.Distribution.set_default_validate_args(False)  # validation needs real values
    for name, (cls, _) in variants(arguments, network).items():
        step, (latents, labels) = cls(arguments, network, False), inputs(arguments)
        if isinstance(step, Ours):
            step.draws = FlowDraws.at(
                0, {"epoch": 0, "position": torch.arange(len(latents))}, arguments.shape, latents.device, True
            )
        step.fake = True
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as live:
            for module in step.modules():
                make_fake(module, fake, live)
            step.optimizer.param_groups[0]["params"] = list(step.modules()[0].parameters())
            if isinstance(step, Ours):  # it keeps lists of the tensors that it updates
                step.ema = EMA(step.network, DECAY)
            for _ in range(2):  # from the second step on, AdamW's moments exist
                live.peak = live.now
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), GpuAutocast():
                    step.run(latents, labels)
            found[name] = {"between_steps_gib": live.now / GIB, "peak_gib": live.peak / GIB}
    return found


def inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(arguments.batch, *arguments.shape, generator=rng), torch.arange(arguments.batch) % CLASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rae", type=Path, help="checkout of the official code")
    parser.add_argument("--raev2", type=Path, help="checkout of RAEv2")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["ditdh_s", "dit_b"])
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[768, 16, 16], metavar="N", help="C, h and w of the latents"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--device", type=device_option, default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="bf16 and fp16 only on a GPU")
    parser.add_argument("--compile", action="store_true", help="also compiled steps, each as in its own trainer")
    parser.add_argument("--computed", action="store_true", help="derive a GPU's memory from tensor sizes")
    parser.add_argument("--memory_of", help="print the peak of one variant (internal use)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    arguments.shape = tuple(arguments.shape)
    if arguments.precision != "fp32" and arguments.device.type == "cpu":
        parser.error(f"--precision {arguments.precision} is for --device cuda; on a CPU it is fp32")
    if arguments.memory_of:
        cls, compiled = variants(arguments, arguments.network[0])[arguments.memory_of]
        step, (latents, labels) = cls(arguments, arguments.network[0], compiled), inputs(arguments)
        step.run(latents, labels)
        print(json.dumps(peak_memory(lambda: step.run(latents, labels), torch.device("cpu"))))
        return
    results = {}
    for network in arguments.network:
        results[network] = found = (computed if arguments.computed else measure)(arguments, network)
        for name, values in found.items():
            print(f"{network}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        for name in ("ours", "ours compiled"):
            other = found.get(name.replace("ours", "theirs"))
            if other is not None:
                ratios = (f"{key} {found[name][key] / other[key]:.3f}" for key in other)
                print(f"{network}, {name} over theirs: {', '.join(ratios)}", flush=True)
    write(surroundings(arguments.device) | {"results": results}, arguments.out)


if __name__ == "__main__":
    main()
