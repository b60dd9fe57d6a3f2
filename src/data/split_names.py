"""Names of splits: what means the same in every program, in folders, datasets and file names."""

import re
from collections.abc import Sequence

from src.core.errors import UserError

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev")
TEST_SPLITS = ("test",)
SPLIT_NAMES = (TRAIN_SPLITS, VALIDATION_SPLITS, TEST_SPLITS)
"""Names that mean the same split; the first is the one that the converter writes."""
ALIASES = {name: same[0] for same in SPLIT_NAMES for name in same}


def split_of(file: str) -> str | None:
    """Return the split that the name of a file, or else of its folders, says: `imagenet1k-train-0001.tar` -> `train`.

    Raises:
        UserError: one name with the words of two splits.
    """
    for part in reversed(file.split("/")):
        found = sorted({ALIASES[word] for word in re.split(r"[^a-z]+", part.lower()) if word in ALIASES})
        if len(found) > 1:
            raise UserError(f"{file}: its name says {' and '.join(found)}; rename it, so that it says one split.")
        if found:
            return found[0]
    return None


def group_by_split(files: Sequence[str], place: str) -> dict[str, list[str]]:
    """Return the files of each split by their names; all of them under `train` where no name says one.

    Raises:
        UserError: some files say a split and others none, so that nobody knows what these are.
    """
    groups: dict[str | None, list[str]] = {}
    for file in files:
        groups.setdefault(split_of(file), []).append(file)
    unknown = groups.pop(None, [])
    if unknown and groups:
        known = "; ".join(f"{name}: {files[0]} …" for name, files in groups.items() if name)
        raise UserError(
            f"{place} (data.data_dir): {len(unknown)} of {len(files)} files, such as {unknown[0]}, say no split in their name, "
            f"others do ({known}). Move those of a split into a folder called so, or give one pattern: "
            f"data.data_dir='{place}/NAME-{{0000..0099}}.tar'."
        )
    return {"train": unknown} if unknown else {str(name): groups[name] for name in sorted(groups, key=str)}
