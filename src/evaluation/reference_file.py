"""Write a reference file to score against. Used by `src/make_reference.py`."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.core.distributed import Process
from src.core.errors import UserError
from src.core.terminal import counted, progress
from src.core.weights import resolve
from src.evaluation.images import ALL, HELD_OUT, Images, centre_crops, decoder_of, open_images
from src.evaluation.networks import networks_of
from src.evaluation.options import EvaluationOptions, ReferenceOptions
from src.evaluation.per_image_files import image_stack
from src.formats.checkpoint import open_checkpoint, stored
from src.formats.opening import DEFAULT_IMAGE_PX
from src.metrics.fid import save_npz
from src.metrics.generation import ImageStatistics
from src.metrics.reference import Preparation

log = logging.getLogger(__name__)


def write_reference(options: ReferenceOptions, process: Process) -> tuple[int, str]:
    """Write the reference and return (number of images, description); complete on rank 0. Called on all ranks.

    Raises:
        UserError: no data, no Inception weights, fewer than two images, an image size that differs from the checkpoint's.
    """
    target = resolve(options.output)
    if target.suffix != ".npz":
        raise UserError(f"--output {options.output}: expected a name that ends in .npz.")
    without = "without one, drop --checkpoint and set --split, --image_size and --exif"
    config = open_checkpoint(options.checkpoint, without)[1]["config"] if options.checkpoint else {}
    images = _open(options, config)
    size, decoder = _image_size(options, config), decoder_of(options, config)
    prepared = images.preparation(size, decoder.exif, options.num_samples)
    made_of = f"{images.split} of {images.folder}, {size} px, EXIF {decoder.exif}"
    network = None
    if options.kind == "statistics":
        network = networks_of(options, config)[0].to(process.device)
    loader = centre_crops(images, size, decoder, options, process)
    with progress(Path(images.folder).name, process.main) as update:
        batches = counted(loader, len(loader), update)
        if network is not None:
            statistics = ImageStatistics(network, options.batch_size, keep=False)
            for batch in batches:
                statistics.update(batch["image"])
            statistics.reduce()
            if process.main:
                save_npz(target, statistics.pool, network.name, prepared.facts(), statistics.spatial)
            more = " and, for sFID, mu_s and sigma_s" if statistics.spatial is not None else ""
            return statistics.count, f"mu and sigma{more} ({network.name}; {made_of})"
        with image_stack(target, size, process) as stack:
            for batch in batches:
                stack.write(batch["position"] * process.world + process.rank, batch["image"])
            return stack.finish(prepared.facts()), f"arr_0 ({made_of})"


def command_for(options: EvaluationOptions, images: Images, prepared: Preparation, features: str | None = None) -> str:
    """Return the command that makes the reference an evaluation with `options` expects. It writes to a new file: the
    existing one may be somebody else's. `features`: value of --features; None: leave the option out."""
    parts: list[Any] = ["python", "src/make_reference.py"]
    if options.checkpoint:
        parts += ["--checkpoint", options.checkpoint]
    parts += ["--data_dir", images.folder, "--split", images.split, "--image_size", prepared.image_size]
    parts += ["--exif", prepared.exif]
    if prepared.selected != prepared.available:
        parts += ["--num_samples", prepared.selected]
    for name, usual in (("inception_path", None), ("inception_weights", "pretrained"), ("inception_width", None)):
        if (value := getattr(options, name)) != usual:
            parts += [f"--{name}", value]
    if features is not None:
        parts += ["--features", features]
    if options.device != "cuda":
        parts += ["--device", options.device]
    parts += ["--output", f"reference_{Path(images.folder).name}_{images.split}_{prepared.image_size}px.npz"]
    return shlex.join(map(str, parts))


def _open(options: ReferenceOptions, config: Mapping[str, Any]) -> Images:
    if options.split == HELD_OUT and not options.checkpoint:
        raise UserError(
            "--split held_out: only a checkpoint says what its training held out. Add --checkpoint FILE, or use "
            "--split all."
        )
    images = open_images(options.data_dir[0], options.split, config.get("data"))
    if options.split is None and images.split == ALL and not options.checkpoint:
        log.warning(
            "%s has no validation split: the reference is made of all its %s images, while `eval_rfid.py --checkpoint "
            "FILE` scores those that training held out, if it held any out. Give the same --checkpoint FILE here to "
            "use those, or --split all to use all.",
            images.folder, f"{len(images.rows):,}",
        )  # fmt: skip
    return images


def _image_size(options: ReferenceOptions, config: Mapping[str, Any]) -> int:
    trained: int | None = stored(config, "model.image_size")
    if None not in (trained, options.image_size) and trained != options.image_size:
        raise UserError(
            f"--image_size {options.image_size}, but the model of {options.checkpoint} works at {trained} px. Drop the "
            "option, or the checkpoint."
        )
    return options.image_size or trained or DEFAULT_IMAGE_PX
