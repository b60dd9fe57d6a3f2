"""What `src/make_reference.py` does."""

from typing import Any

from src.errors import UserError
from src.evaluation.images import evaluation_loader, open_images
from src.evaluation.networks import load_inception
from src.evaluation.options import INCEPTION_FILE
from src.evaluation.processes import Place
from src.evaluation.spool import NpzSpool
from src.evaluation.terminal import Track
from src.metrics.fid import save_npz
from src.metrics.reference import image_statistics
from src.weights import resolve

TRY_OUT = "For a try-out without the file: --inception_weights untrained (of use with such an evaluation only)."


def write_reference(options: Any, place: Place, track: Track) -> tuple[int, str]:
    """(images, what was written); complete on rank 0. On all ranks.

    Raises:
        UserError: no data, no Inception weights, fewer than two images.
    """
    target = resolve(options.output)
    if target.suffix != ".npz":
        raise UserError(f"--output {options.output}: expected a name that ends in .npz.")
    images = open_images(options.data_dir[0], options.split, None)
    inception = None
    if options.kind == "statistics":
        path = options.inception_path or INCEPTION_FILE
        inception = load_inception(
            path, options.inception_weights, options.inception_width, "--inception_path", TRY_OUT
        ).to(place.device)
    loader = evaluation_loader(
        images, options.image_size, options.num_samples, options.batch_size, options.num_workers, options.exif,
        options.max_bad_share, place.device, place.rank, place.world,
    )  # fmt: skip
    batches = track(loader, len(loader), images.folder.name)
    if inception is not None:
        statistics = image_statistics((batch["image"] for batch in batches), inception, options.batch_size).reduce()
        if place.main:
            save_npz(target, statistics, inception.name)
        return statistics.count, f"mu and sigma ({inception.name})"
    spool = NpzSpool(target, options.image_size, place.rank, place.world)
    try:
        for batch in batches:
            spool.write(batch["position"] * place.world + place.rank, batch["image"])
        return spool.finish(), f"arr_0, {options.image_size} px"
    except BaseException:
        spool.abandon()
        raise
