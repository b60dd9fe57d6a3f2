"""Format durations, config values, nested keys and tables as text; quote values for Hydra; mask secrets."""

import re
from collections.abc import Mapping, Sequence
from typing import Any


def duration(seconds: float) -> str:
    """Format seconds: 59 -> `59 s`, 9000 -> `2 h 30 min`, 200000 -> `2 d 8 h`."""
    seconds = max(seconds, 0)
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def typed(value: Any) -> str:
    """Return a configuration value as users type it: `null`, `true`, `'text'`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} -> {"a.b": 1}; empty mappings are kept."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return one indented line for each (name, text), with the texts aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def hydra_quoted(value: str) -> str:
    """Return an override's value as typed in a shell, quoted for Hydra and the shell if Hydra needs it."""
    if re.fullmatch(r"[A-Za-z0-9_/.@%+-]+", value):
        return value
    return '"' + re.sub(r'(["$`\\])', r"\\\1", quoted(value)) + '"'


def quoted(value: object) -> str:
    """Return a value in single quotes, escaped for Hydra's parser."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", "\\'"), str(value))
    return f"'{escaped}'"


_SECRET = re.compile(
    r"(^|[._])(\w*(secret|password|passwd|api_?key)\w*|(\w+_)?token|storage_options(\.\w+)*)$", re.IGNORECASE
)
"""Keys whose values are masked; includes all of `storage_options`, whose keys differ between services."""
MASK = "***"


def masked(content: Any, name: str = "") -> Any:
    """Return nested plain containers with the values of keys that look like secrets (token, password, api_key) masked.

    Overrides in lists (`logger.wandb.api_key=…`, `logger.wandb={api_key: …}`) and Hydra's `override_dirname` are masked too.
    """
    if (_SECRET.search(name) or name == "override_dirname") and content not in (None, "", {}):
        return MASK
    if isinstance(content, Mapping):
        return {key: masked(value, str(key)) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(masked(value) for value in content)
    if isinstance(content, str) and not name and "=" in content:
        key, _, value = content.partition("=")
        inside = re.findall(r"[\w.]+(?=['\"]?\s*:)", value)  # keys of an inline dictionary
        if any(map(_SECRET.search, (key.lstrip("+~"), *inside))):
            return f"{key}={MASK}"
    return content
