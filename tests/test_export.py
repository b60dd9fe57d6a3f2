"""src/export.py: three formats from a checkpoint, their model cards, and errors that leave existing files alone."""

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers.utils.logging import enable_progress_bar

from src.core.errors import UserError
from src.export import main
from src.formats.card import model_card
from src.formats.checkpoint import load_trained
from src.formats.diffusers import read_diffusers
from src.formats.export import new_folder
from src.formats.folder import read_folder
from src.formats.provenance import file_hashes, without_private_paths
from src.formats.upload import push
from src.models.rae import RAE
from tests.tiny_models import checkpoint, equal_decoders, tiny_rae


def run(line: str) -> int:
    return main(shlex.split(line))


def test_statistics_of_a_file_go_into_an_export(tmp_path):
    file = checkpoint(tmp_path, image_size=64)
    var = torch.rand(64, 4, 4)
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    for model, out in ((f"--checkpoint {file}", "one"), (f"--decoder {tmp_path}/one", "two")):
        assert run(f"{model} --stats {tmp_path}/stat.pt --format folder --output {tmp_path}/{out}") == 0
        back = read_folder(tmp_path / out).rae
        assert back.latent_mean is None and torch.equal(back.latent_var, var)


def test_every_format_round_trips_and_exports_can_be_exported_again(tmp_path, capsys):
    file = checkpoint(tmp_path, image_size=256, statistics=True)
    rae = load_trained(file).rae
    images = torch.rand(1, 3, 256, 256)
    for name, words, read in (
        ("folder", "--format folder", read_folder),
        ("whole", "--format folder --with_encoder", read_folder),
        ("a", "--format diffusers", read_diffusers),
    ):
        assert run(f"--checkpoint {file} {words} --output {tmp_path}/{name}") == 0
        enable_progress_bar()  # in transformers, as before the first encoder
        back = read(tmp_path / name)
        assert equal_decoders(rae, back.rae) and torch.equal(back.rae(images), rae(images))
        assert back.description["encoder"] == load_trained(file).description["encoder"]
        assert back.description["step"] == 12 and back.rae.encoder.untrained
    assert run(f"--checkpoint {file} --format official --output {tmp_path}/o") == 0
    source = rae.encoder.source
    again = RAE("Dinov2withNorm", source, {"dinov2_path": source, "weights": "untrained"}, tmp_path / "decoder.json", 16, 256,
                pretrained_decoder_path=tmp_path / "o/model.pt", normalization_stat_path=tmp_path / "o/stats.pt")  # fmt: skip
    assert torch.equal(again(images), rae(images))
    said = capsys.readouterr()
    assert (
        "UNTRAINED: encoder" in said.out and "transformers 4 or 5.17" in said.out and "Loading weights" not in said.err
    )

    assert run(f"--decoder {tmp_path}/a --format folder --output {tmp_path}/b") == 1  # the encoder is only in there
    assert run(f"--decoder {tmp_path}/a --format folder --with_encoder --output {tmp_path}/b") == 0
    assert run(f"--decoder {tmp_path}/b --format diffusers --output {tmp_path}/c") == 0
    capsys.readouterr()
    for name in "ab":  # exports name their encoder
        assert run(f"--decoder {tmp_path}/{name} --encoder_layers x --format official --output {tmp_path}/d") == 1
        assert "--encoder_layers" in capsys.readouterr().err
    a, c = (file_hashes(tmp_path / name) for name in "ac")
    same = "diffusion_pytorch_model.safetensors", "config.json"
    assert {name: a[name] for name in same} == {name: c[name] for name in same}
    assert "rae_tiny" in (tmp_path / "c/README.md").read_text()


def test_online_weights_and_half_precision(tmp_path):
    file = checkpoint(tmp_path)
    assert run(f"--checkpoint {file} --weights online --dtype bf16 --format official --output {tmp_path}/o") == 0
    content = torch.load(tmp_path / "o/model.pt", weights_only=True)
    online = load_trained(file, "online").rae.decoder.state_dict()
    assert type(content) is dict and content.keys() == online.keys()
    assert all(torch.equal(content[name], online[name].bfloat16()) for name in online)
    assert "online, bf16" in (tmp_path / "o/README.md").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/runs/last.ckpt", "last.ckpt"), ("~/w/x.pt", "x.pt"), ("/data/in1k/", "in1k/"), ("C:\\Users\\me\\x.pt", "x.pt"),
        ("file:///home/me/a.npz", "a.npz"), (Path("/home/me/x"), "x"), ("weights/model.pt", "weights/model.pt"),
        ("3 bad images in data.data_dir=/home/me/in1k, see '/home/me/bad.txt'", "3 bad images in data.data_dir=in1k, see 'bad.txt'"),
        ("/home/me/x.ckpt was made with 'facebook/dinov2'", "x.ckpt was made with 'facebook/dinov2'"),
        ("1/2 of s3://bucket/a/b.tar, https://x.org/a/b", "1/2 of s3://bucket/a/b.tar, https://x.org/a/b"),
    ],
)  # fmt: skip
def test_no_private_path_leaves_with_an_export(text, shown):
    assert without_private_paths({"warnings": [text]}) == {"warnings": [shown]}


