"""`run.json`: what was run, on what, and how it ended. Enough to do it again."""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from src.core.files import write_text
from src.core.run_names import git_state

_PACKAGES = (
    "torch",
    "pytorch-lightning",
    "hydra-core",
    "transformers",
    "datasets",
    "numpy",
    "pillow",
    "simplejpeg",
    "torchmetrics",
)


class RunRecord:
    """A JSON file that is rewritten as the run learns more; every write is atomic."""

    def __init__(self, folder: Path, experiment: str, main: bool) -> None:
        self.file = folder / "run.json"
        self._main = main
        self.content: dict[str, Any] = {
            "experiment_name": experiment,
            "status": "running",
            "started": datetime.now().isoformat(timespec="seconds"),
            "command": [Path(sys.executable).name, *sys.argv],
            "git": git_state(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
        }

    def update(self, values: Mapping[str, Any]) -> None:
        self.content.update(values)
        if not self._main:
            return
        write_text(self.file, json.dumps(self.content, indent=2, default=str) + "\n")

    def finish(self, status: str, warnings: list[str], **result: Any) -> None:
        """`status`: finished, failed, terminated or interrupted."""
        self.update(
            {"status": status, "ended": datetime.now().isoformat(timespec="seconds"), "warnings": warnings, **result}
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
