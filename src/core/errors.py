"""What is shown without a traceback: mistakes of the user, and a lack of memory."""


class UserError(Exception):
    """Says what came, what was expected and what to type instead. Programs print it and exit with status 1."""


def lacks_memory(error: BaseException) -> bool:
    """Return whether the host or a GPU had too little memory."""
    words = "can't allocate memory" in str(error)  # PyTorch's, on the CPU
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or words
