"""Damage files of every kind that the project reads, and check that each is read, left out, or refused with one message.

    python scripts/fuzz.py --minutes 10                       (kinds: images arrow tar npz decoder checkpoint latents json)
    python scripts/fuzz.py --minutes 1 --kinds npz tar --seed 7

An input is a valid file in which some bytes are flipped, cut, repeated or overwritten by huge numbers; in checkpoints and
JSON, a value can also be replaced by an odd one. Inputs are read in forked children with 2 GiB of extra memory and 20 s per
input. Prints the number of inputs and outcomes by kind. Exit status 1 if any input crashes, hangs or raises another error;
such inputs are kept in --output.
"""

import argparse
import copy
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of scripts/

from src.core.options import above_zero

MEMORY = 2 << 30
"""Bytes of address space that a child may use beyond its size at the start."""
LIMIT_S = 20
BATCH = 200
ODD: list[Any] = [None, "text", "", 5, -1, 1e400, 10**30, True, [], [None], {}, {"a": []}, b"bytes"]


@dataclass(frozen=True)
class Kind:
    """make(folder): write valid files and return those to damage. use(folder): read them as the project does.
    structure(file, random): put an odd value into a file that stays parseable; None: damage bytes only."""

    make: Callable[[Path], list[Path]]
    use: Callable[[Path], None]
    structure: Callable[[Path, random.Random], None] | None = None


# -- damage


