"""Turn a trained model into files that other programs load: the official decoder file, a diffusers folder, or our own.

    python src/export.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --format official --output exports/mine
    python src/export.py --checkpoint CKPT --format diffusers --output exports/mine_diffusers
    python src/export.py --checkpoint CKPT --format folder --with_encoder --output exports/mine_folder --push NAME/MODEL
    python src/export.py --decoder exports/mine_diffusers --format folder --with_encoder --output exports/back

Every export is a folder with a model card, the latent statistics (`stats.pt`) and the sha256 of its files. All of them
are read back by `model.pretrained_decoder_path`, `model.normalization_stat_path`, and `--decoder` of the other programs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the export is there, 1 where something is wrong with what was given."""
    from src.core.options import add_model_options, make_parser, option

    parser = make_parser(__doc__)
    add_model_options(parser)
    out = parser.add_argument_group("export")
    option(
        out,
        "format",
        choices=("official", "diffusers", "folder"),
        required=True,
        help="official: model.pt; diffusers: AutoencoderRAE with its encoder; folder: ours",
    )
    option(out, "output", type=Path, required=True, metavar="DIR", help="a new folder")
    option(
        out,
        "dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the weights; statistics stay fp32 (default: %(default)s)",
    )
    option(out, "overwrite", action="store_true", help="replace an earlier export in --output")
    option(out, "with_encoder", action="store_true", help="folder: put the encoder in (diffusers always does)")
    option(
        out,
        "published_names",
        action="store_true",
        help="diffusers: name the encoder's parameters as transformers 4 does, instead of as the installed one",
    )
    option(out, "scores", nargs="+", default=[], metavar="JSON", help="results of src/eval_rfid.py for the model card")
    option(out, "push", metavar="NAME/MODEL", help="send the export to the Hugging Face hub")
    option(out, "private", action="store_true", help="with --push: a private repository")
    arguments = parser.parse_args(argv)

    from src.core.terminal import run_program

    return run_program(lambda: _run(arguments))


def _run(arguments: Any) -> int:
    from src.formats.export import ExportOptions, check_output, export
    from src.formats.opening import ModelChoice, open_model
    from src.formats.upload import check_repo_id, push

    if arguments.push:
        check_repo_id(arguments.push)
    check_output(arguments.output, arguments.overwrite)
    loaded = open_model(ModelChoice.of(arguments))
    options = ExportOptions(
        arguments.format, arguments.dtype, arguments.with_encoder, arguments.published_names, arguments.overwrite
    )
    remarks = export(loaded, arguments.output, options, arguments.scores)
    print(
        f"{arguments.format} export of {loaded.description['source']} ({loaded.description['weights']}, "
        f"{arguments.dtype}):"
    )
    for file in sorted(path for path in arguments.output.rglob("*") if path.is_file()):
        print(f"  {file}  {file.stat().st_size:,} bytes")
    for remark in remarks:
        print(f"Note: {remark}")
    if arguments.push:
        print(f"Pushed to {push(arguments.output, arguments.push, arguments.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
