"""Sample images from a trained diffusion transformer, for looking and for scoring.

    python src/sample.py --checkpoint logs/runs/DATE/TIME/checkpoints/best.ckpt --num_images 50000 --output samples.npz
    python src/sample.py --checkpoint stage2_model.pt --model ditdh_xl --autoencoder exports/mine --output samples.npz
    torchrun --nproc_per_node=8 src/sample.py --checkpoint CKPT --guide WEAK --auto 1.42 --output guided.npz

Image i depends on --seed and i alone. The indices are dealt to the processes in blocks of --batch_size, so any number of
processes gives the same file, and the same command after an interruption goes on where it stopped. The npz has `arr_0`
(uint8 N x H x W x 3) for ADM's suite and `labels`. Several values of --cfg or --interval make a file each and a table.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.errors import UserError
from src.core.files import check_writable
from src.core.options import run
from src.core.terminal import progress
from src.evaluation.options import SampleOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 where the samples are written, 1 where something is wrong with what was given."""
    return run(SampleOptions, __doc__, _run, argv)


def _run(options: SampleOptions) -> int:
    from src.core.distributed import processes
    from src.evaluation.samples import describe, sample
    from src.formats.stage2 import open_generator

    sweep = list(itertools.product(options.cfg or (None,), options.interval or (None,)))
    outputs = [_output(options.output, *point) if len(sweep) > 1 else options.output for point in sweep]
    for output in outputs:
        if output.exists() and not options.overwrite:
            raise UserError(f"--output {output} exists. Add --overwrite, or choose another name.")
    with processes(options.device) as process:
        if process.main:
            check_writable(options.output, "--output")
        generator = open_generator(options.checkpoint, options.model, options.autoencoder)
        guide = None
        if options.guide is not None:
            shape = generator.network.latent_shape
            guide = open_generator(options.guide, options.guide_model, shape=shape, key="--guide")
        rows: list[tuple[Any, ...]] = []
        for (cfg, interval), output in zip(sweep, outputs, strict=True):
            alone = {"cfg": cfg, "interval": interval}
            point = replace(options, **{name: () if value is None else (value,) for name, value in alone.items()})
            began = time.perf_counter()
            with progress("images", process.main) as update:
                settings = sample(generator, guide, point, output, process, update)
            rows.append((settings.cfg, f"{settings.t_min:g}:{settings.t_max:g}", output, time.perf_counter() - began))
    if process.main:
        print(describe(generator, options))
        for scale, times, output, seconds in rows:
            print(f"{output}: {options.num_images:,} images, cfg {scale:g} for t in {times}, {seconds:.0f} s")
    return 0


def _output(output: Path, cfg: float | None, interval: str | None) -> Path:
    parts = [output.stem, "" if cfg is None else f"cfg{cfg:g}", (interval or "").replace(":", "to")]
    return output.with_stem("_".join(filter(None, parts)))


if __name__ == "__main__":
    sys.exit(main())
