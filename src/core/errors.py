"""What is shown without a traceback: mistakes of the user, and a lack of memory."""


class UserError(Exception):
    """Says what came, what was expected and what to type instead. Programs print it and exit with status 1."""


def lacks_memory(error: BaseException) -> bool:
    """Return whether the host or a GPU had too little memory."""
    # PyTorch's on the CPU, and of what takes a GPU's memory beside PyTorch: kernels that are loaded, cuBLAS, cuDNN, NCCL
    words = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in words))
