"""Write a reference file for scoring: Inception statistics (`mu`, `sigma`) of a data set, or its images (`arr_0`).

    python src/make_reference.py --data_dir /path/to/imagenet_hf --split validation --output val256.npz
    python src/make_reference.py --data_dir /path/to/imagenet_hf --kind images --output val256_images.npz
    python src/make_reference.py --checkpoint best.ckpt --data_dir /path/to/photos --output held_out256.npz

Images are the same centre crops that reconstructions are compared with. `eval_rfid.py --reference` reads both files;
statistics also work with pytorch-fid and similar tools, images with the ADM evaluation suite. To pack reconstructions for
that suite use `eval_rfid.py --save_npz FILE`; a folder of generated images is a data set like any other. Both files record
how their images were prepared, which `eval_rfid.py` checks against its own settings.
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