def test_an_export_that_fails_to_replace_another_leaves_it_there(tmp_path, monkeypatch):
    with new_folder(tmp_path / "o", False) as folder:
        (folder / "rae_export.json").write_text("{}")
    original = os.replace

    def killed(source, target):
        if str(source).endswith(".part"):
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "o", True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["o"] and (tmp_path / "o/rae_export.json").is_file()


def test_content_of_the_model_card(tmp_path):
    file = checkpoint(tmp_path)
    scores = {"quantization": "round", "exif": "apply", "features": "inception", "model": {"weights": "ema"},
              "results": [{"data_dir": "/data/private/in1k", "split": "validation", "images": 50000, "rfid": 0.5678, "psnr": 19.1, "ssim": 0.5}]}  # fmt: skip
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert run(f"--checkpoint {file} --format official --output {tmp_path}/o --scores {tmp_path}/scores.json") == 0
    card = (tmp_path / "o/README.md").read_text()
    for text in ("Dinov2withNorm", "64 x 4 x 4", "1,234 training images", "c0ffee", "| rfid | 0.5678 | 50,000 images", "18.2500", "56 held-out images", "weights ema, features", "by the end of the run, step",
                 "1,000 images", "| steps | 12 (epoch 4)", "| global batch | 64", "UNTRAINED: encoder", file_hashes(tmp_path / "o")["model.pt"]):  # fmt: skip
        assert text in card, text
    record = (tmp_path / "o/rae_export.json").read_text()
    assert "/private" not in card + record and str(tmp_path) not in card + record
    facts = json.loads(record)
    assert facts["files"]["model.pt"] == file_hashes(tmp_path / "o")["model.pt"]
    facts["encoder"]["source"] = "facebook/dinov3-vitb16-pretrain-lvd1689m"
    assert "| encoder licence | DINOv3 License, gated |" in model_card(load_trained(file).rae, facts)


def test_existing_output_is_safe(tmp_path, capsys):
    words = f"--checkpoint {checkpoint(tmp_path)} --format official --output {tmp_path}"
    assert run(f"{words}/o") == 0 and run(f"{words}/o") == 1
    assert "--overwrite" in capsys.readouterr().err
    before = file_hashes(tmp_path / "o")
    assert run(f"{words}/o --overwrite --format diffusers") == 1  # grid of 4 x 4: nothing is lost
    assert file_hashes(tmp_path / "o") == before and not list(tmp_path.glob(".o.*"))
    assert "grid is 4 x 4" in capsys.readouterr().err
    (tmp_path / "o/note.txt").write_text("of the export")
    assert run(f"{words}/o --overwrite") == 0 and not (tmp_path / "o/note.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    assert run(f"{words}/mine --overwrite") == 1
    assert (tmp_path / "mine/thesis.txt").exists() and "not an earlier export" in capsys.readouterr().err
    for place in (tmp_path / "mine/thesis.txt/o", Path("/proc/o")):  # below a file, or not writable
        assert run(f"{words} --output {place}") == 1
        assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "more", "reason"), [
    (None, "", "not found"),
    (b"no checkpoint", "", "refused|can't be read"),
    ({"state_dict": {}}, "", "not a checkpoint of this trainer"),
    (b"x", "/o", "can't be read|not found|Not a directory"),
    (None, " --push nonsense", "NAME/MODEL"),
])  # fmt: skip
def test_invalid_checkpoints_and_arguments_are_rejected(tmp_path, capsys, content, more, reason):
    file = tmp_path / "file.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert run(f"--format official --output {tmp_path}/o --checkpoint {file}{more}") == 1
    assert re.search(reason, capsys.readouterr().err) and not (tmp_path / "o").exists()


def test_released_decoder_file_with_its_encoder(tmp_path):
    rae = tiny_rae(tmp_path)
    torch.save(rae.decoder.state_dict(), tmp_path / "model.pt")
    rae.encoder.model.save_pretrained(tmp_path / "encoder")  # with weights, as the hub has them
    words = f"--encoder_cls Dinov2withNorm --encoder {tmp_path}/encoder --decoder_config {tmp_path}/decoder.json --image_size 64"
    assert run(f"--decoder {tmp_path}/model.pt {words} --format folder --with_encoder --output {tmp_path}/o") == 0
    assert equal_decoders(read_folder(tmp_path / "o").rae, rae)


# -- the hub


class Hub:
    def __init__(self, error=None):
        self.error, self.calls = error, []

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        if self.error:
            raise self.error

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_push_sends_the_whole_folder(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "model.pt").write_text("weights")
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    push(tmp_path, "me/model", True)
    assert hub.calls == [("create", "me/model", True, True), ("upload", "me/model", ["README.md", "model.pt"])]


def http_error(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, f"HTTP {status}")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize("error", [LocalTokenNotFoundError("no token"), http_error(403), ConnectionError("no route")])
def test_push_errors_say_what_to_do(tmp_path, monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(error))
    with pytest.raises(UserError, match=f"{error}.*push again.*write permission.*HF_TOKEN"):
        push(tmp_path, "me/model", False)
