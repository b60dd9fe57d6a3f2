r"""Reconstruct images with a model: write reconstructions, scores and latents.

    python src/reconstruct.py --checkpoint CKPT --input photo.jpg --output out
    python src/reconstruct.py --decoder exports/mine --input 'photos/**/*.jpg' --output out --write images sheet scores npz
    torchrun --nproc_per_node=8 src/reconstruct.py --checkpoint CKPT --input /path/to/imagenet_hf --split train \
        --latents normalized --output latents_in1k
    python src/reconstruct.py --checkpoint CKPT --from_latents latents_in1k/latents --output decoded

Images may have any size: `--fit crop` resizes the shorter side to the model's size and crops the centre (as in evaluation),
`pad` resizes the longer side and fills the rest with the edge's colours (which count in the scores), `resize` ignores the
aspect ratio.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.errors import UserError
from src.core.files import check_folder, write_text
from src.core.options import run
from src.evaluation.options import ReconstructionOptions

if TYPE_CHECKING:
    from src.core.distributed import Process

RECORD = "reconstruct.json"
FIGURES = {"psnr": "PSNR {:.2f} dB", "lpips_untrained": "LPIPS {:.4f} with UNTRAINED features"}


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 all written, 1 user error."""
    return run(ReconstructionOptions, __doc__, _run, argv)


def _run(options: ReconstructionOptions) -> int:
    from src.core.distributed import processes
    from src.data.latents import LatentStore
    from src.evaluation.reconstruction import decode_latents, reconstruct
    from src.evaluation.reconstruction_inputs import open_inputs
    from src.formats.opening import open_model

    with processes(options.device) as process:
        if process.main:
            _check_output(options)
        store = LatentStore(options.from_latents) if options.from_latents else None
        inputs = None if store is not None else open_inputs(options.input, options.split, options.num_samples)
        loaded = open_model(options)
        loaded.rae.to(process.device)
        with _output_folder(options, process):
            if store is not None:
                given, (count, means, written) = len(store), decode_latents(options, loaded, store, process)
            else:
                assert inputs is not None
                given, (count, means, written) = len(inputs.rows), reconstruct(options, loaded, inputs, process)
    if not process.main:
        return 0
    model = {name: value for name, value in loaded.description.items() if name != "config"}
    untrained, left_out = loaded.rae.encoder.untrained, given - count
    facts = {"model": model, "untrained_encoder": untrained, "images": count, "left_out": left_out}
    _write_record(options.output, {"status": "finished", **facts, **means})
    images = "1 image" if count == 1 else f"{count:,} images"
    rest = f", {left_out:,} left out (not decodable)" if left_out else ""
    print(f"{images} through {model['source']} ({model['weights']}){rest}")
    if means:
        figures = (FIGURES.get(name, name.upper() + " {:.4f}").format(value) for name, value in means.items())
        print(f"{', '.join(figures)} (means of per-image values)")
    if untrained:
        print("UNTRAINED encoder: random weights, not a result.")
    for path in written:
        print(f"Written: {path}")
    return 0


def _check_output(options: ReconstructionOptions) -> None:
    check_folder(options.output, options.overwrite, (RECORD,), "output of this script")


@contextmanager
def _output_folder(options: ReconstructionOptions, process: "Process") -> Iterator[None]:
    """Create an empty folder with a record of this script; remove it after an error, unless results were written."""
    from src.core.distributed import wait_for_all

    output = options.output
    if process.main:
        _check_output(options)  # again: another process may have started while the model was loading
        try:
            if output.exists():
                shutil.rmtree(output)
            output.mkdir(parents=True)
            _write_record(output, {"status": "running"})
        except OSError as error:
            raise UserError(
                f"--output {output} can't be written: {error.strerror or error}. Choose a folder with write permission "
                "and free space."
            ) from error
    wait_for_all()
    try:
        yield
    except BaseException:
        if process.main and all(
            path.name == RECORD or (path.is_dir() and not any(path.iterdir())) for path in output.iterdir()
        ):
            shutil.rmtree(output)
        raise


def _write_record(output: Path, content: dict[str, Any]) -> None:
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    write_text(output / RECORD, json.dumps({"command": command, **content}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
