"""Compare our stage-1 training step with those of the official code and RAEv2 (their own code), interleaved in one process.

    python benchmarks/peers.py --rae ../RAE --raev2 ../RAEv2 --decoder ViTB --batch 4
    python benchmarks/peers.py --rae ../RAE --raev2 ../RAEv2 --device cuda --decoder ViTXL --batch 64 --precision bf16

`--rae` and `--raev2` are checkouts of github.com/bytetriper/RAE and github.com/nanovisionx/RAEv2; no code of theirs is part of
this project. The body of the official training loop in `train_stage1.py` and RAEv2's function `train_one_epoch` run unmodified,
on one batch at a time and under DistributedDataParallel with one process, as in their trainers. `raev2_compile` is RAEv2 with
`--compile`. All have untrained networks of the same sizes; RAEv2's DINOv2, which comes from torch.hub, is replaced by the
equivalent one of transformers. What neither step needs (evaluation, wandb) is left out.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import statistics
import sys
import types
from collections import defaultdict
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from benchmarks.runners import DTYPES, ENCODERS, PHASES, build_models, make_inputs, make_runner, step_parser
from benchmarks.surroundings import in_turns, surroundings, write
from benchmarks.train_step import autocast, clock, free_memory, matmul_peak, memory_alone, peak_memory, turns
from src.core.errors import lacks_memory
from src.core.files import write_torch
from src.losses.lpips import CHANNELS, CONVS_PER_STAGE
from src.models.dino import RECIPES, DinoTrunk

VARIANTS = ("official", "raev2", "raev2_compile", "plain", "ours", "compiled")
PACKAGES = ("stage1", "disc", "utils", "eval", "configs", "encoders", "train_stage1")
"""Top-level module names of the two repositories."""
NEVER = 10**12
PERCEPTUAL_WEIGHT, DISC_WEIGHT, MAX_D_WEIGHT, EMA_DECAY = 1.0, 0.75, 1e4, 0.9978
ADAM = {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}
COSINE = {"type": "cosine", "warmup_epochs": 1, "decay_end_epoch": 16, "base_lr": 2e-4, "final_lr": 2e-5}


class Repository:
    """A checkout whose modules are importable inside `with`, and removed from `sys.modules` afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root / "src"
        self.modules: dict[str, types.ModuleType] = {}

    def __enter__(self) -> "Repository":
        sys.path.insert(0, str(self.root))
        sys.modules.update(self.modules)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.path.remove(str(self.root))
        own = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
        self.modules = {name: sys.modules.pop(name) for name in own}


