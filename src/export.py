"""Export a trained model: as the official decoder file, a diffusers folder, or a folder in our own format.

    python src/export.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --format official --output exports/mine
    python src/export.py --checkpoint CKPT --format diffusers --output exports/mine_diffusers
    python src/export.py --checkpoint CKPT --format folder --with_encoder --output exports/mine_folder --push NAME/MODEL
    python src/export.py --decoder exports/mine_diffusers --format folder --with_encoder --output exports/back
    python src/export.py --checkpoint STAGE2_CKPT --format official --output exports/transformer

Every export is a folder with a model card, the latent statistics (`stats.pt`) and the SHA-256 of its files. All formats can be
loaded by `model.pretrained_decoder_path`, `model.normalization_stat_path`, and `--decoder` of the other scripts.
"""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.errors import UserError
from src.core.options import ModelOptions, Place, option, run


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Command-line options of the export."""

    format: Literal["official", "diffusers", "folder"] = option(
        "official: model.pt, for stage 2 stage2_model.pt or RAEv2's checkpoint.pt; diffusers: AutoencoderRAE with its encoder; "
        "folder: our own format",
        default=MISSING,
    )
    output: Place = option("a new folder", "DIR", MISSING)
    dtype: Literal["fp32", "bf16", "fp16"] = option("dtype of the weights; statistics stay fp32", default="fp32")
    overwrite: bool = option("replace an earlier export in --output", default=False)
    with_encoder: bool = option("folder: include the encoder (diffusers always does)", default=False)
    published_names: bool = option(
        "diffusers: name the encoder's parameters as transformers 4 and 5.17 do, not as the installed version",
        default=False,
    )
    scores: tuple[str, ...] = option("results of src/eval_rfid.py to put on the model card", "JSON", ())
    push: str | None = option("upload the export to the Hugging Face hub", "NAME/MODEL")
    private: bool = option("with --push: make the repository private", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 exported, 1 user error."""
    return run(Options, __doc__, _run, argv)


def _run(options: Options) -> int:
    from src.formats.checkpoint import OtherStage
    from src.formats.export import check_output, export
    from src.formats.opening import open_model
    from src.formats.upload import check_repo_id

    if options.push:
        check_repo_id(options.push)
    check_output(options.output, options.overwrite)
    try:
        loaded = open_model(options)
    except OtherStage as error:
        return _transformer(options, error)
    remarks = export(
        loaded, options.output, options.format, options.dtype, options.with_encoder, options.published_names,
        options.overwrite, options.scores,
    )  # fmt: skip
    source, weights = loaded.description["source"], loaded.description["weights"]
    return _report(options, f"{source} ({weights}, {options.dtype})", remarks)


def _transformer(options: Options, other: UserError) -> int:
    """Export a stage-2 checkpoint, for which there is only the official format."""
    from src.core.weights import DTYPES
    from src.formats.stage2 import export_official

    plain = Options(
        checkpoint=options.checkpoint, format="official", output=options.output, dtype=options.dtype,
        overwrite=options.overwrite, push=options.push, private=options.private,
    )  # fmt: skip
    if options != plain:
        raise UserError(
            f"{other} Of a diffusion transformer the EMA weights are exported, with --format official; the only other options "
            "are --dtype, --output, --overwrite, --push and --private."
        )
    assert options.checkpoint is not None
    export_official(options.checkpoint, options.output, DTYPES[options.dtype], options.overwrite)
    return _report(options, f"{options.checkpoint} (ema, {options.dtype})", ())


def _report(options: Options, what: str, remarks: Sequence[str]) -> int:
    from src.formats.upload import push

    print(f"{options.format} export of {what}:")
    for file in sorted(path for path in options.output.rglob("*") if path.is_file()):
        print(f"  {file}  {file.stat().st_size:,} bytes")
    for remark in remarks:
        print(f"Note: {remark}")
    if options.push:
        print(f"Pushed to {push(options.output, options.push, options.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
