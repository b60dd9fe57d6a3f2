"""Downloads against a local server that cuts off, lies about length, serves wrong bytes, redirects and refuses."""

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.core.assets import partial as partial_module
from src.core.assets.digests import RECORD, read_record, verify, verify_blob
from src.core.assets.download import Patience, Source, fetch
from src.core.assets.needs import needs
from src.core.assets.obtain import obtain, sources
from src.core.assets.table import ASSETS, FILES, Digest, FileAsset, RepoAsset, by_name
from src.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
BODY = b"\x80" + bytes(range(256)) * 4096  # 1 MiB that starts as a pickle does
SHA = hashlib.sha256(BODY).hexdigest()
DIGEST = Digest("sha256", SHA[:8])
QUICK = Patience(retries=3, backoff_s=0.001, timeout_s=5.0)
Answer = Callable[["_Handler"], None]


class _Handler(BaseHTTPRequestHandler):
    """Answers with the function registered for the path and notes what was asked."""

    protocol_version = "HTTP/1.0"  # a body ends with its connection: what the lies need

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path.split("?")[0])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that has seen enough
            answer(self) if answer else self.reply(404)

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @property
    def start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def log_message(self, *_: object) -> None:
        pass


class Server(SimpleNamespace):
    def __init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.http.asked, self.http.answers = [], {}
        super().__init__(
            asked=self.http.asked, answers=self.http.answers, url=f"http://127.0.0.1:{self.http.server_port}"
        )
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_ENDPOINT", "HF_TOKEN"):
            monkeypatch.delenv(name)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def serve(body: bytes = BODY, etag: str | None = '"v1"', ranges: bool = True, cut_at: int | None = None) -> Answer:
    """A correct server, which can close the connection once at `cut_at` bytes of the file."""
    cuts = [cut_at] if cut_at is not None else []

    def answer(request: _Handler) -> None:
        headers = {"ETag": etag} if etag else {}
        start = request.start if ranges and request.headers.get("If-Range", etag) == etag else 0
        if start >= len(body) > 0:
            return request.reply(416, Content_Range=f"bytes */{len(body)}")
        rest = body[start : cuts.pop()] if cuts else body[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        request.reply(206 if start else 200, rest, length=len(body) - start, **headers)

    return answer


def get(server: Server, target: Path, *paths: str, digest: Digest | None = DIGEST, token: str | None = None):
    return fetch([Source(server.url + path, token) for path in paths], target, digest, patience=QUICK)


def ranges_asked(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.asked]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_plain_download_is_whole_checked_and_leaves_nothing_else(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve()
    seen: list[tuple[int, int | None]] = []
    fetched = fetch([Source(server.url + "/f")], tmp_path / "a/f.pth", DIGEST, lambda *at: seen.append(at), QUICK)
    assert (tmp_path / "a/f.pth").read_bytes() == BODY
    assert (fetched.sha256, fetched.size, fetched.checked) == (SHA, len(BODY), str(DIGEST))
    assert seen[0] == (0, len(BODY)) and seen[-1] == (len(BODY), len(BODY))
    assert leftovers(tmp_path / "a") == ["f.pth"]


def test_cut_off_is_resumed_under_if_range(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve(cut_at=300_000)
    get(server, tmp_path / "f.pth", "/f")
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert ranges_asked(server) == [None, "bytes=300000-"]
    assert server.asked[1][1]["If-Range"] == '"v1"'


def test_a_later_run_continues_what_an_earlier_one_left(server: Server, tmp_path: Path) -> None:
    def always_cut(request: _Handler) -> None:
        request.reply(200, BODY[:1000], length=len(BODY), ETag='"v1"')

    server.answers["/f"] = always_cut
    with pytest.raises(UserError, match=r"ended after|brought nothing new"):
        get(server, tmp_path / "f.pth", "/f", digest=None)
    assert leftovers(tmp_path) == ["f.pth.partial", "f.pth.partial.json"]
    server.answers["/f"] = serve()
    server.asked.clear()
    get(server, tmp_path / "f.pth", "/f", digest=None)
    assert ranges_asked(server) == ["bytes=1000-"]
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_a_changed_file_is_not_glued_to_the_old_beginning(server: Server, tmp_path: Path) -> None:
    old = b"\x80" + b"o" * 5000
    (tmp_path / "f.pth.partial").write_bytes(old[:700])
    note = {"url": f"{server.url}/f", "total": len(old), "validator": '"v0"', "sha256": None}
    (tmp_path / "f.pth.partial.json").write_text(json.dumps(note))
    server.answers["/f"] = serve(etag='"v1"')
    get(server, tmp_path / "f.pth", "/f", digest=None)
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_nothing_is_resumed_without_validator_or_hash(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.pth.partial").write_bytes(b"unknown origin")
    server.answers["/f"] = serve(etag=None)
    get(server, tmp_path / "f.pth", "/f", digest=None)
    assert ranges_asked(server) == [None]


def test_a_server_that_ignores_the_range_is_read_from_the_start(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve(ranges=False, cut_at=300_000)
    get(server, tmp_path / "f.pth", "/f")
    assert ranges_asked(server) == [None, "bytes=300000-"]
    assert (tmp_path / "f.pth").read_bytes() == BODY


def _keep(server: Server, folder: Path, kept: bytes) -> None:
    """A partial file of an earlier run, with the validator of what the server has now."""
    (folder / "f.pth.partial").write_bytes(kept)
    note = {"url": f"{server.url}/f", "total": len(BODY), "validator": '"v1"', "sha256": None}
    (folder / "f.pth.partial.json").write_text(json.dumps(note))


@pytest.mark.parametrize("digest", [DIGEST, None])
@pytest.mark.parametrize("kept", [BODY, BODY + b"too much"])
def test_416_takes_a_whole_partial_file_and_drops_one_that_is_too_long(
    server: Server, tmp_path: Path, kept: bytes, digest: Digest | None
) -> None:
    _keep(server, tmp_path, kept)
    server.answers["/f"] = serve()
    get(server, tmp_path / "f.pth", "/f", digest=digest)
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert ranges_asked(server)[0] == f"bytes={len(kept)}-"
    assert len(server.asked) == (1 if kept == BODY else 2)


def test_wrong_beginning_with_a_right_rest_is_fetched_again_whole(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.pth.partial").write_bytes(b"x" * 1000)
    server.answers["/f"] = serve()
    get(server, tmp_path / "f.pth", "/f")
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert ranges_asked(server) == ["bytes=1000-", None]


def test_another_part_than_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    _keep(server, tmp_path, BODY[:1000])

    def answer(request: _Handler) -> None:
        if request.start:
            return request.reply(206, BODY[1500:], Content_Range=f"bytes 1500-{len(BODY) - 1}/{len(BODY)}")
        request.reply(200, BODY)

    server.answers["/f"] = answer
    get(server, tmp_path / "f.pth", "/f", digest=None)
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_wrong_bytes_are_deleted_and_named_with_both_hashes(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve(b"\x80 something else")
    with pytest.raises(UserError) as caught:
        get(server, tmp_path / "f.pth", "/f")
    assert SHA[:8] in str(caught.value) and hashlib.sha256(b"\x80 something else").hexdigest() in str(caught.value)
    assert leftovers(tmp_path) == []


def test_wrong_bytes_leave_a_good_older_file_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.pth").write_bytes(BODY)
    server.answers["/f"] = serve(b"\x80 something else")
    with pytest.raises(UserError):
        get(server, tmp_path / "f.pth", "/f")
    assert (tmp_path / "f.pth").read_bytes() == BODY


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_length_that_promises_too_much_never_passes_as_whole(
    server: Server, tmp_path: Path, digest: Digest | None
) -> None:
    short = BODY[:5000]
    server.answers["/f"] = lambda request: request.reply(200, short, length=len(BODY))
    with pytest.raises(UserError, match=r"ended after 5,000 of|wrong bytes"):
        get(server, tmp_path / "f.pth", "/f", digest=digest)
    assert not (tmp_path / "f.pth").exists()


def test_length_that_promises_too_much_then_416_without_hash_is_refused(server: Server, tmp_path: Path) -> None:
    def answer(request: _Handler) -> None:
        if request.start:
            return request.reply(416, Content_Range="bytes */5000")
        request.reply(200, BODY[:5000], length=9000, ETag='"v1"')

    server.answers["/f"] = answer
    with pytest.raises(UserError, match=r"promised 9,000 bytes and has 5,000"):
        get(server, tmp_path / "f.pth", "/f", digest=None)
    assert leftovers(tmp_path) == []


def test_length_that_promises_too_little_fails_the_hash(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = lambda request: request.reply(200, BODY, length=5000)
    with pytest.raises(UserError, match=r"wrong bytes.*\(5,000 bytes\)"):
        get(server, tmp_path / "f.pth", "/f")
    assert leftovers(tmp_path) == []


def test_redirects_are_followed_and_the_token_stays_with_the_first_host(server: Server, tmp_path: Path) -> None:
    other = Server()
    other.answers["/there"] = serve()
    server.answers["/f"] = lambda request: request.reply(
        302, Location=f"http://localhost:{other.http.server_port}/there"
    )
    get(server, tmp_path / "f.pth", "/f", token="secret")
    other.http.shutdown()
    other.http.server_close()
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert "Authorization" not in other.asked[0][1]
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_redirects_in_circles_end(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = lambda request: request.reply(302, Location="/f")
    with pytest.raises(UserError, match="circles"):
        get(server, tmp_path / "f.pth", "/f")


def test_hub_headers_on_the_redirect_give_hash_and_size(server: Server, tmp_path: Path) -> None:
    linked = {"X_Linked_Etag": f'"{SHA}"', "X_Linked_Size": str(len(BODY))}
    server.answers["/f"] = lambda request: request.reply(302, Location="/blob", **linked)
    server.answers["/blob"] = serve(cut_at=10)
    fetched = get(server, tmp_path / "f.pth", "/f", digest=None)
    assert "stated by the hub" in fetched.checked and SHA in fetched.checked
    server.answers["/blob"] = serve(BODY[:-1] + b"!")
    with pytest.raises(UserError, match="wrong bytes"):
        get(server, tmp_path / "g.pth", "/f", digest=None)
    server.answers["/blob"] = serve(BODY[:-1])
    with pytest.raises(UserError, match="contradicts itself"):
        get(server, tmp_path / "g.pth", "/f", digest=None)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_goes_to_the_next_source_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.answers["/bad"] = lambda request: request.reply(status)
    server.answers["/good"] = serve()
    assert get(server, tmp_path / "f.pth", "/bad", "/good").url.endswith("/good")
    assert [path for path, _ in server.asked] == ["/bad", "/good"]


def test_wrong_bytes_and_a_dead_host_go_to_the_next_source(server: Server, tmp_path: Path) -> None:
    server.answers["/bad"] = serve(b"<html>please log in</html>")
    server.answers["/good"] = serve()
    places = [Source("http://127.0.0.1:9/f"), Source(server.url + "/bad"), Source(server.url + "/good")]
    assert fetch(places, tmp_path / "f.pth", DIGEST, patience=QUICK).url.endswith("/good")


def test_a_partial_file_is_continued_at_another_source_where_the_hash_is_known(server: Server, tmp_path: Path) -> None:
    def cut_then_gone(request: _Handler) -> None:
        request.reply(404) if request.start else request.reply(200, BODY[:1000], length=len(BODY))

    server.answers["/bad"] = cut_then_gone
    server.answers["/good"] = serve()
    get(server, tmp_path / "f.pth", "/bad", "/good")
    assert ranges_asked(server) == [None, "bytes=1000-", "bytes=1000-"]
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_busy_servers_are_asked_again_and_not_forever(server: Server, tmp_path: Path) -> None:
    busy = [503, 429]
    server.answers["/f"] = lambda request: request.reply(busy.pop()) if busy else serve()(request)
    get(server, tmp_path / "f.pth", "/f")
    assert len(server.asked) == 3
    server.asked.clear()
    server.answers["/g"] = lambda request: request.reply(500)
    with pytest.raises(UserError, match="HTTP 500"):
        get(server, tmp_path / "g.pth", "/g")
    assert len(server.asked) == QUICK.retries + 1


def test_without_a_hash_a_login_page_or_half_a_zip_is_no_weights_file(server: Server, tmp_path: Path) -> None:
    server.answers["/page"] = serve(b"<!DOCTYPE html><html>log in</html>")
    with pytest.raises(UserError, match="no weights file"):
        get(server, tmp_path / "f.pth", "/page", digest=None)
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("data.pkl", BODY)
    server.answers["/whole"], server.answers["/half"] = serve(memory.getvalue()), serve(memory.getvalue()[:5000])
    with pytest.raises(UserError, match="damaged"):
        get(server, tmp_path / "f.pth", "/half", digest=None)
    assert "no published hash" in get(server, tmp_path / "f.pth", "/whole", digest=None).checked


def test_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["http://weights.invalid/f"] = serve()  # a proxy is asked for the absolute address
    monkeypatch.setenv("http_proxy", server.url)
    fetch([Source("http://weights.invalid/f")], tmp_path / "f.pth", DIGEST, patience=QUICK)
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_full_disk_and_read_only_place_are_user_errors(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["/f"] = serve()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file where a folder"):
        get(server, tmp_path / "file/f.pth", "/f")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(partial_module.os, "open", denied)
        with pytest.raises(UserError, match="can't be written"):
            get(server, tmp_path / "f.pth", "/f")
    with monkeypatch.context() as patch:
        patch.setattr(partial_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(UserError, match="10 bytes free and f.pth needs 1,048,577"):
            get(server, tmp_path / "f.pth", "/f")

    def full(self: partial_module.Partial, block: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial_module.Partial, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        get(server, tmp_path / "f.pth", "/f")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve()
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="can't be written"):
        get(server, tmp_path / "f.pth", "/f")


def test_two_processes_do_not_write_the_same_file(server: Server, tmp_path: Path) -> None:
    server.answers["/f"] = serve()
    with partial_module.Partial.open(tmp_path / "f.pth"), pytest.raises(UserError, match="Another process"):
        get(server, tmp_path / "f.pth", "/f")


def test_record_finds_later_damage(tmp_path: Path, server: Server) -> None:
    asset = FileAsset("x", "x", "x.pth", (server.url + "/x.pth",))
    server.answers["/x.pth"] = serve()
    need = SimpleNamespace(asset=asset, place=tmp_path / "x.pth", key="x")
    obtain(need, [], False, lambda *_: None, QUICK)
    assert read_record(tmp_path) == {"x.pth": SHA}
    assert (tmp_path / RECORD).read_text() == f"{SHA}  x.pth\n"  # as `sha256sum -c` reads it
    assert verify(tmp_path / "x.pth", None).ok is True
    assert "present" in obtain(need, [], False, lambda *_: None, QUICK)
    (tmp_path / "x.pth").write_bytes(BODY[:-1])
    assert verify(tmp_path / "x.pth", None).ok is False
    with pytest.raises(UserError, match="--force"):
        obtain(need, [], False, lambda *_: None, QUICK)
    obtain(need, [], True, lambda *_: None, QUICK)
    assert verify(tmp_path / "x.pth", None).ok is True


def test_blobs_of_the_hubs_cache_are_checked_by_their_names(tmp_path: Path) -> None:
    large, small = tmp_path / SHA, tmp_path / "5e1c309dae7f45e0f39b1bf3ac3cd9db12e7d689"
    large.write_bytes(BODY)
    small.write_bytes(b"Hello World")  # its name is what `git hash-object` prints
    (tmp_path / "model.safetensors").symlink_to(large)
    assert verify_blob(tmp_path / "model.safetensors").ok is True
    assert verify_blob(small).ok is True
    large.write_bytes(BODY[1:])
    small.write_bytes(b"Hello world")
    assert verify_blob(tmp_path / "model.safetensors").ok is False
    assert verify_blob(small).ok is False


def test_mirrors_come_first_and_the_token_goes_to_the_hub_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    found = sources(by_name("discriminator"), ["http://m.example/base/"])
    path = "/nyu-visionx/RAE-collections/resolve/main/discs/dino_vit_small_patch8_224.pth"
    assert found[0] == Source("http://m.example/base" + path)
    assert Source("http://m.example/base/discs/dino_vit_small_patch8_224.pth") in found
    assert Source("https://hub.example" + path, "secret") in found
    assert all(source.token is None for source in found if "hub.example" not in source.url)
    assert all(source.token is None for source in sources(by_name("vgg16"), []))
    with pytest.raises(UserError, match="--mirror"):
        sources(by_name("vgg16"), ["ftp.example"])


def test_table_is_consistent() -> None:
    assert len({asset.name for asset in ASSETS}) == len(ASSETS)
    assert len({asset.place for asset in FILES}) == len(FILES)
    for asset in FILES:
        assert by_name(asset.name) is asset and by_name(asset.place) is asset
        assert all(source.startswith(("https://", "hf://")) for source in asset.sources)
        if asset.digest and asset.digest.algorithm == "sha256":
            assert asset.digest.hex in asset.place  # PyTorch's rule: the hash is in the name
    assert by_name("vgg16-397923af.pth").name == "vgg16"
    with pytest.raises(UserError, match="several"):
        by_name("model.pt")
    with pytest.raises(UserError, match="Known names"):
        by_name("rae_dino")


def _config(**model: object) -> dict:
    return {
        "paths": {"weights_dir": "weights"},
        "data": {"data_dir": "data/imagenet", "pretrained": "no_path"},
        "model": {
            "encoder_config_path": "facebook/dinov2-with-registers-base",
            "encoder_params": {"dinov2_path": "facebook/dinov2-with-registers-base", "num_tokens": None},
            "decoder_config_path": "configs/decoder/ViTXL",
            "pretrained_decoder_path": None,
            "normalization_stat_path": None,
            "disc_arch": {"arch": {"dino_ckpt_path": "weights/discs/dino_vit_small_patch8_224.pth"}},
            "lpips_arch": {"vgg_path": "weights/vgg16-397923af.pth", "linear_path": "weights/lpips_vgg_v0.1.pth"},
            **model,
        },
        "callbacks": {"rfid": {"inception_path": "weights/pt_inception-2015-12-05-6726825d.pth"}},
    }


def _names(config: dict) -> list[str]:
    return sorted(need.asset.name if need.asset else f"?{need.place}" for need in needs(config, ROOT / "weights", ROOT))


def test_needs_follow_the_config() -> None:
    full = ["discriminator", "facebook/dinov2-with-registers-base", "inception", "lpips", "vgg16"]
    assert _names(_config()) == full
    assert _names(_config() | {"callbacks": {"rfid": None}}) == [name for name in full if name != "inception"]
    siglip = {"model_name": "google/siglip2-base-patch16-256", "weights": "pretrained"}
    assert "google/siglip2-base-patch16-256" in _names(_config(encoder_params=siglip))
    official = "weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
    assert "decoder-dinov2" in _names(_config(pretrained_decoder_path=official))
    assert "?/elsewhere/model.pt" in _names(_config(pretrained_decoder_path="/elsewhere/model.pt"))


def test_untrained_parts_and_local_folders_need_nothing(tmp_path: Path) -> None:
    config = _config(
        encoder_config_path=str(tmp_path),
        encoder_params={"dinov2_path": str(tmp_path)},
        disc_arch={"arch": {"dino_ckpt_path": "weights/d.pth", "weights": "untrained"}},
        lpips_arch={"weights": "untrained", "vgg_path": "weights/vgg16-397923af.pth", "linear_path": None},
    )
    config["callbacks"]["rfid"]["inception_weights"] = "untrained"
    assert _names(config) == []


def test_a_configured_place_outside_the_weights_folder_is_where_the_file_goes(tmp_path: Path) -> None:
    config = _config(lpips_arch={"vgg_path": str(tmp_path / "my_vgg.pth"), "linear_path": None})
    (need,) = [need for need in needs(config, ROOT / "weights", ROOT) if need.key == "model.lpips_arch.vgg_path"]
    assert (need.asset, need.place) == (by_name("vgg16"), tmp_path / "my_vgg.pth")


def test_an_encoder_of_ones_own_choice_and_unresolved_values() -> None:
    found = needs(_config(encoder_params={"model_name": "someone/else-vit"}), ROOT / "weights", ROOT)
    assert RepoAsset("someone/else-vit", "encoder") in [need.asset for need in found]
    with pytest.raises(UserError, match=r"model.encoder_config_path is '\?\?\?'"):
        needs(_config(encoder_config_path="???"), ROOT / "weights", ROOT)


def _script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("HF_")}
    command = [sys.executable, "scripts/download_weights.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_script_downloads_from_a_mirror_lists_and_checks(server: Server, tmp_path: Path) -> None:
    server.answers["/copy/discs/dino_vit_small_patch8_224.pth"] = serve()  # a copy of somebody's weights folder
    where = ["discriminator", "--weights_dir", str(tmp_path / "w")]
    before = _script(*where, "--list")
    assert before.returncode == 0 and "missing  discriminator" in before.stdout and "no published hash" in before.stdout
    got = _script(*where, "--mirror", f"{server.url}/copy", HF_HUB_OFFLINE="1")
    assert got.returncode == 0, got.stderr
    place = tmp_path / "w/discs/dino_vit_small_patch8_224.pth"
    assert place.read_bytes() == BODY
    assert "present  discriminator" in _script(*where, "--list").stdout
    assert _script(*where, "--check").returncode == 0
    place.write_bytes(BODY[:-1])
    damaged = _script(*where, "--check")
    assert damaged.returncode == 1 and "MISMATCH" in damaged.stdout


def test_script_without_a_network_says_what_to_do_by_hand(tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9"
    done = _script("vgg16", "--weights_dir", str(tmp_path), HTTPS_PROXY=dead)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in done.stderr
    assert str(tmp_path / "vgg16-397923af.pth") in done.stderr
    gated = _script("facebook/dinov3-vitb16-pretrain-lvd1689m", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert gated.returncode == 1 and "HF_TOKEN" in gated.stderr and "hf download" in gated.stderr


def _serve_hub(server: Server, repo: str, files: dict[str, bytes]) -> None:
    """As much of the hub's interface as huggingface_hub asks for."""
    commit = "a" * 40
    blob = {name: hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() for name, body in files.items()}
    info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(body), "oid": blob[name]} for name, body in files.items()]

    def answer_json(value: object) -> Answer:
        return lambda request: request.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def answer_file(name: str) -> Answer:
        return lambda request: request.reply(200, files[name], ETag=f'"{blob[name]}"', X_Repo_Commit=commit)

    server.answers[f"/api/models/{repo}"] = answer_json(info)
    server.answers[f"/api/models/{repo}/revision/main"] = answer_json(info)
    server.answers[f"/api/models/{repo}/tree/{commit}"] = answer_json(tree)
    for name in files:
        server.answers[f"/{repo}/resolve/{commit}/{name}"] = answer_file(name)


@pytest.mark.parametrize("through", ["endpoint", "mirror"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_script_gets_an_encoder_from_a_hub(server: Server, tmp_path: Path, through: str, weights: str) -> None:
    repo = "facebook/vit-mae-base"
    small = {"config.json": b"{}", "preprocessor_config.json": b"{}", "README.md": b"not needed", "tf_model.h5": b"no"}
    _serve_hub(server, repo, small | {weights: b"weights"})
    cache = {"HF_HOME": str(tmp_path), "HF_TOKEN": "secret"}
    where = {"HF_ENDPOINT": server.url} if through == "endpoint" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    options = ["--mirror", server.url] if through == "mirror" else []
    got = _script(repo, *options, **cache, **where)
    assert got.returncode == 0, got.stderr
    (folder,) = (tmp_path / "hub").glob("models--*/snapshots/*")
    assert leftovers(folder) == sorted(["config.json", "preprocessor_config.json", weights])
    tokens = {
        headers.get("authorization") or headers.get("Authorization") for path, headers in server.asked if repo in path
    }
    assert tokens == ({"Bearer secret"} if through == "endpoint" else {None})
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert "present" in _script(repo, "--list", **offline).stdout
    assert _script(repo, "--check", **offline).stdout.count("ok ") == 3
    assert _script(repo, **offline).returncode == 0
    (folder / weights).resolve().write_bytes(b"damaged")
    assert _script(repo, "--check", **offline).returncode == 1


def test_script_explains_a_gated_encoder(server: Server, tmp_path: Path) -> None:
    repo = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    gate = {"X_Error_Code": "GatedRepo", "X_Error_Message": "gated"}
    server.answers[f"/api/models/{repo}"] = lambda request: request.reply(401, **gate)
    done = _script(repo, HF_HOME=str(tmp_path), HF_ENDPOINT=server.url)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gated, and no token" in done.stderr and f"https://huggingface.co/{repo}" in done.stderr


def test_script_leaves_out_a_decoder_that_the_user_has_yet_to_name(tmp_path: Path) -> None:
    """`required` of rae_finetune is a word to the user, not the path of a missing file."""
    where = ["--experiment", "rae_finetune", "--weights_dir", str(tmp_path)]
    for action in ("--list", "--check"):
        unnamed = _script(*where, action, HF_HUB_OFFLINE="1")
        assert unnamed.returncode == 0, unnamed.stderr
        assert "left out: the decoder" in unnamed.stdout and "model.pretrained_decoder_path=PATH" in unnamed.stdout
        assert "/required" not in unnamed.stdout and "vgg16" in unnamed.stdout
    named = _script(*where, "--list", f"model.pretrained_decoder_path={tmp_path / 'mine.pt'}", HF_HUB_OFFLINE="1")
    assert "left out" not in named.stdout and str(tmp_path / "mine.pt") in named.stdout


def test_script_usage_errors() -> None:
    assert _script().returncode == 2
    nowhere = _script("--experiment", "no_such_experiment")
    assert nowhere.returncode == 1 and "Experiments:" in nowhere.stderr
    unknown = _script("no-such-thing")
    assert unknown.returncode == 1 and "Known names" in unknown.stderr
    assert "--experiment" in _script("--help").stdout
