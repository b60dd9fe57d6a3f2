"""Tars in object storage: the rows of local ones, one ranged read each, tried again, gone on with from the cache.

The storage is an HTTP-free stand-in of fsspec that counts requests and can fail.
"""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.data import dummy, remote
from src.data.datamodule import RAEDataModule
from src.data.places import locate, look
from src.data.sources import ReadOptions
from tests.test_data_loader import arguments, assert_same
from tests.test_data_places import image_tar


class Bucket(LocalFileSystem):
    """Files of the disk as objects; `failures` requests fail."""

    protocol = "bucket"
    reads: list[tuple[int, int]] = []
    failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if Bucket.failures:
            Bucket.failures -= 1
            raise ConnectionError("the server is away")
        Bucket.reads.append((start, end))
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0))
    Bucket.reads, Bucket.failures = [], 0
    for i in range(2):
        image_tar(tmp_path / f"set/train-{i}.tar", 10)
    image_tar(tmp_path / "set/validation-0.tar", 4)
    return tmp_path / "set"


def module(place: str | Path, **changed: Any) -> RAEDataModule:
    return RAEDataModule(**arguments(data_dir=str(place), **changed))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_of_a_bucket_are_those_of_the_disk(bucket: Path, num_workers: int) -> None:
    there, here = module(f"bucket://{bucket}", num_workers=num_workers), module(bucket)
    assert (there.train_size, there.val_size, there.num_classes) == (20, 4, 3)
    loader = there.train_dataloader()
    assert_same(list(loader), list(here.train_dataloader()))
    loader.close()
    assert_same(list(there.val_dataloader()), list(here.val_dataloader()))
    there.teardown()
    assert there.splits.kind == "tar files in object storage"
    assert not RAEDataModule(**arguments(data_dir=f"bucket://{bucket}")).splits.train.index_built  # type: ignore[attr-defined]


def test_a_row_is_one_ranged_read(bucket: Path) -> None:
    source = look(f"bucket://{bucket}").open("train")
    Bucket.reads.clear()
    for row in range(20):
        data = source.encoded(row)
        assert data == dummy.jpeg(row % 10)
    assert len(Bucket.reads) == 20
    assert all(end - start == len(dummy.jpeg(row % 10)) for row, (start, end) in enumerate(Bucket.reads))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.encoded(3) == source.encoded(3) and len(pickle.dumps(source)) < 2000


def test_errors_are_tried_again_and_then_named(bucket: Path) -> None:
    source = look(f"bucket://{bucket}").open("train")
    loader = module(f"bucket://{bucket}", num_workers=1).train_dataloader()
    Bucket.failures = 2
    assert source.encoded(0) == dummy.jpeg(0)
    Bucket.failures = 100
    with pytest.raises(UserError, match="ConnectionError: the server is away.*Tried 3 times"):
        source.encoded(0)
    with pytest.raises(UserError, match=r"^bucket://\S+: ConnectionError: the server is away. Tried 3 times"):
        list(loader)
    loader.close()
    Bucket.failures = 0
    with pytest.raises(UserError, match="No tar files at"):
        look(f"bucket://{bucket}/nothing")
    with pytest.raises(UserError, match="fsspec can't open odd://"):
        look("odd://x")


def test_training_goes_on_from_the_cache(bucket: Path) -> None:
    options = {"cache_gb": 1.0, "batch_size": 4}
    first = list(module(f"bucket://{bucket}", **options).train_dataloader())
    data = module(f"bucket://{bucket}", **options)
    data.setup()
    Bucket.reads.clear()
    Bucket.failures = 1000
    for one, again in zip(first, data.train_dataloader(), strict=True):
        assert torch.equal(one["image"], again["image"])
    assert not Bucket.reads


def test_the_cache_keeps_to_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CACHE_CHECK_ROWS", 1)
    cache = remote.Cache(tmp_path, 5000 / 1e9)
    for i in range(20):
        cache.put(str(i), bytes([i]) * 1000)
    kept = [i for i in range(20) if cache.get(str(i)) is not None]
    assert 4 <= len(kept) <= 6 and 19 in kept
    assert cache.get("19") == bytes([19]) * 1000


def test_options_are_never_shown(bucket: Path) -> None:
    options = ReadOptions(storage={"auto_mkdir": False, "use_listings_cache": "SECRET"})
    place = look(f"bucket://{bucket}", options)
    assert "SECRET" not in repr(place) + repr(options) + repr(place.storage)
    assert "SECRET" not in repr(module(f"bucket://{bucket}", storage_options={"key": "SECRET"}).hparams)


def test_the_index_script(bucket: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(PROJECT_ROOT / "scripts/index_data.py"), *arguments], capture_output=True, text=True)  # fmt: skip

    done = run(str(bucket))
    assert done.returncode == 0 and "train: 20 images, index made" in done.stdout
    assert "validation: 4 images, index there already" in run(str(bucket)).stdout
    remote_one = run(f"file://{bucket}")
    assert remote_one.returncode == 0 and "train: 20 images, index made" in remote_one.stdout
    assert run(str(bucket / "nothing")).returncode == 1


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tar(tmp_path / "0.tar", 3)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        if name == "org/gated":
            raise PermissionError("401 Unauthorized\nlong text")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    data = module("hf:org/name@v1", batch_size=2)
    data.prepare_data()
    data.setup()
    assert data.train_size == 3
    assert asked == [("org/name", "v1", False), ("org/name", "v1", True)]
    with pytest.raises(UserError, match="401 Unauthorized.*huggingface-cli download --repo-type dataset org/gated"):
        locate("hf:org/gated", True)
    with pytest.raises(UserError, match="expected hf:ORG/NAME"):
        locate("hf:name", True)
    with pytest.raises(UserError, match="No dataset at"):
        module("org/name").setup()  # not guessed
