"""How a data set is read, whatever its format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReadOptions:
    """Names of columns, and options of object storage.

    image: None for the column called `image`, else the only one of the type Image. label: None for the column called
    `label`, where it holds whole numbers; of tars `cls` or `json:KEY`. storage: for fsspec; may hold secrets, so it is
    never shown. cache_gb: of rows from object storage, on the local disk; 0: none.
    """

    image: str | None = None
    label: str | None = None
    storage: Mapping[str, Any] | None = field(default=None, repr=False)
    cache_gb: float = 0.0


DEFAULT_OPTIONS = ReadOptions()
