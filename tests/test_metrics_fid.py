"""FID statistics and distance: closed form, parity with torchmetrics, any split into batches, npz files."""

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.metrics.fid import FeatureStatistics, Gaussian, few_images_warning, frechet_distance, load_npz, save_npz
from src.metrics.generation import load_reference
from src.metrics.inception import InceptionFeatures
from src.metrics.npz import ImageNpz, write_image_npz
from src.metrics.reference import Preparation


def features(count: int, dim: int, seed: int, offset: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mix + offset + 0.1 * seed


def statistics(rows: Tensor, batch: int = 10**6) -> FeatureStatistics:
    made = FeatureStatistics(rows.shape[1])
    for part in rows.split(batch):
        made.update(part)
    return made


def images(count: int, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_closed_form_of_commuting_gaussians() -> None:
    # |m|^2 + sum (sqrt(a) - sqrt(b))^2 in a shared eigenbasis
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    a, b = torch.linspace(0.1, 3, 12).double(), torch.linspace(2, 0, 12).double()  # b is singular
    mean = torch.linspace(-1, 1, 12).double()
    first = Gaussian(torch.zeros(12).double(), basis @ a.diag() @ basis.T)
    second = Gaussian(mean, basis @ b.diag() @ basis.T)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("count", [60, 400])
def test_agrees_with_torchmetrics_on_the_same_features(count: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 64)).double().requires_grad_(False)
    network.num_features = 64
    theirs = FrechetInceptionDistance(network, normalize=False, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    real, fake = torch.rand(2, count, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fake = 0.7 * real + 0.5 * fake
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(statistics(network(real)), statistics(network(fake)))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)


@pytest.mark.parametrize("count", [3, 100, 900])  # below and above the 128 dimensions
@pytest.mark.parametrize("offset", [0.4, 1e4])  # mean far above the deviation, as features of a weak network
def test_any_split_into_batches_gives_the_same_distance(count: int, offset: float) -> None:
    real, fake = features(count, 128, 1, offset), features(count, 128, 2, offset)
    whole = frechet_distance(statistics(real), statistics(fake))
    for batch in (1, 7, 64):
        assert frechet_distance(statistics(real, batch), statistics(fake, batch)) == pytest.approx(whole, rel=1e-8)


@pytest.mark.parametrize("count", [2, 40, 500])
def test_distance_of_a_set_to_itself_is_zero(count: int) -> None:
    rows = features(count, 256, 1)
    assert 0 <= frechet_distance(statistics(rows), statistics(rows.flip(0), 33)) < 1e-6


@pytest.mark.parametrize("count", [2, 40, 127, 128])
def test_few_images_use_a_smaller_eigenproblem_with_the_same_result(count: int) -> None:
    """The count sets the size of the eigenproblem; a count that is too small is noticed."""
    scale = torch.logspace(0, -5, 256) * (torch.arange(256) % 5 > 0)  # some features are constant
    a, b = (statistics(features(count, 256, seed) * scale) for seed in (1, 2))
    moments = [(part.mean, part.covariance) for part in (a, b)]
    whole = frechet_distance(*(Gaussian(*part) for part in moments))
    assert frechet_distance(a, b) == pytest.approx(whole, rel=1e-9)
    assert frechet_distance(*(Gaussian(*part, 2) for part in moments)) == pytest.approx(whole, rel=1e-9)


def test_fewer_than_two_images_and_other_networks_are_errors() -> None:
    one, two = statistics(features(1, 8, 1)), statistics(features(2, 8, 1))
    with pytest.raises(UserError, match="at least 2 images.*got 1"):
        frechet_distance(one, two)
    with pytest.raises(UserError, match="8 and 6 features"):
        frechet_distance(two, statistics(features(5, 6, 1)))


def test_features_that_are_not_finite_give_nan() -> None:
    broken = features(5, 8, 1)
    broken[2, 3] = float("inf")
    assert np.isnan(frechet_distance(statistics(broken), statistics(features(5, 8, 1))))


def test_warning_below_the_feature_dimensions() -> None:
    assert few_images_warning(2048, 2048) is None and few_images_warning(None, 2048) is None
    assert "1,000 images" in few_images_warning(1000, 2048)


def test_npz_round_trip_and_files_of_other_tools(tmp_path: Path) -> None:
    made = statistics(features(30, 8, 1))
    save_npz(tmp_path / "deep" / "ours.npz", made, "net")
    loaded = load_npz(tmp_path / "deep" / "ours.npz")
    assert (loaded.count, loaded.features) == (30, "net")
    assert torch.equal(loaded.mean, made.mean) and torch.equal(loaded.covariance, made.covariance)
    with np.load(tmp_path / "deep" / "ours.npz") as plain:
        assert plain["mu"].shape == (8,) and plain["sigma"].shape == (8, 8)
    np.savez(tmp_path / "theirs.npz", mu=made.mean.numpy(), sigma=made.covariance.numpy().astype(np.float32))
    theirs = load_npz(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.features is None and theirs.mean.dtype == torch.float64
    assert frechet_distance(theirs, made) < 1e-6
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["ours.npz"]  # nothing left beside it


def test_hostile_and_broken_npz_are_rejected(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "objects.npz", mu=objects, sigma=objects, arr_0=objects, allow_pickle=True)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    good = tmp_path / "good.npz"
    np.savez(good, mu=np.zeros(400), sigma=np.eye(400))
    (tmp_path / "short.npz").write_bytes(good.read_bytes()[:3000])
    damaged = bytearray(good.read_bytes())
    damaged[5000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("objects", "pickle", "short", "damaged", "nan", "shape", "other", "missing"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            load_npz(tmp_path / f"{name}.npz")
    for name in ("objects.npz", "pickle.npz", "short.npz", "other.npz", "missing.npz", "single.npy"):
        with pytest.raises(UserError, match=name):
            ImageNpz(tmp_path / name)
    with pytest.raises(UserError, match="single"):
        load_npz(tmp_path / "single.npy")
    for pixels in (np.zeros((2, 4, 4, 3)), np.zeros((2, 3, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        np.savez(tmp_path / "a.npz", pixels)
        with pytest.raises(UserError, match="expected uint8"):
            ImageNpz(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches_and_split_over_ranks(tmp_path: Path, save) -> None:
    pixels = images(11, size=5)
    save(tmp_path / "a.npz", pixels.permute(0, 2, 3, 1).contiguous().numpy())
    archive = ImageNpz(tmp_path / "a.npz")
    assert len(archive) == 11 and archive.shape == (11, 5, 5, 3)
    for world, sizes in ((1, [4, 4, 3]), (2, [4, 3, 4])):
        batches = [batch for rank in range(world) for batch in archive.batches(4, rank, world)]
        assert [len(places) for places, _ in batches] == sizes
        assert all(torch.equal(rows, pixels[places]) for places, rows in batches)


def write_images(path: Path, pixels: Tensor, **facts: str | int) -> None:
    shape = (len(pixels), *pixels.shape[2:], 3)
    write_image_npz(path, shape, (image.permute(1, 2, 0).numpy().tobytes() for image in pixels), facts)


def test_written_npz_is_read_by_numpy_and_replaced_only_when_complete(tmp_path: Path) -> None:
    pixels, path = images(10, size=6), tmp_path / "new" / "a.npz"
    write_images(path, pixels, exif="apply")
    with np.load(path) as plain:
        assert plain.files == ["arr_0", "exif"]
        assert np.array_equal(plain["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    before = path.read_bytes()

    def broken():
        yield bytes(108)
        raise SystemExit  # as a signal ends a script

    with pytest.raises(SystemExit):
        write_image_npz(path, (10, 6, 6, 3), broken(), {})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["a.npz"]


INCEPTION = InceptionFeatures(None, "tiny")
PREPARED = Preparation(16, "apply", "validation", "0123456789abcdef", 6, 6)


def load(path: Path, wanted: Preparation = PREPARED, inception: InceptionFeatures = INCEPTION):
    return load_reference(path, inception, 4, wanted, "Type this.", pool_only=True).pool


def write_both_kinds(folder: Path, prepared: Preparation | None = PREPARED) -> FeatureStatistics:
    """Write `statistics.npz` and `images.npz` of the same 6 images, both with the facts of `prepared`."""
    facts, made = {} if prepared is None else prepared.facts(), statistics(INCEPTION(images(6)), 4)
    save_npz(folder / "statistics.npz", made, INCEPTION.name, facts)
    write_images(folder / "images.npz", images(6), **facts)
    return made


def test_reference_is_statistics_or_images(tmp_path: Path) -> None:
    made = write_both_kinds(tmp_path)
    for name in ("images", "statistics"):
        reference = load(tmp_path / f"{name}.npz")
        assert reference.count == 6 and frechet_distance(reference, made) < 1e-6
    with pytest.raises(UserError, match="seed0.*seed1"):
        load(tmp_path / "statistics.npz", inception=InceptionFeatures(None, "tiny", 1))
    for name, arrays, words in (
        ("small", {"mu": np.zeros(8), "sigma": np.eye(8)}, "8 features"),
        ("foreign", {"mu": made.mean.numpy(), "sigma": made.covariance.numpy()}, "untrained"),
        ("other", {"weights": np.zeros(3)}, "arr_0"),
        ("oblong", {"arr_0": np.zeros((3, 16, 24, 3), np.uint8)}, "16 x 24 px"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=words):
            load(tmp_path / f"{name}.npz")


def test_invalid_facts_of_a_reference_count_as_unknown(tmp_path: Path) -> None:
    odd = {"image_size": np.zeros(2), "exif": np.arange(3), "split": np.array(7), "count": np.arange(3)}
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(3), **odd)
    assert Preparation.of_file(tmp_path / "odd.npz") == Preparation()
    assert load_npz(tmp_path / "odd.npz").count is None


def test_statistics_stored_with_images_have_their_size(tmp_path: Path, caplog) -> None:
    """The ADM suite's reference files hold both."""
    write_both_kinds(tmp_path, None)
    with np.load(tmp_path / "statistics.npz") as a, np.load(tmp_path / "images.npz") as b:
        np.savez(tmp_path / "both.npz", **a, **b)
    load(tmp_path / "both.npz")
    assert "does not state" not in caplog.text
    with pytest.raises(UserError, match="16 x 16 px.*8 x 8 px"):
        load(tmp_path / "both.npz", Preparation(image_size=8))


@pytest.mark.parametrize("name", ["statistics", "images"])
def test_reference_prepared_differently_warns_or_is_rejected(tmp_path: Path, caplog, name) -> None:
    write_both_kinds(tmp_path)
    for changes, words in (
        ({}, []),
        ({"split": "val"}, []),  # another name for the same images
        ({"exif": "ignore"}, ["EXIF orientation apply, here ignore"]),
        ({"fingerprint": "f" * 16}, ["0123456789abcdef", "f" * 16]),
        ({"split": "all", "available": 9}, ["'validation', here 'all'"]),
        ({"available": 9}, ["6 images to choose from, here 9"]),
        ({"selected": 4}, ["6 images, here 4"]),
    ):
        caplog.clear()
        load(tmp_path / f"{name}.npz", replace(PREPARED, **changes))
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == bool(words), changes
        assert all(word in warnings[0] for word in [*words, "Type this."] if words), changes
    with pytest.raises(UserError, match=r"16 x 16 px.*32 x 32 px.*Type this"):
        load(tmp_path / f"{name}.npz", Preparation(image_size=32))


def test_third_party_references_warn_about_missing_facts(tmp_path: Path, caplog) -> None:
    write_both_kinds(tmp_path, None)
    load(tmp_path / "images.npz")
    assert "does not state" not in caplog.text  # the images themselves do
    load(tmp_path / "statistics.npz")
    assert "statistics.npz does not state the size" in caplog.text and "16 px" in caplog.text
    load(tmp_path / "statistics.npz", replace(PREPARED, selected=5))
    assert "6 images, here 5" in caplog.text  # from `count`
