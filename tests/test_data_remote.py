"""Tars in object storage: the same rows as on disk, one ranged read each, with retries and a cache.

The storage is a stand-in file system of fsspec and, if installed, a local S3 server: `pip install "moto[server]" ".[storage]"`.
"""

import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from src.core.errors import UserError
from src.data import dummy, remote
from src.data.datamodule import RAEDataModule
from src.data.places import locate, look
from src.data.sources import ReadOptions, Source
from tests.test_data_loader import arguments, assert_same
from tests.test_data_places import image_tar

IMAGES = 20
OUTAGE_S = 1.5


class Disk(LocalFileSystem):
    """Local files as objects; reads fail while the file `away` exists."""

    protocol = "bucket"
    away = Path()
    requests: list[int] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if Disk.away.exists():
            raise ConnectionError("the server is away")
        Disk.requests.append(end - start)
        return super().cat_file(path, start=start, end=end, **options)


class StandIn:
    """A bucket that can go away and come back with its content; `requests`: bytes of each ranged read."""

    def __init__(self, local: Path, tmp_path: Path) -> None:
        fsspec.register_implementation("bucket", Disk, clobber=True)
        self.url, self.options = f"bucket://{local}", {"auto_mkdir": False}
        Disk.away, Disk.requests = tmp_path / "away", []
        self.requests = Disk.requests
        self.stop, self.start = Disk.away.touch, lambda: Disk.away.unlink(missing_ok=True)


