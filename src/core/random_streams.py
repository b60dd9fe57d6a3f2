"""Draw random numbers as a pure function of (seed, purpose, epoch, position).

Nothing in training reads a generator whose state depends on earlier draws. A run that is killed and resumed, with any
number of workers or ranks, gets the same order, crops, noise and augmentation (docs/data.md, "Order of batches").

`position` is the index of an image in its epoch's order over all ranks; `step` counts micro-batches the same way.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor


@unique
class Purpose(IntEnum):
    """One independent stream per purpose. Append only: a changed number changes every seeded run."""

    ORDER = 0
    CROP = 1
    LATENT_NOISE = 2
    AUGMENT_GENERATOR = 3
    AUGMENT_FAKE = 4
    AUGMENT_REAL = 5
    LAYER_SUBSET = 6
    REPLACEMENT = 7
    DUMMY_DATA = 8
    SPLIT = 9
    EVALUATION_ORDER = 10
    NOISE_LEVEL = 11
    FLOW_NOISE = 12
    FLOW_SCALARS = 13
    EVAL_NOISE = 14
    EVAL_SCALARS = 15
    SAMPLE_NOISE = 16
    SAMPLE_LABELS = 17
    MIX = 18
    GENERATED_NOISE = 19


def generator(seed: int, purpose: Purpose, epoch: int = 0, position: int = 0) -> np.random.Generator:
    """Return a counter-based (Philox) generator for one position in the stream. Costs a few microseconds."""
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=[0, 0, position, epoch]))


def generators(seed: int, purpose: Purpose, epoch: int, positions: Sequence[int]) -> Iterator[np.random.Generator]:
    """Yield `generator` for each of `positions`, at a tenth of the cost. It is the same object each time: draw from it before
    asking for the next."""
    numbers = generator(seed, purpose, epoch)
    start = numbers.bit_generator.state
    counter = start["state"]["counter"]
    for position in positions:
        counter[2] = position
        numbers.bit_generator.state = start
        yield numbers


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of `length` images in `epoch`: int64, shape (length,)."""
    return generator(seed, Purpose.ORDER, epoch).permutation(length)


def uniforms(seed: int, purpose: Purpose, epoch: int, positions: Sequence[int], count: int) -> Tensor:
    """Draw `count` numbers U[0, 1) for each position: float32 on the CPU, shape (len(positions), count)."""
    out = np.empty((len(positions), count), dtype=np.float32)
    for row, numbers in zip(out, generators(seed, purpose, epoch, positions), strict=True):
        numbers.random(dtype=np.float32, out=row)
    return torch.from_numpy(out)


def normals(
    seed: int, purpose: Purpose, epoch: int, positions: Sequence[int], shape: Sequence[int], device: torch.device
) -> Tensor:
    """Draw N(0, 1) of `shape` for each position, on `device`, one image at a time: float32, (len(positions), *shape).

    Values depend on the device type, but not on batch size, workers or ranks.
    """
    out = torch.empty(len(positions), *shape, device=device)
    rng = torch.Generator(device)
    for row, numbers in zip(out, generators(seed, purpose, epoch, positions), strict=True):
        key = numbers.integers(0, 2**63 - 1)
        torch.randn(tuple(shape), generator=rng.manual_seed(int(key)), device=device, out=row)
    return out
