"""The notebook: its cells run in order in a fresh process, without Jupyter, and it is committed without outputs."""

import json
import os
import subprocess
import sys

import torch

from src.core.weights import PROJECT_ROOT
from tests.tiny_models import checkpoint, photos
from tests.training import last

NOTEBOOK = PROJECT_ROOT / "notebooks/first_look.ipynb"
SHOWN = """
for name in ("images", "decoded", "noisy", "second", "samples"):
    value = globals()[name]
    print(name, tuple(value.shape), bool(torch.isfinite(value).all()))
"""


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_notebook_is_committed_without_outputs():
    for cell in cells():
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_cells_run(autoencoder, stage2_run, tmp_path):
    """With a checkpoint, an export to compare with, a photograph, and samples."""
    paths = {
        "MODEL": checkpoint(tmp_path / "b"),
        "OTHER": autoencoder,
        "GENERATOR": last(stage2_run[0]),
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
    for words in ("PSNR", *(f"{name}, 3, 64, 64) True" for name in ("images (1", "noisy (4", "samples (4"))):
        assert words in done.stdout
