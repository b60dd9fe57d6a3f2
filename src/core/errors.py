"""Errors that are shown without a traceback: user errors and out of memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """A user error: what was given, what was expected and what to type instead. Scripts print it and exit with status 1."""


@contextmanager
def worded(names: Mapping[str, str]) -> Iterator[None]:
    """Replace keys or options in UserErrors from the block by those the user typed: {in the message: as typed}."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for said, typed in names.items():
            text = text.replace(said, typed)
        raise UserError(text) from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether the host or a GPU ran out of memory."""
    # From PyTorch on the CPU, and from what uses GPU memory outside PyTorch's allocator: loaded kernels, cuBLAS, cuDNN, NCCL.
    # The last is from a convolution that finds no room for its workspace (pytorch/pytorch#108645).
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "to find an engine",
    )
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in words))
