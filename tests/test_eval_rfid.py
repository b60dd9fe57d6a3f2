"""`src/eval_rfid.py`: scores, output files and errors."""

import csv
import json
import math
import os
import shlex
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
from src.core.options import build_parser
from src.core.weights import PROJECT_ROOT
from src.data.crops import adm_center_crop
from src.data.decode import ORIENTATION_TAG
from src.data.order import evaluation_rows
from src.evaluation.image_pairs import KeptPairs
from src.evaluation.images import open_images
from src.evaluation.options import EvaluationOptions
from src.evaluation.scoring_pass import ScoredBatch
from src.formats.checkpoint import load_trained
from src.metrics.quality import psnr
from tests import tiny_models
from tests.conftest import make_rae
from tests.tiny_models import two_processes

LAYERED = {"encoder_params": {"dinov2_path": "configs/encoder/dinov2_tiny", "weights": "untrained", "layers": [0, 1]}}
QUICK = "--device cpu --inception_weights tiny --num_workers 0 --batch_size 4"
LPIPS = {"vgg_path": None, "linear_path": None, "weights": "untrained", "channels": [4, 8, 8, 16, 16]}
SPLITS = {"hf_split": "train", "hf_validation_split": "validation"}


def write_images(folder: Path, count: int, side: int = 80, seed: int = 0) -> Path:
    """Write smooth images of several sizes in two class folders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels.resize((side + i, side), Image.Resampling.BICUBIC).save(place / f"{i:03d}.png")
    return folder


def write_checkpoint(path: Path, data_dir: Path, train_split: float = 1.0, model: dict = LAYERED, **config) -> Path:
    """Write a checkpoint as training does; online and EMA weights differ. `config`: further nodes and keys."""
    data = {**SPLITS, "data_dir": str(data_dir), "train_split": train_split, **config.pop("data", {})}
    config = {"data": data, "callbacks": {}, **config}
    return tiny_models.write_checkpoint(
        path, make_rae(**model), "configs/decoder/tiny", config, lambda weights: weights * 0.9, lpips_arch=LPIPS
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pictures", 11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt", images)


@pytest.fixture
def evaluate(run_program):
    return lambda line: run_program(eval_rfid.main, f"{QUICK} {line}")


@pytest.fixture
def refused(run_program):
    return lambda line, quick=QUICK: run_program(eval_rfid.main, f"{quick} {line}", code=1)


def table(file: Path) -> list[dict]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_output_has_the_form_of_the_guide_and_names_untrained_features(evaluate, checkpoint, images, tmp_path):
    out, content = evaluate(f"--checkpoint {checkpoint} --data_dir {images} --output_dir {tmp_path}/out")
    (result,) = content["results"]
    assert f"rFID (untrained Inception) Score: {result['rfid_untrained']:.4f}\n" in out and "rFID Score" not in out
    assert f"\nSample images saved to: {tmp_path / 'out'}\n" in out
    assert result["images"] == result["available"] == 11 and "11 of 11" in out
    assert {"psnr", "ssim", "lpips_untrained", "seconds"} <= result.keys() and not {"rfid", "lpips"} & result.keys()
    assert content["quantization"] == "round" and content["exif"] == "apply" and content["model"]["step"] == 12
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * 11 + 1


def test_name_rfid_is_only_for_the_published_weights():
    """Only the text: the file of 24 M weights is not available here."""
    counts = {"data_dir": "x", "split": "all", "images": 10, "available": 10}
    assert "\nrFID Score: 12.3456\n" in eval_rfid.text([{**counts, "rfid": 12.34561, "psnr": 1.0, "ssim": 0.5}])


def test_options_and_defaults_of_the_guide():
    parser = build_parser(EvaluationOptions, None)
    guide = "--checkpoint c --data_dir d --num_samples 5 --batch_size 2 --image-size 64 --device cpu --output-dir o --num-workers 1"
    options = parser.parse_args(guide.split())
    assert (options.num_samples, options.image_size, options.output_dir, options.num_workers) == (5, 64, "o", 1)
    defaults = EvaluationOptions(data_dir=("d",))
    assert (defaults.num_samples, defaults.batch_size, defaults.device, defaults.num_workers, defaults.output_dir) == (
        10000, 64, "cuda", 4, None,
    )  # fmt: skip


def test_scores_depend_on_weights_and_precision_but_not_on_batch_size(evaluate, checkpoint, images):
    def run(*more: str) -> dict:
        return evaluate(f"--checkpoint {checkpoint} --data_dir {images} {' '.join(more)}")[1]["results"][0]

    first, other = run(), run("--batch_size 7")
    assert other["rfid_untrained"] == pytest.approx(first["rfid_untrained"], rel=1e-4)
    assert other["psnr"] == pytest.approx(first["psnr"], rel=1e-5)
    assert run("--weights online")["psnr"] != pytest.approx(first["psnr"], rel=1e-3)
    assert 0 < abs(run("--quantization truncate")["psnr"] - first["psnr"]) < 0.2
    assert 0 < abs(run("--precision bf16")["psnr"] - first["psnr"]) < 0.1
    assert run("--num_samples 5")["images"] == 5
    older = run("--inception_weights untrained --inception_width 0.125")
    assert older["rfid_untrained"] == first["rfid_untrained"]


def test_noise_and_blocks_give_a_row_each(evaluate, checkpoint, images, tmp_path):
    files = f"--csv {tmp_path}/a.csv --save_npz {tmp_path}/a.npz --output_dir {tmp_path}/out --worst 3"
    model = f"--checkpoint {checkpoint} --data_dir {images}"
    out, content = evaluate(f"{model} --noise_sigma 0 0.8 --layers k1 0.1 {files}")
    rows, variants = content["results"], [("k1", 0), ("k1", 0.8), ("0.1", 0), ("0.1", 0.8)]
    assert [(r["layers"], r["noise_sigma"]) for r in rows] == variants
    assert len({round(r["psnr"], 6) for r in rows}) == 4 and "blocks" in out
    own = evaluate(model)[1]["results"][0]  # the model's own blocks are 0 and 1
    assert rows[2]["rfid_untrained"] == pytest.approx(own["rfid_untrained"], rel=1e-6)
    assert rows[2]["psnr"] == own["psnr"]
    lines = table(tmp_path / "a.csv")
    assert len(lines) == 11 * 4 and list(lines[0])[-4:] == ["noise_sigma", "psnr", "ssim", "lpips_untrained"]
    for row, (layers, sigma) in zip(rows, variants, strict=True):
        values = [float(r["psnr"]) for r in lines if (r["layers"], r["noise_sigma"]) == (layers, f"{sigma:g}")]
        assert len(values) == 11 and np.mean(values) == pytest.approx(row["psnr"], rel=1e-5)
    assert [lines[4 * i]["file"] for i in range(11)] == [lines[4 * i + 3]["file"] for i in range(11)]
    packed = np.load(tmp_path / "a.npz")["arr_0"]
    assert packed.shape == (11, 64, 64, 3) and packed.dtype == np.uint8
    by_lpips = sorted(lines[::4], key=lambda r: -float(r["lpips_untrained"]))
    assert [entry["file"] for entry in rows[0]["worst"]] == [r["file"] for r in by_lpips[:3]]
    assert (tmp_path / "out" / "worst.png").is_file() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("lpips", [[math.nan, 0.1, 0.9, 0.5], [0.9, 0.1, 0.5, math.nan]])
def test_an_image_without_a_number_is_among_the_worst(lpips):
    images, pairs = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), KeptPairs(2, worst=True)
    for part in (slice(2), slice(2, 4)):
        places = torch.arange(4)[part]
        pairs.observe([ScoredBatch(places, places, images[part], images[part], {"lpips": torch.tensor(lpips)[part]})])
    assert [pair.place for pair in pairs.gather()] == [lpips.index(math.nan), lpips.index(0.9)]


def test_packed_reconstructions_are_those_of_the_model(evaluate, checkpoint, images, tmp_path):
    shutil.copytree(images, tmp_path / "pictures")
    (tmp_path / "pictures/class0/broken.png").write_bytes(b"no image")
    files = f"--csv {tmp_path}/a.csv --save_npz {tmp_path}/a.npz --max_bad_share 1"
    evaluate(f"--checkpoint {checkpoint} --data_dir {tmp_path}/pictures {files}")
    packed = torch.from_numpy(np.load(tmp_path / "a.npz")["arr_0"]).permute(0, 3, 1, 2)
    lines = table(tmp_path / "a.csv")
    originals = np.stack([adm_center_crop(np.asarray(Image.open(row["file"])), 64) for row in lines])
    originals = torch.from_numpy(originals).permute(0, 3, 1, 2)
    expected = unit_to_bytes(load_trained(checkpoint).rae(originals))
    assert len(packed) == 11 and (packed.int() - expected.int()).abs().max() <= 1
    assert [float(row["psnr"]) for row in lines] == pytest.approx(psnr(originals, packed).tolist(), rel=1e-5)


def test_several_data_sets_in_one_call(evaluate, checkpoint, images, tmp_path):
    more = write_images(tmp_path / "faces", 5, seed=1)
    files = f"--csv {tmp_path}/a.csv --output_dir {tmp_path}/out"
    out, content = evaluate(f"--checkpoint {checkpoint} {files} --data_dir {images} {more}")
    assert [r["images"] for r in content["results"]] == [11, 5] and out.count("Score: ") == 2
    alone = evaluate(f"--checkpoint {checkpoint} --data-dir {more}")[1]["results"][0]
    assert alone["rfid_untrained"] == pytest.approx(content["results"][1]["rfid_untrained"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["faces", "pictures"]
    assert [row["data_dir"] for row in table(tmp_path / "a.csv")] == [str(images)] * 11 + [str(more)] * 5


def test_checkpoint_is_scored_with_the_settings_of_its_training(evaluate, caplog, checkpoint, tmp_path):
    """EXIF, quantization and the size limit come from its config, unless the command line sets them."""
    pictures = write_images(tmp_path / "pictures", 6)
    for file in pictures.rglob("*.png"):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        Image.open(file).save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    Image.new("RGB", (400, 400)).save(pictures / "class0" / "large.png")
    training = {"data": {"exif": "ignore", "max_megapixels": 0.1}, "callbacks": {"rfid": {"quantization": "truncate"}}}
    training |= {"trainer": {"precision": "bf16-mixed"}}  # not followed
    other = write_checkpoint(tmp_path / "other.ckpt", pictures, **training)

    def run(file: Path, *more: str) -> tuple[list, dict]:
        content = evaluate(f"--checkpoint {file} --data_dir {pictures} --max_bad_share 1 {' '.join(more)}")[1]
        assert content["precision"] == "32"
        return [content[name] for name in ("exif", "quantization", "max_megapixels")], content["results"][0]

    with caplog.at_level("INFO", "src"):
        plain, plain_result = run(checkpoint)
        assert "--exif apply (by default)" in caplog.text
        followed, result = run(other)
        assert "--exif ignore (as in training, data.exif)" in caplog.text
        assert "--quantization truncate (as in training, callbacks.rfid.quantization)" in caplog.text
        said, _ = run(other, "--exif apply --quantization round")
        assert "the training of this checkpoint used data.exif=ignore" in caplog.text
    assert (plain, plain_result["images"]) == (["apply", "round", 80], 7)
    assert (followed, result["images"]) == (["ignore", "truncate", 0.1], 6)
    assert said == ["apply", "round", 0.1]
    for exif in ("apply", "ignore"):
        for quantization in ("round", "truncate"):
            value = run(other, f"--exif {exif} --quantization {quantization}")[1]["psnr"]
            followed = (exif, quantization) == ("ignore", "truncate")
            assert (value == pytest.approx(result["psnr"], rel=1e-6)) == followed


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(capsys, checkpoint, images, tmp_path):
    """Also if the second process has no image: its only one of three can't be decoded."""
    few = open_images(write_images(tmp_path / "few", 3), None, None)
    (row,) = few.rows[evaluation_rows(3, 3, 2, 1)]
    Path(few.source.name(int(row))).write_bytes(b"no image")

    def words(folder: Path) -> str:
        files = f"--json {folder}/a.json --csv {folder}/a.csv --output_dir {folder}/out --max_bad_share 1"
        model = f"--checkpoint {checkpoint} --data_dir {images} {few.folder}"
        return f"{model} --noise_sigma 0 0.5 --worst 2 --save_samples_count 5 {files}"

    one, two = tmp_path / "one", tmp_path / "two"
    assert eval_rfid.main(shlex.split(f"{QUICK} {words(one)}")) == 0
    out = two_processes("src/eval_rfid.py", *shlex.split(f"{QUICK} {words(two)}"))
    assert capsys.readouterr().out.count("Score: ") == out.count("Score: ") == 2  # one process prints
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    rows = [json.loads((folder / "a.json").read_text())["results"] for folder in (one, two)]
    assert [row["images"] for row in rows[1]] == [11, 11, 2, 2]
    for a, b in zip(*rows, strict=True):
        for key in ("rfid_untrained", "psnr", "ssim", "lpips_untrained"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert a["images"] == b["images"] and a["worst"] == b["worst"]
    lines = [table(folder / "a.csv") for folder in (one, two)]
    assert [r["file"] for r in lines[0]] == [r["file"] for r in lines[1]]
    assert [float(r["psnr"]) for r in lines[0]] == pytest.approx([float(r["psnr"]) for r in lines[1]], rel=1e-4)


# -- errors


def test_missing_gpu_is_an_error(refused, checkpoint, images):
    if torch.cuda.is_available():
        pytest.skip("a GPU is available")
    assert "--device cpu" in refused(f"--checkpoint {checkpoint} --data_dir {images}", quick="")


@pytest.fixture(scope="module")
def odd(tmp_path_factory, checkpoint) -> Path:
    """Write data sets and files that can't be scored."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "empty").mkdir()
    write_images(folder / "one", 1)
    for file in write_images(folder / "two", 2).rglob("*.png"):
        file.write_bytes(b"no image")
    (folder / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:-1000])
    torch.save({"a": torch.zeros(1)}, folder / "other.ckpt")
    (folder / "wrong.pth").write_bytes(b"")
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/checkpoints/last.ckpt").touch()
    return folder


FILE = "--inception_weights pretrained --inception_path ODD"


@pytest.mark.parametrize(("arguments", "words"), [
    ("", ["one of --checkpoint"]),
    ("--checkpoint CHECKPOINT --decoder x.pt", ["x.pt"]),
    ("--checkpoint CHECKPOINT --image-size 128", ["--image_size 128, but the model of", "64 px"]),
    ("--checkpoint CHECKPOINT --stats x", ["--stats"]),
    ("--checkpoint CHECKPOINT --layers k7", ["--layers=k7"]),
    ("--checkpoint CHECKPOINT --split test", ["no split 'test'"]),
    ("--checkpoint CHECKPOINT --split held_out", ["held nothing out"]),
    ("--checkpoint CHECKPOINT --reference a.npz b.npz", ["--reference names 2"]),
    ("--checkpoint CHECKPOINT --reference no.npz", ["no.npz"]),
    ("--checkpoint CHECKPOINT --device tpu", ["--device tpu"]),
    ("--decoder IMAGES/class0/000.png", ["needs its encoder"]),
    ("--checkpoint ODD/cut.ckpt", ["cut.ckpt"]),
    ("--checkpoint ODD/none.ckpt", ["not found", "That folder has cut.ckpt"]),
    ("--checkpoint ODD/run", ["That folder has checkpoints/last.ckpt"]),
    ("--checkpoint ODD/other.ckpt", ["--decoder"]),
    ("--checkpoint CHECKPOINT --data_dir ODD/empty", ["is empty"]),
    ("--checkpoint CHECKPOINT --data_dir ODD/one", ["at least 2 images, got 1"]),
    ("--checkpoint CHECKPOINT --data_dir ODD/nowhere", ["No dataset at"]),
    ("--checkpoint CHECKPOINT --data_dir ODD/two --csv ODD/a.csv --save_npz ODD/a.npz", ["bad images"]),
    ("--checkpoint CHECKPOINT --data_dir ODD/two --max_bad_share 1", ["could be decoded"]),
    ("--checkpoint CHECKPOINT --csv /proc/a.csv", ["--csv /proc/a.csv can't be written"]),
    (f"--checkpoint CHECKPOINT {FILE}/no.pth", ["no.pth", "download_weights.py", "--inception_weights untrained"]),
    (f"--checkpoint CHECKPOINT {FILE}/wrong.pth", ["wrong.pth"]),
    (f"--checkpoint CHECKPOINT {FILE}/no.pth --inception_width 0.5", ["width"]),
])  # fmt: skip
def test_invalid_arguments_and_files_are_rejected(refused, checkpoint, images, odd, arguments, words):
    for name, place in (("CHECKPOINT", checkpoint), ("IMAGES", images), ("ODD", odd)):
        arguments = arguments.replace(name, str(place))
    message = refused(f"--data_dir {images} {arguments}")
    assert all(word in message for word in words)
    assert not list(odd.glob("*a.*"))  # no partial file stays


def test_images_smaller_than_the_model_are_enlarged(evaluate, checkpoint, tmp_path):
    small = write_images(tmp_path / "small", 4, side=9)
    assert "4 of 4" in evaluate(f"--checkpoint {checkpoint} --data_dir {small}")[0]


class Malice:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("option", ["--checkpoint", "--decoder", "--stats", "--reference", "--inception_path"])
def test_code_in_a_file_is_rejected_and_not_run(refused, checkpoint, images, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "malicious.npz"
    if option == "--reference":
        np.savez(file, arr_0=np.array([Malice()], dtype=object))
    else:
        torch.save({"state_dict": Malice(), "mean": Malice(), "decoder_layers.0": Malice()}, file)
    encoder = f"--encoder_cls Dinov2withNorm --encoder {PROJECT_ROOT}/configs/encoder/dinov2_tiny"
    model = {"--checkpoint": f"--checkpoint {file}", "--decoder": f"--decoder {file} {encoder}"}
    weights = "--inception_weights pretrained" if option == "--inception_path" else ""
    refused(f"{model.get(option, f'--checkpoint {checkpoint} {option} {file}')} --data_dir {images} {weights}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("arguments", [
    "--worst 3", "--save_npz x.npz --data_dir a b", "--num_samples 0", "--noise_sigma -1", "--num 3", "--weights best",
])  # fmt: skip
def test_misuse_exits_with_2(arguments):
    with pytest.raises(SystemExit, match="^2$"):
        eval_rfid.main(["--checkpoint", "c", "--data_dir", "d", *arguments.split()])


def test_help_is_quick_and_has_the_published_command():
    command = [sys.executable, "-X", "importtime", "src/eval_rfid.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--exif ignore --quantization truncate" in done.stdout
    told = " ".join(done.stdout.split())
    assert "checkpoint's data.exif, else apply" in told and "callbacks.rfid.quantization, else round" in told
    assert "torch" not in done.stderr


# -- third-party models


def assert_same_scores(evaluate, one: str, other: str) -> None:
    mine, theirs = (evaluate(line)[1]["results"][0] for line in (one, other))
    assert mine["psnr"] == pytest.approx(theirs["psnr"], rel=1e-5)
    assert mine["rfid_untrained"] == pytest.approx(theirs["rfid_untrained"], rel=1e-3)


def test_an_official_decoder_with_its_statistics(evaluate, images, tmp_path):
    rae = make_rae()
    rae.encoder.model.save_pretrained(tmp_path / "encoder")
    torch.save(rae.decoder.state_dict(), tmp_path / "model.pt")
    torch.save({"mean": torch.rand(rae.latent_shape), "var": torch.rand(rae.latent_shape) + 0.5}, tmp_path / "stats.pt")
    one_block = {"encoder_params": {"dinov2_path": "configs/encoder/dinov2_tiny", "weights": "untrained"}}
    same = write_checkpoint(tmp_path / "same.ckpt", images, model=one_block)
    assert_same_scores(  # statistics are undone by the decoder, so the images are the same
        evaluate,
        f"--decoder {tmp_path}/model.pt --encoder_cls Dinov2withNorm --encoder {tmp_path}/encoder --stats {tmp_path}/stats.pt "
        f"--decoder_config configs/decoder/tiny --image_size 64 --data_dir {images}",
        f"--checkpoint {same} --data_dir {images}",
    )


def test_encoder_of_a_checkpoint_may_be_elsewhere(evaluate, refused, checkpoint, images, tmp_path, monkeypatch):
    elsewhere = shutil.copytree(PROJECT_ROOT / "configs/encoder/dinov2_tiny", tmp_path / "elsewhere")
    words, reads, load = f"--checkpoint {checkpoint} --data_dir {images}", [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: (reads.append(file), load(file, **options))[1])
    assert_same_scores(evaluate, words, f"{words} --encoder {elsewhere}")
    assert len(reads) == 2  # gigabytes, read once per call
    assert "siglip" in refused(f"{words} --encoder {PROJECT_ROOT}/configs/encoder/siglip_tiny")
