"""Imports point downward only, and the plain layers stay plain (design: layout)."""

import ast
from pathlib import Path

import pytest

from src.weights import PROJECT_ROOT

SRC = PROJECT_ROOT / "src"
# What a layer may import of the project, besides itself. Small files directly in src/ are open to all.
ALLOWED = {
    "losses": set(),
    "metrics": set(),
    "models": {"losses", "metrics"},  # metrics for validation in the Lightning module
    "data": set(),
    "interop": {"models", "losses", "metrics", "data"},
    "assets": set(),
    "callbacks": {"models", "losses", "metrics", "data", "runs", "interop", "evaluation"},
    "evaluation": {"models", "losses", "metrics", "data", "interop", "callbacks"},
    "latents": {"models", "losses", "metrics", "data", "interop", "evaluation"},
    "reconstruction": {"models", "losses", "metrics", "data", "interop", "evaluation", "latents"},
    "exporting": {
        "models",
        "losses",
        "metrics",
        "data",
        "interop",
        "evaluation",
        "assets",
        "runs",
    },  # digests; the git state
    "reporting": {"runs"},
    "runs": {"models", "losses", "metrics", "data", "callbacks", "interop", "evaluation"},
}
LIGHTNING_FILES = {"src/models/rae_module.py", "src/data/datamodule.py"}
SMALL = {"errors", "files", "geometry", "images", "ema", "schedules", "weights", "stream", "sheets"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return [f for f in (SRC / folder).rglob("*.py") if f.name != "__init__.py"]


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_layers_import_downward(layer):
    folders = {p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"}
    for file in files(layer):
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "src" and len(parts) > 1 and parts[1] in folders:
                assert parts[1] in ALLOWED[layer] | {layer}, f"{file.relative_to(PROJECT_ROOT)} imports {name}"


@pytest.mark.parametrize("layer", ["models", "losses", "metrics", "data", "interop"])
def test_plain_layers_know_neither_lightning_nor_hydra(layer):
    for file in files(layer):
        if str(file.relative_to(PROJECT_ROOT)) in LIGHTNING_FILES:
            continue
        heads = {name.split(".")[0] for name in imports(file)}
        assert not heads & {"pytorch_lightning", "lightning", "hydra", "omegaconf", "requests", "urllib"}, file


def test_small_files_stand_on_their_own():
    for name in SMALL:
        for imported in imports(SRC / f"{name}.py"):
            parts = imported.split(".")
            if parts[0] == "src" and len(parts) > 1:
                assert parts[1] in SMALL, f"{name}.py imports {imported}"


def test_every_layer_is_listed():
    folders = {p.name for p in SRC.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= ALLOWED.keys()
