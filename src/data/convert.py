"""A tree of image files -> a Hugging Face dataset on disk, in parallel, restartable, complete or not there.

Work goes on in `OUTPUT.partial`. One shard is one unit of work: its Arrow file appears whole under its name, then a
journal entry beside it says that it is done. A later run with the same settings and files takes finished shards as they
are. The dataset gets its name by one rename at the very end. Nothing is replaced but an empty folder and, where told so,
a dataset: never the images, and never what somebody else put in the way.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.files import check_folder
from src.data.arrow_writer import shard_name, write_json, write_metadata
from src.data.convert_shard import Job, Settings, convert_shard, printable
from src.data.image_tree import Tree
from src.data.sources import MARKS

log = logging.getLogger(__name__)

JOURNAL = ".conversion"
REPORT = "conversion_report.json"
SHARD_IMAGES = (64, 2500)  # at least and at most; about 280 MB of ImageNet


@dataclass(frozen=True)
class Report:
    """What became of the files; also written as conversion_report.json."""

    images: dict[str, int]
    """By split; the one split of a tree without splits is called `train`."""
    classes: int
    bad: list[dict[str, str]]
    """`file` and `reason` of everything left out."""
    shards_reused: int
    seconds: float


def convert(
    tree: Tree,
    output: Path,
    settings: Settings,
    num_workers: int,
    overwrite: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Convert and put the dataset at `output`. `progress(done, total)` is called with numbers of files.

    Raises:
        UserError: `output` is there (without overwrite), is no dataset or shares a folder with the images, a
            half-finished conversion had other settings, the disk is full or can't be written, or no file is an image.
    """
    started = time.monotonic()
    output = output.resolve()  # of a link: the folder behind it, which is what would be replaced
    partial = output.with_name(output.name + ".partial")
    try:
        _check_apart(tree, output, partial)
        check_output(output, overwrite)
        _prepare(partial, tree, settings, overwrite)
        jobs = _jobs(partial, tree, settings)
        open_jobs = [job for job in jobs if not Path(job.journal).is_file()]
        done, total = sum(len(j.files) for j in jobs) - sum(len(j.files) for j in open_jobs), tree.count
        progress(done, total)
        for finished in _run(open_jobs, num_workers):
            done += finished
            progress(done, total)
        report = _finish(partial, tree, jobs, len(jobs) - len(open_jobs), started)
        check_output(output, overwrite)  # again: hours may have passed
        _put_in_place(partial, output)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "The disk is full" if full else f"Can't write {error.filename or ''} ({error.strerror or error})"
        raise UserError(
            f"{why}: {partial}. Finished parts are kept; {'make room' if full else 'mend that'} and run the same "
            f"command again, it goes on where it stopped. To give up: rm -r '{partial}'"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, perhaps for lack of memory. Finished parts are kept; run the same command "
            "again with a smaller --num_workers."
        ) from error
    return report


def check_output(output: Path, overwrite: bool) -> None:
    """Check that `output` is free, or a dataset that is to be replaced. Raises UserError."""
    check_folder(output, overwrite, (REPORT, *MARKS), "dataset", "--output_dir")


def _check_apart(tree: Tree, output: Path, partial: Path) -> None:
    """The images are neither replaced nor mixed with what is written, those behind linked folders included."""
    root = tree.root.resolve()
    folders = {os.path.dirname(file.path) for files in tree.splits.values() for file in files}
    for images in [root, *((root / folder).resolve() for folder in sorted(folders))]:
        for place in (output, partial):
            if place.is_relative_to(images) or images.is_relative_to(place):
                how = "is" if place == images else "lies in" if place.is_relative_to(images) else "holds"
                raise UserError(
                    f"--output_dir {output}: {place} {how} the folder of images {images} (--input_dir {tree.root}), "
                    f"which must stay as it is. Choose a folder apart from it, such as {root}_hf."
                )


