"""Score reconstructions: rFID, PSNR, SSIM and LPIPS of a trained model, a released decoder or an exported folder.

python src/eval_rfid.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --data_dir /path/to/imagenet_hf
torchrun --nproc_per_node=8 src/eval_rfid.py …                       several processes, the same number
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import EXIT_CODES, parse
from src.core.terminal import run_program
from src.evaluation.options import EvaluationOptions

EPILOG = rf"""
the published figures of the released DINOv2-B decoder (rFID .57, PSNR 18.9 dB on the 50,000 images of ImageNet val):

    python scripts/download_weights.py inception vgg16 lpips decoder-dinov2 stats-dinov2 \
        facebook/dinov2-with-registers-base
    python src/eval_rfid.py \
        --decoder weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt --decoder_config configs/decoder/ViTXL \
        --encoder_cls Dinov2withNorm --encoder facebook/dinov2-with-registers-base \
        --stats weights/stats/dinov2/wReg_base/imagenet1k/stat.pt \
        --data_dir /path/to/imagenet_hf --split validation --num_samples 50000 --image_size 256 \
        --exif ignore --quantization truncate

with our own defaults (EXIF rotation applied, 8-bit values rounded) the numbers differ a little; compare like with like.
A checkpoint is scored as its training scored it: --exif and --quantization are those of its configuration.
A DDP run of N processes, or another batch size, gives the same number up to float32 rounding of the features.

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(EvaluationOptions, __doc__, argv, EPILOG)
    return run_program(lambda: _run(options))


def _run(options: EvaluationOptions) -> int:
    from src.core.distributed import processes
    from src.core.files import write_text
    from src.core.weights import resolve
    from src.evaluation.report import text
    from src.evaluation.rfid import evaluate

    with processes(options.device) as process:
        results, protocol = evaluate(options, process)
    if results:
        print(text(results))
        if options.output_dir:
            print(f"Sample images saved to: {options.output_dir}")
        if options.json:
            content = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **protocol, "results": results}
            write_text(resolve(options.json), json.dumps(content, indent=2) + "\n")
        for file in filter(None, (options.json, options.csv, options.save_npz)):
            print(f"Written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
