"""The notebook: its cells run one after the other in a fresh process, without Jupyter, and it is committed without outputs."""

import json
import os
import subprocess
import sys

import torch

from src.core.weights import PROJECT_ROOT
from src.formats.export import write_own_statistics
from src.formats.folder import write_folder
from tests.test_stage2 import SMALL
from tests.tiny_models import checkpoint, loaded, photos, tiny_rae
from tests.training import train

NOTEBOOK = PROJECT_ROOT / "notebooks/first_look.ipynb"
SHOWN = """
for name in ("images", "decoded", "noisy", "second", "samples"):
    value = globals()[name]
    print(name, tuple(value.shape), bool(torch.isfinite(value).all()))
"""


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_committed_without_outputs():
    for cell in cells():
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_its_cells_run(tmp_path):
    """With a checkpoint, an export to compare with, a photograph, and samples."""
    rae, export = tiny_rae(tmp_path / "a", statistics=True), tmp_path / "export"
    export.mkdir()
    write_folder(loaded(rae), export)
    write_own_statistics(rae, export, rae.encoder.identity())
    train(tmp_path / "run", *SMALL, f"model.autoencoder={export}", "trainer.max_steps=1", small=False)
    paths = {
        "MODEL": checkpoint(tmp_path / "b"),
        "OTHER": export,
        "GENERATOR": tmp_path / "run/checkpoints/last.ckpt",
        "PHOTO": next(photos(tmp_path / "photos", 1).rglob("*.png")),
    }
    source = "\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")
    for name, path in paths.items():
        assert f"\n{name} = None  #" in source
        source = source.replace(f"\n{name} = None  #", f"\n{name} = {str(path)!r}  #")
    done = subprocess.run(
        [sys.executable, "-c", source + SHOWN], cwd=PROJECT_ROOT / "notebooks", capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "PSNR" in done.stdout
        and "images (1, 3, 64, 64) True" in done.stdout
        and "noisy (4, 3, 64, 64) True" in done.stdout
    )
    assert "samples (4, 3, 64, 64) True" in done.stdout
