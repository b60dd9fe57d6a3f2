"""Exact per-element mean and variance of a data set's latents, for `model.normalization_stat_path`.

    python src/latent_stats.py --config experiment=rae_dino data.data_dir=/path/to/imagenet_hf --output weights/stats.pt
    torchrun --nproc_per_node=8 src/latent_stats.py --checkpoint CKPT --data_dir /path/to/images --output stats.pt

Takes the training images (`--split` names others), centre-cropped, through the encoder in float32, without noise. The sums
are kept in float64 and saved every 16,384 images, so the same command continues an interrupted pass. The file is the
official one (`mean`, `var`, each C x h x w) and says besides which encoder it is of.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the statistics are written, 1 where something is wrong with what was given."""
    from src.core.options import add_device_option, make_parser, not_negative, option, positive

    parser = make_parser(__doc__)
    model = parser.add_argument_group("encoder (one of)")
    option(
        model,
        "config",
        nargs="+",
        metavar="KEY=VALUE",
        help="overrides as for src/train.py, experiment=NAME first; data.data_dir and its split count too",
    )
    option(model, "checkpoint", metavar="FILE", help=".ckpt that training wrote")
    option(model, "decoder", metavar="DIR", help="exported folder (ours or diffusers)")
    option(model, "encoder", metavar="PATH", help="with --checkpoint: where the same encoder lies on this machine")
    data = parser.add_argument_group("images")
    option(
        data,
        "data_dir",
        metavar="DIR",
        help=(
            "Hugging Face dataset on disk or a tree of image files (default: data.data_dir of --config or of the "
            "checkpoint)"
        ),
    )
    option(
        data,
        "split",
        metavar="NAME",
        default="all",
        help="a split by its name, or `all` of the training split (default)",
    )
    option(data, "num_samples", type=positive, metavar="N", help="only the first N images (default: all)")
    option(
        data,
        "batch_size",
        type=positive,
        default=64,
        metavar="N",
        help="images at once and process; the result does not depend on it (default: %(default)s)",
    )
    option(
        data, "num_workers", type=not_negative, default=4, metavar="N", help="loading processes (default: %(default)s)"
    )
    option(data, "exif", choices=("apply", "ignore"), default="apply", help="as in training (default: %(default)s)")
    option(
        data,
        "max_bad_share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when more of the images can't be decoded (default: %(default)s)",
    )
    option(parser, "output", type=Path, required=True, metavar="FILE", help="the statistics, .pt")
    option(parser, "overwrite", action="store_true", help="replace an existing --output")
    add_device_option(parser)
    arguments = parser.parse_args(argv)
    if sum(value is not None for value in (arguments.config, arguments.checkpoint, arguments.decoder)) != 1:
        parser.error("give one of --config, --checkpoint and --decoder")

    from src.core.terminal import run_program

    return run_program(lambda: _run(arguments))


def _run(arguments: Any) -> int:
    from src.core.errors import UserError
    from src.core.files import write_torch
    from src.core.processes import processes
    from src.data.decode import Decoder
    from src.evaluation.images import MAX_MEGAPIXELS, open_images
    from src.evaluation.latent_statistics import latent_statistics, partial_file

    output: Path = arguments.output
    if output.exists() and not arguments.overwrite:
        raise UserError(f"--output {output} exists. Add --overwrite, or choose another name.")
    with processes(arguments.device) as place:
        rae, trained_on = _model(arguments)
        data_dir = arguments.data_dir or trained_on.get("data_dir")
        if data_dir is None:
            raise UserError("Nothing says which images: give --data_dir.")
        images = open_images(data_dir, arguments.split, None)
        if place.main:
            _make_room(output)
        loading = {name: getattr(arguments, name) for name in ("batch_size", "num_workers", "max_bad_share")}
        loading["decoder"] = Decoder(arguments.exif, MAX_MEGAPIXELS)
        with _bar(place.main) as progress:
            content = latent_statistics(
                rae.to(place.device), images, arguments.num_samples, loading, place, output, progress
            )
        if not place.main:
            return 0
        write_torch(output, content)
        partial_file(output).unlink(missing_ok=True)
    shape = " x ".join(map(str, content["mean"].shape))
    print(f"{output}: mean and var, each {shape}, of {content['images']:,} images of {images.folder} ({images.split})")
    print(
        f"mean {content['mean'].mean():.4f} on average, std {content['var'].sqrt().mean():.4f} (from "
        f"{content['var'].min().sqrt():.4f} to {content['var'].max().sqrt():.4f})"
    )
    if rae.encoder.untrained:
        print("UNTRAINED encoder: these statistics say nothing of the method.")
    return 0


def _model(arguments: Any) -> "tuple[Any, dict[str, Any]]":
    """The RAE, and the node `data:` that goes with it."""
    if arguments.config is not None:
        from src.core.compose import compose
        from src.formats.encoder_of import encoder_of

        config = compose(arguments.config)
        return encoder_of(config), config["data"]
    from src.formats.opening import ModelChoice, open_model

    nothing = {"encoder_cls": None, "encoder_layers": None, "stats": None, "image_size": None}
    choice = ModelChoice(
        checkpoint=arguments.checkpoint, weights="ema", decoder=arguments.decoder, encoder=arguments.encoder,
        decoder_config="configs/decoder/ViTXL", decoder_patch_size=16, decoder_output="normalized", **nothing,
    )  # fmt: skip
    loaded = open_model(choice)
    return loaded.rae, (loaded.description.get("config") or {}).get("data") or {}


def _make_room(output: Path) -> None:
    from src.core.errors import UserError

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(f".{output.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror or error}.") from error


@contextmanager
def _bar(shown: bool) -> "Iterator[Any]":
    """A progress bar on standard error; plain lines where that is no terminal."""
    from src.evaluation.latent_progress import progress_bar

    with progress_bar("images", shown) as update:
        yield update


if __name__ == "__main__":
    sys.exit(main())
