"""Check the files of an encoder (folder or hub repository) for damage, and read its pixel statistics.

Broken downloads leave git-lfs pointers, HTML pages, empty or truncated files; the error gives the size and a remedy.
"""

import logging
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from src.core.errors import UserError
from src.core.images import IMAGENET_MEAN, IMAGENET_STD
from src.core.json_files import read_json
from src.core.weights import failed_download

log = logging.getLogger(__name__)

PixelStatistics = tuple[Sequence[float], Sequence[float]]
STATISTICS: dict[str, PixelStatistics] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Mean and std of pixels in [0, 1], by name."""
_WEIGHTS = ("*.safetensors", "*.bin")
_REMEDY = "Download it again (`hf download ID --local-dir FOLDER`), and compare its size with the one on the hub"


def check_folder(folder: Path) -> None:
    """Raise UserError if config, preprocessor or weights in `folder` are damaged, of another format or incomplete."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds a PEFT adapter instead of a full model. Merge it into its base model and save the result."
        )
    names = ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
    found = [folder / name for name in names if (folder / name).is_file()]
    for file in [*found, *(file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern)))]:
        if problem := _damage(file):
            raise UserError(f"{file} ({file.stat().st_size:,} bytes) {problem}.")
    index = folder / "model.safetensors.index.json"
    if index in found:
        shards = set(read_json(index, _REMEDY, weight_map=dict[str, str])["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise UserError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}. {_REMEDY}.")


def read_statistics(place: str, default: PixelStatistics) -> PixelStatistics:
    """Return (mean, std) from `preprocessor_config.json` of a folder or hub id, or `default` if there is none.

    Raises:
        UserError: `place` is neither a folder nor a hub id, or the values are no mean and std of three channels.
    """
    from transformers.utils import cached_file

    try:
        file = cached_file(
            place,
            "preprocessor_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.encoder_config_path={place}: {str(error).splitlines()[0]}. Expected a hub id, or a folder with "
            "preprocessor_config.json."
        ) from error
    if not file:
        log.info("%s has no preprocessor_config.json: using the mean and std of its family.", place)
        return default
    config = read_json(file, _REMEDY)
    if config.get("do_normalize") is False:
        return STATISTICS["none"]
    return checked_statistics(config.get("image_mean", default[0]), config.get("image_std", default[1]), file)


def checked_statistics(mean: Any, std: Any, file: object) -> PixelStatistics:
    """Return (mean, std). Raises UserError unless each is three finite numbers, with std positive."""
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        numbers = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or not all(least < value < math.inf for value in values):
            raise UserError(
                f"{file}: image_{name} is {values!r:.80}; expected three finite numbers{', above 0' * (name == 'std')}."
            )
    return mean, std


def _damage(file: Path) -> str | None:
    """Return what is wrong with the content of a file, with a remedy; None if it is intact."""
    if problem := failed_download(file):
        return problem
    if file.suffix == ".json":
        read_json(file, _REMEDY + ".")
        return None
    if file.suffix == ".bin":
        with file.open("rb") as stream:  # torch's zip format, or the pickle format before torch 1.6
            whole = stream.read(1) == b"\x80" or zipfile.is_zipfile(stream)
        return None if whole else f"is cut short or no file of torch. {_REMEDY}"
    try:
        with safe_open(file, "pt"):  # reads the header and checks it against the file size
            return None
    except SafetensorError as error:
        return f"is cut short or no safetensors file: {error}. {_REMEDY}"
