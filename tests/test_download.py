"""Downloads from a local server that cuts off, lies about length, serves wrong bytes, redirects and refuses."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import threading
import zipfile
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest

from scripts.download_weights import main
from src.core import requirements as table
from src.core.compose import compose
from src.core.download import RECORD, addresses, check, download
from src.core.errors import UserError
from src.core.requirements import FILES, Asset, requirements
from src.core.text import quoted
from src.core.weights import PROJECT_ROOT
from src.models.encoder_presets import PRESETS, hub_assets
from tests.training import python

BODY = b"\x80" + bytes(range(256)) * 4096  # 1 MiB that starts as a pickle does
SHA = hashlib.sha256(BODY).hexdigest()
DIGEST = f"sha256:{SHA[:8]}"
with zipfile.ZipFile(memory := io.BytesIO(), "w") as file:
    file.writestr("data.pkl", BODY)
ARCHIVE = memory.getvalue()
OTHER = b"\x80 other"
DEAD = "http://127.0.0.1:9"
ENCODERS = hub_assets()


def by_name(name):
    return table.by_name(name, ENCODERS)


class Handler(BaseHTTPRequestHandler):
    """Record the request and answer with the function registered for its path. HTTP/1.0: a body may end anywhere."""

    def do_GET(self):
        self.server.asked.append(self)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that has seen enough
            self.server.answers.get(self.path.split("?")[0], status(404))(self)

    do_HEAD = do_GET

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers, self.url = [], {}, f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def headers(self, name):
        return [request.headers[name] for request in self.asked if request.command == "GET"]


def hub_at(url, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Start a server, and make the hub not answer: no request leaves this machine, and retries do not wait."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name, value in (("HF_HUB_OFFLINE", False), ("DOWNLOAD_CHUNK_SIZE", 1000), ("HF_HUB_CACHE", f"{tmp_path}/hub")):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hub_at(DEAD, monkeypatch)
    huggingface_hub.close_session()
    with Server() as server:
        yield server
        server.shutdown()


def status(code, **headers):
    return lambda request: request.reply(code, **headers)


def serve(body=BODY, ranges=True, cuts=(), length=None, **headers):
    """Answer correctly, except for `ranges` and `length`; the first answers end early, at the offsets `cuts` of the file."""
    left = list(cuts)

    def answer(request):
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if ranges else None
        start = int(match[1]) if match else 0
        if start >= len(body):
            return request.reply(416, Content_Range=f"bytes */{len(body)}")
        rest = body[start : left.pop(0)] if left and request.command == "GET" else body[start:]
        stated = {"Content-Length": length or len(body) - start, **headers}
        if start:
            stated["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        request.reply(206 if start else 200, rest, **stated)

    return answer


def asset(folder, *sources, digest=DIGEST, name="f.pth"):
    return Asset(name, "x", name, sources, digest, path=folder / name)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("answer", "kept", "digest", "ranges"),
    [
        (serve(), None, DIGEST, [None]),
        (serve(cuts=[300_000]), None, DIGEST, [None, "bytes=300000-"]),
        (serve(cuts=[300_000]), None, None, [None, "bytes=300000-"]),
        (serve(ranges=False, cuts=[300_000]), None, DIGEST, [None, "bytes=300000-"]),
        (serve(), BODY[:1000], DIGEST, ["bytes=1000-"]),
        (serve(ranges=False), BODY[:1000], DIGEST, ["bytes=1000-"]),
        (serve(), BODY[:1000], None, [None]),  # without a hash, the partial file may be of another file
        (serve(), BODY, DIGEST, [f"bytes={len(BODY)}-"]),  # 416: the partial file is complete
        (serve(), BODY + b"more", DIGEST, [f"bytes={len(BODY) + 4}-", None]),
        (serve(), b"x" * 1000, DIGEST, ["bytes=1000-", None]),
    ],
)
def test_download_is_complete_and_recorded(server, tmp_path, answer, kept, digest, ranges):
    server.answers["/f"] = answer
    if kept:
        (tmp_path / "f.pth.partial").write_bytes(kept)
    (line,) = download([asset(tmp_path, f"{server.url}/f", digest=digest)])
    assert (tmp_path / "f.pth").read_bytes() == BODY and (digest or "no published hash") in line
    assert server.headers("Range") == ranges and names(tmp_path) == [RECORD, "f.pth"]
    assert (tmp_path / RECORD).read_text() == f"{SHA}  f.pth\n"  # as `sha256sum -c` reads it


@pytest.mark.parametrize(
    ("answer", "digest", "said"),
    [
        (serve(OTHER), DIGEST, f"{SHA[:8]}, got {hashlib.sha256(OTHER).hexdigest()}"),
        (serve(length=5000), DIGEST, "wrong bytes.*5,000 bytes"),
        (serve(length=len(BODY) + 9), None, "416|Consistency|closed"),
        (serve(ranges=False, cuts=[5000] * 99), DIGEST, "keeps breaking"),
        (serve(b"<html>log in</html>"), None, "not a complete weights file; it starts with b'<html>"),
        (serve(ARCHIVE[:5000]), None, "not a complete weights file"),
        (status(302, Location="/f"), DIGEST, "redirects"),
    ],
)
def test_failed_download_leaves_the_older_file_alone(server, tmp_path, answer, digest, said):
    server.answers["/f"] = answer
    (tmp_path / "f.pth").write_bytes(b"older")
    with pytest.raises(UserError, match=said):
        list(download([asset(tmp_path, f"{server.url}/f", digest=digest)], force=True))
    assert (tmp_path / "f.pth").read_bytes() == b"older" and RECORD not in names(tmp_path)
    assert "f.pth.partial" not in names(tmp_path) or "wrong bytes" not in said


@pytest.mark.parametrize("bad", [401, 403, 404, 410, 500, "wrong bytes", f"{DEAD}/f", "http://:x/"])
def test_next_source_is_tried(server, tmp_path, bad):
    server.answers["/good"] = serve(ARCHIVE)
    server.answers["/bad"] = serve(b"<html>") if bad == "wrong bytes" else status(bad)
    first = bad if str(bad).startswith("http") else f"{server.url}/bad"
    (line,) = download([asset(tmp_path, first, f"{server.url}/good", digest=None)])
    assert f"from {server.url}/good" in line and (tmp_path / "f.pth").read_bytes() == ARCHIVE


def test_hub_provides_the_hash_and_only_the_hub_sees_the_token(server, tmp_path, monkeypatch):
    hub_at(server.url, monkeypatch)
    with Server() as storage:
        there = f"http://localhost:{storage.server_port}/blob"
        stated = {"X-Repo-Commit": "a" * 40, "X-Linked-Etag": f'"{SHA}"', "X-Linked-Size": len(BODY)}
        server.answers["/f"] = status(302, Location=there, **stated)
        hub = asset(tmp_path, f"{server.url}/f", digest=None)
        other = asset(tmp_path, f"{storage.url}/blob", name="other")
        storage.answers["/blob"] = serve(cuts=[1000])
        assert [f"sha256:{SHA}" in line for line in download([hub, other])] == [True, False]
        storage.answers["/blob"] = serve(BODY[:-1] + b"!")
        with pytest.raises(UserError, match="wrong bytes"):
            list(download([hub], force=True))
        storage.shutdown()
    assert set(server.headers("Authorization")) == {"Bearer secret"} and set(storage.headers("Authorization")) == {None}


def test_proxy_and_mirrors(server, tmp_path, monkeypatch):
    server.answers["http://weights.invalid/f"] = serve()  # a proxy is asked for the absolute address
    monkeypatch.setenv("http_proxy", server.url)
    list(download([asset(tmp_path, "http://weights.invalid/f")]))
    assert (tmp_path / "f.pth").read_bytes() == BODY
    place = "discs/dino_vit_small_patch8_224.pth"
    found = addresses(by_name("discriminator").below(tmp_path), ["http://m.example/base"])
    path = f"nyu-visionx/RAE-collections/resolve/main/{place}"
    assert found[0] == f"http://m.example/base/{path}" and f"http://m.example/base/{place}" in found
    assert found[-2] == f"{DEAD}/{path}"  # HF_ENDPOINT


@pytest.mark.parametrize("said", ["[Nn]o space left", "1,048,577 bytes", "Not a directory|exists", "another process"])
def test_local_errors_stop_all_downloads_with_one_message(server, tmp_path, monkeypatch, said):
    server.answers["/f"] = serve()
    folder, partial = tmp_path / "w", tmp_path / "w/f.pth.partial"
    folder.mkdir()
    with open(partial if "process" in said else os.devnull, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if "space" in said:
            partial.symlink_to("/dev/full")
        elif "bytes" in said:
            monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        elif "directory" in said:
            folder = tmp_path / "file"
            folder.touch()
        with pytest.raises(UserError, match=rf"f\.pth: .*({said}).*--weights_dir"):
            list(download([asset(folder, f"{server.url}/f"), asset(folder, f"{server.url}/second", name="second")]))
    assert not any(request.path == "/second" for request in server.asked)


def test_silent_host_is_asked_once_and_all_missing_files_are_listed(server, tmp_path):
    server.answers["/f"] = lambda request: None  # no answer at all
    wanted = [asset(tmp_path, f"{server.url}/f", f"{DEAD}/g", name=name) for name in ("one", "two", "three")]
    with pytest.raises(UserError, match="^4 could not be obtained") as caught:
        list(download([*wanted, Asset("model.my_path", "yours to provide", path=tmp_path / "mine")]))
    assert len(server.asked) == 1 and names(tmp_path) == []
    for name in ("one", "two", "three", "mine"):
        assert f"put it at\n    {tmp_path / name}" in str(caught.value)
    assert f"{DEAD}/g" in str(caught.value) and "yours to provide" in str(caught.value)


def test_installed_package_is_used_only_if_its_bytes_match(server, tmp_path):
    lpips = replace(by_name("lpips").below(tmp_path), sources=(f"{server.url}/f",))
    assert "torchmetrics" in next(download([lpips])) and not server.asked
    assert check(tmp_path / lpips.place, lpips.digest)[0] is True
    server.answers["/f"] = serve()
    list(download([replace(lpips, digest=DIGEST)], force=True))
    assert (tmp_path / lpips.place).read_bytes() == BODY


def test_table_is_consistent():
    names = [*(asset.name for asset in FILES), *{asset.name for asset in ENCODERS.values()}]
    assert len(set(names)) == len(names) and len({asset.place for asset in FILES}) == len(FILES)
    assert by_name("clip-l") is by_name(PRESETS["clip-l"].hub_id) and by_name("dinov3-b").gated
    for file in FILES:
        assert by_name(file.name) is file and by_name(file.place) is file
        assert file.sources and all(source.startswith("https://") for source in file.sources)
        if file.digest and file.digest.startswith("sha256:"):
            assert file.digest[7:] in file.place  # PyTorch's rule: the hash is in the name
    assert by_name("dino_vit_small_patch8_224.pth").name == "discriminator"
    with pytest.raises(UserError, match="several"):
        by_name("model.pt")


DINOV2 = "facebook/dinov2-with-registers-base"
FULL = {"discriminator", DINOV2, "inception", "lpips", "vgg16"}
dino_config = cache(lambda: compose(["experiment=rae_dino"]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, FULL),
        ({"encoder_params": {"model_name": "someone/else-vit"}}, FULL | {"someone/else-vit"}),
        ({"encoder_config_path": "configs", "encoder_params": {"dinov2_path": "configs"}}, FULL - {DINOV2}),
        ({"encoder_config_path": "configs", "encoder_params": {"dinov2_path": "a/b"}}, FULL - {DINOV2} | {"a/b"}),
        ({"encoder_config_path": "/no/encoder", "encoder_params": {}}, FULL - {DINOV2} | {"model.encoder_config_path"}),
        ({"pretrained_decoder_path": f"weights/{by_name('decoder-dinov2').place}"}, FULL | {"decoder-dinov2"}),
        ({"pretrained_decoder_path": "/elsewhere/model.pt"}, FULL | {"model.pretrained_decoder_path"}),
        ({"pretrained_decoder_path": "required"}, FULL),
        ({"normalization_stat_path": "weights/stats/dinov3l-k7/stats.pt"}, FULL | {"stats-dinov3l-k7"}),
        ({"lpips_arch": {"vgg_path": "/x/my_vgg.pth", "linear_path": None}}, FULL - {"lpips"}),
        ({"lpips_arch": {"weights": "untrained", "vgg_path": "weights/vgg16-397923af.pth"}}, FULL - {"lpips", "vgg16"}),
        ({"disc_arch": {"arch": {"dino_ckpt_path": "d.pth", "weights": "untrained"}}}, FULL - {"discriminator"}),
        ({"disc_arch": [{"dino_ckpt_path": "/d"}]}, FULL - {"discriminator"} | {"model.disc_arch.0.dino_ckpt_path"}),
        ({"disc_arch": {"dino_ckpt_path": "/x/dino_vit_small_patch8_224.pth"}}, FULL),
        ({"rfid": {"inception_path": "i.pth", "inception_weights": "untrained"}}, FULL - {"inception"}),
    ],
)
def test_requirements_follow_the_config(changes, expected):
    config = {**dino_config(), "model": {**dino_config()["model"], **changes}}
    if "rfid" in changes:
        config["callbacks"] = changes
    listed = requirements(config, PROJECT_ROOT / "weights", PROJECT_ROOT)
    found = {file.name: file.path for file in listed}
    assert found.keys() == expected and len(listed) == len(found) and found.get(DINOV2) is None
    if "vgg16" in found:  # at the path in the config
        assert found["vgg16"] == PROJECT_ROOT / config["model"]["lpips_arch"]["vgg_path"]
    with pytest.raises(UserError, match=r"model.encoder_config_path is '\?\?\?'"):
        requirements({"model": {"encoder_config_path": "???"}}, PROJECT_ROOT, PROJECT_ROOT)


def test_script_downloads_from_a_mirror_lists_checks_and_repairs(server, tmp_path, capsys):
    server.answers["/copy/discs/dino_vit_small_patch8_224.pth"] = serve()  # a copy of a weights folder
    place, mirror = tmp_path / "w/discs/dino_vit_small_patch8_224.pth", ["--mirror", f"{server.url}/copy/"]
    for options, code, said in (
        (["--list"], 0, ["missing  discriminator", str(place), "no published hash", f"from {DEAD}/nyu"]),
        (["--dry-run"], 0, ["missing  discriminator"]),
        (["--check"], 0, [f"missing   {place}"]),
        (mirror, 0, ["ready", str(place), f"from {server.url}"]),
        (mirror, 0, ["ready", str(place), "present"]),
        (["--list"], 0, ["present  discriminator", f"{len(BODY):,} bytes"]),
        (["--check"], 0, ["ok "]),
        (["damage", "--check"], 1, ["MISMATCH"]),
        (mirror, 1, ["failed", "--force"]),
        ([*mirror, "--force"], 0, ["ready", f"from {server.url}"]),
        (["unknown", "--check"], 0, ["unknown "]),
    ):
        if "damage" in options:
            place.write_bytes(BODY[:-1])
        elif "unknown" in options:
            (place.parent / RECORD).unlink()
        arguments = [option for option in options if option not in ("damage", "unknown")]
        assert main(["discriminator", "--weights-dir", str(tmp_path / "w"), *arguments]) == code
        output = "".join(capsys.readouterr())
        assert all(words in output for words in said), output


@pytest.mark.parametrize(
    ("weights", "mirror", "token"),
    [("model.safetensors", DEAD, {"Bearer secret"}), ("pytorch_model.bin", "", {None})],
)
def test_script_downloads_an_encoder_from_a_hub(server, tmp_path, monkeypatch, capsys, weights, mirror, token):
    repo, commit, needed = "facebook/vit-mae-base", "a" * 40, ["config.json", "preprocessor_config.json", weights]
    files = {name: name.encode() for name in [*needed, "README.md", "tf_model.h5"]}
    oid = {name: hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() for name, body in files.items()}
    info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(body), "oid": oid[name]} for name, body in files.items()]
    for path, value in (("", info), ("/revision/main", info), (f"/tree/{commit}", tree)):
        server.answers[f"/api/models/{repo}{path}"] = serve(json.dumps(value).encode(), Content_Type="application/json")
    for name, body in files.items():
        answer = serve(body, ETag=f'"{oid[name]}"', X_Repo_Commit=commit)
        server.answers[f"/{repo}/resolve/{commit}/{name}"] = answer
    hub_at(server.url if mirror else DEAD, monkeypatch)
    assert main([repo, "--mirror", mirror or server.url]) == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "hub").glob("models--*/snapshots/*")
    assert names(folder) == sorted(needed) and set(server.headers("Authorization")) == token
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main([repo, "--list"]) == main([repo]) == main([repo, "--check"]) == 0
    output = capsys.readouterr().out
    assert f"present  {repo}" in output and output.count("ok ") == 3
    (folder / weights).resolve().write_bytes(b"damaged")
    assert main([repo, "--check"]) == 1 and "MISMATCH" in capsys.readouterr().out
    (folder / weights).resolve().unlink()
    assert main([repo]) == 1 and "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_script_says_what_to_do_by_hand(server, tmp_path):
    repo = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    server.answers[f"/api/models/{repo}"] = status(401, X_Error_Code="GatedRepo", X_Error_Message="gated")
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = ["scripts/download_weights.py", repo, "discriminator", "--weights_dir", tmp_path]
    said = python(*command, code=1, **hub)
    place = f"put it at\n    {tmp_path}/discs/dino_vit_small_patch8_224.pth"
    for words in (f"accept its licence at https://huggingface.co/{repo}", "HF_TOKEN", "hf download", "404", place):
        assert words in said, said


def test_script_lists_an_experiment(tmp_path, capsys):
    """`required` in rae_finetune is a placeholder, not the path of a missing file."""
    tmp_path = tmp_path / "it's"
    where = ["--list", "--experiment", "rae_finetune", "--weights_dir", str(tmp_path)]
    assert main([*where, "vgg16"]) == 0
    unnamed = capsys.readouterr().out
    assert "left out: the decoder" in unnamed and f"{tmp_path}/vgg16" in unnamed
    assert unnamed.count("vgg16: ") == 1 and "/required" not in unnamed
    assert main([*where, f"model.pretrained_decoder_path={quoted(tmp_path / 'mine.pt')}"]) == 0
    named = capsys.readouterr().out
    assert "left out" not in named and str(tmp_path / "mine.pt") in named
    assert main(["--experiment", "rae_dummy"]) == 0 and "nothing to download" in capsys.readouterr().out
    assert main(["--list", "--experiment", "raev2_dit_k7"]) == 0
    assert f"{PRESETS['dinov3-l'].hub_id}: encoder dinov3-l" in capsys.readouterr().out  # by the name of a preset
    assert main(["--list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {tuple(row[1:3]) for row in rows if len(row) > 2} >= {(p.name, p.hub_id) for p in PRESETS.values()}


def test_script_rejects_invalid_arguments(capsys):
    for arguments, said in (([], "--experiment NAME"), (["vgg16", "--mirror", "ftp.example"], "--mirror ftp.example")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err
    for arguments, said in ((["--experiment", "no_such"], ", rae_ddp, "), (["no-such"], "Known names")):
        assert main(arguments) == 1
        assert said in capsys.readouterr().err
