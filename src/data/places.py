"""Detect the format of a `data_dir` by its content. The only file that knows every format."""

import difflib
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from src.core.errors import UserError
from src.core.files import resolve
from src.core.json_files import read_json
from src.data import lists, parquet
from src.data.arrow import ArrowSource
from src.data.file_names import (
    TRAIN_SPLITS,
    expand,
    find_split,
    folder_splits,
    group_by_split,
    is_pattern,
)
from src.data.remote import RemoteTarSource, Storage, is_remote
from src.data.sources import (
    DEFAULT_OPTIONS,
    ReadOptions,
    Source,
    folders,
    is_hidden,
    is_image,
    loose_files,
    open_image_tree,
    walk,
)
from src.data.tars import TarSource

log = logging.getLogger(__name__)

Kind = Literal["dataset", "cache", "arrow", "tars", "remote", "tree", "list", "parquet", "latents"]
KINDS: dict[Kind, str] = {
    "dataset": "Hugging Face dataset",
    "cache": "cache of load_dataset",
    "arrow": "Arrow file",
    "tars": "tar files",
    "remote": "tar files in object storage",
    "tree": "image files",
    "list": "list of image files",
    "latents": "stored latents",
    "parquet": "Parquet files",
}
MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
"""Every Hugging Face dataset on disk contains one of these files."""
CONVERT = "python scripts/create_hf_test_data.py --input_dir"
NESTED_DEPTH, NESTED_FOLDERS = 5, 20_000
"""Limits of the search for splits below the folder of an image tree."""
LOOK_AT = 200
"""Entries of a folder, or files below it, that are checked for images."""


