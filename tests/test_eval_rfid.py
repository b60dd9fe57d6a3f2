"""`src/eval_rfid.py`: what it prints, writes and refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import eval_rfid
from src.core.images import unit_to_bytes
from src.core.weights import PROJECT_ROOT
from src.data.crops import adm_center_crop
from src.data.decode import ORIENTATION_TAG
from src.evaluation import report
from src.evaluation.images import open_images
from src.formats.checkpoint import LoadedModel, load_trained
from src.formats.checkpoint_content import FORMAT_VERSION, RAESettings
from src.formats.diffusers import write_diffusers
from src.formats.folder import write_folder
from src.metrics.quality import psnr
from tests.conftest import make_rae

LAYERED = {"encoder_params": {"dinov2_path": "configs/encoder/dinov2_tiny", "weights": "untrained", "layers": [0, 1]}}
QUICK = [
    "--device",
    "cpu",
    "--inception_weights",
    "untrained",
    "--inception_width",
    "0.03",
    "--num_workers",
    "0",
    "--batch_size",
    "4",
]
LPIPS = {"vgg_path": None, "linear_path": None, "weights": "untrained", "channels": [4, 8, 8, 16, 16]}


def write_images(folder: Path, count: int, side: int = 80, seed: int = 0) -> Path:
    """Smooth pictures in two classes; sides differ."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((side + i, side), Image.Resampling.BICUBIC).save(place / f"{i:03d}.png")
    return folder


def write_checkpoint(
    path: Path, data_dir: Path, train_split: float = 1.0, model: dict = LAYERED, **config: dict
) -> Path:
    """As training writes it; online and averaged weights differ. `config`: more keys of its nodes."""
    rae = make_rae(**model)
    settings = dict.fromkeys(RAESettings.field_names()) | {
        "encoder_cls": "Dinov2withNorm", "encoder_config_path": "configs/encoder/dinov2_tiny", "image_size": 64,
        "decoder_config_path": "configs/decoder/tiny", "decoder_patch_size": 16, "decoder_denormalize": True, "noise_tau": 0.1,
        "train_positions": False, "activation_checkpointing": False, **model,
    }  # fmt: skip
    state = {f"ema_decoder.{k}": v for k, v in rae.decoder.state_dict().items()}
    state |= {f"rae.decoder.{k}": v * 0.9 for k, v in rae.decoder.state_dict().items()}
    data = {
        "data_dir": str(data_dir),
        "hf_split": "train",
        "hf_validation_split": "validation",
        "train_split": train_split,
        **config.pop("data", {}),
    }
    content = {
        "format_version": FORMAT_VERSION,
        "config": {"model": {**settings, "lpips_arch": LPIPS}, "data": data, "callbacks": {}, **config},
        "encoder": rae.encoder.identity(), "state_dict": state, "global_step": 7, "epoch": 1,
    }  # fmt: skip
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pictures", 11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt", images)


