"""Convert image files, tars or Parquet to a Hugging Face dataset on disk: parallel, resumable, atomic.

Shards are written to `OUTPUT.partial`, one per job: first the Arrow file, atomically, then a journal entry that marks it
done. A later run with the same settings and files reuses finished shards. A rename at the very end puts the dataset at its
path. Only an empty folder and, with `overwrite`, an existing dataset are replaced: never the images, and never a folder that
something else created.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from src.core.errors import UserError
from src.core.files import check_folder
from src.core.json_files import read_json
from src.core.stopping import KILL, end_with_parent
from src.data.arrow_writer import shard_name, write_json, write_metadata
from src.data.convert_scan import Rows, Tree
from src.data.convert_shard import Job, Settings, convert_shard
from src.data.places import MARKS
from src.data.sources import printable

JOURNAL = ".conversion"
REPORT = "conversion_report.json"
SHARD_IMAGES = (64, 2500)  # per shard, minimum and maximum; at most about 280 MB of ImageNet


@dataclass(frozen=True)
class Report:
    """Result of a conversion; also written as conversion_report.json."""

    images: dict[str, int]
    """Images written per split; data without splits counts as `train`."""
    classes: int
    bad: list[dict[str, str]]
    """`file` and `reason` of everything skipped."""
    shards_reused: int
    seconds: float


def convert(
    tree: Tree,
    output: Path,
    settings: Settings,
    num_workers: int,
    overwrite: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Convert `tree` to a dataset at `output`. `progress` receives the number of files done.

    Raises:
        UserError: `output` exists (without overwrite), is not a dataset or overlaps the image folders, a half-finished
            conversion had other settings, the disk is full or can't be written, or no file is an image.
    """
    started = time.monotonic()
    output = output.resolve()  # a link's target, which is what would be replaced
    partial = output.with_name(output.name + ".partial")
    try:
        _check_no_overlap(tree, output, partial)
        check_output(output, overwrite)
        _prepare(partial, tree, settings, overwrite)
        jobs = _jobs(partial, tree, settings)
        open_jobs = [job for job in jobs if not job.journal.is_file()]
        done = tree.count - sum(len(job.part) for job in open_jobs)
        progress(done)
        for finished in _run(open_jobs, num_workers):
            done += finished
            progress(done)
        report = _finish(partial, tree, jobs, len(jobs) - len(open_jobs), started)
        check_output(output, overwrite)  # again: hours may have passed
        _put_in_place(partial, output)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "The disk is full" if full else f"Can't write {error.filename or ''} ({error.strerror or error})"
        raise UserError(
            f"{why}: {partial}. Finished parts are kept; {'make room' if full else 'fix that'} and run the same "
            f"command again to resume. To give up: rm -r '{partial}'"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, perhaps for lack of memory. Finished parts are kept; run the same command "
            "again with a smaller --num_workers."
        ) from error
    return report


def check_output(output: Path, overwrite: bool) -> None:
    """Check that `output` is free, or a dataset that may be replaced. Raises UserError."""
    check_folder(output, overwrite, (REPORT, *MARKS), "a dataset", "--output_dir")


def _check_no_overlap(tree: Tree, output: Path, partial: Path) -> None:
    """Check that the output neither replaces nor mixes with an image folder, linked ones included."""
    root = tree.root.resolve()
    places = {place for rows in tree.splits.values() for place in rows.places()}
    for images in [root, *((root / place).resolve() for place in sorted(places))]:
        for place in (output, partial):
            if place.is_relative_to(images) or images.is_relative_to(place):
                how = "is" if place == images else "lies in" if place.is_relative_to(images) else "holds"
                raise UserError(
                    f"--output_dir {output}: {place} {how} the folder of images {images} (--input_dir {tree.root}), "
                    f"which must not change. Choose a separate folder, such as {root}_hf."
                )