class Official:
    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.repository = Repository(arguments.rae)
        encoder, decoder, dino = files(arguments, arguments.rae)
        lpips_file(self.repository.root / "disc/.caches/vgg.pth")
        with self.repository:
            stand_in("eval", evaluate_reconstruction_distributed=None)
            program = importlib.import_module("train_stage1")
            arch = {"dino_ckpt_path": str(dino), "ks": 9, "recipe": arguments.disc}
            with device, patch.object(Dinov2WithRegistersModel, "from_pretrained", untrained_dinov2):
                rae = program.RAE(
                    "Dinov2withNorm", str(encoder), 224, {"dinov2_path": str(encoder)}, str(decoder), 16, noise_tau=0.8
                ).to(device)
                discriminator, augment = program.build_discriminator({"arch": arch}, device)
                lpips = program.LPIPS().to(device).eval()
            average, model = prepare(rae, device)
            training = {"optimizer": ADAM, "scheduler": COSINE}
            heads = [p for p in discriminator.parameters() if p.requires_grad]
            optimizers = [program.build_optimizer(p, training)[0] for p in (rae.decoder.parameters(), heads)]
            schedulers = [program.build_scheduler(optimizer, 2502, training)[0] for optimizer in optimizers]
            disc_loss, gen_loss = program.select_gan_losses("hinge", "vanilla")
            scaler = torch.amp.GradScaler(device.type) if arguments.precision == "fp16" else None
            self.names = vars(program) | {
                "rae": rae, "ddp_model": model, "ema_model": average, "discriminator": discriminator.train(),
                "ddp_disc": wrap(discriminator, device), "disc_aug": augment, "disc_loss_fn": disc_loss, "gen_loss_fn": gen_loss,
                "lpips": lpips, "optimizer": optimizers[0], "disc_optimizer": optimizers[1],
                "scheduler": schedulers[0], "disc_scheduler": schedulers[1], "scaler": scaler, "device": device,
                "rank": 0, "autocast": partial(torch.autocast, device.type), "autocast_kwargs": their_autocast(arguments.precision),
                "disc_weight": DISC_WEIGHT, "perceptual_weight": PERCEPTUAL_WEIGHT, "max_d_weight": MAX_D_WEIGHT,
                "clip_grad": None, "ema_decay": EMA_DECAY, "disc_updates": 1, "lpips_start_step": 0, "log_interval": 0,
                "sample_every": NEVER, "do_eval": False, "num_batches": 0, "last_layer": rae.decoder.decoder_pred.weight,
                "epoch_metrics": defaultdict(lambda: torch.zeros(1, device=device)),
            }  # fmt: skip
        main = next(
            node
            for node in ast.parse((self.repository.root / "train_stage1.py").read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == "main"
        )
        loop = next(n for n in ast.walk(main) if isinstance(n, ast.For) and ast.unparse(n.iter) == "enumerate(loader)")
        self.code = compile(ast.Module([loop], []), "the official training loop", "exec")

    def run(self, images: Tensor, phase: str) -> None:
        start = 0 if phase == "gan" else NEVER
        self.names |= {"loader": [(images.float() / 255, None)], "gan_start_step": start, "disc_update_step": start}
        self.names["global_step"] = 1
        exec(self.code, self.names)


class RAEv2:
    def __init__(self, arguments: argparse.Namespace, device: torch.device, compiled: bool) -> None:
        self.repository = Repository(arguments.raev2)
        encoder, decoder, dino = files(arguments, arguments.raev2)
        lpips_file(self.repository.root / "stage1/disc/.caches/vgg.pth")
        with self.repository:
            stand_in("eval", evaluate_reconstruction_distributed=None)
            stand_in("encoders.vision_encoder", create_encoder=None)
            package = stand_in("stage1")  # its own __init__ imports other autoencoders, which need more libraries
            package.__path__ = [str(self.repository.root / "stage1")]
            model, discs, configs, optim, self.engine = (
                importlib.import_module(n)
                for n in ("stage1.rae", "stage1.disc", "configs", "utils.optim_utils", "stage1.engine")
            )
            model.create_encoder = lambda *_, **__: HubDinov2(encoder)
            self.engine.autocast = partial(torch.autocast, device.type)
            arch = configs.DiscriminatorArchConfig(dino_ckpt_path=str(dino), recipe=arguments.disc)
            with device:
                rae = model.RAE("dinov2", arguments.image_size, str(decoder), 16, None, 0.8, None).to(device)
                discriminator, self.augment = discs.build_discriminator(arch, device, configs.DiscAugmentConfig())
                self.lpips = discs.LPIPS().to(device).eval()
            self.average, self.model = prepare(rae, device)
            if compiled:
                self.model = torch.compile(self.model)
            self.discriminator = wrap(discriminator.train(), device)
            heads = [p for p in discriminator.parameters() if p.requires_grad]
            adam = configs.OptimizerConfig(**ADAM)
            self.optimizers = [optim.build_optimizer(p, adam)[0] for p in (rae.decoder.parameters(), heads)]
        self.device, self.autocast = device, their_autocast(arguments.precision)
        loss = SimpleNamespace(
            disc_loss="hinge", gen_loss="vanilla", disc_weight=DISC_WEIGHT, perceptual_weight=PERCEPTUAL_WEIGHT, disc_start=1,
            disc_upd_start=1, lpips_start=0, max_d_weight=MAX_D_WEIGHT, disc_updates=1,
        )  # fmt: skip
        training = SimpleNamespace(
            virtual_epoch_steps=10, checkpoint_interval=0, clip_grad=None, ema_decay=EMA_DECAY, log_interval=0,
            sample_every=NEVER,
        )  # fmt: skip
        self.config = SimpleNamespace(gan=SimpleNamespace(loss=loss), training=training, eval=None)

    def run(self, images: Tensor, phase: str) -> None:
        step = 11 if phase == "gan" else 1  # adversarial from epoch 1 on; an epoch has ten steps
        bar = SimpleNamespace(update=lambda _: None)
        with self.repository:  # torch.compile looks modules up by name
            self.engine.train_one_epoch(
                self.model, self.average, self.discriminator, self.augment, self.lpips, [(images.float() / 255, None)],
                *self.optimizers, None, None, self.autocast, self.device, 1, step, len(images), self.config,
                SimpleNamespace(wandb=False), None, 1, 1, "", "", bar,
            )  # fmt: skip


class Ours:
    def __init__(self, name: str, arguments: argparse.Namespace, device: torch.device) -> None:
        _, self.draws = make_inputs(arguments, device)
        options = {"disc_fake": "fresh", "loss_chunk_size": None, "activation_checkpointing": False}
        options["dtype"] = DTYPES[arguments.precision]
        self.runner = make_runner(name, build_models(arguments, device), device, options)
        self.autocast = partial(autocast, device, arguments.precision)

    def run(self, images: Tensor, phase: str) -> None:
        with self.autocast():
            self.runner.run(images, self.draws, PHASES[phase])


class HubDinov2(nn.Module):
    """Stand-in for RAEv2's encoder: images in [0, 255] -> patch tokens, without the affine part of the norm."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = untrained_dinov2(folder).requires_grad_(False)
        self.model.layernorm = nn.LayerNorm(self.model.config.hidden_size, elementwise_affine=False)
        self.patch_size, self.hidden_size = self.model.config.patch_size, self.model.config.hidden_size

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images / 255 - 0.45, 224, mode="bicubic")
        return self.model(x).last_hidden_state[:, 5:]


def untrained_dinov2(folder: str | Path, **_: Any) -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig.from_pretrained(folder))


def prepare(rae: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return (EMA model, model to train), created in the same order as in both trainers."""
    rae.encoder.eval(), rae.decoder.train()
    average = deepcopy(rae).eval().requires_grad_(False)
    rae.encoder.requires_grad_(False), rae.decoder.requires_grad_(True)
    return average, wrap(rae, device)


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    devices = [0] if device.type == "cuda" else None
    return DistributedDataParallel(module, devices, broadcast_buffers=False, find_unused_parameters=False)


def their_autocast(precision: str) -> dict[str, Any]:
    dtype = DTYPES[precision]
    return {"enabled": False} if dtype is None else {"enabled": True, "dtype": dtype}


def stand_in(name: str, **content: Any) -> types.ModuleType:
    """Register a stub module called `name`, and empty packages above it."""
    for end in range(1, name.count(".") + 1):
        package = ".".join(name.split(".")[:end])
        sys.modules.setdefault(package, types.ModuleType(package))
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]