def evaluate(capsys, *arguments: object, data_dir: object = None, quick: bool = True) -> str:
    given = [str(a) for a in arguments]
    data = [] if data_dir is None else ["--data_dir", str(data_dir)]
    assert eval_rfid.main([*given, *data, *(QUICK if quick else [])]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    """The message of an error by the user."""
    assert eval_rfid.main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def results(path: Path) -> list[dict]:
    return json.loads(path.read_text())["results"]


def test_prints_the_score_in_the_guides_form_and_names_untrained_features(capsys, checkpoint, images, tmp_path):
    out = evaluate(
        capsys,
        "--checkpoint",
        checkpoint,
        "--output_dir",
        tmp_path / "out",
        "--json",
        tmp_path / "a.json",
        data_dir=images,
    )
    (result,) = results(tmp_path / "a.json")
    assert f"rFID (untrained Inception) Score: {result['rfid_untrained']:.4f}\n" in out and "rFID Score" not in out
    assert f"\nSample images saved to: {tmp_path / 'out'}\n" in out
    assert result["images"] == result["available"] == 11 and "11 of 11" in out
    assert (
        {"psnr", "ssim", "lpips_untrained", "seconds"} <= result.keys()
        and "rfid" not in result
        and "lpips" not in result
    )
    protocol = json.loads((tmp_path / "a.json").read_text())
    assert protocol["quantization"] == "round" and protocol["exif"] == "apply" and protocol["model"]["step"] == 7
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * 11 + 1


def test_the_name_rfid_belongs_to_the_published_weights():
    """The words alone: the file of 24 M numbers is not at hand here."""
    result = {
        "data_dir": "x",
        "split": "all",
        "images": 10,
        "available": 10,
        "rfid": 12.34561,
        "psnr": 1.0,
        "ssim": 0.5,
    }
    assert "\nrFID Score: 12.3456\n" in report.text([result])


def test_every_option_in_both_spellings():
    parser = eval_rfid.build_parser()
    for action in parser._actions:
        for name in action.option_strings:
            if name.startswith("--"):
                assert "--" + name[2:].replace("_", "-") in action.option_strings
                assert "--" + name[2:].replace("-", "_") in action.option_strings
    guide = "--checkpoint c --data_dir d --num_samples 5 --batch_size 2 --image-size 64 "
    guide += "--device cpu --output-dir o --num-workers 1"
    options = parser.parse_args(guide.split())
    assert (options.num_samples, options.image_size, options.output_dir, options.num_workers) == (5, 64, "o", 1)
    defaults = parser.parse_args(["--data_dir", "d"])
    assert (defaults.num_samples, defaults.batch_size, defaults.device, defaults.num_workers, defaults.output_dir) == (
        10000,
        64,
        "cuda",
        4,
        None,
    )


def test_any_batch_size_gives_the_same_and_weights_differ(capsys, checkpoint, images, tmp_path):
    def run(name: str, *more: object) -> dict:
        evaluate(
            capsys, "--checkpoint", checkpoint, "--json", tmp_path / name, *QUICK, *more, data_dir=images, quick=False
        )
        return results(tmp_path / name)[0]

    first, other = run("a"), run("b", "--batch_size", 7)
    assert other["rfid_untrained"] == pytest.approx(first["rfid_untrained"], rel=1e-4)
    assert other["psnr"] == pytest.approx(first["psnr"], rel=1e-5)
    assert run("c", "--weights", "online")["psnr"] != pytest.approx(first["psnr"], rel=1e-3)
    assert 0 < abs(run("d", "--quantization", "truncate")["psnr"] - first["psnr"]) < 0.2
    assert 0 < abs(run("e", "--precision", "bf16")["psnr"] - first["psnr"]) < 0.1
    assert run("f", "--num_samples", 5)["images"] == 5


def test_noise_and_blocks_give_a_row_each(capsys, checkpoint, images, tmp_path):
    files = ["--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--save_npz", tmp_path / "a.npz"]
    pictures = ["--output_dir", tmp_path / "out", "--worst", 3]
    out = evaluate(
        capsys,
        "--checkpoint",
        checkpoint,
        "--noise_sigma",
        0,
        0.8,
        "--layers",
        "k1",
        "0.1",
        *files,
        *pictures,
        data_dir=images,
    )
    rows = results(tmp_path / "a.json")
    assert [(r["layers"], r["noise_sigma"]) for r in rows] == [("k1", 0), ("k1", 0.8), ("0.1", 0), ("0.1", 0.8)]
    assert len({round(r["psnr"], 6) for r in rows}) == 4 and "blocks" in out
    evaluate(capsys, "--checkpoint", checkpoint, "--json", tmp_path / "b.json", data_dir=images)
    own = results(tmp_path / "b.json")[
        0
    ]  # the model's own blocks are 0 and 1; sharing the originals' features changes nothing
    assert (
        rows[2]["rfid_untrained"] == pytest.approx(own["rfid_untrained"], rel=1e-6) and rows[2]["psnr"] == own["psnr"]
    )
    with (tmp_path / "a.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 11 * 4 and table[0].keys() >= {"file", "psnr", "ssim", "lpips_untrained"}
    for row, (layers, sigma) in zip(rows, [("k1", "0"), ("k1", "0.8"), ("0.1", "0"), ("0.1", "0.8")], strict=True):
        own = [float(r["psnr"]) for r in table if (r["layers"], r["noise_sigma"]) == (layers, sigma)]
        assert len(own) == 11 and np.mean(own) == pytest.approx(row["psnr"], rel=1e-5)
    assert [table[4 * i]["file"] for i in range(11)] == [table[4 * i + 3]["file"] for i in range(11)]
    packed = np.load(tmp_path / "a.npz")["arr_0"]
    assert packed.shape == (11, 64, 64, 3) and packed.dtype == np.uint8
    worst = [entry["file"] for entry in rows[0]["worst"]]
    by_lpips = sorted(
        (r for r in table if (r["layers"], r["noise_sigma"]) == ("k1", "0")), key=lambda r: -float(r["lpips_untrained"])
    )
    assert worst == [r["file"] for r in by_lpips[:3]] and (tmp_path / "out" / "worst.png").is_file()
    assert not list(tmp_path.glob(".*part"))


def test_packed_reconstructions_are_those_of_the_model(capsys, checkpoint, images, tmp_path):
    evaluate(
        capsys,
        "--checkpoint",
        checkpoint,
        "--save_npz",
        tmp_path / "a.npz",
        "--csv",
        tmp_path / "a.csv",
        data_dir=images,
    )
    packed = torch.from_numpy(np.load(tmp_path / "a.npz")["arr_0"]).permute(0, 3, 1, 2)
    with (tmp_path / "a.csv").open() as file:
        table = list(csv.DictReader(file))
    originals = np.stack([adm_center_crop(np.asarray(Image.open(row["file"])), 64) for row in table])
    originals = torch.from_numpy(originals).permute(0, 3, 1, 2)
    expected = unit_to_bytes(load_trained(checkpoint).rae(originals))
    assert (packed.int() - expected.int()).abs().max() <= 1
    assert [float(row["psnr"]) for row in table] == pytest.approx(psnr(originals, packed).tolist(), rel=1e-5)


def test_several_data_sets_in_one_call(capsys, checkpoint, images, tmp_path):
    more = write_images(tmp_path / "faces", 5, seed=1)
    arguments = [
        "--checkpoint",
        checkpoint,
        "--json",
        tmp_path / "a.json",
        "--csv",
        tmp_path / "a.csv",
        "--output_dir",
        tmp_path / "out",
    ]
    out = evaluate(capsys, *arguments, "--data_dir", images, more)
    assert [r["images"] for r in results(tmp_path / "a.json")] == [11, 5] and out.count("Score: ") == 2
    evaluate(capsys, "--checkpoint", checkpoint, "--json", tmp_path / "b.json", "--data-dir", more)
    assert results(tmp_path / "b.json")[0]["rfid_untrained"] == pytest.approx(
        results(tmp_path / "a.json")[1]["rfid_untrained"]
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["faces", "pictures"]
    with (tmp_path / "a.csv").open() as file:
        assert [row["data_dir"] for row in csv.DictReader(file)] == [str(images)] * 11 + [str(more)] * 5


def test_a_checkpoint_is_scored_as_its_training_scored_it(capsys, caplog, checkpoint, tmp_path):
    """EXIF, quantization and the largest size by its configuration, unless the command line says otherwise."""
    pictures = write_images(tmp_path / "pictures", 6)
    for file in pictures.rglob("*.png"):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        Image.open(file).save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    Image.new("RGB", (400, 400)).save(pictures / "class0" / "large.png")
    training = {"exif": "ignore", "max_megapixels": 0.1}, {"rfid": {"quantization": "truncate"}}
    other = write_checkpoint(tmp_path / "other.ckpt", pictures, data=training[0], callbacks=training[1])

    def run(file: Path, *more: object) -> tuple[dict, dict]:
        arguments = ["--checkpoint", file, "--max_bad_share", 1, "--json", tmp_path / "a.json", *more]
        evaluate(capsys, *arguments, data_dir=pictures)
        content = json.loads((tmp_path / "a.json").read_text())
        return content, content["results"][0]

    with caplog.at_level("INFO", "src"):
        plain, plain_result = run(checkpoint)
        assert "--exif apply (by default)" in caplog.text
        followed, result = run(other)
        assert "--exif ignore (as in training, data.exif)" in caplog.text
        assert "--quantization truncate (as in training, callbacks.rfid.quantization)" in caplog.text
        said, _ = run(other, "--exif", "apply", "--quantization", "round")
        assert "the training of this checkpoint used data.exif=ignore" in caplog.text
    names = ("exif", "quantization", "max_megapixels")
    assert [plain[name] for name in names] == ["apply", "round", 80]
    assert [followed[name] for name in names] == ["ignore", "truncate", 0.1]
    assert [said[name] for name in names] == ["apply", "round", 0.1]
    assert (plain_result["images"], result["images"]) == (7, 6)
    for exif in ("apply", "ignore"):
        for quantization in ("round", "truncate"):
            psnr = run(other, "--exif", exif, "--quantization", quantization)[1]["psnr"]
            same = psnr == pytest.approx(result["psnr"], rel=1e-6)
            assert same == ((exif, quantization) == ("ignore", "truncate"))


def test_the_precision_of_training_is_told_not_followed(capsys, caplog, images, tmp_path):
    half = write_checkpoint(tmp_path / "half.ckpt", images, trainer={"precision": "bf16-mixed"})
    with caplog.at_level("INFO", "src"):
        evaluate(capsys, "--checkpoint", half, "--json", tmp_path / "a.json", data_dir=images)
    assert "trainer.precision=bf16-mixed" in caplog.text
    assert json.loads((tmp_path / "a.json").read_text())["precision"] == "32"


def torchrun(*arguments: object) -> str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "src/eval_rfid.py",
        *map(str, arguments),
        *QUICK,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_what_one_gives(capsys, checkpoint, images, tmp_path):
    written = []
    for name, run in (("one", lambda *a: evaluate(capsys, *a)), ("two", torchrun)):
        folder = tmp_path / name
        out = run(
            "--checkpoint", checkpoint, "--data_dir", images, "--noise_sigma", 0, 0.5, "--output_dir", folder, "--worst", 2,
            "--save_samples_count", 5, "--json", folder / "a.json", "--csv", folder / "a.csv", "--save_npz", folder / "a.npz",
        )  # fmt: skip
        assert out.count("Score: ") == 1  # one process speaks
        table = list(csv.DictReader((folder / "a.csv").open()))
        written.append(
            (
                results(folder / "a.json"),
                table,
                np.load(folder / "a.npz")["arr_0"],
                sorted(p.name for p in folder.iterdir()),
            )
        )
    (rows, table, packed, names), (rows2, table2, packed2, names2) = written
    assert names == names2
    for a, b in zip(rows, rows2, strict=True):
        for key in ("rfid_untrained", "psnr", "ssim", "lpips_untrained"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert a["images"] == b["images"] == 11 and a["worst"] == b["worst"]
    assert [r["file"] for r in table] == [r["file"] for r in table2]
    assert [float(r["psnr"]) for r in table] == pytest.approx([float(r["psnr"]) for r in table2], rel=1e-4)
    assert packed.shape == packed2.shape and np.abs(packed.astype(int) - packed2).max() <= 1


# -- what cannot work


def test_no_device(capsys, checkpoint, images):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "--device cpu" in refused(capsys, "--checkpoint", checkpoint, "--data_dir", images)


def test_no_inception_file(capsys, checkpoint, images, tmp_path):
    message = refused(
        capsys,
        "--checkpoint",
        checkpoint,
        "--data_dir",
        images,
        "--device",
        "cpu",
        "--inception_path",
        tmp_path / "no.pth",
    )
    for words in (str(tmp_path / "no.pth"), "download_weights.py inception", "--inception_weights untrained"):
        assert words in message
    (tmp_path / "wrong.pth").write_bytes(b"")
    assert "wrong.pth" in refused(
        capsys,
        "--checkpoint",
        checkpoint,
        "--data_dir",
        images,
        "--device",
        "cpu",
        "--inception_path",
        tmp_path / "wrong.pth",
    )


def test_no_images_one_image_broken_images(capsys, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "No images" in refused(capsys, "--checkpoint", checkpoint, "--data_dir", tmp_path / "empty", *QUICK)
    one = write_images(tmp_path / "one", 1)
    assert "at least 2 images, got 1" in refused(capsys, "--checkpoint", checkpoint, "--data_dir", one, *QUICK)
    two = write_images(tmp_path / "two", 2)
    for file in two.rglob("*.png"):
        file.write_bytes(b"no image")
    assert "bad images" in refused(
        capsys, "--checkpoint", checkpoint, "--data_dir", two, "--csv", tmp_path / "a.csv", *QUICK
    )
    assert "could be decoded" in refused(
        capsys, "--checkpoint", checkpoint, "--data_dir", two, "--max_bad_share", 1, *QUICK
    )
    assert not list(tmp_path.glob("*csv*"))  # nothing half-done stays
    assert "No dataset at" in refused(capsys, "--checkpoint", checkpoint, "--data_dir", tmp_path / "nowhere", *QUICK)


def test_images_smaller_than_the_model_are_enlarged(capsys, checkpoint, tmp_path):
    out = evaluate(capsys, "--checkpoint", checkpoint, data_dir=write_images(tmp_path / "small", 4, side=9))
    assert "4 of 4" in out


def test_bad_checkpoints(capsys, checkpoint, images, tmp_path):
    for share in (0.0, 0.5, 0.99):
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(checkpoint.read_bytes()[: int(checkpoint.stat().st_size * share)])
        assert "cut.ckpt" in refused(capsys, "--checkpoint", cut, "--data_dir", images, *QUICK)
    assert "not found" in refused(capsys, "--checkpoint", tmp_path / "none.ckpt", "--data_dir", images, *QUICK)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.ckpt")
    assert "--decoder" in refused(capsys, "--checkpoint", tmp_path / "other.ckpt", "--data_dir", images, *QUICK)


class Malice:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("option", ["--checkpoint", "--decoder", "--stats", "--reference", "--inception_path"])
def test_code_in_a_file_is_refused_and_not_run(capsys, checkpoint, images, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "malicious.npz"
    if option == "--reference":
        np.savez(file, arr_0=np.array([Malice()], dtype=object))
    else:
        torch.save({"state_dict": Malice(), "mean": Malice(), "decoder_layers.0": Malice()}, file)
    encoder = ["--encoder_cls", "Dinov2withNorm", "--encoder", PROJECT_ROOT / "configs/encoder/dinov2_tiny"]
    model = {
        "--checkpoint": ["--checkpoint", file],
        "--decoder": ["--decoder", file, *encoder],
    }.get(option, ["--checkpoint", checkpoint, option, file])
    quick = [
        a
        for a in QUICK
        if option != "--inception_path" or a not in ("--inception_weights", "untrained", "--inception_width", "0.03")
    ]
    refused(capsys, *model, "--data_dir", images, *quick)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of --checkpoint"),
        (["--checkpoint", "CHECKPOINT", "--decoder", "x"], "one of --checkpoint"),
        (["--checkpoint", "CHECKPOINT", "--image-size", "128"], "--image_size 128, but the model of"),
        (["--checkpoint", "CHECKPOINT", "--stats", "x"], "--stats"),
        (["--checkpoint", "CHECKPOINT", "--layers", "k7"], "--layers=k7"),
        (["--checkpoint", "CHECKPOINT", "--split", "test"], "no split 'test'"),
        (["--checkpoint", "CHECKPOINT", "--split", "held_out"], "held nothing out"),
        (["--checkpoint", "CHECKPOINT", "--reference", "a.npz", "b.npz"], "--reference names 2"),
        (["--checkpoint", "CHECKPOINT", "--reference", "no.npz"], "no.npz"),
        (["--checkpoint", "CHECKPOINT", "--device", "tpu"], "--device tpu"),
        (["--decoder", "CHECKPOINT"], "needs its encoder"),
    ],
)
def test_contradictions(capsys, checkpoint, images, arguments, words):
    given = [str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]
    message = refused(
        capsys,
        *given,
        "--data_dir",
        images,
        *[a for a in QUICK if "--device" not in given or a not in ("--device", "cpu")],
    )
    assert words in message
    if "--image-size" in given:
        assert "64 px" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--worst", "3"],
        ["--save_npz", "x.npz", "--data_dir", "a", "b"],
        ["--num_samples", "0"],
        ["--noise_sigma", "-1"],
        ["--num", "3"],
        ["--weights", "best"],
    ],
)
def test_misuse_exits_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        eval_rfid.main(["--checkpoint", "c", "--data_dir", "d", *arguments])
    assert caught.value.code == 2


def test_help_is_quick_and_has_the_published_command():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "src/eval_rfid.py", "--help"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--exif ignore --quantization truncate" in done.stdout
    told = " ".join(done.stdout.split())
    assert "checkpoint's data.exif, else apply" in told and "callbacks.rfid.quantization, else round" in told
    assert "torch" not in done.stderr


# -- models of others


def test_an_official_decoder_with_its_statistics(capsys, images, tmp_path):
    rae = make_rae()
    rae.encoder.model.save_pretrained(tmp_path / "encoder")
    torch.save(rae.decoder.state_dict(), tmp_path / "model.pt")
    torch.save({"mean": torch.rand(rae.latent_shape), "var": torch.rand(rae.latent_shape) + 0.5}, tmp_path / "stats.pt")
    model = ["--decoder", tmp_path / "model.pt", "--encoder_cls", "Dinov2withNorm", "--encoder", tmp_path / "encoder",
             "--stats", tmp_path / "stats.pt", "--decoder_config", "configs/decoder/tiny", "--image_size", 64]  # fmt: skip
    evaluate(capsys, *model, "--json", tmp_path / "a.json", data_dir=images)
    one_block = {"encoder_params": {"dinov2_path": "configs/encoder/dinov2_tiny", "weights": "untrained"}}
    evaluate(
        capsys,
        "--checkpoint",
        write_checkpoint(tmp_path / "same.ckpt", images, model=one_block),
        "--json",
        tmp_path / "b.json",
        data_dir=images,
    )
    assert_same_scores(tmp_path)  # statistics are undone by the decoder, so the images are the same


@pytest.mark.parametrize("kind", ["diffusers", "folder"])
def test_exported_folders(capsys, images, tmp_path, kind):
    """A grid of 16 x 16, the only one that diffusers can express."""
    shape = json.loads((PROJECT_ROOT / "configs/encoder/dinov2_tiny/config.json").read_text()) | {"image_size": 518}
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(shape))
    rae = make_rae(decoder_patch_size=4, encoder_params={"dinov2_path": str(tmp_path / "shape")})
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "diffusers":
        write_diffusers(rae, folder)
    else:
        write_folder(LoadedModel(rae, {"encoder": rae.encoder.identity(), "config": None}), folder, with_encoder=True)
    evaluate(capsys, "--decoder", folder, "--json", tmp_path / "a.json", data_dir=images)
    torch.save(rae.decoder.state_dict(), tmp_path / "model.pt")
    rae.encoder.model.save_pretrained(tmp_path / "encoder")
    model = ["--decoder", tmp_path / "model.pt", "--encoder_cls", "Dinov2withNorm", "--encoder", tmp_path / "encoder",
             "--decoder_config", "configs/decoder/tiny", "--decoder_patch_size", 4, "--image_size", 64]  # fmt: skip
    evaluate(capsys, *model, "--json", tmp_path / "b.json", data_dir=images)
    assert_same_scores(tmp_path)
    assert "--stats" in refused(capsys, "--decoder", folder, "--stats", "x", "--data_dir", images, *QUICK)


def assert_same_scores(folder: Path) -> None:
    mine, theirs = results(folder / "a.json")[0], results(folder / "b.json")[0]
    assert mine["psnr"] == pytest.approx(theirs["psnr"], rel=1e-5)
    assert mine["rfid_untrained"] == pytest.approx(theirs["rfid_untrained"], rel=1e-3)


def test_the_encoder_of_a_checkpoint_may_lie_elsewhere(capsys, checkpoint, images, tmp_path):
    elsewhere = shutil.copytree(PROJECT_ROOT / "configs/encoder/dinov2_tiny", tmp_path / "elsewhere")
    evaluate(capsys, "--checkpoint", checkpoint, "--json", tmp_path / "a.json", data_dir=images)
    evaluate(capsys, "--checkpoint", checkpoint, "--encoder", elsewhere, "--json", tmp_path / "b.json", data_dir=images)
    assert_same_scores(tmp_path)
    other = PROJECT_ROOT / "configs/encoder/siglip_tiny"
    assert "siglip" in refused(capsys, "--checkpoint", checkpoint, "--encoder", other, "--data_dir", images, *QUICK)


# -- which images


def test_splits(images, tmp_path):
    tree = tmp_path / "tree"
    write_images(tree / "train", 6)
    write_images(tree / "val", 3)
    assert (open_images(tree, None, None).split, len(open_images(tree, None, None).rows)) == ("validation", 3)
    assert len(open_images(tree, "train", None).rows) == 6
    own = {"data_dir": str(images), "hf_split": "train", "hf_validation_split": "validation", "train_split": 0.75}
    held = open_images(images, None, own)
    assert (held.split, len(held.rows)) == ("held_out", 3)
    assert len(open_images(images, "all", own).rows) == 11
    elsewhere = own | {"data_dir": str(tree)}
    assert open_images(images, None, elsewhere).split == "all"  # other data than that of the training, which is here
    assert open_images(images, None, own | {"data_dir": "/not/here"}).split == "held_out"  # may be a copy of it
    assert open_images(images, "held_out", elsewhere).split == "held_out"
    assert open_images(images, None, None).split == "all"


def test_hugging_face_sets_are_recognised(images, tmp_path):
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    files = sorted(str(p) for p in images.rglob("*.png"))

    def dataset(paths: list[str]) -> Dataset:
        return Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature())

    DatasetDict({"train": dataset(files[:8]), "validation": dataset(files[8:])}).save_to_disk(tmp_path / "dict")
    dataset(files).save_to_disk(tmp_path / "single")
    assert (open_images(tmp_path / "dict", None, None).split, len(open_images(tmp_path / "dict", None, None).rows)) == (
        "validation",
        3,
    )
    assert len(open_images(tmp_path / "dict", "train", None).rows) == 8
    assert len(open_images(tmp_path / "single", None, None).rows) == 11
