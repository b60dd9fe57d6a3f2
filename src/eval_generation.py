"""Score generated images: gFID, sFID, Inception Score, precision and recall, as in ADM's evaluation suite, without TensorFlow.

python src/eval_generation.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
python src/eval_generation.py --samples FOLDER --reference /path/to/imagenet_hf --reference_split validation
python src/eval_generation.py --latents latents.npz --decoder exports/a exports/b best.ckpt --reference reference.npz
torchrun --nproc_per_node=8 src/eval_generation.py ...                several processes, same results
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import EXIT_CODES, run
from src.evaluation.options import GenerationOptions

EPILOG = rf"""
Published gFID uses the training set as reference: ADM's npz holds its moments, and 10,000 images for precision and recall.
Reconstructions are scored against the validation set (eval_rfid.py), so the two numbers are not comparable. Published
scores use 50,000 images, the same number per class. A folder is read in file-name order, which affects the Inception Score.

To find out whether a worse gFID comes from the decoder, score several decoders on the same latents:

    python src/eval_generation.py --latents latents.npz --decoder exports/a exports/b --reference reference.npz

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    return run(GenerationOptions, __doc__, _run, argv, EPILOG)


def _run(options: GenerationOptions) -> int:
    from src.core.distributed import processes
    from src.core.files import check_writable, write_text
    from src.core.weights import resolve
    from src.evaluation.generation import evaluate

    with processes(options.device) as process:
        if options.json and process.main:
            check_writable(resolve(options.json), "--json")
        results, facts = evaluate(options, process)
    if results:
        print(table(results))
        if any(name.endswith("_untrained") for name in results[0]):
            print("UNTRAINED Inception: random features, not a result.")
        if options.json:
            content = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **facts, "results": results}
            write_text(resolve(options.json), json.dumps(content, indent=2) + "\n")
            print(f"Written: {options.json}")
    return 0


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a text table with one line per set of images; scores that were not computed have no column."""
    from src.evaluation.report_card import aligned, label

    keys = [key for key in results[0] if label(key)]
    rows = [[*(str(label(key)) for key in keys), "images", "of"]]
    rows += [[*(f"{r[key]:.4f}" for key in keys), f"{r['images']:,}", r["images_of"]] for r in results]
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    raise SystemExit(main())
