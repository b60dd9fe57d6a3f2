"""Patterns of file names: brace ranges as webdatasets are written, `{0000..1023}`, and `*`, `?`, `[...]`."""

import glob
import re
from pathlib import Path

from src.core.errors import UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_FILES = 1_000_000


def is_pattern(text: str) -> bool:
    """Return whether the text is a pattern and not the name of something that is there."""
    return bool(_RANGE.search(text) or glob.has_magic(text)) and not Path(text).exists()


def expand(text: str) -> list[Path]:
    """Return the files of a pattern, sorted; those of a range all have to be there.

    Raises:
        UserError: nothing there, or some files of a range missing.
    """
    names = [text]
    while match := _RANGE.search(names[0]):
        first, last = int(match[1]), int(match[2])
        if last < first or (last - first + 1) * len(names) > MAX_FILES:
            raise UserError(f"data.data_dir={text}: expected a range upwards, as {{0000..1023}}.")
        width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
        numbers = [f"{n:0{width}d}" for n in range(first, last + 1)]
        names = [name.replace(match[0], number, 1) for name in names for number in numbers]
    ranged = len(names) > 1
    files = [file for name in names for file in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [file for file in files if not Path(file).is_file()]
    if ranged and missing:
        raise UserError(
            f"data.data_dir={text}: {len(missing):,} of {len(files):,} files are missing, such as {missing[0]}. Copy or "
            "download them, or give the range that is there."
        )
    found = [Path(file) for file in files if Path(file).is_file()]
    if not found:
        raise UserError(f"data.data_dir={text}: no file has such a name.")
    return found
