"""Compute the GPU memory of a training step at any batch size, on a CPU and without running the step.

    python benchmarks/memory.py --decoder ViTB --batch 1 4 16 --activation_checkpointing --loss_chunk_size 4
    python benchmarks/memory.py --decoder ViTB --batch 16 --accumulate 1 32 --activation_checkpointing --loss_chunk_size 4
    python benchmarks/memory.py --decoder ViTXL --batch 64 --phases warmup gan --variants plain ours --fit 80 140

The step of `benchmarks/train_step.py` runs on fake tensors (shapes and dtypes, no data), with all networks at real size, and
the bytes of all live tensors are added up at each operation. This is what a GPU's allocator would hand out, without its
rounding, the CUDA context (about 0.5 GB) and the workspaces of cuBLAS and cuDNN: add 1 to 1.5 GB. Autocast uses the same
dtypes as on a GPU. On an H100 the measured peaks of the third command, at batch 64, were within 1 %.
`--fit` prints the largest batch for an amount of memory (a constant plus an amount per image). Choose a smaller one: on that
H100 it printed 219 images with GAN, and 218 did not fit.
"""

import argparse
import sys
import tempfile
import warnings
import weakref
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.runners import DECODERS, DTYPES, ENCODERS, PHASES, build_models, make_inputs, make_runner
from benchmarks.surroundings import write
from src.core.options import positive
from src.core.precision import cast_frozen
from src.losses import lpips_distance
from src.models.dino import RECIPES

GIB = 2**30
OVERHEAD = 1.5
"""GiB used besides tensors, subtracted by `--fit`."""
IN_FLOAT32_ON_A_GPU = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "norm", "vector_norm", "sum", "prod", "cumsum",
    "pow", "__pow__", "__rpow__", "exp", "log", "rsqrt", "reciprocal", "l1_loss", "mse_loss",
}  # fmt: skip
"""From the table of operations in torch's autocast documentation; on a CPU, autocast leaves these in half precision."""


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all live storages (`now`) and their maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class GpuAutocast(TorchFunctionMode):
    """Makes CPU autocast run those operations in float32 that GPU autocast runs in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in IN_FLOAT32_ON_A_GPU and torch.is_autocast_enabled("cpu"):
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def make_fake(root: nn.Module, fake: FakeTensorMode, live: LiveBytes) -> None:
    """Replace parameters and buffers by fake tensors of the same shapes."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stand_in = fake.from_tensor(parameter.detach())
                live.add(stand_in)
                module._parameters[name] = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)
                live.add(module._buffers[name])


def peak_bytes(arguments: argparse.Namespace, variant: str, batch: int, accumulate: int = 1) -> tuple[int, int]:
    """Return bytes between steps (weights, EMA, moments) and at the peak within a step of `accumulate` micro-batches."""
    arguments.batch = batch
    device, dtype = torch.device("cpu"), DTYPES[arguments.precision]
    options = {"disc_fake": arguments.disc_fake, "loss_chunk_size": arguments.loss_chunk_size, "dtype": None,
               "activation_checkpointing": arguments.activation_checkpointing}  # fmt: skip
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy only checks it for null
    with tempfile.TemporaryDirectory() as arguments.scratch:
        models = build_models(arguments, device)
    if dtype is not None and variant != "plain":  # the runner does this, but can't cast fake weights in place
        cast_frozen(models.rae.encoder, dtype)
        cast_frozen(models.discriminator.trunk, dtype)
    images, draws = make_inputs(arguments, device)
    tiles = patch.object(lpips_distance, "PART_ON_CPU", lpips_distance.PART_ON_DEVICE)
    with tiles, FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as live:
        for module in (models.rae, models.lpips, models.discriminator):
            make_fake(module, fake, live)
        runner = make_runner(variant, models, device, options)
        for micro_batches in (1, accumulate):  # from the second step on, AdamW's moments exist
            live.peak, runner.accumulate = live.now, micro_batches
            with torch.autocast("cpu", dtype or torch.bfloat16, dtype is not None, cache_enabled=False), GpuAutocast():
                runner.run(images, draws, PHASES[arguments.phase])
        return live.now, live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=ENCODERS, default="dinov2_b")
    parser.add_argument("--decoder", choices=DECODERS, default="ViTB", help="folder in configs/decoder")
    parser.add_argument("--disc", choices=sorted(RECIPES), default="S_8")
    parser.add_argument("--image_size", type=int, default=256, metavar="PX")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--variants", nargs="+", choices=["plain", "ours"], default=["ours"])
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--phases", nargs="+", choices=sorted(PHASES), default=["gan"])
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--loss_chunk_size", type=positive, metavar="N")
    parser.add_argument("--disc_fake", choices=["fresh", "reuse"], default="fresh")
    parser.add_argument(
        "--accumulate", type=positive, nargs="+", default=[1], metavar="N", help="micro-batches; not for plain"
    )
    parser.add_argument("--fit", type=positive, nargs="+", default=[], metavar="GIB", help="memory to fill")
    parser.add_argument("--out", type=Path, help="write the results of the last batch size as JSON")
    arguments = parser.parse_args()
    batches = arguments.batch
    if arguments.accumulate != [1] and "plain" in arguments.variants:
        parser.error("--accumulate: the plain step has one micro-batch; leave plain out of --variants")
    results: dict[str, dict[str, dict[str, float]]] = {phase: {} for phase in arguments.phases}
    for phase in arguments.phases:
        arguments.phase = phase
        for variant in arguments.variants:
            for batch, accumulate in product(batches, arguments.accumulate):
                held, peak = peak_bytes(arguments, variant, batch, accumulate)
                micro = f" x {accumulate}" if accumulate > 1 else ""
                sizes = f"{peak / GIB:.2f} GiB at the peak, {held / GIB:.2f} GiB between steps"
                print(f"{phase}, {variant}, batch {batch}{micro}: {sizes}", flush=True)
            found = {"peak_gib": peak / GIB, "between_steps_gib": held / GIB}  # of the last batch size
            results[phase][variant] = found | largest_batches(arguments, variant, batch, peak)
    args = {k: str(v) for k, v in vars(arguments).items() if k not in ("scratch", "batch", "phase")}
    record = {"torch": torch.__version__, "computed": "from the sizes of tensors", "batch": batches[-1]}
    write(record | {"arguments": args, "results": results}, arguments.out)


def largest_batches(arguments: argparse.Namespace, variant: str, batch: int, peak: int) -> dict[str, float]:
    """Return the largest batch for each value of `--fit`, extrapolated from two batch sizes."""
    if not arguments.fit:
        return {}
    other = max(1, batch // 2) if batch > 1 else 2
    less = peak_bytes(arguments, variant, other, arguments.accumulate[-1])[1]
    share = (peak - less) / (batch - other)  # bytes per image
    found = {"gib_per_image": share / GIB}
    for gib in arguments.fit:
        largest = max(0, int(((gib - OVERHEAD) * GIB - (peak - share * batch)) / share))
        found[f"batch_in_{gib}_gib"] = largest
        print(f"{arguments.phase}, {variant}: {gib} GiB hold batches up to about {largest}")
    return found


if __name__ == "__main__":
    main()
