"""Sample images from a trained diffusion transformer.

    python src/sample.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --num_images 50000 --output samples.npz
    python src/sample.py --checkpoint stage2_model.pt --model ditdh_xl --autoencoder exports/mine --output samples.npz
    torchrun --nproc_per_node=8 src/sample.py --checkpoint CKPT --guide WEAK --auto 1.42 --output guided.npz

Image i depends only on --seed and i. Processes share the indices in blocks of --batch_size, so any number of processes writes
the same file, and the same command resumes after an interruption. The npz holds `arr_0` (uint8 N x H x W x 3) for ADM's
suite, `labels`, and the `settings` used. Several values of --cfg or --interval write one file each, and a table.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import run
from src.core.terminal import progress
from src.evaluation.options import SampleOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 samples written, 1 user error."""
    return run(SampleOptions, __doc__, _run, argv)


def _run(options: SampleOptions) -> int:
    from src.core.distributed import processes
    from src.core.errors import worded
    from src.evaluation.samples import check_files, describe, sample
    from src.formats.stage2 import open_generator

    points = _points(options)
    with processes(options.device) as process:
        if process.main:
            check_files(points)
        generator = open_generator(options.checkpoint, options.model, options.autoencoder)
        guide = None
        if options.guide is not None:
            with worded({"--model": "--guide_model"}):
                guide = open_generator(options.guide, options.guide_model, loaded=generator.autoencoder, key="--guide")
        rows: list[tuple[Any, ...]] = []
        for point in points:
            began = time.perf_counter()
            with progress("images", process.main) as update:
                settings = sample(generator, guide, point, process, update)
            rows.append(
                (settings.cfg, f"{settings.t_min:g}:{settings.t_max:g}", point.output, time.perf_counter() - began)
            )
    if process.main:
        print(describe(generator, options))
        for scale, times, output, seconds in rows:
            print(f"{output}: {options.num_images:,} images, cfg {scale:g} for t in {times}, {seconds:.0f} s")
    return 0


def _points(options: SampleOptions) -> list[SampleOptions]:
    """Return the options of each point of a sweep, with separate output files; the unchanged options if there is only one."""
    from src.evaluation.samples import interval_of

    sweep = list(itertools.product(options.cfg or (None,), options.interval or (None,)))
    if len(sweep) == 1:
        return [options]
    points = []
    for cfg, interval in sweep:
        mark = "" if cfg is None else f"_cfg{cfg:g}"
        mark += "" if interval is None else "_{:g}to{:g}".format(*interval_of(interval))
        values: dict[str, Any] = {name: path.with_stem(path.stem + mark) for name, path in options.files().items()}
        values |= {name: () if value is None else (value,) for name, value in (("cfg", cfg), ("interval", interval))}
        points.append(replace(options, **values))
    return points


if __name__ == "__main__":
    sys.exit(main())
