"""Compute the exact per-element mean and variance of a data set's latents, for `model.normalization_stat_path`.

    python src/latent_stats.py --config experiment=rae_dino data.data_dir=/path/to/imagenet_hf --output weights/stats.pt
    torchrun --nproc_per_node=8 src/latent_stats.py --checkpoint CKPT --data_dir /path/to/images --output stats.pt

Encodes the training images (`--split` selects others), centre-cropped, in float32 and without noise. Sums are float64 and
saved every 16,384 images, so the same command continues an interrupted pass. The file has the official format (`mean`, `var`,
each C x h x w) and also identifies the encoder.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.errors import UserError
from src.core.files import check_writable
from src.core.options import ModelOptions, run
from src.core.terminal import progress
from src.evaluation.options import StatisticsOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 statistics written, 1 user error."""
    return run(StatisticsOptions, __doc__, _run, argv)


def _run(options: StatisticsOptions) -> int:
    from src.core.distributed import processes
    from src.core.files import write_torch
    from src.evaluation.images import open_images
    from src.evaluation.latent_statistics import latent_statistics, partial_file

    output = options.output
    if output.exists() and not options.overwrite:
        raise UserError(f"--output {output} exists. Add --overwrite, or choose another name.")
    with processes(options.device) as process:
        rae, trained_on = _model(options)
        data_dir = options.data_dir or trained_on.get("data_dir")
        if data_dir is None:
            raise UserError("No images are given: set --data_dir.")
        images = open_images(data_dir, options.split, None)
        if process.main:
            check_writable(output, "--output")
        with progress("images", process.main) as update:
            content = latent_statistics(rae.to(process.device), images, options, process, update)
        if not process.main:
            return 0
        write_torch(output, content)
        partial_file(output).unlink(missing_ok=True)
    shape, std = " x ".join(map(str, content["mean"].shape)), content["var"].sqrt()
    print(f"{output}: mean and var, each {shape}, of {content['images']:,} images of {images.folder} ({images.split})")
    spread = f"std {std.mean():.4f} (from {std.min():.4f} to {std.max():.4f})"
    print(f"mean {content['mean'].mean():.4f} on average, {spread}")
    if rae.encoder.untrained:
        print("UNTRAINED encoder: random weights, not a result.")
    return 0


def _model(options: StatisticsOptions) -> tuple[Any, Mapping[str, Any]]:
    """Return the RAE and its `data:` config node."""
    if options.config:
        from src.core.compose import compose
        from src.formats.checkpoint import encoder_of

        config = compose(options.config)
        return encoder_of(config), config["data"]
    from src.formats.opening import open_model

    loaded = open_model(ModelOptions(checkpoint=options.checkpoint, decoder=options.decoder, encoder=options.encoder))
    return loaded.rae, (loaded.description.get("config") or {}).get("data") or {}


if __name__ == "__main__":
    sys.exit(main())
