"""Infer a file's split from its name, and expand file patterns.

Patterns are brace ranges as in WebDataset, `{0000..1023}`, and `*`, `?`, `[...]`.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from src.core.errors import UserError

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev")
TEST_SPLITS = ("test",)
SPLIT_NAMES = (TRAIN_SPLITS, VALIDATION_SPLITS, TEST_SPLITS)
"""Names of the same split; the converter writes the first."""
ALIASES = {name: same[0] for same in SPLIT_NAMES for name in same}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_FILES = 1_000_000


def split_of(file: str) -> str | None:
    """Return the split named in a file's name, or else in its folders: `imagenet1k-train-0001.tar` -> `train`.

    Raises:
        UserError: one name contains two splits.
    """
    for part in reversed(file.split("/")):
        found = sorted({ALIASES[word] for word in re.split(r"[^a-z]+", part.lower()) if word in ALIASES})
        if len(found) > 1:
            raise UserError(f"{file}: its name contains {' and '.join(found)}; rename it to contain one split.")
        if found:
            return found[0]
    return None


def folder_splits(names: Sequence[str]) -> dict[str, str]:
    """Return the folder names that are splits, each with its standard name: `val` -> `validation`.

    Variants such as `Train` or `val2017` count only if another folder is a different split or all folders are splits: a class
    of vehicles may be called Train.
    """
    standard = {name: ALIASES.get(re.sub(r"[\W_]*\d*$", "", name.lower())) for name in names}
    found = {name: split for name, split in standard.items() if split}
    if len(set(found.values())) > 1 or len(found) == len(names):
        return found
    return {name: ALIASES[name] for name in names if name in ALIASES}


def find_split(split: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that means `split`: the same word, else an alias in `SPLIT_NAMES`, else by `folder_splits`.

    Raises:
        UserError: several match by `folder_splits`.
    """
    same = next((group for group in SPLIT_NAMES if split in group), ())
    exact = next((name for name in (split, *same) if name in names), None)
    alike = [name for name, standard in folder_splits(names).items() if same and standard == same[0]]
    if exact is None and len(alike) > 1:
        key = "data.hf_split" if split in TRAIN_SPLITS else "data.hf_validation_split"
        raise UserError(
            f"The folders {', '.join(alike)} (data.data_dir) all mean the split {split!r}. Choose one by {key}={alike[-1]}, "
            "or set data.data_dir to that folder."
        )
    return exact or next(iter(alike), None)


def group_by_split(files: Sequence[str], place: str) -> dict[str, list[str]]:
    """Group files by the split in their names; all are `train` if no name contains one.

    Raises:
        UserError: some names contain a split and others don't.
    """
    groups: dict[str | None, list[str]] = {}
    for file in files:
        groups.setdefault(split_of(file), []).append(file)
    unknown = groups.pop(None, [])
    if unknown and groups:
        known = "; ".join(f"{name}: {files[0]} …" for name, files in groups.items() if name)
        raise UserError(
            f"{place} (data.data_dir): {len(unknown)} of {len(files)} files, such as {unknown[0]}, have no split in their name, "
            f"others do ({known}). Move the files of each split into a folder named after it, or give one pattern: "
            f"data.data_dir='{place}/NAME-{{0000..0099}}.tar'."
        )
    return {"train": unknown} if unknown else {str(name): groups[name] for name in sorted(groups, key=str)}


def is_pattern(text: str) -> bool:
    """Return whether the text is a pattern, not an existing path."""
    return bool(_RANGE.search(text) or glob.has_magic(text)) and not Path(text).exists()


def expand(text: str) -> list[Path]:
    """Return the files that match a pattern, sorted. All files of a range must exist.

    Raises:
        UserError: no match, or some files of a range are missing.
    """
    names = [text]
    while match := _RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or (last - first + 1) * len(names) > MAX_FILES:
            raise UserError(
                f"data.data_dir={text}: expected an ascending range like {{0000..1023}}, at most {MAX_FILES:,} files."
            )
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        numbers = [f"{n:0{width}d}" for n in range(first, last + 1)]
        names = [name.replace(match[0], number, 1) for name in names for number in numbers]
    ranged = len(names) > 1
    files = [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [file for file in files if not Path(file).is_file()]
    if ranged and missing:
        raise UserError(
            f"data.data_dir={text}: {len(missing):,} of {len(files):,} files are missing, such as {missing[0]}. Copy or "
            "download them, or give the range that exists."
        )
    found = [Path(file) for file in files if Path(file).is_file()]
    if not found:
        raise UserError(f"data.data_dir={text}: no file matches.")
    return found