def damage(data: bytes, draw: random.Random) -> bytes:
    """Return the bytes of a file after one to four random changes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) or 1), draw.choice((1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << draw.randrange(8)]) if changed else b"\0"
            case 1:
                changed[at : at + length] = draw.randbytes(length)
            case 2:
                changed[at : at + length] = draw.choice((b"\xff", b"\x7f", b"\0")) * length
            case 3:
                del changed[at:]
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[draw.randrange(len(changed) or 1) :][: 16 * length]
            case 6:
                number = draw.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, len(data), len(data) + 1, 10**9))
                changed[at : at + 8] = number.to_bytes(8, draw.choice(("little", "big")))
    return bytes(changed)


def odd_value(content: Any, draw: random.Random) -> Any:
    """Return nested plain containers with one value, at any depth, removed or replaced by an odd one."""
    content = copy.copy(content)
    inner = [key for key in content if isinstance(content[key], dict)] if isinstance(content, dict) else []
    if inner and draw.random() < 0.6:
        key = draw.choice(inner)
        content[key] = odd_value(content[key], draw)
    elif isinstance(content, dict) and content:
        key = draw.choice(list(content))
        if draw.random() < 0.3:
            del content[key]
        else:
            content[key] = draw.choice(ODD)
    else:
        content = draw.choice(ODD)
    return content


def odd_json(file: Path, draw: random.Random) -> None:
    file.write_text(json.dumps(odd_value(json.loads(file.read_text()), draw), default=str))


def odd_torch(file: Path, draw: random.Random) -> None:
    import torch

    torch.save(odd_value(torch.load(file, weights_only=True), draw), file)


# -- kinds


def _images(folder: Path) -> list[Path]:
    import io

    from PIL import Image

    from src.data import dummy

    image = Image.open(io.BytesIO(dummy.jpeg(1))).convert("RGB").resize((96, 80))
    image.save(folder / "baseline.jpg", quality=80)
    image.save(folder / "progressive.jpg", quality=80, progressive=True)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    for ending in ("png", "webp", "gif", "bmp", "tif"):
        image.save(folder / f"a.{ending}")
    image.convert("I;16").save(folder / "grey.png")
    return sorted(folder.iterdir())


def _use_images(folder: Path) -> None:
    from src.data.decode import Decoder

    for file in folder.iterdir():
        Decoder("apply", 80).decode(file.read_bytes())


def _dataset(pattern: str, folder: Path) -> list[Path]:
    from src.data import dummy

    dummy.write(folder / "set", 6)
    return sorted((folder / "set").glob(pattern))


def _tar(folder: Path) -> list[Path]:
    import io

    from src.data import dummy

    (folder / "set").mkdir()
    with tarfile.open(folder / "set/train-0000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(4):
            for name, data in ((f"{'x' * 120}{i}.jpg", dummy.jpeg(i)), (f"{'x' * 120}{i}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [folder / "set/train-0000.tar"]


def _use_data(folder: Path) -> None:
    from src.data.decode import BadImage
    from src.data.places import locate
    from src.data.splits import open_splits

    source = open_splits(locate(str(folder / "set")), None, "train", "validation", 1.0).train
    source.fingerprint()
    for i in range(min(len(source), 10)):
        try:
            source.encoded(i)
            source.label(i)
            source.name(i)
        except BadImage:
            pass


def _npz(folder: Path) -> list[Path]:
    import numpy as np

    np.savez(folder / "moments.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez_compressed(folder / "packed.npz", mu=np.zeros(8), sigma=np.eye(8))
    np.savez(folder / "images.npz", np.zeros((3, 16, 16, 3), np.uint8))
    return sorted(folder.iterdir())


def _use_npz(folder: Path) -> None:
    from src.metrics.fid import load_npz
    from src.metrics.npz import ImageNpz

    for file in folder.iterdir():
        if file.name == "images.npz":
            for _ in ImageNpz(file).batches(2):
                pass
        else:
            load_npz(file)


def _decoder(folder: Path) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    from src.models.decoder import DecoderConfig, ViTDecoder

    state = ViTDecoder(DecoderConfig.read("configs/decoder/tiny"), 16, 4, 64).state_dict()
    state = {name: value for name, value in state.items() if value.numel() < 4096}
    torch.save({"model": state}, folder / "decoder.pt")
    save_file(state, folder / "decoder.safetensors")
    return sorted(folder.iterdir())


def _use_decoder(folder: Path) -> None:
    from src.formats.decoder_files import read_decoder

    for file in folder.iterdir():
        read_decoder(file)


def _checkpoint(folder: Path) -> list[Path]:
    import torch

    from src.core.compose import compose
    from src.formats.checkpoint import FORMAT_VERSION
    from src.training.stage1 import RAEModule

    config = compose(["experiment=rae_dummy", "data.image_size=32", "model.disc_weight=0", "model.perceptual_weight=0"])
    module = RAEModule(**{key: value for key, value in config["model"].items() if key != "_target_"})
    content = {"format_version": FORMAT_VERSION, "config": config, "global_step": 3, "epoch": 0, "loops": {}}
    content |= {"optimizer_states": [], "state_dict": module.state_dict(), **module.identity()}
    torch.save(content, folder / "last.ckpt")
    return [folder / "last.ckpt"]


def _use_checkpoint(folder: Path) -> None:
    from src.callbacks.checkpoint import AtomicCheckpointIO
    from src.core.errors import UserError
    from src.formats.checkpoint import load_trained
    from src.formats.decoder_files import read_decoder, read_statistics

    statistics = partial(read_statistics, shape=(64, 4, 4), identity={})
    for use in (AtomicCheckpointIO().load_checkpoint, read_decoder, statistics, load_trained):
        try:
            use(folder / "last.ckpt")
        except UserError as error:
            refused = error
        else:
            refused = None
    if refused:
        raise refused


def _latents(folder: Path) -> list[Path]:
    import torch

    from src.data.latents import LatentWriter, write_index

    writer = LatentWriter(folder, (2, 1, 1), torch.float32, 0)
    writer.write(torch.ones(3, 2, 1, 1), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    write_index(
        folder, writer.close(), {"scale": "raw", "shape": [2, 1, 1], "encoder": {"weights": "a"}, "statistics": None}
    )
    return sorted(folder.iterdir())


def _use_latents(folder: Path) -> None:
    from src.data.latents import LatentStore

    for _ in LatentStore(folder).batches(2):
        pass


KINDS = {
    "images": Kind(_images, _use_images),
    "arrow": Kind(partial(_dataset, "*.arrow"), _use_data),
    "tar": Kind(_tar, _use_data),
    "npz": Kind(_npz, _use_npz),
    "decoder": Kind(_decoder, _use_decoder),
    "checkpoint": Kind(_checkpoint, _use_checkpoint, odd_torch),
    "latents": Kind(_latents, _use_latents),
    "json": Kind(partial(_dataset, "*.json"), _use_data, odd_json),
}


# -- running


def try_inputs(kind: Kind, whole: Path, folder: Path, targets: list[Path], seeds: range, results: Any) -> None:
    """Read damaged inputs one by one, in a child; send (seed, outcome) to `results` before and after each."""
    import torch

    from src.core.errors import UserError
    from src.data.decode import BadImage

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide the warnings of readers
    torch.set_num_threads(1)  # OpenMP in a forked child waits forever for its parent's threads
    for seed in seeds:
        draw = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        file = folder / draw.choice(targets)
        if kind.structure and draw.random() < 0.7:
            kind.structure(file, draw)
        else:
            file.write_bytes(damage(file.read_bytes(), draw))
        results.send((seed, "began"))
        signal.alarm(LIMIT_S)
        try:
            kind.use(folder)
            outcome = "read"
        except (UserError, BadImage):
            outcome = "refused"
        except BaseException:
            outcome = traceback.format_exc()
        signal.alarm(0)
        results.send((seed, outcome))
    results.close()


def fuzz(name: str, seconds: float, first: int, output: Path) -> Counter[str]:
    """Try inputs of a kind for some seconds. Return the number of inputs by outcome; keep the bad ones below `output`."""
    kind, counts = KINDS[name], Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        whole, folder = Path(place) / "whole", Path(place) / "damaged"
        whole.mkdir()
        targets = [file.relative_to(whole) for file in kind.make(whole)]
        kind.use(whole)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            seeds = range(first, first + BATCH)
            receiver, sender = multiprocessing.Pipe(duplex=False)
            child = multiprocessing.get_context("fork").Process(
                target=try_inputs, args=(kind, whole, folder, targets, seeds, sender)
            )
            child.start()
            sender.close()
            latest = first
            try:
                while time.monotonic() - began < seconds + LIMIT_S:
                    latest, outcome = receiver.recv()
                    if outcome == "began":
                        continue
                    first = latest + 1
                    bad = outcome not in ("read", "refused")
                    counts["raised" if bad else outcome] += 1
                    if bad:
                        _keep(output / f"{name}-{latest}", folder, outcome)
                    if time.monotonic() - began >= seconds:
                        break
                child.kill()
            except (EOFError, pickle.UnpicklingError):
                child.join()
                if child.exitcode and latest >= first:  # it died while reading an input
                    outcome = "hung" if child.exitcode == -signal.SIGALRM else f"died with {child.exitcode}"
                    counts[outcome] += 1
                    _keep(output / f"{name}-{latest}", folder, outcome)
                    first = latest + 1
            child.join()
    return counts


def _keep(place: Path, folder: Path, text: str) -> None:
    shutil.copytree(folder, place, dirs_exist_ok=True)
    (place / "outcome.txt").write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every input was read or refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=above_zero, default=10, help="total time for all kinds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input of each kind")
    parser.add_argument("--output", type=Path, default=Path("fuzz"), help="folder for inputs that failed")
    args = parser.parse_args(argv)
    failures = 0
    for name in args.kinds:
        counts = fuzz(name, 60 * args.minutes / len(args.kinds), args.seed, args.output.absolute())
        bad = counts.total() - counts["read"] - counts["refused"]
        print(
            f"{name:<12}{counts.total():>8,} inputs: "
            + ", ".join(f"{count:,} {what}" for what, count in counts.items())
        )
        failures += bad
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