class S3Server:
    """The same over HTTP. A read without a range counts as 0 bytes."""

    url = "s3://set"

    def __init__(self, local: Path, tmp_path: Path) -> None:
        s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
        app = server.DomainDispatcherApplication(server.create_backend_app)
        self.requests: list[int] = []

        def counted(environ: dict[str, Any], start_response: Any) -> Any:
            body = list(app(environ, start_response))
            if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar"):
                self.requests.append(sum(map(len, body)) if environ.get("HTTP_RANGE") else 0)
            return body

        self._app, self.port = counted, 0
        self.start()
        once = {"retries": {"max_attempts": 1}, "connect_timeout": 2}  # otherwise botocore retries for 15 s
        self.options = {"endpoint_url": f"http://127.0.0.1:{self.port}", "config_kwargs": once}
        system = s3fs.S3FileSystem(skip_instance_cache=True, **self.options)
        system.makedirs("set", exist_ok=True)
        system.put([str(file) for file in local.glob("*.tar")], "set/")

    def start(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._app, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for i in range(2):
        image_tar(folder / f"train-{i}.tar", IMAGES // 2)
    image_tar(folder / "validation-0.tar", 4)
    return folder


@pytest.fixture(params=[StandIn, S3Server])
def bucket(request: Any, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "loopback")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = request.param(local, tmp_path)
    yield found
    found.stop()


def module(bucket: Any, **changed: Any) -> RAEDataModule:
    return RAEDataModule(**arguments(data_dir=bucket.url, storage_options=bucket.options, **changed))


def opened(bucket: Any) -> Source:
    return look(bucket.url, ReadOptions(storage=bucket.options)).open("train")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_bucket_equal_those_from_disk(bucket: Any, local: Path, num_workers: int) -> None:
    there, here = module(bucket, num_workers=num_workers), RAEDataModule(**arguments(data_dir=str(local)))
    assert (there.train_size, there.val_size, there.num_classes) == (IMAGES, 4, 3)
    loaders = [data.train_dataloader() for data in (there, here)]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert_same(*(list(loader) for loader in loaders))
    assert_same(list(there.val_dataloader()), list(here.val_dataloader()))
    there.teardown()
    assert there.splits.kind == "tar files in object storage"
    assert not module(bucket).splits.train.index_built  # type: ignore[attr-defined]


def test_each_row_is_one_ranged_request_of_its_size(bucket: Any) -> None:
    source = opened(bucket)
    bucket.requests.clear()
    expected = [dummy.jpeg(row % (IMAGES // 2)) for row in range(IMAGES)]
    assert [source.encoded(row) for row in range(IMAGES)] == expected
    assert bucket.requests == [len(data) for data in expected]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.encoded(3) == expected[3] and len(pickle.dumps(source)) < 2000


def test_short_outage_is_waited_out(bucket: Any, local: Path) -> None:
    data = module(bucket, num_workers=1)
    data.setup()
    bucket.stop()
    threading.Timer(OUTAGE_S, bucket.start).start()
    began = time.monotonic()
    assert_same(list(data.train_dataloader()), list(RAEDataModule(**arguments(data_dir=str(local))).train_dataloader()))
    assert time.monotonic() - began >= OUTAGE_S
    data.teardown()


def test_lasting_outage_is_an_error_that_names_the_url(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.1, 0.1))
    source, loader = opened(bucket), module(bucket, num_workers=1).train_dataloader()
    bucket.stop()
    for read in (lambda: source.encoded(0), lambda: list(loader)):
        with pytest.raises(UserError, match=rf"^{bucket.url}: \w+.*Tried 3 times.*data.storage_options"):
            read()
    loader.close()
    bucket.start()


def test_cached_rows_are_read_during_an_outage(bucket: Any) -> None:
    first = list(module(bucket, cache_gb=1.0).train_dataloader())
    data = module(bucket, cache_gb=1.0)
    data.setup()
    bucket.stop()
    assert_same(first, list(data.train_dataloader()))
    bucket.start()


def test_cache_keeps_to_its_size_and_scans_subfolders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, scandir = [], os.scandir
    monkeypatch.setattr(remote, "CACHE_CHECK_ROWS", 1)
    monkeypatch.setattr(os, "scandir", lambda folder: looked.append(folder) or scandir(folder))
    cache = remote.Cache(tmp_path, 256 * 3000 / 1e9)
    for i in range(3000):
        cache.put(str(i), i.to_bytes(2) * 500)
    assert looked.count(tmp_path) == 0 and len(looked) == 3000
    kept = [i for i in range(3000) if cache.get(str(i)) is not None]
    assert 700 < len(kept) <= 768 and sum(kept) / len(kept) > 2200  # the newest
    assert cache.get(str(kept[-1])) == kept[-1].to_bytes(2) * 500


@pytest.mark.parametrize("bucket", [StandIn], indirect=True)
def test_missing_places_are_named_and_storage_options_never_shown(bucket: Any) -> None:
    with pytest.raises(UserError, match="No tar files at"):
        look(f"{bucket.url}/nothing")
    with pytest.raises(UserError, match="fsspec can't open odd://"):
        look("odd://x")
    options = ReadOptions(storage={"auto_mkdir": False, "use_listings_cache": "SECRET"})
    place = look(bucket.url, options)
    assert "SECRET" not in repr(place) + repr(options) + repr(place.storage)
    bucket.options = {"key": "SECRET"}
    assert "SECRET" not in repr(module(bucket).hparams)


def test_index_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script changes it
    from scripts.index_data import main

    def run(place: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["index_data.py", place])
        return main(), "".join(capsys.readouterr())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image_tar(tmp_path / "set/train.tar", 3)
    image_tar(tmp_path / "set/val.tar", 2)
    for place, words in (
        (f"{tmp_path}/set", "made"), (f"{tmp_path}/set", "there already"), (f"file://{tmp_path}/set", "made"),
    ):  # fmt: skip
        code, said = run(place)
        assert (
            code == 0 and f"train: 3 images, index {words}" in said and f"validation: 2 images, index {words}" in said
        )
    code, said = run(f"{tmp_path}/nothing")
    assert code == 1 and "Set data_dir" in said


def test_hub_datasets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tar(tmp_path / "0.tar", 3)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        if name == "org/gated":
            raise PermissionError("401 Unauthorized\nlong text")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    data = RAEDataModule(**arguments(data_dir="hf:org/name@v1", batch_size=2))
    data.prepare_data()
    data.setup()
    assert data.train_size == 3
    assert asked == [("org/name", "v1", False), ("org/name", "v1", True)]
    with pytest.raises(UserError, match="401 Unauthorized.*`hf download --repo-type dataset org/gated`") as refused:
        locate("hf:org/gated", True)
    program = str(refused.value).split("`")[1].split()[0]
    assert program in {script.name for script in metadata.distribution("huggingface-hub").entry_points}
    with pytest.raises(UserError, match="expected hf:ORG/NAME"):
        locate("hf:name", True)
    with pytest.raises(UserError, match="No dataset at"):
        RAEDataModule(**arguments(data_dir="org/name")).setup()  # not taken for a name on the hub
