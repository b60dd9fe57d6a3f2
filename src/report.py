"""One HTML page of a training run: curves, pictures, scores, warnings, configuration and environment.

    python src/report.py logs/runs/DATE/TIME                              RUN_DIR/report.html
    python src/report.py logs/runs/DATE/TIME --out report.html
    python src/report.py logs/runs/DATE/TIME1 logs/runs/DATE/TIME2        overlaid, side by side: RUN_DIR1/comparison.html
    python src/report.py logs/multiruns/DATE/TIME                         all points of a sweep, in the same way

The page holds all it shows (about 5 MB, and the pictures) and opens without a network; it follows the light or dark
mode of the system and prints. Nothing but the files of the run is read: metrics.csv, run.json, .hydra/, run.log, samples/
and the sheets of rFID evaluations. The curves of a run that was resumed continue those of the run before, where that one
is still there. Runs that have no metrics.csv are read through TensorBoard's events, which is slow. A run that is still
going, or that broke, makes a page too; what is missing or damaged is told there.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import option, run

EPILOG = """exit codes: 0 the page is written; 1 a folder is no run's, or the page can't be written; 2 wrong options"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which runs, and where the page goes."""

    run_dirs: tuple[str, ...] = option("folder of a run, logs/runs/DATE/TIME", "RUN_DIR", (), positional=True)
    out: str | None = option(
        "the page (default: report.html in the first run's folder, comparison.html for several)", "FILE"
    )


def main(argv: Sequence[str] | None = None) -> int:
    return run(Options, __doc__, _run, argv, EPILOG)


def _run(options: Options) -> int:
    from src.core.errors import UserError
    from src.core.files import replacing
    from src.core.weights import resolve
    from src.reporting.page import page
    from src.reporting.reading import read_runs

    runs = read_runs(options.run_dirs)
    name = "report.html" if len(runs) == 1 else "comparison.html"
    target = resolve(options.out) if options.out else runs[0].folder / name
    if target.is_dir():
        raise UserError(f"--out {target} is a folder: name a file in it, such as {target / 'report.html'}.")
    content = page(runs).encode("utf-8", errors="replace")
    try:
        with replacing(target) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{target} can't be written: {error.strerror or error}. Name another place with --out FILE."
        ) from error
    print(f"{target}  {len(content) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
