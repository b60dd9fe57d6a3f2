"""Measure images/s of data loading on one core: the published two-step Pillow pipeline and ours, interleaved in one process.

    python benchmarks/data.py [--images FOLDER] [--size 256] [--rounds 5] [--out FILE.json]

Measures the path from the bytes of a file in memory to a uint8 3 x S x S training crop, as in a data-loading worker:
    pillow          decode, resize the whole image to 1.5 * S px, crop, to channels first: the published pipeline
    ours            scaled JPEG decode, one resize of the cropped box
    ours_resized    the same on a data set stored with `create_hf_test_data.py --resize_shorter` 1.5 * S
    arrow, tar, folder   ours, with the bytes read from such a source on disk (in the page cache)
Every round runs each of them over all images. CPU time is measured, not wall time, so that other load on the machine does
not matter. Images/s are those of the best round; the ratio is the median over rounds.
"""

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from benchmarks.surroundings import cpu_name, in_turns, surroundings, write
from src.core import random_streams as stream
from src.core.errors import UserError
from src.data import dummy
from src.data.arrow_writer import Row, write_metadata, write_shard
from src.data.convert_shard import encode
from src.data.crops import default_shorter_px, resized_frame
from src.data.dataset import TrainTransform
from src.data.decode import Decoder
from src.data.places import look

GOALS = {"ours": 1.8, "ours_resized": 2.7, "arrow": 1.8, "tar": 1.8, "folder": 1.8}
GENERATED = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images, searched to any depth (default: generated ones)")
    parser.add_argument("--size", type=int, default=256, help="side of the crop, px (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all images (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    try:
        files = load(args.images)
        with tempfile.TemporaryDirectory() as folder:
            report = measure(files, args.size, args.rounds, stored(files, Path(folder)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    report["images"] = str(args.images or "generated")
    for name, row in report["results"].items():
        goal = f" (goal {GOALS[name]})" if name in GOALS else ""
        print(f"{name:14} {row['images_per_s']:8.1f} images/s and core {row['ratio']:6.2f} x pillow{goal}")
    print(f"mean difference to pillow, levels: {report['mean_difference']}")
    write(report, args.out)
    return 0


def load(folder: Path | None) -> list[bytes]:
    """Return the bytes of the images to measure with."""
    if folder is None:
        return [dummy.jpeg(i) for i in range(GENERATED)]
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise UserError(f"--images {folder}: no images found in it.")
    return [p.read_bytes() for p in files]


def stored(files: list[bytes], folder: Path) -> dict[str, Any]:
    """Write the images below `folder` in three formats and return an open source for each, with the same rows, by name."""
    names = [f"{i:05d}.jpg" for i in range(len(files))]
    for kind in ("arrow", "tar", "folder"):
        (folder / kind).mkdir()
    write_shard(folder / "arrow/data.arrow", (Row(*row, 0) for row in zip(files, names, strict=True)), None)
    write_metadata(folder / "arrow", ["data.arrow"], None, "train")
    with tarfile.open(folder / "tar/train.tar", "w") as tar:
        for name, data in zip(names, files, strict=True):
            (folder / "folder" / name).write_bytes(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return {kind: look(folder / kind).open("train") for kind in ("arrow", "tar", "folder")}


def measure(files: list[bytes], size: int, rounds: int, sources: dict[str, Any]) -> dict[str, Any]:
    """Time each pipeline. `sources`: sources of the same images, by name."""
    torch.set_num_threads(1)
    decoder = Decoder("ignore", 80)  # like the published code, so that all give the same crops
    transform = TrainTransform(size, "random", None, decoder, seed=0)
    resized = [encode(data, decoder, default_shorter_px(size)) for data in files]

    def ours(data: bytes, position: int) -> np.ndarray:
        return np.ascontiguousarray(transform(data, 0, position).transpose(2, 0, 1))

    ways: dict[str, tuple[Callable[[bytes, int], np.ndarray], list[bytes]]] = {
        "pillow": (lambda data, position: two_step(data, size, position), files),
        "ours": (ours, files),
        "ours_resized": (ours, resized),
        **{name: (lambda _, i, source=source: ours(source.encoded(i), i), files) for name, source in sources.items()},
    }

    def over_all(way: Callable[[bytes, int], np.ndarray], data: list[bytes]) -> None:
        for position, one in enumerate(data):
            way(one, position)

    steps = {name: partial(over_all, *pair) for name, pair in ways.items()}
    seconds = in_turns(steps, 0, rounds, time.process_time)
    reference = [two_step(data, size, i).astype(int) for i, data in enumerate(files)]
    difference = {
        name: [float(np.abs(way(data[i], i) - reference[i]).mean()) for i in range(len(files))]
        for name, (way, data) in ways.items()
        if name != "pillow"
    }
    return {
        "results": {
            name: {
                "images_per_s": round(len(files) / min(times), 1),
                "ratio": round(statistics.median(p / t for p, t in zip(seconds["pillow"], times, strict=True)), 3),
            }
            for name, times in seconds.items()
        },
        "mean_difference": {
            n: {"mean": round(sum(d) / len(d), 3), "largest": round(max(d), 3)} for n, d in difference.items()
        },
        "files": len(files),
        "bytes": {"raw": sum(map(len, files)), "resized": sum(map(len, resized))},
        "size": size,
        "rounds": rounds,
        "hardware": f"{cpu_name()}, one core",
        **surroundings(),
    }


def two_step(data: bytes, size: int, position: int) -> np.ndarray:
    """Apply the published transform: resize the whole image, then crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = resized_frame(*image.size, default_shorter_px(size))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    u, v = stream.generator(0, stream.Purpose.CROP, 0, position).random(2)
    left, top = int(u * (width - size + 1)), int(v * (height - size + 1))
    crop = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1))


if __name__ == "__main__":
    sys.exit(main())