def stand_in_for_missing() -> None:
    """Replace torchvision's VGG16, whose weights both would download, by an untrained one; stub missing packages."""
    transformers.utils.is_torchvision_available()  # cache the answer before the stub exists
    if importlib.util.find_spec("torchvision") is None:
        top = stand_in("torchvision")
        top.models = stand_in("torchvision.models", vgg16=vgg16)
        top.utils = stand_in("torchvision.utils", make_grid=None)
        top.transforms = stand_in("torchvision.transforms")
        top.datasets = stand_in("torchvision.datasets", ImageFolder=None)
    else:
        importlib.import_module("torchvision.models").vgg16 = vgg16  # type: ignore[attr-defined]
    if importlib.util.find_spec("wandb") is None:
        stand_in("wandb")


def vgg16(**_: Any) -> SimpleNamespace:
    layers: list[nn.Module] = []
    width = 3
    for channels, depth in zip(CHANNELS, CONVS_PER_STAGE, strict=True):
        for _number in range(depth):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
            width = channels
        layers.append(nn.MaxPool2d(2, 2))
    return SimpleNamespace(features=nn.Sequential(*layers))


def lpips_file(path: Path) -> None:
    """Write untrained linear weights if the checkout has none yet; otherwise it would download them."""
    if not path.exists():
        write_torch(path, {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)})


def files(arguments: argparse.Namespace, repository: Path) -> tuple[Path, Path, Path]:
    """Write encoder config, decoder config and an untrained DINO trunk as both trainers expect them on disk."""
    scratch = Path(arguments.scratch).resolve()
    encoder, decoder, dino = scratch / "dinov2", scratch / arguments.decoder, scratch / f"dino_{arguments.disc}.pth"
    Dinov2WithRegistersConfig(**ENCODERS["dinov2_b"], patch_size=14, image_size=518).save_pretrained(encoder)
    statistics_of_imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    content = {"image_processor_type": "BitImageProcessor", **statistics_of_imagenet}
    (encoder / "preprocessor_config.json").write_text(json.dumps(content))
    decoder.mkdir(parents=True, exist_ok=True)
    config = json.loads((repository / "configs/decoder" / arguments.decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**config, "patch_size": 16}))  # transformers 5 refuses a string
    if not dino.exists():
        trunk = DinoTrunk(RECIPES[arguments.disc], None, "untrained").state_dict()
        width = RECIPES[arguments.disc].width
        write_torch(dino, {**trunk, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)})
    return encoder, decoder, dino


