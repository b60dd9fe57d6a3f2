"""Read JSON files that other programs or people wrote."""

import json
from pathlib import Path
from typing import Any

from src.core.errors import UserError


def read_json(path: str | Path, remedy: str = "", /, **required: type | tuple[type, ...]) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        remedy: what to do about a bad file; ends the message.
        required: keys that must be there, each with the type of its value.

    Raises:
        UserError: no such file, unreadable, no JSON object, or missing keys and values of other types (all at once).
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"No such file: {path}. {remedy}".rstrip()) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}. {remedy}".rstrip()) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected an object. {remedy}".rstrip())
    wrong = [
        f"`{key}` is {'missing' if key not in content else f'{content[key]!r:.60}'} (expected {_name(kind)})"
        for key, kind in required.items()
        if not isinstance(content.get(key), kind) or (isinstance(content[key], bool) and kind is int)
    ]
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}. {remedy}".rstrip())
    return content


def _name(kind: type | tuple[type, ...]) -> str:
    words = {
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }
    return " or ".join(words.get(k, k.__name__) for k in (kind if isinstance(kind, tuple) else (kind,)))
