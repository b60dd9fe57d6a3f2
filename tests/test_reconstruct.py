"""src/reconstruct.py: inputs, outputs, and stored latents that decode to the same images."""

import csv
import importlib
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from src import export
from src.core import files as core_files
from src.core.errors import UserError
from src.core.images import unit_to_bytes
from src.data.dataset import EvaluationTransform
from src.data.decode import Decoder
from src.data.latents import LatentStore, LatentWriter, write_index
from src.evaluation.reconstruction_inputs import open_inputs
from src.formats.checkpoint import load_trained
from src.metrics.quality import psnr
from src.reconstruct import main
from tests.test_data_places import image_tar, parquet
from tests.tiny_models import checkpoint, photos, two_processes


def run(line: str) -> int:
    return main(shlex.split(f"{line} --device cpu --num_workers 0"))


def picture(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def test_images_scores_and_npz_agree(tmp_path, capsys):
    file, folder, out = checkpoint(tmp_path), photos(tmp_path / "photos"), tmp_path / "out"
    words = f"--checkpoint {file} --input {folder} --output {out} --batch_size 4"
    assert run(f"{words} --write images sheet scores npz") == 0
    rae, inputs = load_trained(file).rae, open_inputs([str(folder)], None)
    crop = EvaluationTransform(64, Decoder("apply", 80))
    rows = list(csv.DictReader((out / "scores.csv").open()))
    npz, originals = (np.load(out / name)["arr_0"] for name in ("reconstructions.npz", "originals.npz"))
    assert len(rows) == len(npz) == 6
    for i, row in enumerate(rows):
        original = torch.from_numpy(crop(inputs.source.encoded(i)).copy()).permute(2, 0, 1)
        found = picture(out / "reconstructions" / f"{inputs.output_name(i)}.png")
        expected = unit_to_bytes(rae(original[None]))[0]
        assert (found.int() - expected.int()).abs().max() <= 1  # another batch size may round the other way
        assert torch.equal(found, torch.from_numpy(npz[i]).permute(2, 0, 1))
        assert torch.equal(original, torch.from_numpy(originals[i]).permute(2, 0, 1))
        assert float(row["psnr"]) == pytest.approx(psnr(original[None], found[None]).item(), abs=1e-3)
        assert row["file"] == inputs.source.name(i)
    assert Image.open(out / "sheet.png").size == (6 * 66 - 2, 3 * 66 - 2)
    record = json.loads((out / "reconstruct.json").read_text())
    assert record["status"] == "finished" and record["images"] == 6 and record["untrained_encoder"]
    assert record["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]), rel=1e-5)
    assert "UNTRAINED" in capsys.readouterr().out


@pytest.mark.parametrize(("program", "opener"), [
    (main, "src.formats.opening.open_model"), (export.main, "src.formats.export.model_card"),
])  # fmt: skip
def test_output_written_meanwhile_by_another_process_is_kept(tmp_path, capsys, monkeypatch, program, opener):
    """It appears while the model opens, after the output folder was checked."""
    file, out = checkpoint(tmp_path), tmp_path / "out"
    module, name = opener.rsplit(".", 1)
    original = getattr(importlib.import_module(module), name)

    def slow(*args):
        out.mkdir()
        (out / "theirs").touch()
        return original(*args)

    monkeypatch.setattr(opener, slow)
    words = ["--input", photos(tmp_path / "photos"), "--device", "cpu", "--num_workers", 0]
    words = words if program is main else ["--format", "folder"]
    assert program([str(word) for word in ("--checkpoint", file, "--output", out, *words)]) == 1
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert f"--output {out} is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_same(tmp_path):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 5)
    words = f"--checkpoint {file} --input {folder} --batch_size 1 --write images sheet scores npz --latents raw"
    two = f"{words} --device cpu --num_workers 0 --output {tmp_path}/two"
    two_processes("src/reconstruct.py", *shlex.split(two))
    assert run(f"{words} --output {tmp_path}/one") == 0
    one = tmp_path / "one"
    names = [p.relative_to(one) for p in one.rglob("*") if p.suffix in (".png", ".csv", ".npz")]
    assert len(names) == 5 + 4
    for name in names:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    latents = []
    for name in ("one", "two"):
        batches = LatentStore(tmp_path / name / "latents").batches(3)
        latents.append({int(r): z for _, rows, zs in batches for r, z in zip(rows, zs, strict=True)})
    assert latents[0].keys() == latents[1].keys() == set(range(5))
    assert all(torch.equal(latents[0][row], latents[1][row]) for row in range(5))


@pytest.mark.parametrize("scale", ["raw", "normalized"])
def test_stored_latents_decode_to_the_same_images(tmp_path, scale):
    file, folder = checkpoint(tmp_path, statistics=True), photos(tmp_path / "photos", 5)
    (folder / "cats/1.png").rename(folder / "1.png")  # in no class
    words, a, b = f"--checkpoint {file} --batch_size 2", tmp_path / "a", tmp_path / "b"
    assert run(f"{words} --input {folder} --latents {scale} --write images npz --output {a}") == 0
    assert run(f"{words} --from_latents {a}/latents --write images sheet npz --output {b}") == 0
    arrays = [np.load(place / "reconstructions.npz")["arr_0"].astype(int) for place in (a, b)]
    assert np.abs(arrays[0] - arrays[1]).max() <= 1
    assert (b / "reconstructions/0000000.png").is_file() and not (b / "originals.npz").exists()
    assert Image.open(b / "sheet.png").size == (5 * 66 - 2, 64)
    index = json.loads((a / "latents/index.json").read_text())
    facts = {"scale": scale, "shape": [64, 4, 4], "count": 5, "class_names": ["cats", "dogs"]}
    assert facts.items() <= index.items() and (index["statistics"] is None) == (scale == "raw")
    shard = load_file(a / "latents" / index["shards"][0]["file"])
    assert shard["labels"].tolist() == [-1, 0, 1, 1, 1] and shard["rows"].tolist() == [0, 1, 2, 3, 4]
    assert shard["latents"].mean().abs() < 5


def test_latents_alone_decode_nothing(tmp_path):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 3)
    words = f"--checkpoint {file} --input {folder} --output {tmp_path}/a"
    assert run(f"{words} --latents raw --latents_dtype bf16") == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["latents", "reconstruct.json"]
    assert json.loads((tmp_path / "a/reconstruct.json").read_text())["images"] == 3
    assert load_file(next((tmp_path / "a/latents").glob("*.safetensors")))["latents"].dtype == torch.bfloat16


def test_shards_have_their_size_and_are_read_in_any_batch_size(tmp_path):
    z = torch.randn(11, 2, 3, 3)
    writer = LatentWriter(tmp_path, (2, 3, 3), torch.float32, rank=0, shard_bytes=4 * 2 * 9 * 4)
    for start in range(0, 11, 3):
        part = z[start : start + 3]
        writer.write(part, torch.arange(start, start + len(part)), torch.full((len(part),), -1))
    shards = writer.close()
    assert [shard["count"] for shard in shards] == [4, 4, 3]
    write_index(tmp_path, shards, {"scale": "raw", "shape": [2, 3, 3], "encoder": {}, "statistics": None})
    for batch, world in ((1, 1), (3, 1), (5, 2), (100, 3)):
        parts = [entry for rank in range(world) for entry in LatentStore(tmp_path).batches(batch, rank, world)]
        places, rows, latents = (torch.cat([part[i] for part in parts]) for i in range(3))
        order = places.argsort()
        assert places[order].tolist() == list(range(11))
        assert torch.equal(rows, places) and torch.equal(latents[order], z)


def test_images_of_any_size_and_kind(tmp_path):
    image = np.zeros((20, 80, 3), np.uint8)
    image[:, :40, :2] = 255
    image[5:, :40, 2] = 255  # the upper quarter has no blue
    Image.fromarray(image).save(tmp_path / "wide.png")
    data, decoder = (tmp_path / "wide.png").read_bytes(), Decoder("apply", 80)
    crop, pad, resize = (EvaluationTransform(64, decoder, fit)(data) for fit in ("crop", "pad", "resize"))
    assert crop.shape == pad.shape == resize.shape == (64, 64, 3)
    assert (pad[0] == pad[32])[:, :2].all() and pad[:, :30, :2].min() == 255 and pad[:, 34:].max() == 0
    assert pad[20, :28, 2].max() == 0 and resize[20, :28].min() == 255
    assert resize[:, :28, :2].min() == 255 and abs(int((crop[:, :, 0] > 127).sum()) - 64 * 32) <= 64


def test_inputs(tmp_path):
    folder = photos(tmp_path / "photos", 4)
    (folder / "cats/1.jpg").write_bytes((folder / "cats/1.png").read_bytes())
    for name in ("notes.txt", ".hidden.png"):
        (folder / name).write_text("no image")
    names = [open_inputs([str(folder)], None).output_name(i) for i in range(5)]
    assert names == ["cats/1.jpg", "cats/1.png", "cats/3", "dogs/0", "dogs/2"]
    for paths, limit, count in (
        ([folder / "*/*.png"], None, 4),
        ([folder / "cats", folder / "cats/1.png"], None, 3),
        ([folder], 2, 2),
    ):
        assert len(open_inputs([str(path) for path in paths], None, limit).rows) == count
    with pytest.raises(UserError, match="no such file"):
        open_inputs([str(tmp_path / "nothing*")], None)
    for split, count in (("train", 3), ("validation", 2)):
        image_tar(tmp_path / f"tars/{split}/0.tar", count)
    assert len(open_inputs([str(tmp_path / "tars")], None).rows) == 3
    with pytest.raises(UserError, match="holds Parquet files.*Convert them to a dataset"):
        open_inputs([str(parquet(tmp_path / "hub"))], None)


def test_dummy_dataset_is_created_if_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(core_files, "PROJECT_ROOT", tmp_path)
    assert len(open_inputs([str(tmp_path / "data/test_hf")], None).rows) == 20


def test_images_that_can_not_be_decoded_are_counted(tmp_path, capsys):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 3)
    (folder / "cats/broken.jpg").write_bytes(b"no image")
    words = f"--checkpoint {file} --input {folder}"
    assert run(f"{words} --output {tmp_path}/a") == 0
    assert "1 left out" in capsys.readouterr().out
    assert run(f"{words}/cats/broken.jpg --output {tmp_path}/b --write npz scores") == 1
    assert "can be decoded" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_invalid_input_is_rejected(tmp_path, capsys):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    for words, text in (
        (f"--input {tmp_path}/empty --output {tmp_path}/out", "No images"),
        (f"--input {folder} --latents normalized --output {tmp_path}/out", "no latent statistics"),
        (f"--from_latents {folder} --output {tmp_path}/out", "index.json"),
        (f"--input {folder} --split test --output {tmp_path}/out", "test"),
        (f"--input {folder} --output {tmp_path}/mine", "--overwrite"),
        (f"--input {folder} --output {tmp_path}/mine --overwrite", "--overwrite"),
        (f"--input {folder} --output {file}", "is a file"),
        (f"--input {folder} --output /proc/x", "can't be written"),
    ):
        assert run(f"--checkpoint {file} {words}") == 1
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and (tmp_path / "mine/thesis.txt").exists()
    for words in (
        "",
        f"--input {folder} --from_latents {folder}",
        *(f"--from_latents {folder} {more}" for more in ("--write scores", "--num_samples 1")),
    ):
        with pytest.raises(SystemExit, match="^2$"):
            run(f"--checkpoint {file} {words} --output {tmp_path}/x")


