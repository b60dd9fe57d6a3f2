"""Memory of a training step at any batch size, worked out on a CPU without computing anything.

    python benchmarks/memory.py --decoder ViTB --batch 1 4 16 --activation_checkpointing --loss_chunk_size 4

The step of `benchmarks/train_step.py` runs on fake tensors (shapes and types, no numbers), all networks at their real size,
and the bytes of all live tensors are added up at each operation. That is what a GPU's allocator would hand out, without its
rounding, the CUDA context (about 0.5 GB) and the workspaces of cuBLAS and cuDNN: add 1 to 1.5 GB.
"""

import argparse
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.train_step import DTYPES, PHASES, OurRunner, build_models, make_inputs

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive; `peak` is the most there were at once."""

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


def make_fake(root: nn.Module, fake: FakeTensorMode, live: LiveBytes) -> None:
    """Put fake tensors of the same shapes in the place of parameters and buffers."""
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


def peak_bytes(arguments: argparse.Namespace, batch: int) -> tuple[int, int]:
    """(bytes between steps: weights, averages, moments; peak within a step)."""
    arguments.batch = batch
    options = {"disc_fake": "fresh", "compile": False, "loss_chunk_size": arguments.loss_chunk_size,
               "activation_checkpointing": arguments.activation_checkpointing}  # fmt: skip
    with tempfile.TemporaryDirectory() as arguments.scratch:
        models = build_models(arguments, torch.device("cpu"))
    images, draws = make_inputs(arguments, models, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as live:
        for module in (models.rae, models.lpips, models.discriminator):
            make_fake(module, fake, live)
        runner = OurRunner(models, torch.device("cpu"), options)
        dtype = DTYPES[arguments.precision]
        for _ in range(2):  # the second step has its moments already
            live.peak = live.now
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                runner.run(images, draws, PHASES[arguments.phase])
        return live.now, live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="dinov2_b")
    parser.add_argument("--decoder", default="ViTB", help="folder of configs/decoder")
    parser.add_argument("--disc", default="S_8")
    parser.add_argument("--image_size", type=int, default=256, metavar="PX")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--phase", choices=sorted(PHASES), default="gan")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--loss_chunk_size", type=int, metavar="N")
    arguments = parser.parse_args()
    batches = arguments.batch
    for batch in batches:
        held, peak = peak_bytes(arguments, batch)
        print(f"batch {batch}: {peak / GIB:.2f} GiB at the peak, {held / GIB:.2f} GiB of it between steps")


if __name__ == "__main__":
    main()
