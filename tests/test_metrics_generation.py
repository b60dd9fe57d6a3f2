"""Scores of generated images, against brute force in NumPy on the same features, and reference files."""

import logging

import numpy as np
import pytest
import torch

from src.core.errors import UserError
from src.metrics import generation
from src.metrics.fid import save_npz
from src.metrics.generation import (
    GenerationReference,
    ImageStatistics,
    InceptionScore,
    compute_scores,
    load_reference,
    precision_recall,
)  # fmt: skip
from src.metrics.inception import InceptionFeatures
from src.metrics.inception_network import SPATIAL_DIM
from src.metrics.reference import Preparation

PX = 32
HERE = Preparation(image_size=PX)


@pytest.fixture(scope="module")
def inception():
    return InceptionFeatures(None, "tiny")


def images(count, seed=0, size=PX):
    """Smooth images, each with its own colour."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


def statistics(inception, pictures, batch_size=4):
    found = ImageStatistics(inception, batch_size, len(pictures))
    found.update(pictures, torch.arange(len(pictures)))
    return found.reduce()


def score_of(logits, split_images=5000):
    score = InceptionScore(len(logits), logits.shape[1], split_images)
    score.update(logits, torch.arange(len(logits)))
    return score.compute()


def test_inception_score_by_brute_force_in_any_batches():
    logits = 2 * torch.randn(23, 9, generator=torch.Generator().manual_seed(0))
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    parts = [p[:10], p[10:20], p[20:]]
    expected = np.mean([np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts])
    score = InceptionScore(23, 9, 10)
    for places in (torch.arange(1, 23, 2), torch.arange(0, 23, 2)):
        score.update(logits[places], places)
    assert score.compute() == pytest.approx(expected, rel=1e-6)


def brute_precision_recall(generated, reference, k):
    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def share(points, centres):
        own = distances(centres, centres)
        np.fill_diagonal(own, np.inf)
        radii = np.sort(own, axis=1)[:, k - 1]
        return (distances(points, centres) <= radii).any(axis=1).mean()

    return share(generated, reference), share(reference, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [30, 10**6])
def test_precision_and_recall_by_brute_force(monkeypatch, k, chunk):
    monkeypatch.setattr(generation, "CHUNK_NUMBERS", chunk)
    rng = np.random.RandomState(0)
    generated, reference = 0.8 * rng.randn(40, 3) + 5, rng.randn(31, 3) + 5.5
    found = precision_recall(torch.from_numpy(generated), torch.from_numpy(reference), k)
    assert found == pytest.approx(brute_precision_recall(generated, reference, k))
    assert found[0] != found[1] and 0 < min(found) < max(found) < 1


def test_too_few_images_have_no_neighbours():
    line = torch.arange(10.0)[:, None]
    with pytest.raises(UserError, match="at least 4 images on each side; got 3"):
        precision_recall(line[:3], line)


def test_outputs_of_the_network(inception):
    pictures = images(3)
    seen = {}
    branch = inception.network.get_submodule("Mixed_6d.branch1x1")
    handle = branch.register_forward_hook(lambda module, inputs, output: seen.update(spatial=output))
    outputs = inception.outputs(pictures)
    handle.remove()
    assert torch.equal(outputs.pool, inception(pictures))
    assert outputs.spatial.shape == (3, SPATIAL_DIM) == (3, 2023)
    assert torch.equal(outputs.spatial.view(3, 17, 17, 7)[1, 5, 11], seen["spatial"][1, :7, 5, 11])
    torch.testing.assert_close(outputs.logits, outputs.pool @ inception.network.fc.weight.T)


def test_scores_are_those_of_the_features(inception):
    fake, real = images(14, 1), images(12, 2)
    generated, reference = statistics(inception, fake), statistics(inception, real, batch_size=5)
    scores = compute_scores(generated, GenerationReference.of(reference))
    assert scores.keys() == {
        *(f"{name}_untrained" for name in ("gfid", "sfid", "inception_score", "precision", "recall")),
        "images",
    }
    outputs = [inception.outputs(part) for part in (fake, real)]
    for name, feature in (("gfid", "pool"), ("sfid", "spatial")):
        a, b = (getattr(part, feature).double().numpy() for part in outputs)
        left, right = ((part - part.mean(0)) / (len(part) - 1) ** 0.5 for part in (a, b))  # covariance: left.T @ left
        root = np.linalg.svd(left @ right.T, compute_uv=False).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * root
        assert scores[f"{name}_untrained"] == pytest.approx(expected, rel=1e-3)
        if name == "gfid":
            brute = brute_precision_recall(a, b, 3)
            assert (scores["precision_untrained"], scores["recall_untrained"]) == pytest.approx(brute)
    assert scores["inception_score_untrained"] == pytest.approx(score_of(outputs[0].logits), rel=1e-6)
    assert scores["images"] == 14


def adm_file(path, inception, pictures, **more):
    made = statistics(inception, pictures)
    arrays = {"mu": made.pool.mean.numpy(), "sigma": made.pool.covariance.numpy()}
    arrays |= {"mu_s": made.spatial.mean.numpy(), "sigma_s": made.spatial.covariance.numpy()}
    np.savez(path, **arrays, arr_0=pictures.permute(0, 2, 3, 1).numpy(), features=inception.name, **more)
    return made


def test_reference_in_adms_layout(inception, tmp_path, caplog):
    # Its moments are of other images than those it holds, as in the published file.
    made = adm_file(tmp_path / "a.npz", inception, images(9))
    with np.load(tmp_path / "a.npz") as archive:
        np.savez(tmp_path / "b.npz", **{**archive, "arr_0": images(7, 5).permute(0, 2, 3, 1).numpy()})
    found = load_reference(tmp_path / "b.npz", inception, 4, HERE)
    for there, here in ((found.pool, made.pool), (found.spatial, made.spatial)):
        assert torch.equal(there.mean, here.mean) and torch.equal(there.covariance, here.covariance)
    torch.testing.assert_close(found.features, inception(images(7, 5)))
    assert "no sFID" not in caplog.text


def test_references_with_fewer_parts(inception, tmp_path, caplog):
    pictures = images(9)
    np.savez(tmp_path / "images.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy())
    found = load_reference(tmp_path / "images.npz", inception, 4, HERE)
    torch.testing.assert_close(found.features, inception(pictures))
    assert (found.pool.count, found.spatial.count) == (9, 9)
    with caplog.at_level(logging.WARNING):
        save_npz(tmp_path / "moments.npz", found.pool, inception.name, {"image_size": PX})
        found = load_reference(tmp_path / "moments.npz", inception, 4, HERE)
    assert "there is no sFID, and no precision and recall" in caplog.text
    scores = compute_scores(statistics(inception, pictures), found)
    assert scores.keys() == {"gfid_untrained", "inception_score_untrained", "images"}
    assert scores["gfid_untrained"] == pytest.approx(0, abs=1e-6)
    whole = statistics(inception, pictures)
    save_npz(tmp_path / "ours.npz", whole.pool, inception.name, {"image_size": PX}, whole.spatial)
    scores = compute_scores(whole, load_reference(tmp_path / "ours.npz", inception, 4, HERE))
    assert scores["sfid_untrained"] == pytest.approx(0, abs=1e-6)


def test_unsuitable_references_are_rejected(inception, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=images(4, size=48).permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match=r"48 x 48 px, this evaluation has 32 x 32 px(.|\n)*TYPE THIS"):
        load_reference(tmp_path / "large.npz", inception, 4, HERE, "TYPE THIS")
    adm_file(tmp_path / "odd.npz", inception, images(4), count=4)
    with np.load(tmp_path / "odd.npz") as archive:
        np.savez(tmp_path / "odd.npz", **{**archive, "mu_s": np.zeros(3)})
    with pytest.raises(UserError, match="mu_s float64"):
        load_reference(tmp_path / "odd.npz", inception, 4, HERE)
    with pytest.raises(UserError, match="at least 2 images"):
        compute_scores(statistics(inception, images(1)), GenerationReference.of(statistics(inception, images(5))))
