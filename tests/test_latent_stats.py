"""src/latent_stats.py against numpy, for any batch size, number of processes and interruption."""

from functools import partial

import numpy as np
import pytest
import torch
from src.core.processes import Place

from src.data.decode import Decoder
from src.evaluation.images import open_images
from src.evaluation.latent_moments import LatentSums
from src.evaluation.latent_statistics import latent_statistics, partial_file
from src.evaluation.reconstruction_inputs import FitTransform, open_inputs
from src.latent_stats import main
from src.models.rae import RAE
from tests.tiny_models import checkpoint, photos, tiny_rae, two_processes

LOADING = {"batch_size": 4, "num_workers": 0, "decoder": Decoder("apply", 80.0), "max_bad_share": 0.01}


def run(*words) -> int:
    return main([str(word) for word in (*words, "--device", "cpu", "--num_workers", 0)])


def stacked(rae, folder):
    """All raw latents, float64, by the evaluation crop, one image at a time."""
    inputs = open_inputs([str(folder)], None)
    crop = FitTransform(rae.geometry.image_size, "crop", Decoder("apply", 80))
    images = [
        torch.from_numpy(crop(inputs.source.encoded(i)).copy()).permute(2, 0, 1) for i in range(len(inputs.source))
    ]
    return np.stack([rae.encode_raw(image[None])[0].double().numpy() for image in images])


def test_sums_match_numpy_and_add_up():
    z = np.random.default_rng(0).normal(100, 0.5, (37, 3, 2, 2))
    parts = [LatentSums((3, 2, 2)) for _ in range(3)]
    for part, rows in zip(parts, np.array_split(z, 3), strict=True):
        for chunk in np.array_split(rows, 2):
            part.update(torch.from_numpy(chunk))
    total = parts[0].merge(parts[1]).merge(LatentSums.from_state(parts[2].state()))
    assert total.count == 37
    np.testing.assert_allclose(total.mean().numpy(), z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(total.var().numpy(), z.var(0), rtol=1e-8)


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_statistics_equal_numpys_for_any_batch(tmp_path, batch):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 9)
    z = stacked(tiny_rae(tmp_path), folder)
    assert run("--checkpoint", file, "--data_dir", folder, "--batch_size", batch, "--output", tmp_path / "s.pt") == 0
    found = torch.load(tmp_path / "s.pt", weights_only=True)
    np.testing.assert_allclose(found["mean"].numpy(), z.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["var"].numpy(), z.var(0), atol=1e-6)
    assert found["mean"].dtype == found["var"].dtype == torch.float32 and found["images"] == 9
    assert str(tmp_path) not in str(found["data"])


def test_two_processes_give_the_same(tmp_path):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 7)
    words = ("--checkpoint", file, "--data_dir", folder, "--device", "cpu", "--num_workers", 0, "--batch_size", 2)
    two_processes("src/latent_stats.py", *words, "--output", tmp_path / "two.pt")
    assert run("--checkpoint", file, "--data_dir", folder, "--output", tmp_path / "one.pt") == 0
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for name in ("mean", "var"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_an_interrupted_pass_goes_on(tmp_path):
    rae, images = tiny_rae(tmp_path), open_images(photos(tmp_path / "photos", 9), "all", None)
    output = tmp_path / "s.pt"
    once = latent_statistics(
        rae, images, None, LOADING, Place(torch.device("cpu")), output, lambda *_: None, piece_images=4
    )
    partial_file(output).unlink()  # the caller's task, once it has written the output
    seen = []

    class Stop(Exception):
        pass

    def stop(done, total):
        if done > 4:
            raise Stop

    work = partial(
        latent_statistics, rae, images, None, place=Place(torch.device("cpu")), output=output, piece_images=4
    )
    with pytest.raises(Stop):
        work(loading=LOADING, progress=stop)
    assert partial_file(output).is_file()
    again = work(loading=LOADING | {"batch_size": 3}, progress=lambda done, total: seen.append(done))
    assert seen[0] == 4
    torch.testing.assert_close(again["mean"], once["mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(again["var"], once["var"], rtol=0, atol=1e-6)


def test_sums_of_another_pass_are_not_used(tmp_path, caplog):
    rae, images = tiny_rae(tmp_path), open_images(photos(tmp_path / "photos", 9), "all", None)
    output = tmp_path / "s.pt"
    work = partial(
        latent_statistics,
        rae,
        loading=LOADING,
        place=Place(torch.device("cpu")),
        output=output,
        progress=lambda *_: None,
        piece_images=4,
    )
    work(images, None)
    assert work(images, 6)["images"] == 6
    assert "starting afresh" in caplog.text
    partial_file(output).write_bytes(b"rubbish")
    assert work(images, 6)["images"] == 6


def test_the_file_is_taken_and_normalises(tmp_path):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 30)
    assert run("--checkpoint", file, "--data_dir", folder, "--output", tmp_path / "s.pt") == 0
    source = tiny_rae(tmp_path).encoder.source
    rae = RAE(
        "Dinov2withNorm",
        source,
        {"dinov2_path": source, "weights": "untrained"},
        tmp_path / "decoder.json",
        16,
        64,
        normalization_stat_path=tmp_path / "s.pt",
    )
    z = torch.from_numpy(stacked(rae, folder)).float()
    normal = rae.normalize(z)
    assert normal.mean(0).abs().max() < 1e-3 and (normal.var(0, correction=0) - 1).abs().max() < 0.02


def test_from_a_configuration(tmp_path, capsys):
    words = (
        "--config",
        "experiment=rae_dummy",
        f"data.data_dir={photos(tmp_path / 'photos', 4)}",
        "data.use_hf_dataset=false",
    )
    assert run(*words, "--output", tmp_path / "s.pt") == 0
    assert "192 x 8 x 8" in capsys.readouterr().out
    assert run("--config", "experiment=no_such", "--output", tmp_path / "t.pt") == 1
    assert "rae_dino" in capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    file, folder = checkpoint(tmp_path), photos(tmp_path / "photos", 4)
    (tmp_path / "empty").mkdir()
    assert run("--checkpoint", file, "--data_dir", tmp_path / "empty", "--output", tmp_path / "s.pt") == 1
    assert "No images" in capsys.readouterr().err
    (tmp_path / "s.pt").write_text("mine")
    assert run("--checkpoint", file, "--data_dir", folder, "--output", tmp_path / "s.pt") == 1
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "s.pt").read_text() == "mine"
    assert run("--checkpoint", file, "--data_dir", folder, "--output", "/proc/x/s.pt") == 1
    assert "can't be written" in capsys.readouterr().err
    assert run("--checkpoint", file, "--data_dir", folder, "--num_samples", 1, "--output", tmp_path / "t.pt") == 1
    assert "two images" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run("--data_dir", folder, "--output", tmp_path / "t.pt")
    assert stop.value.code == 2
