"""src/latent_stats.py matches numpy for any batch size and number of processes, and after an interruption."""

import shlex

import numpy as np
import pytest
import torch

from src.core.distributed import Process
from src.data.dataset import EvaluationTransform
from src.data.decode import Decoder
from src.data.order import evaluation_rows
from src.evaluation.images import open_images
from src.evaluation.latent_statistics import latent_statistics, partial_file
from src.evaluation.options import StatisticsOptions
from src.evaluation.reconstruction_inputs import open_inputs
from src.latent_stats import main
from tests.tiny_models import checkpoint, photos, tiny_rae, two_processes


def run(line: str) -> int:
    return main(shlex.split(f"{line} --device cpu --num_workers 0"))


def stacked(rae, folder):
    """Return all raw latents in float64, from the evaluation crop, one image at a time."""
    inputs = open_inputs([str(folder)], None)
    crop = EvaluationTransform(rae.geometry.image_size, Decoder("apply", 80))
    images = (torch.from_numpy(crop(inputs.source.encoded(i)).copy()).permute(2, 0, 1) for i in inputs.rows)
    return np.stack([rae.encode_raw(image[None])[0].double().numpy() for image in images])


def moments(z):
    return {"mean": torch.from_numpy(z.mean(0)).float(), "var": torch.from_numpy(z.var(0)).float()}


def same(one, two):
    for name in ("mean", "var"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_latents_far_from_zero_keep_their_variance(tmp_path, monkeypatch):
    rae, images = tiny_rae(tmp_path), open_images(photos(tmp_path / "photos", 9), "all", None)
    z = torch.from_numpy(np.random.default_rng(0).normal(100, 0.5, (9, *rae.latent_shape)))
    parts = iter(z.split(4))
    monkeypatch.setattr(rae, "encode_raw", lambda images: next(parts))
    options = StatisticsOptions(checkpoint="x", output=tmp_path / "s.pt", num_workers=0, batch_size=4)
    found = latent_statistics(rae, images, options, Process(torch.device("cpu")), lambda done, total: None)
    torch.testing.assert_close(found["var"], z.var(0, correction=0).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_statistics_equal_numpy_for_any_batch_size(tmp_path, batch):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 9)
    z = stacked(tiny_rae(tmp_path), folder)
    assert run(f"--checkpoint {file} --data_dir {folder} --batch_size {batch} --output {tmp_path}/s.pt") == 0
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    same(found, moments(z))
    assert found["images"] == 9 and str(tmp_path) not in str(found["data"])
    assert sorted(path.name for path in tmp_path.glob("*s.pt*")) == ["s.pt"]
    rae = tiny_rae(tmp_path, normalization_stat_path=tmp_path / "s.pt")  # the file loads and normalizes
    assert rae.normalize(torch.from_numpy(z).float()).mean(0).abs().max() < 1e-3


@pytest.mark.slow
def test_two_processes_give_the_same(tmp_path):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 7)
    words = f"--checkpoint {file} --data_dir {folder} --device cpu --num_workers 0 --batch_size 2"
    two_processes("src/latent_stats.py", *shlex.split(f"{words} --output {tmp_path}/two.pt"))
    assert run(f"{words} --output {tmp_path}/one.pt") == 0
    same(*(torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt")))


class Stop(Exception):
    pass


def test_interrupted_pass_resumes_and_a_different_one_starts_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("src.evaluation.latent_statistics.PIECE_IMAGES", 4)
    rae, images = tiny_rae(tmp_path), open_images(photos(tmp_path / "photos", 9), "all", None)

    def work(name, update=lambda done, total: None, **options):
        options = StatisticsOptions(checkpoint="x", output=tmp_path / name, num_workers=0, **options)
        return latent_statistics(rae, images, options, Process(torch.device("cpu")), update)

    once, seen = work("once.pt", batch_size=4), []

    def stop(done, total):
        if done > 4:
            raise Stop

    with pytest.raises(Stop):
        work("s.pt", stop, batch_size=4)
    assert partial_file(tmp_path / "s.pt").is_file()
    again = work("s.pt", lambda done, total: seen.append(done), batch_size=3)
    assert seen[0] == 4
    same(again, once)
    assert work("s.pt", num_samples=6)["images"] == 6  # the partial file is still there
    assert "starting over" in caplog.text
    partial_file(tmp_path / "s.pt").write_bytes(b"rubbish")
    some = stacked(rae, tmp_path / "photos")[evaluation_rows(9, 6)]  # of both classes
    same(work("s.pt", num_samples=6), moments(some))


def test_model_from_a_config(tmp_path, capsys):
    data = f"data.data_dir={photos(tmp_path / 'photos', 4)} data.use_hf_dataset=false"
    assert run(f"--config experiment=rae_dummy {data} --output {tmp_path}/s.pt") == 0
    assert "192 x 8 x 8" in capsys.readouterr().out
    assert run(f"--config experiment=no_such --output {tmp_path}/t.pt") == 1
    assert "rae_dino" in capsys.readouterr().err


def test_invalid_input_is_rejected(tmp_path, capsys):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 4)
    photos(tmp_path / "only/val", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.pt").write_text("mine")
    for words, text in (
        (f"--data_dir {tmp_path}/empty --output {tmp_path}/s.pt", "No images"),
        (f"--data_dir {tmp_path}/only --output {tmp_path}/s.pt", "'train' (--split); it has val. Set --split val."),
        (f"--data_dir {folder} --output {tmp_path}/mine.pt", "--overwrite"),
        (f"--data_dir {folder} --output /proc/x/s.pt", "can't be written"),
        (f"--data_dir {folder} --num_samples 1 --output {tmp_path}/t.pt", "two images"),
    ):
        assert run(f"--checkpoint {file} {words}") == 1
        assert text in capsys.readouterr().err
    assert (tmp_path / "mine.pt").read_text() == "mine"
    with pytest.raises(SystemExit, match="^2$"):
        run(f"--data_dir {folder} --output {tmp_path}/t.pt")