def make(name: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    torch.manual_seed(0)
    if name == "official":
        return Official(arguments, device)
    if name.startswith("raev2"):
        return RAEv2(arguments, device, compiled=name.endswith("compile"))
    return Ours(name, arguments, device)


def main() -> None:
    parser = step_parser(__doc__, VARIANTS, ["warmup", "gan"])
    parser.add_argument("--rae", type=Path, required=True, help="checkout of the official code")
    parser.add_argument("--raev2", type=Path, required=True, help="checkout of RAEv2")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    for option, repository in (("rae", "bytetriper/RAE"), ("raev2", "nanovisionx/RAEv2")):
        folder = getattr(arguments, option)
        if not (folder / "src/train_stage1.py").is_file():
            parser.error(
                f"--{option} {folder}: no src/train_stage1.py there. Get one: git clone https://github.com/{repository}"
            )
    arguments.encoder, arguments.image_size = "dinov2_b", 256
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    stand_in_for_missing()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (arguments.batch, 3, 256, 256), dtype=torch.uint8, generator=generator).to(device)
    if arguments.memory_only:
        runner = make(arguments.variants[0], arguments, device)
        print(json.dumps({phase: peak(runner, images, phase, device) for phase in arguments.phases}))
        return
    on_gpu = device.type == "cuda"  # a variant is alone in memory there, so its peak is measured in the same process
    memory = {name: {} if on_gpu else memory_alone(name, arguments.precision) for name in arguments.variants}
    seconds: dict[str, dict[str, list[float]]] = {phase: {} for phase in arguments.phases}
    tflops, failed = matmul_peak(device, arguments.precision), {}
    for names in turns(arguments.variants, device):
        try:
            runners = {name: make(name, arguments, device) for name in names}
            for phase in arguments.phases:
                for name, runner in runners.items() if on_gpu else ():
                    memory[name][phase] = peak(runner, images, phase, device)
                steps = {name: partial(runner.run, images, phase) for name, runner in runners.items()}
                seconds[phase] |= in_turns(steps, arguments.warm, arguments.repeats, partial(clock, device))
        except Exception as error:  # of third-party code: continue with the other variants
            if not on_gpu:
                raise
            why = f"out of memory at batch {arguments.batch}" if lacks_memory(error) else f"{error!r:.300}"
            print(f"{names[0]}: not measured, {why}")
            failed[names[0]] = {"not_measured": why}
        runners = steps = {}
        free_memory(device)
        report(arguments, device, seconds, memory, failed, tflops)  # after each variant, in case a later one crashes
    dist.destroy_process_group()


def peak(runner: Any, images: Tensor, phase: str, device: torch.device) -> float | None:
    runner.run(images, phase)
    return peak_memory(partial(runner.run, images, phase), device)


def times_as_fast(row: dict[str, Any], other: dict[str, Any]) -> float:
    return statistics.median(a / b for a, b in zip(other["seconds_all"], row["seconds_all"], strict=True))


def report(
    arguments: argparse.Namespace,
    device: torch.device,
    seconds: Any,
    memory: Any,
    failed: dict[str, Any],
    tflops: float,
) -> None:
    results: dict[str, dict[str, Any]] = {}
    for phase, found in seconds.items():
        rows = {
            name: {
                "seconds": statistics.median(times), "seconds_all": times, "peak_memory_gb": memory[name][phase],
                "images_per_s": arguments.batch / statistics.median(times),
            }
            for name, times in found.items()
        }  # fmt: skip
        for name, row in rows.items():
            against = ", ".join(f"{times_as_fast(row, rows[other]):.2f} x {other}" for other in rows if other != name)
            print(f"{phase} {name}: {row['seconds']:.2f} s, {row['peak_memory_gb']} GB; {against}")
        results[f"{arguments.precision}/{phase}"] = {**failed, **rows, "matmul_tflops": tflops}
    args = {k: str(v) for k, v in vars(arguments).items() if k not in ("rae", "raev2", "scratch", "out", "memory_only")}
    write({**surroundings(device), "arguments": args, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