@dataclass(frozen=True)
class Place:
    """Data of one format. splits: what to open for each split, by its stored name; of an image tree its folders, which may be
    classes; empty: no splits."""

    kind: Kind
    root: Path
    """For object storage, used only in messages."""
    splits: dict[str, Any] = field(default_factory=dict)
    options: ReadOptions = DEFAULT_OPTIONS
    storage: Storage | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the splits; of an image tree, they may be class names."""
        return [] if self.kind in ("arrow", "list", "latents") else list(self.splits)

    def find(self, split: str) -> str | None:
        """Return the stored name of `split` or of an alias of it; None if there is none."""
        return find_split(split, self.names)

    def held_out_split(self, train: str, *wanted: str | None) -> str | None:
        """Return the first of `wanted` that exists and is not the training split.

        An image tree must have a training split or consist only of splits: otherwise `val` may be an ordinary class.
        """
        own = self.find(train) or self.find("train")
        if own is None and self.kind == "tree" and len(folder_splits(self.names)) < len(self.names):
            return None
        return next((name for name in wanted if name and self.find(name) not in (None, own)), None)

    def open_all(self, train: str = "train") -> Source:
        """Open the training split; if there is none, the first split, or all classes of an image tree. Raises UserError."""
        known = next((name for name in (train, "train") if self.find(name)), None)
        return self.open(known or (self.names[0] if self.kind != "tree" and self.names else train))

    def open(self, split: str) -> Source:
        """Open a split. Data without splits is opened whole; so is an image tree of classes and, say, `val`, but only for training.

        Raises:
            UserError: no such split, or data that is damaged or holds no images.
        """
        found = self.find(split)
        others = self.names if self.kind != "tree" else list(folder_splits(self.names))
        only_splits = len(others) == len(self.names)
        if found is None and others and (only_splits or split not in TRAIN_SPLITS):
            raise UserError(
                f"{self.root} has no split {split!r} (data.hf_split); it has {', '.join(others)}. "
                f"Set data.hf_split={others[0]}."
            )
        return self.open_named(found)

    def open_named(self, split: str | None) -> Source:
        """Open a split by its stored name; None: everything. Raises UserError."""
        kind, root, options = self.kind, self.root, self.options
        if kind == "dataset":
            return ArrowSource(root if split is None else root / split, options)
        if kind == "latents":
            from src.data.latents import LatentStore  # imports torch, which conversion doesn't need

            return LatentStore(root)
        if kind == "list":
            return lists.open_list(root, options.image, options.label)
        for key, value in (("image_column", options.image), ("label", options.label)):
            if value is not None and kind not in ("cache", "arrow") and (kind == "tree" or key == "image_column"):
                raise UserError(
                    f"data.{key}={value}: {root} holds {KINDS[kind]}, which have no columns. Set data.{key}=null"
                    + ("; their labels are their folders." if kind == "tree" else ".")
                )
        if kind == "tree":
            return open_image_tree(root if split is None else root / split)
        files = [name for part in self.splits if split in (part, None) for name in self.splits[part]]
        if kind == "remote":
            assert self.storage is not None
            return RemoteTarSource(self.storage, files, options.label, options.cache_gb)
        return TarSource(root, files, options.label) if kind == "tars" else ArrowSource(root, options, files)


def locate(data_dir: str | Path, download: bool = False) -> Path | str:
    """Resolve a `data_dir` to a path, relative to the project root, or return the URL of object storage unchanged.

    A Hugging Face hub dataset is written `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`, never guessed from `a/b`; it resolves to
    its folder in the cache of huggingface_hub. download: fetch it if missing.

    Raises:
        UserError: not such a name, download failed, or not downloaded.
    """
    text = str(data_dir)
    if not text.startswith("hf:"):
        return text if is_remote(text) else resolve(data_dir)
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
    if match is None:
        raise UserError(f"data.data_dir={text}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(match[1], repo_type="dataset", revision=match[2], local_files_only=not download))
    except Exception as error:  # network and hub errors share no base class
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        revision = f" --revision {match[2]}" if match[2] else ""
        raise UserError(
            f"data.data_dir={text} can't be downloaded ({why}). If it has terms, accept them on the hub. Offline: "
            f"`hf download --repo-type dataset {match[1]}{revision}` on another machine, copy the folder, and set data.data_dir "
            "to it."
        ) from error


def look(path: Path | str, options: ReadOptions = DEFAULT_OPTIONS, latents: bool = False) -> Place:
    """Detect the format of a path, URL or pattern that is to be read without conversion.

    latents: whether stored latents are allowed.

    Raises:
        UserError: nothing found, or a format that can't be read directly; says what to do.
    """
    if is_remote(path):
        storage = Storage(str(path), options.storage)
        return Place("remote", Path(str(path)), group_by_split(list(storage.sizes), storage.url), options, storage)
    found = survey(Path(path))
    if found.kind == "parquet":
        first, is_pattern = found.root / next(iter(found.splits.values()))[0], not Path(path).exists()
        raise UserError(_parquet_message(first, str(found.root if is_pattern else path)))
    if found.kind == "latents" and not latents:
        raise UserError(
            f"{path} holds stored latents, and images are needed here: only stage 2 trains on latents (data.data_dir)."
        )
    return replace(found, options=options)


def survey(path: Path) -> Place:
    """Detect the format of a local path or pattern, including Parquet. Raises UserError."""
    if is_pattern(str(path)):
        return _detect_files(expand(str(path)), str(path))
    if path.is_file():
        return _detect_files([path], str(path))
    if not path.is_dir():
        raise _not_found(path)
    if _holds_latents(path):
        return Place("latents", path)
    return _detect_dataset(path) if is_dataset(path) else _detect_folder(path)


def _holds_latents(folder: Path) -> bool:
    if not (folder / "index.json").is_file():
        return False
    from src.data.latents import FORMAT

    with suppress(UserError):
        return read_json(folder / "index.json").get("format") == FORMAT
    return False


def is_dataset(folder: Path) -> bool:
    """Return whether the folder holds a Hugging Face dataset on disk, complete or not."""
    return any((folder / mark).is_file() for mark in MARKS) or any(folder.glob("*.arrow"))


def holds_rows(folder: Path) -> bool:
    """Return whether the folder holds a dataset, tars or Parquet rather than individual image files."""
    return is_dataset(folder) or ((first := telling_file(folder)) is not None and not is_image(first.name))


def nested_splits(root: Path) -> Path | None:
    """Return the folder below `root` that contains the splits of an image tree; None if there is none.

    Raises:
        UserError: several such folders, or images outside of it: read together, they would mix validation into training.
    """
    found, classes = [], []
    waiting = [(root, 0)]
    for _ in range(NESTED_FOLDERS):
        if not waiting:
            break
        here, depth = waiting.pop()
        if depth and _has_splits(here):
            found.append(here)
        elif _has_images(here):
            classes.append(here)
        elif depth < NESTED_DEPTH:
            waiting += [(here / name, depth + 1) for name in folders(here)]
    if not found or (len(found) == 1 and not classes):
        return found[0] if found else None
    outside = f"; images outside of it lie in {classes[0]}" if len(found) == 1 else ""
    raise UserError(
        f"{root} (data.data_dir) holds folders with splits of their own ({', '.join(map(str, sorted(found)[:4]))}"
        f"{' …' if len(found) > 4 else ''}{outside}). Read as one they would mix validation into training. Set "
        f"data.data_dir={min(found)}."
    )


def _has_splits(folder: Path) -> bool:
    """Return whether the subfolders are splits of images: training and another one, or training alone."""
    names = folders(folder)
    splits = folder_splits(names)
    train = [name for name, split in splits.items() if split == "train"]
    if len(set(splits.values())) == 1 and (len(names) > 1 or _has_images(folder)):
        return False
    return any(is_image(file) for name in train for file in islice(walk(folder / name), LOOK_AT))


def _has_images(folder: Path) -> bool:
    """Return whether images lie directly in the folder, as in a class folder."""
    try:
        with os.scandir(folder) as entries:
            return any(is_image(entry.name) and not is_hidden(entry.name) for entry in islice(entries, LOOK_AT))
    except OSError:
        return False


def _detect_dataset(folder: Path) -> Place:
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json", "", splits=list[str])["splits"]
        odd = [name for name in names if Path(name).name != name]
        if odd:
            raise UserError(
                f"{folder / 'dataset_dict.json'}: `splits` lists {odd[0]!r:.60}; expected names of folders there."
            )
        return Place("dataset", folder, {name: name for name in names})
    if not (folder / "state.json").is_file() and (cached := _cached_splits(folder)):
        return Place("cache", folder, cached)
    return Place("dataset", folder)


def _cached_splits(folder: Path) -> dict[str, list[str]]:
    """Return the files of each split in a `load_dataset` cache: NAME-SPLIT-00000-of-00002.arrow."""
    splits: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for name in sorted(file.name for file in folder.glob("*.arrow") if not file.name.startswith("cache-")):
        match = re.fullmatch(r".+-([A-Za-z_.]+)(?:-\d{5}-of-(\d{5}))?\.arrow", name)
        if match is None:
            return {}
        splits.setdefault(match[1], []).append(name)
        counts.setdefault(match[1], int(match[2] or 0))
    for split, names in splits.items():
        if counts[split] not in (0, len(names)):
            raise UserError(
                f"{folder} holds {len(names)} of the {counts[split]} Arrow files of {split!r}. Copy it again."
            )
    return splits


def _detect_files(files: list[Path], shown: str) -> Place:
    """Detect the format of individually named files."""
    suffix = files[0].suffix.lower()
    if odd := [file for file in files if file.suffix.lower() != suffix]:
        raise UserError(
            f"data.data_dir={shown}: {files[0]} and {odd[0]} are of different formats. Give one pattern that matches one format."
        )
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names = [os.path.relpath(file.absolute(), root) for file in files]
    kinds: dict[str, Kind] = {".tar": "tars", ".arrow": "arrow", ".parquet": "parquet"}
    if suffix in kinds:
        return Place(kinds[suffix], root, group_by_split(names, shown))
    if suffix in lists.SUFFIXES and len(files) == 1:
        return Place("list", files[0])
    if re.search(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$", files[0].name.lower()):
        raise UserError(
            f"{files[0]} (data.data_dir) is a compressed tar, whose members can't be read one by one. Decompress it first."
        )
    raise UserError(
        f"{shown} (data.data_dir) is a file; expected the folder of a dataset or of images, tar or Arrow files, or a list "
        f"of images ({', '.join(lists.SUFFIXES)})."
    )


def _detect_folder(folder: Path) -> Place:
    """Detect the format of a folder without dataset metadata, by the first files found in it."""
    if below := [name for name in folders(folder) if (folder / name / "dataset_info.json").is_file()]:
        raise UserError(
            f"{folder} (data.data_dir) is not a dataset itself, but these folders in it are: {', '.join(below[:8])}. "
            f"Set data.data_dir={folder / below[0]}."
        )
    first = telling_file(folder)
    if first is None:
        raise UserError(f"No images in {folder} (data.data_dir): {_no_images_message(folder)}")
    suffix = first.suffix.lower()
    if suffix in (".parquet", ".tar"):
        names = [name for name in walk(folder) if name.lower().endswith(suffix)]
        return Place("tars" if suffix == ".tar" else "parquet", folder, group_by_split(names, str(folder)))
    root = folder
    if "train" not in folder_splits(folders(folder)).values() and (nested := nested_splits(folder)) is not None:
        log.info("The splits of %s are in %s.", folder, nested)
        root = nested
    names = folders(root)
    splits = folder_splits(names)
    others = [name for name in names if name not in splits] if "train" in splits.values() else []
    if beside := [name for name in others if _has_images(root / name)]:
        log.warning("%s: images beside the splits are left out: %s.", root, ", ".join(beside[:4]))
    return Place("tree", root, {name: name for name in names})


def telling_file(folder: Path) -> Path | None:
    """Return the first image, tar or Parquet file in a folder's splits, else in the folder; it determines the format.

    Tars take precedence over Parquet in the same folder, because img2dataset writes both. Parquet without images is returned
    only if nothing else is found.
    """
    without = None
    for place in (*folder_splits(folders(folder)), ""):
        for name in walk(folder, place):
            lower = name.lower()
            if lower.endswith(".tar") or is_image(name):
                return folder / name
            if lower.endswith(".parquet"):
                if beside := sorted((folder / name).parent.glob("*.tar")):
                    return beside[0]
                if without is None:
                    without = folder / name
                    if parquet.image_column(without) is not None:
                        return without
    return without


def _parquet_message(first: Path, shown: str) -> str:
    """Return what to do with Parquet. Never suggests overwriting it: it may be the only copy."""
    if parquet.image_column(first) is None:
        columns = ", ".join(parquet.read_schema(first).names[:8])
        return (
            f"{shown} (data.data_dir) holds Parquet without images (columns of {first.name}: {columns}): metadata, or image "
            "URLs. img2dataset downloads URLs as tars; set data.data_dir to its output folder."
        )
    beside = re.sub(r"\.parquet$", "", shown.rstrip("/")) + "_hf"
    return (
        f"{shown} (data.data_dir) holds Parquet files, of which single rows can't be read. Convert them to a dataset with "
        f"`{CONVERT} {shown} --output_dir {beside}` and set data.data_dir={beside}."
    )


def _not_found(path: Path) -> UserError:
    if path.exists():
        return UserError(f"{path} (data.data_dir) is neither a file nor a folder.")
    parent = next(p for p in path.parents if p.is_dir())
    there = folders(parent) if os.access(parent, os.R_OK) else []
    close = difflib.get_close_matches(path.relative_to(parent).parts[0], there, n=5, cutoff=0.4) or there[:5]
    return UserError(
        f"No dataset at {path} (data.data_dir).{f' Folders in {parent}: ' + ', '.join(close) + '.' if close else ''} "
        f"Set data.data_dir, or make the dataset from a folder of images with `{CONVERT} IMAGES --output_dir {path}`."
    )


def _no_images_message(folder: Path) -> str:
    """Return what the folder contains and what to do. Never suggests overwriting it: it may be the only copy."""
    if not folders(folder) and not loose_files(folder):
        return f"it is empty. Make a dataset there with `{CONVERT} IMAGES --output_dir {folder}`."
    packed = next((name for name in walk(folder) if re.search(r"\.(tar\.\w+|tgz|zip|rar|7z)$", name.lower())), None)
    if packed:
        return f"it holds archives, such as {packed}. Unpack them, and set data.data_dir to the unpacked folder."
    names = ", ".join(list(islice(walk(folder), 3))) or "none"
    return (
        f"expected a Hugging Face dataset ({', '.join(MARKS)}), tars or image files. Files there: "
        f"{names}. Set data.data_dir to the folder of the images."
    )
