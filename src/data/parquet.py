"""Inspect Parquet files: do they hold images, and in which column?"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from src.core.errors import UserError
from src.data.arrow import holds_images, image_columns, schema_features


def read_metadata(file: Path) -> Any:
    """Return pyarrow's FileMetaData of a file. Raises UserError if it is not a complete Parquet file."""
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise UserError(
            f"{file} ({size:,} bytes) can't be read as Parquet: {str(error).splitlines()[0]} Copy or download it again."
        ) from error


def read_schema(file: Path) -> pa.Schema:
    """Return the schema of a file. Raises UserError if it is not a complete Parquet file."""
    return read_metadata(file).schema.to_arrow_schema()


def image_column(file: Path) -> str | None:
    """Return the name of the image column; None if there is none."""
    schema = read_schema(file)
    found = image_columns(schema_features(schema), schema)
    usable = [name for name in found if holds_images(schema.field(name).type)]
    return "image" if "image" in usable else next(iter(usable), None)
