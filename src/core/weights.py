"""Find, read and check weight files, and load them strictly into modules. Never goes online, never runs pickled code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.files import PROJECT_ROOT as PROJECT_ROOT
from src.core.files import resolve as resolve
from src.core.nonfinite import nonfinite_tensors

Weights = Literal["pretrained", "untrained"]
SizedWeights = Literal["pretrained", "untrained", "tiny"]
"""`tiny`: untrained with few channels, for tests and the dummy experiments."""
RANDOM = ("untrained", "tiny")
_CHECKED: set[tuple[str, int, int, int]] = set()
"""Archives whose CRCs this process has checked, as `_file_version` returns them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Float dtypes by their names in options."""


_UNTRAINED = "To try without it, ask for untrained weights by name (weights=untrained, --inception_weights untrained)."


def require(path: str | Path | None, what: str, key: str) -> Path:
    """Return the resolved path of a file that must exist, else raise UserError naming `what` and `key` (config key or option)."""
    if path is None:
        raise UserError(
            f"{what}: {key} is not set. Give the file (`python scripts/download_weights.py --list` shows where to get it). "
            + _UNTRAINED
        )
    found = resolve(path)
    if not found.is_file():
        raise UserError(
            f"{what} not found: {found} (from {key}). Get it with `python scripts/download_weights.py --experiment "
            "NAME` (everything that an experiment needs; --list shows each file, its path and its sources), or set "
            f"{key} to the path where you have it. {_UNTRAINED}"
        )
    return found


def read(path: str | Path) -> Any:
    """Load a `.pt` / `.pth` / `.ckpt` or `.safetensors` file onto the CPU, without running code in it. Raises UserError."""
    path = Path(path)
    try:
        if problem := failed_download(path):
            raise UserError(f"{path} ({path.stat().st_size:,} bytes) {problem}.")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it holds Python objects other than tensors and plain containers, or is not a weights "
            "file. Loading such objects could run code. Re-save it as a plain state dict, or download it again."
        ) from error
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) can't be read as a weights file: {reason}. "
            "It may be cut short; download or copy it again."
        ) from error


def failed_download(file: Path) -> str | None:
    """Return what a failed download left instead of the file, and the remedy; None if it may be the file itself."""
    with file.open("rb") as stream:
        start = stream.read(1024)
    if not start:
        return "is empty. Download it again (`hf download ID --local-dir FOLDER`)"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself. Run `git lfs pull` in that folder, or `hf download`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "is an HTML page: a login or error page was saved. Download it again, with HF_TOKEN if the model is gated"
        )
    return None


def check_archive(path: Path) -> None:
    """Check the CRCs of a torch.save archive, which torch.load doesn't; other files pass. Raises UserError: a damaged entry.

    Reads the file once, 1.5 ms per MB. If every CRC is wrong, the writer computed none (an option of torch.save): no error.
    """
    if not zipfile.is_zipfile(path) or _file_version(path) in _CHECKED:
        return
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None and any(_intact(archive, entry) for entry in archive.infolist()):
            raise UserError(
                f"{path} ({path.stat().st_size:,} bytes) is damaged: its entry {damaged} has a wrong checksum (CRC-32). "
                "Copy or download it again, or take another checkpoint of that run."
            )
    _CHECKED.add(_file_version(path))


def _file_version(path: Path) -> tuple[str, int, int, int]:
    """Return a key that changes when the file is replaced or modified: path, inode, size, mtime."""
    status = path.stat()
    return str(path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns


def _intact(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as file:
            while file.read(1 << 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`. UserErrors list every missing, unexpected and misshaped tensor, or all non-finite ones."""
    check_fit(module.state_dict(), state, source, type(module).__name__)
    check_finite(state, source)
    module.load_state_dict(state)


def check_finite(content: Any, source: str | Path, remedy: str = "Take another file.") -> None:
    """Raise UserError if a tensor in nested containers holds NaN or infinity; `source` names the file."""
    if names := nonfinite_tensors(content):
        raise UserError(
            f"{source} holds numbers that are NaN or infinite, in {len(names)} tensor(s): {_abbreviate(names, 4)}. {remedy}"
        )


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path, model: str) -> None:
    """Raise UserError unless `state` has the names and shapes of `own`."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source} is not a state dict: expected a flat mapping of names to tensors for {model}.")
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: file {tuple(state[name].shape)}, model {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"  {label} ({len(names)}): {_abbreviate(names)}"
            for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
            if names
        ]
        raise UserError(f"{source} does not fit {model}:\n" + "\n".join(parts))


def freeze(module: nn.Module) -> nn.Module:
    """Set eval mode and turn gradients off, in place."""
    return module.eval().requires_grad_(False)


class Frozen(nn.Module):
    """A network that is never trained: `train()` leaves it in eval mode."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def _abbreviate(names: list[str], shown: int = 12) -> str:
    rest = f" … and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
