"""Imports point one way only: core <- data, models, losses, metrics <- formats <- evaluation <- callbacks <- training."""

import ast
from pathlib import Path

import pytest

from src.core.weights import PROJECT_ROOT

SRC = PROJECT_ROOT / "src"
PLAIN = {"data", "models", "losses", "metrics"}
ALLOWED = {
    "core": set(),
    **{folder: {"core"} for folder in PLAIN},
    "reporting": {"core"},
    "formats": {"core", *PLAIN},
    "evaluation": {"core", *PLAIN, "formats"},
    "callbacks": {"core", *PLAIN, "formats", "evaluation"},
    "training": {"core", *PLAIN, "formats", "evaluation", "callbacks"},
}
"""Folders that a folder of `src` may import, besides itself."""
EXCEPTIONS = {
    ("src/models/rae.py", "formats"): "inside RAE.__init__: its arguments name files",
}
"""(file, imported folder) that the table above forbids -> why it is allowed."""
FRAMEWORKS = {"src/data/datamodule.py": {"pytorch_lightning"}, "src/core/compose.py": {"hydra"}}
"""Files in the layers below `callbacks` that import Lightning or Hydra."""


def imports(file: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return [f for f in (SRC / folder).rglob("*.py") if f.name != "__init__.py"]


def test_every_folder_is_listed():
    assert {p.name for p in SRC.iterdir() if p.is_dir() and p.name != "__pycache__"} == ALLOWED.keys()


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder):
    forbidden, used = [], set()
    for file in files(folder):
        name = str(file.relative_to(PROJECT_ROOT))
        for imported in imports(file):
            part = [*imported.split("."), ""][1]
            if imported.startswith("src.") and part not in ALLOWED[folder] | {folder}:
                used.add((name, part))
                if (name, part) not in EXCEPTIONS:
                    forbidden.append(f"{name} imports {imported}")
    assert not forbidden
    assert used == {pair for pair in EXCEPTIONS if pair[0].startswith(f"src/{folder}/")}


@pytest.mark.parametrize("folder", ["core", *sorted(PLAIN), "formats", "evaluation"])
def test_plain_folders_import_neither_lightning_nor_hydra(folder):
    for file in files(folder):
        heads = {name.split(".")[0] for name in imports(file)} & {"pytorch_lightning", "lightning", "hydra"}
        assert heads == FRAMEWORKS.get(str(file.relative_to(PROJECT_ROOT)), set()), file


def test_architecture_table_names_what_exists():
    text = (PROJECT_ROOT / "docs/architecture.md").read_text()
    table = text.split("## Where is X?")[1].split("## To change")[0]
    rows = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in table.splitlines() if "`" in line]
    assert len(rows) >= 10
    for _, place, name, test in rows:
        content = (PROJECT_ROOT / place).read_text()
        owner, *inner = name.split(".")
        assert all(word in content for word in (owner, *inner)) and (PROJECT_ROOT / test).is_file(), (place, name, test)
        if place.endswith(".py"):
            defined = {n.name for n in ast.walk(ast.parse(content)) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
            assert {owner, *inner} <= defined, (place, name)
