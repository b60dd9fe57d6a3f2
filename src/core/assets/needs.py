"""What a composed experiment needs: read from its config by the names of the keys, so that it can't go stale."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.core.assets.table import FILES, Asset, FileAsset, by_name, repository
from src.core.errors import UserError

# Keys that name a weights file, with the asset that such a file always is (None: the file's place and name tell).
FILE_KEYS: dict[str, str | None] = {
    "vgg_path": "vgg16",
    "linear_path": "lpips",
    "inception_path": "inception",
    "dino_ckpt_path": None,
    "pretrained_decoder_path": None,
    "normalization_stat_path": None,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Need:
    """One thing that must be on this machine.

    `place` is where a file belongs; None for an encoder repository, which lives in the hub's cache.
    `asset` is None where the config names something that has no known source: the user has to bring it.
    """

    key: str  # the first config key that asks for it
    asset: Asset | None
    place: Path | None


def needs(config: Mapping[str, Any], weights_dir: Path, root: Path) -> list[Need]:
    """Everything that `config` (plain, resolved, nested) loads, each once.

    Parts with `weights: untrained` need nothing, nor a path beside such a word (`inception_weights` for
    `inception_path`), nor do keys that are null. Relative paths are relative to `root`, the
    project. `weights_dir` is where the table's places are. Raises UserError for a value that is not resolved.
    """
    found: dict[tuple[Asset | None, Path | None], Need] = {}
    for key, value in _references(config, ()):
        if "${" in value or value == "???":
            raise UserError(
                f"{key} is {value!r}: give it a value, such as `{key}=PATH`, before its weights can be found."
            )
        need = _need(key, value, weights_dir, root)
        if need is not None:
            found.setdefault((need.asset, need.place), need)
    return list(found.values())


def _references(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every leaf that names weights, in the order of the config."""
    if isinstance(node, Mapping):
        if node.get("weights") in ("untrained", "tiny"):
            return
        for name, value in node.items():
            if node.get(str(name).removesuffix("_path") + "_weights") in ("untrained", "tiny"):
                continue
            yield from _references(value, (*path, str(name)))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _references(value, (*path, str(index)))
    elif isinstance(node, str) and node and (_names_encoder(path) or path[-1] in FILE_KEYS):
        yield ".".join(path), node


def _names_encoder(path: tuple[str, ...]) -> bool:
    """`model.encoder_config_path`, and `model_name` or any `*_path` among the encoder's own parameters."""
    inside = len(path) >= 2 and path[-2] == "encoder_params"
    return path[-1] == "encoder_config_path" or (inside and (path[-1] == "model_name" or path[-1].endswith("_path")))


def _need(key: str, value: str, weights_dir: Path, root: Path) -> Need | None:
    place = root / Path(value).expanduser()
    leaf = key.rsplit(".", 1)[-1]
    if leaf in FILE_KEYS:
        return Need(key, _file_asset(leaf, place, weights_dir), place)
    if place.exists():  # an encoder in a folder of the user's own
        return None
    if _HUB_ID.fullmatch(value):
        return Need(key, repository(value), None)
    return Need(key, None, place)


def _file_asset(leaf: str, place: Path, weights_dir: Path) -> FileAsset | None:
    """By its place under `weights_dir`, else by a name that only one asset has, else by what the key always means."""
    if place.is_relative_to(weights_dir):
        relative = place.relative_to(weights_dir).as_posix()
        for asset in FILES:
            if asset.place == relative:
                return asset
    same_name = [asset for asset in FILES if Path(asset.place).name == place.name]
    if len(same_name) == 1:
        return same_name[0]
    meaning = FILE_KEYS[leaf]
    found = by_name(meaning) if meaning else None
    return found if isinstance(found, FileAsset) else None