def _prepare(partial: Path, tree: Tree, settings: Settings, overwrite: bool) -> None:
    """Create `partial`, or check that an existing one was started with the same settings and files."""
    digest = hashlib.sha256(json.dumps(tree.class_names).encode())
    for split, rows in tree.splits.items():
        for line in rows.identity():
            digest.update(os.fsencode(f"{split}\0{line}\n"))
    wanted = asdict(settings) | {"input_dir": str(tree.root), "files": tree.count, "digest": digest.hexdigest()[:16]}
    noted = partial / JOURNAL / "settings.json"
    if partial.exists():
        try:
            found = read_json(noted) if noted.is_file() else None
        except UserError:
            found = {}  # damaged: treat as other settings
        if found == wanted:
            return
        if found is None and any(path.name != JOURNAL for path in partial.iterdir()):
            raise UserError(
                f"{partial} is in the way: the conversion needs this folder, but did not create it (there is no "
                f"{JOURNAL}/{noted.name}), so it is not deleted. Move it away, or choose another --output_dir."
            )
        if found is not None and not overwrite:
            other = ", ".join(f"{k}: then {found.get(k)}, now {wanted[k]}" for k in wanted if found.get(k) != wanted[k])
            raise UserError(
                f"{partial} holds a half-finished conversion with other settings ({other}). Repeat the command with "
                "those to resume, or add --overwrite to start over."
            )
        shutil.rmtree(partial)
    write_json(noted, wanted)


def _jobs(partial: Path, tree: Tree, settings: Settings) -> list[Job]:
    jobs = []
    for split, rows in tree.splits.items():
        folder = tree.folder(partial, split)
        folder.mkdir(exist_ok=True)
        parts: Sequence[Rows] = rows.parts(min(SHARD_IMAGES[1], max(SHARD_IMAGES[0], -(-len(rows) // 16))))
        own = settings if split == "train" else replace(settings, resize_shorter_px=None)
        for i, part in enumerate(parts):
            name = shard_name(i, len(parts))
            journal = partial / JOURNAL / f"{split}-{name}.json"
            jobs.append(Job(part, folder / name, journal, own, tree.class_names))
    return jobs


def _run(jobs: list[Job], num_workers: int) -> Iterator[int]:
    """Run the jobs in any order; yield the number of files of each finished job."""
    if num_workers <= 1 or len(jobs) <= 1:
        yield from map(convert_shard, jobs)
        return
    workers, context = min(num_workers, len(jobs)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, end_with_parent, (KILL,)) as pool:  # orphans would wait forever
        try:
            for job in as_completed([pool.submit(convert_shard, job) for job in jobs]):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finish(partial: Path, tree: Tree, jobs: list[Job], reused: int, started: float) -> Report:
    """Write the metadata and the report, which completes the dataset except for its final path."""
    bad = [{"file": printable(path), "reason": reason} for path, reason in tree.outside]
    images: dict[str, int] = {}
    for split in tree.splits:
        folder, images[split] = tree.folder(partial, split), 0
        mine = [job for job in jobs if job.target.parent == folder]
        for job in mine:
            journal = read_json(job.journal, "Repeat with --overwrite.", rows=int, bad=list[dict[str, str]])
            images[split] += journal["rows"]
            bad += journal["bad"]
        write_metadata(folder, [job.target.name for job in mine], tree.class_names, split)
    if not images.get("train", sum(images.values())):
        first = "; ".join(f"{b['file']}: {b['reason']}" for b in bad[:3])
        shutil.rmtree(partial)
        raise UserError(f"None of the {tree.count} files in {tree.root} is a readable image ({first} …).")
    for left in partial.rglob(".*.writing"):  # left by killed processes
        left.unlink()
    report = Report(images, len(tree.class_names or ()), bad, reused, round(time.monotonic() - started, 1))
    if tree.has_splits:
        write_json(partial / "dataset_dict.json", {"splits": list(tree.splits)})
    write_json(partial / REPORT, {"input_dir": str(tree.root)} | asdict(report))
    return report


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`; an existing dataset is deleted last, and restored if the rename fails."""
    aside = Path(tempfile.mkdtemp(prefix=f"{output.name}.old-", dir=output.parent))  # a unique name
    old = aside / output.name
    try:
        if output.exists():
            os.rename(output, old)
        os.replace(partial, output)
    except BaseException:
        if old.exists() and not output.exists():
            os.rename(old, output)
        with suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(output / JOURNAL, ignore_errors=True)