def test_earlier_output_is_replaced_only_with_overwrite(tmp_path, capsys):
    words = f"--checkpoint {checkpoint(tmp_path)} --input {photos(tmp_path / 'photos', 2)} --output {tmp_path}/a"
    assert run(f"{words} --write images") == 0 and run(f"{words} --write npz") == 1
    assert "already exists" in capsys.readouterr().err
    assert run(f"{words} --write npz --overwrite") == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["originals.npz", "reconstruct.json", "reconstructions.npz"]


def test_latents_of_another_model_or_cut_short_are_rejected(tmp_path, capsys):
    file, folder = checkpoint(tmp_path, statistics=True), photos(tmp_path / "photos", 3)
    assert run(f"--checkpoint {file} --input {folder} --latents normalized --output {tmp_path}/a") == 0
    store = tmp_path / "a/latents"

    def refused(model) -> str:
        assert run(f"--checkpoint {model} --from_latents {store} --output {tmp_path}/b") == 1
        return capsys.readouterr().err

    others = {"shape": {"image_size": 96}, "another encoder": {"encoder": {"layer_norm_eps": 1e-5}}, "statistics": {}}
    for text, options in others.items():
        (tmp_path / text).mkdir()
        assert text in refused(f"'{checkpoint(tmp_path / text, **options)}'")
    shard = next(store.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in refused(file)
    shard.unlink()
    assert "lacks 1 of 1" in refused(file)
