"""Write an HTML report of training runs: curves, sample images, scores, warnings, configuration and environment.

    python src/report.py logs/runs/DATE/TIME                              RUN_DIR/report.html
    python src/report.py logs/runs/DATE/TIME --out report.html
    python src/report.py logs/runs/DATE/TIME1 logs/runs/DATE/TIME2        curves overlaid: RUN_DIR1/comparison.html
    python src/report.py logs/multiruns/DATE/TIME                         all runs of a sweep, in the same way

The page is self-contained (about 5 MB plus the images) and works offline; it follows the system's light or dark mode and can
be printed. Only files of the run are read: metrics.csv, run.json, .hydra/, run.log, samples/ and the sample sheets of rFID
evaluations. Curves of a resumed run continue those of the previous run, if that still exists. Without metrics.csv,
TensorBoard events are read, which is slow. Unfinished and failed runs work too; the page lists what is missing or damaged.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

from src.core.options import option, run

EPILOG = """exit codes: 0 page written; 1 not a run folder, or the page can't be written; 2 wrong options"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command-line options of the report."""

    run_dirs: tuple[str, ...] = option("run folder, such as logs/runs/DATE/TIME", "RUN_DIR", (), positional=True)
    out: str | None = option(
        "output file (default: report.html in the run folder; for several runs comparison.html in the first one)",
        "FILE",
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
            f"{target} can't be written: {error.strerror or error}. Give another path with --out FILE."
        ) from error
    print(f"{target}  {len(content) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
