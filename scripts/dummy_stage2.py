"""Run both stages without a GPU, data or downloads: tiny autoencoder, its latents, diffusion transformer, samples by class.

    python scripts/dummy_stage2.py                 (or `make dummy2`)

Reuses the autoencoder of an earlier call if there is one. At the end it prints the Frechet distances of decoded noise (what
an untrained transformer samples) and of the samples, the share of samples that show their class, and the path of a sample
sheet. The encoder and the evaluation networks are untrained: the numbers show that the pipeline works, not its quality.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of scripts/

from src.core.errors import UserError
from src.core.json_files import read_json
from src.core.options import EXIT_CODES
from src.core.terminal import run_program
from src.core.text import quoted
from src.core.weights import PROJECT_ROOT

DATA = "data/dummy_dataset_hf"
IMAGES = 192


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if everything ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=PROJECT_ROOT / "logs/dummy2", help="for autoencoder, latents and samples"
    )
    parser.add_argument("--epochs", type=int, default=None, help="for the transformer (default: the experiment's)")
    args = parser.parse_args(argv)
    return run_program(lambda: _run(args.folder.absolute(), args.epochs))


def _run(folder: Path, epochs: int | None) -> int:
    autoencoder, statistics = folder / "autoencoder/checkpoints/last.ckpt", folder / "stats.pt"
    if not _finished(autoencoder.parents[1]):  # resume it if it was interrupted
        go_on = [f"ckpt_path={quoted(autoencoder)}"] if autoencoder.is_file() else []
        statistics.unlink(missing_ok=True)
        quick = [
            "data.image_size=64",
            "model.disc_weight=0",
            "trainer.max_epochs=12",
            "trainer.check_val_every_n_epoch=12",
        ]
        _program("train.py", "experiment=rae_dummy", *quick, f"paths.run_dir={quoted(autoencoder.parents[1])}", *go_on)
    if not statistics.is_file():
        model = "--checkpoint", autoencoder, "--device", "cpu", "--num_workers", 0, "--overwrite"
        _program("reconstruct.py", *model, "--input", DATA, "--latents", "raw", "--output", folder / "encoded")
        _program("latent_stats.py", *model, "--data_dir", DATA, "--output", statistics)
    run = next(place for n in itertools.count(1) if not (place := folder / f"run-{n}").exists())
    length = [] if epochs is None else [f"trainer.max_epochs={epochs}"]
    _program("train.py", "experiment=dit_dummy", f"model.autoencoder={quoted(autoencoder)}",
             f"model.statistics={quoted(statistics)}", "model.flip_probability=0",
             f"data.data_dir={quoted(folder / 'encoded/latents')}", f"paths.run_dir={quoted(run)}", *length)  # fmt: skip
    samples = run / "samples.npz"
    _program("sample.py", "--checkpoint", run / "checkpoints/last.ckpt", "--num_images", IMAGES, "--cfg", 3, "--device", "cpu",
             "--output", samples, "--grid", run / "samples.png")  # fmt: skip
    before, after, share = _judge(run / "checkpoints/last.ckpt", samples)
    print(
        f"Frechet distance of {IMAGES} images to the data, UNTRAINED features: {before:.4f} before, {after:.4f} after"
    )
    print(f"{share:.0%} of the samples show their class (the strongest colour); chance is 33%")
    print(f"Samples, a row for each class: {run / 'samples.png'}")
    return 0


def _finished(run: Path) -> bool:
    try:
        return read_json(run / "run.json").get("status") == "finished"
    except UserError:  # not started yet
        return False


def _program(name: str, *words: object) -> None:
    program = subprocess.Popen([sys.executable, f"src/{name}", *map(str, words)], cwd=PROJECT_ROOT)
    while program.returncode is None:
        with suppress(KeyboardInterrupt):  # the script gets it too: it saves and exits
            program.wait()
    if program.returncode:
        sys.exit(program.returncode)


def _judge(checkpoint: Path, samples: Path) -> tuple[float, float, float]:
    """Return the Frechet distances of decoded noise and samples to the data, and the share of samples of the right class."""
    import numpy as np
    import torch

    from src.core.images import unit_to_bytes
    from src.core.options import LoadingOptions
    from src.data.decode import Decoder
    from src.evaluation.images import centre_crops, open_images
    from src.formats.stage2 import open_generator
    from src.metrics.fid import frechet_distance
    from src.metrics.generation import ImageStatistics
    from src.metrics.inception import InceptionFeatures
    from src.metrics.reference import ALONE

    generator = open_generator(checkpoint)
    rae, inception = generator.rae, InceptionFeatures(None, "tiny")
    loading, decoder = LoadingOptions(num_workers=0, batch_size=32), Decoder("apply", 80.0)
    loader = centre_crops(open_images(DATA, "all", None), rae.geometry.image_size, decoder, loading, ALONE)
    noise = torch.randn(IMAGES, *rae.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = [unit_to_bytes(rae.decode(part)) for part in noise.split(32)]
    archive = np.load(samples)
    made = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2)
    sets = [(batch["image"] for batch in loader), decoded, [made]]
    found = [ImageStatistics(inception, 32, keep=False, spatial=False) for _ in sets]
    for statistics, batches in zip(found, sets, strict=True):
        for images in batches:
            statistics.update(images)
    real, before, after = (statistics.pool for statistics in found)
    right = made.float().mean((2, 3)).argmax(1).numpy() == archive["labels"]
    return frechet_distance(real, before), frechet_distance(real, after), float(right.mean())


if __name__ == "__main__":
    sys.exit(main())
