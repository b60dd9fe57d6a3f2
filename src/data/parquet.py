"""Parquet files: whether they hold images, and their rows one row group at a time. Read by the converter alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from src.core.errors import UserError
from src.data.arrow import holds_images, image_columns, schema_features


def read_schema(file: Path) -> pa.Schema:
    """Return the schema of a file. Raises UserError where it is no whole Parquet file."""
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise UserError(
            f"{file} ({size:,} bytes) can't be read as Parquet: {str(error).splitlines()[0]} Copy or download it again."
        ) from error


def image_column(file: Path) -> str | None:
    """Return the column that holds the images; None where there is none."""
    schema = read_schema(file)
    found = image_columns(schema_features(schema), schema)
    usable = [name for name in found if holds_images(schema.field(name).type)]
    return "image" if "image" in usable else next(iter(usable), None)


def row_groups(file: Path) -> list[int]:
    """Return the number of rows of each row group."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        return [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]


def batches(file: Path, groups: list[int], columns: list[str], rows: int) -> Iterator[Any]:
    """Yield record batches of at most `rows` rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, memory_map=False) as opened:
        yield from opened.iter_batches(batch_size=rows, row_groups=groups, columns=columns, use_threads=False)
