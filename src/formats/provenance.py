"""Collect where an exported model comes from: its run, scores and exporter version. Plain values, no private paths."""

import importlib.metadata
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.files import file_digest
from src.core.json_files import Document, read_json
from src.core.run_names import git_state
from src.core.weights import RANDOM, resolve
from src.formats.checkpoint import LoadedModel, stored
from src.formats.decoder_files import RECORD, read_record
from src.models.frozen_encoder import is_untrained

log = logging.getLogger(__name__)

_END = r"\s\"'`,;|)\]}>"  # what ends a path in a text
_FOLDERS = re.compile(rf"""(?<![^\s"'`=([{{,;|<])(?:file://)?(?:~|/|[A-Za-z]:[/\\])[^{_END}]*[/\\](?=[^/\\{_END}])""")
"""The folders of an absolute path in a text."""
_PACKAGES = ("torch", "transformers", "safetensors")
_OF_RUN = ("experiment_name", "started", "ended", "status", "git", "packages", "device", "processes", "data",
           "resumed_from", "warnings", "result")  # fmt: skip


def provenance(loaded: LoadedModel, score_files: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Return the content of `rae_export.json`. The run record is read from the checkpoint's run folder, if it still exists.

    Raises:
        UserError: an invalid score file.
    """
    description = loaded.description
    source = Path(description["source"])
    carried = read_record(source) if source.is_dir() else {}
    run = _run_record(source) or carried.get("run")
    if run is None:
        log.warning("No run.json found for %s: the model card won't tell how it was trained.", source)
    values = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source.name,
        "source_sha256": file_digest(source, "sha256") if source.is_file() else None,
        "weights": description["weights"],
        "step": description.get("step"),
        "epoch": description.get("epoch"),
        "encoder": description["encoder"],
        "untrained": untrained_parts(description, run),
        "config": description.get("config"),
        "run": run,
        "scores": [_scores(path) for path in score_files] + list(carried.get("scores", [])),
        "exporter": {"git": git_state(), "packages": {name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
    return without_private_paths(values)


class Score(Document):
    """One of the results of `src/eval_rfid.py --json`."""

    images: int


_OPTIONAL = (dict[str, Any] | None, None)


def untrained_parts(description: Mapping[str, Any], run: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the parts that were never trained, to warn users of the model."""
    parts = ["encoder"] if is_untrained(description["encoder"]) else []
    if stored(description, "config.model.lpips_arch.weights") in RANDOM:
        parts.append("LPIPS (a loss of the training)")
    if stored(description, "config.model.disc_arch.arch.weights") in RANDOM:
        parts.append("the discriminator's trunk (a loss of the training)")
    if description.get("step") == 0 or stored(run, "result.step") == 0:
        parts.append("decoder")
    return parts


def write_record(values: Mapping[str, Any], folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(values, indent=2, default=str) + "\n")


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path, "sha256") for path in files}


def without_private_paths(value: Any) -> Any:
    """Reduce absolute paths, inside texts too, to their last part, since exports are shared."""
    if isinstance(value, Mapping):
        return {str(key): without_private_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_private_paths(item) for item in value]
    if isinstance(value, Path):
        return value.name
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _run_record(source: Path) -> dict[str, Any] | None:
    for folder in (source.parent.parent, source.parent):
        with suppress(UserError):
            content = read_json(folder / "run.json", result=_OPTIONAL, data=_OPTIONAL)
            return {key: content[key] for key in _OF_RUN if key in content}
    return None


def _scores(path: str | Path) -> dict[str, Any]:
    remedy = "--scores takes the JSON that `src/eval_rfid.py --json` wrote."
    return {"file": Path(path).name, **read_json(resolve(path), remedy, results=list[Score])}
