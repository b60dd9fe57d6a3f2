"""Score reconstructions of trained models, released decoders or exported folders: rFID, PSNR, SSIM and LPIPS.

python src/eval_rfid.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --data_dir /path/to/imagenet_hf
python src/eval_rfid.py --decoder exports/a exports/b --data_dir DATA --noise_sigma 0 0.4 0.8 --report_card card
torchrun --nproc_per_node=8 src/eval_rfid.py ...                     several processes, same results
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import EXIT_CODES, run
from src.evaluation.options import EvaluationOptions

EPILOG = rf"""
To reproduce the published scores of the released DINOv2-B decoder (rFID 0.57, PSNR 18.9 dB on 50,000 images of ImageNet val):

    python scripts/download_weights.py inception vgg16 lpips decoder-dinov2 stats-dinov2 \
        facebook/dinov2-with-registers-base
    python src/eval_rfid.py \
        --decoder weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt --decoder_config configs/decoder/ViTXL \
        --encoder_cls Dinov2withNorm --encoder facebook/dinov2-with-registers-base \
        --stats weights/stats/dinov2/wReg_base/imagenet1k/stat.pt \
        --data_dir /path/to/imagenet_hf --split validation --num_samples 50000 --image_size 256 \
        --exif ignore --quantization truncate

With our defaults (EXIF rotation applied, 8-bit values rounded) the scores differ slightly; only compare like with like.
A checkpoint is scored as during training: --exif and --quantization default to its configuration.
Any number of processes and any batch size give the same scores, up to float32 rounding of the features.

{EXIT_CODES}"""

RFID = {"rfid": "rFID", "rfid_untrained": "rFID (untrained Inception)"}


def main(argv: Sequence[str] | None = None) -> int:
    return run(EvaluationOptions, __doc__, _run, argv, EPILOG)


def _run(options: EvaluationOptions) -> int:
    from src.core.distributed import processes
    from src.core.files import write_text
    from src.core.weights import resolve
    from src.evaluation.report_card import NUMBERS, TABLE, markdown
    from src.evaluation.rfid import evaluate

    with processes(options.device) as process:
        results, protocol = evaluate(options, process)
    if results:
        print(text(results))
        if options.output_dir:
            print(f"Sample images saved to: {options.output_dir}")
        content = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **protocol, "results": results}
        card = [Path(options.report_card) / name for name in (TABLE, NUMBERS)] if options.report_card else []
        if card:
            write_text(resolve(card[0]), markdown(results))
        for file in filter(None, (options.json, *card[1:])):
            write_text(resolve(file), json.dumps(content, indent=2) + "\n")
        for file in filter(None, (options.json, options.csv, options.save_npz, *card)):
            print(f"Written: {file}")
    return 0


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a paragraph per data set: the scores of the first result, and a table if there are several results."""
    from src.evaluation.report_card import aligned, label, score_rows

    paragraphs = []
    for data_dir in dict.fromkeys(result["data_dir"] for result in results):
        own = [result for result in results if result["data_dir"] == data_dir]
        first = own[0]
        lines = [f"Images: {first['images']:,} of {first['available']:,}, {first['split']} of {data_dir}"]
        lines += [f"Model: {first['model']}"] if len({result.get("model") for result in own}) > 1 else []
        lines += [f"{name} Score: {first[key]:.4f}" for key, name in RFID.items() if key in first]
        others = [key for key in first if key not in RFID and label(key)]
        lines.append(", ".join(f"{label(key)}: {first[key]:.4f}" for key in others))
        lines += aligned(score_rows(own, ("model", "layers")), "  ") if len(own) > 1 else []
        paragraphs.append("\n".join(lines) + "\n")
    return "\n".join(paragraphs)


if __name__ == "__main__":
    raise SystemExit(main())
