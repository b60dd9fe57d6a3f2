"""The same promises against an S3 server on this machine: `pip install "moto[server]" ".[storage]"`."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.core.errors import UserError
from src.data import dummy, remote
from src.data.datamodule import RAEDataModule
from src.data.places import look
from src.data.sources import ReadOptions
from tests.test_data_loader import arguments, assert_same
from tests.test_data_places import image_tar

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

IMAGES = 20
OUTAGE_S = 2.0


class Bucket:
    """S3 on loopback that can go away and come back with what it holds, and that counts what it is asked for."""

    def __init__(self) -> None:
        app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
        self.requests: list[tuple[str | None, int]] = []  # Range header and bytes given back, of each GET of an object

        def counted(environ: dict[str, Any], start_response: Any) -> Any:
            body = list(app(environ, start_response))
            if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".tar"):
                self.requests.append((environ.get("HTTP_RANGE"), sum(map(len, body))))
            return body

        self._app, self.port = counted, 0
        self.start()

    def start(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._app, threaded=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def options(self) -> dict[str, Any]:
        once = {
            "retries": {"max_attempts": 1},
            "connect_timeout": 2,
        }  # or botocore tries for a quarter of a minute by itself
        return {"endpoint_url": f"http://127.0.0.1:{self.port}", "config_kwargs": once}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for i in range(2):
        image_tar(folder / f"train-{i}.tar", IMAGES // 2)
    return folder


@pytest.fixture
def bucket(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    import s3fs

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "loopback")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Bucket()
    system = s3fs.S3FileSystem(skip_instance_cache=True, **server.options)
    system.makedirs("set", exist_ok=True)
    system.put([str(file) for file in local.glob("*.tar")], "set/")
    yield server
    server.stop()


def module(bucket: Bucket, **changed: Any) -> RAEDataModule:
    return RAEDataModule(**arguments(data_dir="s3://set", storage_options=bucket.options, **changed))


def test_a_row_is_one_ranged_request_of_its_size(bucket: Bucket) -> None:
    source = look("s3://set", ReadOptions(storage=bucket.options)).open("train")
    bucket.requests.clear()
    assert all(source.encoded(row) == dummy.jpeg(row % (IMAGES // 2)) for row in range(IMAGES))
    sizes = [len(dummy.jpeg(row % (IMAGES // 2))) for row in range(IMAGES)]
    assert len(bucket.requests) == IMAGES and all(range_ for range_, _ in bucket.requests)
    assert sum(given for _, given in bucket.requests) <= 1.05 * sum(sizes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_are_those_of_the_disk(bucket: Bucket, local: Path, num_workers: int) -> None:
    there, here = module(bucket, num_workers=num_workers), RAEDataModule(**arguments(data_dir=str(local)))
    loaders = [data.train_dataloader() for data in (there, here)]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert_same(*(list(loader) for loader in loaders))
    there.teardown()


def test_a_server_away_for_a_while_is_waited_for(bucket: Bucket, local: Path) -> None:
    data = module(bucket, num_workers=1)
    data.setup()
    bucket.stop()
    threading.Timer(OUTAGE_S, bucket.start).start()
    began = time.monotonic()
    assert_same(list(data.train_dataloader()), list(RAEDataModule(**arguments(data_dir=str(local))).train_dataloader()))
    assert time.monotonic() - began >= OUTAGE_S
    data.teardown()


def test_training_goes_on_from_the_cache_while_the_server_is_away(bucket: Bucket) -> None:
    data = module(bucket, cache_gb=1.0)
    loader = data.train_dataloader()
    first = list(loader)
    bucket.stop()
    loader.resume_at(0, 0)
    assert_same(first, list(loader))
    bucket.start()


def test_a_server_that_stays_away_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_S", (0.1, 0.1))
    loader = module(bucket, num_workers=1).train_dataloader()
    bucket.stop()
    with pytest.raises(UserError, match=r"^s3://set: \w+.*Tried 3 times"):
        list(loader)
    loader.close()
    bucket.start()
