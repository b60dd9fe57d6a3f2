"""What is shown without a traceback: mistakes of the user, and a lack of memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Says what came, what was expected and what to type instead. Programs print it and exit with status 1."""


@contextmanager
def worded(names: Mapping[str, str]) -> Iterator[None]:
    """Put the name of the option or key that the user has typed into messages of the block, by what they say instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for said, typed in names.items():
            text = text.replace(said, typed)
        raise UserError(text) from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether the host or a GPU had too little memory."""
    # PyTorch's on the CPU, and of what takes a GPU's memory beside PyTorch: kernels that are loaded, cuBLAS, cuDNN, NCCL. The
    # last is a convolution's, for which no workspace was left (pytorch/pytorch#108645).
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "ALLOC_FAILED",
        "ALLOCATION_FAILED",
        "to find an engine",
    )
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in words))
