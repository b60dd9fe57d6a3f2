"""Images through a model and back: pictures, scores, latents.

    python src/reconstruct.py --checkpoint CKPT --input photo.jpg --output out
    python src/reconstruct.py --decoder exports/mine --input 'photos/**/*.jpg' --output out --write images sheet scores npz
    torchrun --nproc_per_node=8 src/reconstruct.py --checkpoint CKPT --input /path/to/imagenet_hf --split train \
        --latents normalized --output latents_in1k
    python src/reconstruct.py --checkpoint CKPT --from_latents latents_in1k/latents --output decoded

Images of any size: `--fit crop` (as evaluation does: shorter side to the model's size, the middle), `pad` (longer side, the
rest filled with the edge's colours, which count in the scores) or `resize` (proportions given up).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

PRODUCTS = ("images", "sheet", "scores", "npz")
RECORD = "reconstruct.json"


def build_parser() -> Any:
    from src.core.options import add_device_option, add_model_options, make_parser, not_negative, option, positive

    parser = make_parser(__doc__)
    add_model_options(parser)
    data = parser.add_argument_group("images (one of --input and --from_latents)")
    option(
        data,
        "input",
        nargs="+",
        metavar="PATH",
        help="image files, folders, patterns in quotes, or one data set on disk",
    )
    option(data, "from_latents", metavar="DIR", help="decode latents that --latents stored")
    option(data, "split", metavar="NAME", help="of a data set (default: all of its training split)")
    option(data, "num_samples", type=positive, metavar="N", help="only the first N images (default: all)")
    option(
        data,
        "fit",
        choices=("crop", "pad", "resize"),
        default="crop",
        help="how an image becomes a square (default: %(default)s)",
    )
    option(
        data,
        "exif",
        choices=("apply", "ignore"),
        default="apply",
        help="turn images as their EXIF says (default: %(default)s)",
    )
    option(
        data,
        "batch_size",
        type=positive,
        default=32,
        metavar="N",
        help="images at once and process (default: %(default)s)",
    )
    option(
        data, "num_workers", type=not_negative, default=4, metavar="N", help="loading processes (default: %(default)s)"
    )
    out = parser.add_argument_group("output")
    option(out, "output", type=Path, required=True, metavar="DIR", help="a new folder")
    option(out, "overwrite", action="store_true", help="replace what an earlier call left in --output")
    option(
        out,
        "write",
        nargs="+",
        choices=PRODUCTS,
        metavar="WHAT",
        help=(
            "images: PNG files; sheet: originals, reconstructions, differences; scores: PSNR, SSIM and LPIPS of each "
            "image as CSV; npz: reconstructions and originals for FID programs (default: images sheet scores, nothing "
            "with --latents)"
        ),
    )
    option(out, "sheet_images", type=positive, default=32, metavar="N", help="on the sheet (default: %(default)s)")
    option(
        out,
        "latents",
        choices=("raw", "normalized"),
        help="store latents as the encoder gives them, or normalised by the model's statistics",
    )
    option(out, "latents_dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: %(default)s)")
    option(
        out,
        "vgg_path",
        metavar="FILE",
        help="VGG16 for LPIPS (default: the checkpoint's, else weights/vgg16-397923af.pth)",
    )
    option(
        out,
        "lpips_path",
        metavar="FILE",
        help="linear weights of LPIPS (default: the checkpoint's, else weights/lpips_vgg_v0.1.pth)",
    )
    add_device_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 where everything is written, 1 where something is wrong with what was given."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if (options.input is None) == (options.from_latents is None):
        parser.error("give one of --input and --from_latents")
    if options.from_latents is not None and (options.latents or "scores" in (options.write or ())):
        parser.error("--from_latents has no originals: neither --latents nor --write scores goes with it")
    from src.core.terminal import run_program

    return run_program(lambda: _run(options))


def _run(options: Any) -> int:
    from src.core.processes import processes
    from src.data.decode import Decoder
    from src.data.latents import LatentStore
    from src.evaluation.images import MAX_MEGAPIXELS
    from src.evaluation.reconstruction import decode_latents, reconstruct
    from src.evaluation.reconstruction_inputs import FitTransform, open_inputs
    from src.formats.opening import ModelChoice, open_model

    if int(os.environ.get("RANK", "0")) == 0:
        _check_output(options.output, options.overwrite)
    store = LatentStore.open(options.from_latents) if options.from_latents else None
    inputs = open_inputs(options.input, options.split, options.num_samples) if options.input else None
    with processes(options.device) as place:
        loaded = open_model(ModelChoice.of(options))
        loaded.rae.to(place.device)
        products = _products(options)
        if place.main:
            _prepare(options.output)
        _wait()
        with _nothing_left_behind(options.output, place.main), _progress(place.main) as track:
            if store is not None:
                outcome = decode_latents(loaded, store, products, options.output, options.batch_size, place, track)
            else:
                assert inputs is not None
                transform = FitTransform(
                    loaded.rae.geometry.image_size, options.fit, Decoder(options.exif, MAX_MEGAPIXELS)
                )
                lpips = _lpips(options, loaded) if products.decode else None
                if lpips is not None:
                    lpips.to(place.device)
                outcome = reconstruct(
                    loaded,
                    inputs,
                    transform,
                    lpips,
                    products,
                    options.output,
                    options.batch_size,
                    options.num_workers,
                    place,
                    track,
                )
    if place.main:
        _finish(options, loaded, outcome, len(inputs.rows) if inputs is not None else len(store))
    return 0


def _products(options: Any) -> Any:
    from src.evaluation.reconstruction import Products
    from src.core.weights import DTYPES

    wanted = options.write or (
        [] if options.latents else ["images", "sheet", *([] if options.from_latents else ["scores"])]
    )
    return Products(
        images="images" in wanted,
        sheet_images=options.sheet_images if "sheet" in wanted else 0,
        scores="scores" in wanted,
        npz="npz" in wanted,
        latents=options.latents,
        latents_dtype=DTYPES[options.latents_dtype],
    )


def _lpips(options: Any, loaded: Any) -> Any:
    from src.evaluation.networks import load_lpips

    given = {"vgg_path": options.vgg_path, "linear_path": options.lpips_path}
    trained_with = ((loaded.description.get("config") or {}).get("model") or {}).get("lpips_arch")
    files = {"vgg_path": "weights/vgg16-397923af.pth", "linear_path": "weights/lpips_vgg_v0.1.pth"}
    if any(given.values()) or not trained_with:
        return load_lpips({name: given[name] or files[name] for name in files}, "--vgg_path and --lpips_path")
    return load_lpips(trained_with, "--vgg_path and --lpips_path")


def _check_output(output: Path, overwrite: bool) -> None:
    from src.core.errors import UserError

    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--output {output} exists and is not empty. Add --overwrite to replace what an earlier call left "
            "there, or choose another folder."
        )
    if not (output / RECORD).is_file():
        raise UserError(
            f"--output {output} holds no {RECORD}: it was not written by this program, so --overwrite does not "
            "delete it. Choose another folder."
        )


def _prepare(output: Path) -> None:
    """An empty folder that says whose it is."""
    from src.core.errors import UserError

    try:
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
        _write_record(output, {"status": "running"})
    except OSError as error:
        raise UserError(
            f"--output {output} can't be written: {error.strerror or error}. Choose a place with write permission "
            "and room."
        ) from error


@contextmanager
def _nothing_left_behind(output: Path, main: bool) -> "Iterator[None]":
    """After an error a folder in which nothing but the record lies goes again."""
    try:
        yield
    except BaseException:
        if main and all(
            path.name == RECORD or (path.is_dir() and not any(path.iterdir())) for path in output.iterdir()
        ):
            shutil.rmtree(output)
        raise


def _write_record(output: Path, content: dict[str, Any]) -> None:
    (output / RECORD).write_text(
        json.dumps({"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **content}, indent=2) + "\n"
    )


def _finish(options: Any, loaded: Any, outcome: Any, given: int) -> None:
    model = {name: value for name, value in loaded.description.items() if name != "config"}
    untrained = loaded.rae.encoder.untrained
    content = {
        "status": "finished",
        "model": model,
        "untrained_encoder": untrained,
        "images": outcome.images,
        "left_out": given - outcome.images,
        **outcome.means,
    }
    _write_record(options.output, content)
    left_out = f", {given - outcome.images:,} left out (not decodable)" if given > outcome.images else ""
    images = "1 image" if outcome.images == 1 else f"{outcome.images:,} images"
    print(f"{images} through {model['source']} ({model['weights']}){left_out}")
    if outcome.means:
        names = {
            "psnr": "PSNR {:.2f} dB",
            "ssim": "SSIM {:.4f}",
            "lpips": "LPIPS {:.4f}",
            "lpips_untrained": "LPIPS {:.4f} with UNTRAINED features",
        }
        print(
            ", ".join(names[name].format(value) for name, value in outcome.means.items())
            + " (means of per-image values)"
        )
    if untrained:
        print("UNTRAINED encoder: these figures say nothing of the method.")
    for path in outcome.written:
        print(f"Written: {path}")


def _wait() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def _progress(shown: bool) -> "Iterator[Callable[[Iterable[Any], int], Iterable[Any]]]":
    from src.evaluation.latent_progress import progress_bar

    with progress_bar("batches", shown) as update:

        def track(batches: Iterable[Any], total: int) -> Iterator[Any]:
            for done, batch in enumerate(batches):
                update(done, total)
                yield batch
            update(total, total)

        yield track


if __name__ == "__main__":
    sys.exit(main())
