"""Make a file to score against: Inception statistics (`mu`, `sigma`) or the images themselves (`arr_0`) of a data set.

    python src/make_reference.py --data_dir /path/to/imagenet_hf --split validation --output val256.npz
    python src/make_reference.py --data_dir /path/to/imagenet_hf --kind images --output val256_images.npz
    python src/make_reference.py --checkpoint best.ckpt --data_dir /path/to/photos --output held_out256.npz

Images are the centre crops that reconstructions are compared with. Both files go into `eval_rfid.py --reference`, and
into other tools: the first is what pytorch-fid and the like read, the second what the ADM evaluation suite reads. To
pack reconstructions for that suite use `eval_rfid.py --save_npz FILE`; a folder of generated images is a data set like
any other. Both files say how their images were prepared, and `eval_rfid.py` compares that with its own.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import run
from src.evaluation.options import ReferenceOptions


def main(argv: Sequence[str] | None = None) -> int:
    return run(ReferenceOptions, __doc__, _run, argv)


def _run(options: ReferenceOptions) -> int:
    from src.core.distributed import processes
    from src.evaluation.reference_file import write_reference

    with processes(options.device) as process:
        count, description = write_reference(options, process)
    if process.main:
        print(f"{options.output}: {description} of {count:,} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
