"""Read and validate JSON files written by third-party tools or by hand."""

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, create_model

from src.core.errors import UserError
from src.core.settings import Settings


class Document(Settings):
    """A JSON object; unlike `Settings`, it may have unknown keys and infinite numbers."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


def read_json(path: str | Path, remedy: str = "", /, **schema: Any) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError: no such file, unreadable, not an object, or missing keys and values
    of the wrong type (all listed at once).

    Args:
        remedy: what to do about a bad file; appended to the message.
        schema: type annotation of each key: `weight_map=dict[str, str]`, or (annotation, default) for an optional key.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}. {remedy}".rstrip()) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}. {remedy}".rstrip()) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected an object. {remedy}".rstrip())
    check_json(content, path, remedy, **schema)
    return content


def check_json(content: dict[str, Any], path: str | Path, remedy: str = "", /, **schema: Any) -> None:
    """Raise UserError if the content of a JSON file does not fit `schema` (see `read_json`)."""
    fields: dict[str, Any] = {}
    for number, (key, kind) in enumerate(schema.items()):  # pydantic allows no field name that begins with _
        annotation, default = kind if isinstance(kind, tuple) else (kind, ...)
        fields[f"key{number}"] = (annotation, Field(default, alias=key))
    try:
        create_model("Document", __base__=Document, **fields).parse(content, "")
    except UserError as error:
        raise UserError(f"{path}: {error} {remedy}".rstrip()) from None
