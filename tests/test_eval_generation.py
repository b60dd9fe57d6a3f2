"""`src/eval_generation.py`: npz, folder and latents give the same scores; invalid input is rejected."""

import json
import shlex
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from src import eval_generation, reconstruct
from src.data.latents import LatentStore, LatentWriter, write_index
from src.formats.checkpoint import load_trained
from src.formats.folder import write_folder
from src.metrics.generation import GenerationReference, ImageStatistics, compute_scores
from src.metrics.inception import InceptionFeatures
from tests.tiny_models import checkpoint, two_processes

PX = 64
QUICK = "--device cpu --num_workers 0 --batch_size 4"
TINY = f"{QUICK} --inception_weights tiny"
SCORES = [f"{name}_untrained" for name in ("gfid", "sfid", "inception_score", "precision", "recall")]


def pictures(count, seed, size=PX):
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in coarse])


def as_folder(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def as_npz(path, images):
    np.savez(path, arr_0=images)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write generated images and a reference, each as npz and as folder."""
    root = tmp_path_factory.mktemp("images")
    for name, images in (("generated", pictures(11, 1)), ("reference", pictures(9, 2))):
        as_npz(root / f"{name}.npz", images)
        as_folder(root / name, images)
    return root


@pytest.fixture
def evaluate(run_program):
    """Return a function that runs the script and returns its stdout and its results."""

    def run(line):
        out, content = run_program(eval_generation.main, f"{TINY} {line}")
        return out, content["results"]

    return run


@pytest.fixture
def refused(run_program):
    return lambda line, quick=TINY: run_program(eval_generation.main, f"{quick} {line}", code=1)


def test_npz_folder_and_functions_give_the_same_scores(evaluate, files):
    out, (result,) = evaluate(f"--samples {files}/generated.npz --reference {files}/reference.npz")
    assert {*SCORES, "images", "image_size", "images_of"} == result.keys()
    for word in ("gFID", "sFID", "IS", "prec.", "rec.", f"{result['gfid_untrained']:.4f}", "UNTRAINED"):
        assert word in out
    _, (other,) = evaluate(f"--samples {files}/generated --reference {files}/reference --batch_size 5")
    assert [other[name] for name in SCORES] == pytest.approx([result[name] for name in SCORES], rel=1e-5)

    inception, found = InceptionFeatures(None, "tiny"), []
    for name in ("generated", "reference"):
        images = torch.from_numpy(np.load(files / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)
        found.append(ImageStatistics(inception, 4, len(images)))
        found[-1].update(images, torch.arange(len(images)))
    direct = compute_scores(found[0], GenerationReference.of(found[1]))
    assert {name: result[name] for name in direct} == direct


def test_results_describe_the_images_of_the_reference(run_program, files, tmp_path):
    for split, count in (("train", 6), ("val", 5)):
        as_folder(tmp_path / "set" / split, pictures(count, 3))
    for option, split, count in (("", "val", 5), ("--reference_split train --exif ignore", "train", 6)):
        line = f"{TINY} --samples {files}/generated.npz --reference {tmp_path}/set {option}"
        facts = run_program(eval_generation.main, line)[1]["reference_images"]
        assert (facts["split"], facts["available"], facts["exif"]) == (split, count, "ignore" if option else "apply")


@pytest.mark.slow
def test_two_processes_and_the_first_images_only(evaluate, files, tmp_path):
    line = f"--samples {files}/generated --reference {files}/reference.npz --num_samples 7"
    two_processes("src/eval_generation.py", *shlex.split(f"{TINY} {line} --json {tmp_path}/two.json"))
    (shared,) = json.loads((tmp_path / "two.json").read_text())["results"]
    few = as_npz(tmp_path / "few.npz", pictures(11, 1)[:7])
    _, (alone,) = evaluate(f"--samples {few} --reference {files}/reference.npz")
    _, (first,) = evaluate(f"--samples {files}/generated.npz --reference {files}/reference.npz --num_samples 7")
    assert [first[name] for name in SCORES] == pytest.approx([alone[name] for name in SCORES], rel=1e-5)
    assert [shared[name] for name in SCORES] == pytest.approx([alone[name] for name in SCORES], rel=1e-5)
    assert shared["images"] == first["images"] == 7


@pytest.mark.slow
def test_latents_through_several_decoders(evaluate, refused, files, tmp_path):
    file = checkpoint(tmp_path)
    line = f"--checkpoint {file} --input {files}/generated {QUICK}"
    words = f"{line} --latents raw --write npz --output {tmp_path}/out"
    assert reconstruct.main(shlex.split(words)) == 0
    loaded = load_trained(file)
    (tmp_path / "other").mkdir()
    with torch.no_grad():
        for parameter in loaded.rae.decoder.parameters():
            parameter.mul_(0.8)
    write_folder(loaded, tmp_path / "other", with_encoder=True)

    latents, reference = f"--latents {tmp_path}/out/latents", f"--reference {files}/reference.npz"
    out, (first, second) = evaluate(f"{latents} --decoder {file} {tmp_path}/other {reference}")
    _, (images,) = evaluate(f"--samples {tmp_path}/out/reconstructions.npz {reference}")
    assert [first[name] for name in SCORES] == pytest.approx([images[name] for name in SCORES], rel=1e-3)
    assert second["gfid_untrained"] != pytest.approx(first["gfid_untrained"], rel=1e-3)
    assert str(file) in out and f"{tmp_path}/other" in out
    _, (alone,) = evaluate(f"{latents} --checkpoint {file} {reference} --num_samples 6")
    assert alone["images"] == 6

    z = load_trained(file).rae.normalize(torch.cat([z for _, _, z in LatentStore(tmp_path / "out/latents").batches(4)]))
    np.savez(tmp_path / "z.npz", latents=z.numpy(), labels=np.zeros(len(z)))
    _, (packed,) = evaluate(f"--latents {tmp_path}/z.npz --checkpoint {file} {reference} --num_samples 6")
    assert [packed[name] for name in SCORES] == pytest.approx([alone[name] for name in SCORES], rel=1e-3)
    np.savez(tmp_path / "z.npz", latents=z[:, :3].numpy())
    assert "(3, 4, 4) there, (64, 4, 4) here" in refused(f"--latents {tmp_path}/z.npz --checkpoint {file} {reference}")

    mine, other = loaded.rae.encoder.identity(), {"encoder": dict.fromkeys(loaded.rae.encoder.identity(), "x")}
    for settings, values, said in (
        (json.dumps({"encoder": mine} | {"statistics": "0" * 16}), z, f"statistics: {'0' * 16} there"),
        (json.dumps(other), z, "another encoder, by class"),
        ("[1]", z, "settings"),
        ('{"encoder": 3}', z, "encoder=3"),
        (json.dumps({"encoder": mine}), torch.where(z == z.max(), torch.nan, z), "NaN or infinite"),
    ):
        np.savez(tmp_path / "z.npz", latents=values.numpy(), settings=settings)
        assert said in refused(f"--latents {tmp_path}/z.npz --checkpoint {file} {reference}"), settings

    writer = LatentWriter(tmp_path / "small", (3, 2, 2), torch.float32, 0)
    writer.write(torch.zeros(4, 3, 2, 2), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    facts = json.loads((tmp_path / "out/latents/index.json").read_text()) | {"shape": [3, 2, 2], "count": 4}
    write_index(tmp_path / "small", writer.close(), facts)
    words = f"--latents {tmp_path}/small --checkpoint {file} {reference}"
    assert "(3, 2, 2) there, (64, 4, 4) here" in refused(words)


def test_unsuitable_samples_and_references_are_rejected(refused, files, tmp_path):
    reference, samples = f"--reference {files}/reference.npz", f"--samples {files}/generated.npz"
    small = as_npz(tmp_path / "small.npz", pictures(5, 1, 48))
    message = refused(f"--samples {small} {reference}")
    assert "64 x 64 px, this evaluation has 48 x 48 px" in message
    assert "make_reference.py --kind images --image_size 48" in message
    one = as_npz(tmp_path / "one.npz", pictures(1, 1))
    assert "has 1 image: a Frechet distance needs at least 2" in refused(f"--samples {one} {reference}")
    assert "has 1 image: 2 or more" in refused(f"{samples} --reference {as_folder(tmp_path / 'one', pictures(1, 1))}")
    mixed = shutil.copytree(files / "generated", tmp_path / "mixed")
    Image.fromarray(pictures(1, 1, 32)[0]).save(mixed / "z.png")
    assert "square images of one size, found 64 x 64 px" in refused(f"--samples {mixed} {reference}")
    header, broken = b"IHDR" + bytes(2), tmp_path / "broken/a.png"  # on which Pillow raises ValueError
    broken.parent.mkdir()
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + (2).to_bytes(4) + header + zlib.crc32(header).to_bytes(4))
    assert "found nothing readable" in refused(f"--samples {broken.parent} {reference}")
    assert "(--reference). Folders in" in refused(f"{samples} --reference {tmp_path}/nowhere")
    held_out = f"{samples} --reference {files}/generated --reference_split held_out"
    assert "--reference_split held_out: training held nothing out" in refused(held_out)
    wide = as_npz(tmp_path / "wide.npz", pictures(5, 1)[:, :32])
    assert "32 x 64 px: expected squares" in refused(f"--samples {wide} {reference}")
    assert "not a folder and not an .npz" in refused(f"--samples {tmp_path}/nothing {reference}")
    assert "download_weights.py" in refused(f"{samples} {reference} --inception_path {tmp_path}/no.pth", QUICK)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(256), sigma=np.eye(256))
    assert "comes from another tool" in refused(f"{samples} --reference {tmp_path}/foreign.npz")


@pytest.mark.parametrize(("line", "words"), [
    ("--reference r.npz", "give one of --samples and --latents"),
    ("--samples a --latents b --reference r.npz", "give one of --samples and --latents"),
    ("--samples a --decoder b --reference r.npz", "go with --latents"),
    ("--latents a --reference r.npz", "need models to decode them"),
    ("--samples a", "--reference"),
    ("--samples a --reference r.npz --reference_split val", "--reference_split goes with a data set"),
])  # fmt: skip
def test_misuse_exits_with_2(capsys, line, words):
    with pytest.raises(SystemExit) as error:
        eval_generation.main(shlex.split(line))
    assert error.value.code == 2 and words in capsys.readouterr().err