def _prepare(partial: Path, tree: Tree, settings: Settings, overwrite: bool) -> None:
    """Start or go on in `partial`."""
    wanted = asdict(settings) | {"input_dir": str(tree.root), "files": tree.count, "digest": _digest(tree)}
    noted = partial / JOURNAL / "settings.json"
    if partial.exists():
        found = json.loads(noted.read_text()) if noted.is_file() else None
        if found == wanted:
            return
        if found is None and not _is_barely_begun(partial):
            raise UserError(
                f"{partial} is in the way: a conversion works there, but this holds no {JOURNAL}/{noted.name}, so no "
                "conversion made it and none deletes it. Move it away, or choose another --output_dir."
            )
        if found is not None and not overwrite:
            other = ", ".join(f"{k}: then {found.get(k)}, now {wanted[k]}" for k in wanted if found.get(k) != wanted[k])
            raise UserError(
                f"{partial} holds a half-finished conversion with other settings ({other}). Repeat the command with "
                "those to go on, or add --overwrite to begin anew."
            )
        shutil.rmtree(partial)
    noted.parent.mkdir(parents=True)
    write_json(noted, wanted)


def _is_barely_begun(partial: Path) -> bool:
    """Killed before its settings were written: nothing but the journal's folder in it."""
    journal = partial / JOURNAL
    return partial.is_dir() and all(
        path == journal or (path.parent == journal and path.name.startswith(".settings.json."))
        for path in partial.rglob("*")
    )


def _digest(tree: Tree) -> str:
    digest = hashlib.sha256(json.dumps(tree.class_names).encode())
    for split, files in tree.splits.items():
        for file in files:
            digest.update(os.fsencode(f"{split}\0{file.path}\0{file.label}\n"))
    return digest.hexdigest()[:16]


def _jobs(partial: Path, tree: Tree, settings: Settings) -> list[Job]:
    jobs = []
    for split, files in tree.splits.items():
        folder = partial / split if tree.has_splits else partial
        folder.mkdir(exist_ok=True)
        size = min(SHARD_IMAGES[1], max(SHARD_IMAGES[0], -(-len(files) // 16)))
        count = -(-len(files) // size)
        own = settings if split == "train" else Settings(None, settings.max_megapixels)
        for i in range(count):
            name = shard_name(i, count)
            journal = partial / JOURNAL / f"{split}-{name}.json"
            part = files[i * size : (i + 1) * size]
            jobs.append(Job(str(tree.root), part, str(folder / name), str(journal), tree.class_names, own))
    return jobs


def _run(jobs: list[Job], num_workers: int) -> Iterator[int]:
    """Work off the jobs in any order; gives the number of files of each that is done."""
    if num_workers <= 1 or len(jobs) <= 1:
        yield from map(convert_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(num_workers, len(jobs))
    with ProcessPoolExecutor(workers, context, _quit_with_parent, (os.getpid(),)) as pool:
        waiting = iter(jobs)
        running = {pool.submit(convert_shard, job) for job in islice(waiting, 2 * workers)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                    running |= {pool.submit(convert_shard, job) for job in islice(waiting, 1)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _quit_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(partial: Path, tree: Tree, jobs: list[Job], reused: int, started: float) -> Report:
    """Metadata and report: a complete dataset but for its name."""
    bad = [{"file": printable(path), "reason": reason} for path, reason in tree.outside]
    images: dict[str, int] = {}
    for split in tree.splits:
        mine = [job for job in jobs if Path(job.journal).name.startswith(f"{split}-data-")]
        journals: list[dict[str, Any]] = [json.loads(Path(job.journal).read_text()) for job in mine]
        images[split] = sum(j["rows"] for j in journals)
        bad += [entry for j in journals for entry in j["bad"]]
    if not images.get("train", sum(images.values())):
        first = "; ".join(f"{b['file']}: {b['reason']}" for b in bad[:3])
        shutil.rmtree(partial)
        raise UserError(f"None of the {tree.count} files in {tree.root} is a readable image ({first} …).")
    for left in partial.rglob(".*.writing"):  # of processes that were killed
        left.unlink()
    report = Report(images, len(tree.class_names), bad, reused, round(time.monotonic() - started, 1))
    for split in tree.splits:
        folder = partial / split if tree.has_splits else partial
        names = [Path(job.target).name for job in jobs if Path(job.target).parent == folder]
        write_metadata(folder, names, tree.class_names or None, split)
    if tree.has_splits:
        write_json(partial / "dataset_dict.json", {"splits": list(tree.splits)})
    write_json(partial / REPORT, {"input_dir": str(tree.root)} | asdict(report))
    return report


def _put_in_place(partial: Path, output: Path) -> None:
    """What is at `output` goes once the new one has its name, and comes back where that fails."""
    if not output.exists():
        os.replace(partial, output)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f"{output.name}.old-", dir=output.parent))  # a name that nobody uses
        old = aside / output.name
        try:
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
