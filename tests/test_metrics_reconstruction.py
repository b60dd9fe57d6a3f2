"""Scores of reconstructions: equal to those of their parts, named by the weights used, without side effects."""

import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.images import bytes_to_unit, unit_to_bytes
from src.metrics.fid import FeatureStatistics, frechet_distance
from src.metrics.inception import InceptionFeatures
from src.metrics.quality import psnr, ssim
from src.metrics.reconstruction import ReconstructionScore


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    return InceptionFeatures(None, "tiny")


def lpips(x: Tensor, y: Tensor) -> Tensor:
    """Stand in for LPIPS: check the range, return one value per image."""
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.5 and x.dtype == torch.float32
    return (x - y).abs().mean(dim=(1, 2, 3))


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    """Return originals in uint8 and reconstructions in about [-.05, 1.05]."""
    generator = torch.Generator().manual_seed(0)
    pixels, colours = (torch.rand(count, 3, side, side, generator=generator) for side in (16, 1))
    original = (pixels * colours * 255).round().to(torch.uint8)
    return original, bytes_to_unit(original) + 0.1 * torch.rand(original.shape, generator=generator) - 0.05


def score_of(
    inception: InceptionFeatures | None, batches: list[tuple[Tensor, Tensor]], **options
) -> ReconstructionScore:
    score = ReconstructionScore([] if inception is None else [inception], batch_size=5, **options)
    for original, reconstruction in batches:
        score.update(original, reconstruction)
    return score


def test_all_scores_equal_those_of_their_parts(inception: InceptionFeatures) -> None:
    original, reconstruction = data()
    score = ReconstructionScore([inception], 5, lpips)
    values = score.update(original, reconstruction)
    decoded = unit_to_bytes(reconstruction)
    assert torch.equal(values["psnr"], psnr(original, decoded)) and torch.equal(values["ssim"], ssim(original, decoded))
    assert {"psnr", "ssim", "lpips"} <= values.keys() and {tuple(value.shape) for value in values.values()} == {(24,)}
    result = score.reduce().compute()  # without a process group there is nothing to add
    moments = [FeatureStatistics(inception.feature_dim) for _ in range(2)]
    for part, images in zip(moments, (original, decoded), strict=True):
        part.update(inception(images))
    expected = {name: value.double().mean().item() for name, value in values.items()}
    expected |= {"rfid_untrained": frechet_distance(*moments), "images": 24}
    assert result == pytest.approx(expected, rel=1e-5) and isinstance(result["images"], int)
    assert list(result)[:3] == ["rfid_untrained", "psnr", "ssim"] and list(result)[-1] == "images"


def test_perfect_reconstructions_have_no_distance(inception: InceptionFeatures) -> None:
    original, _ = data()
    result = score_of(inception, [(original, bytes_to_unit(original))]).compute()
    assert result["rfid_untrained"] < 1e-6 and result["psnr"] == 100 and result["ssim"] == pytest.approx(1, abs=1e-6)
    truncated = score_of(inception, [(original, bytes_to_unit(original) + 0.9 / 255)], quantization="truncate")
    rounded = score_of(inception, [(original, bytes_to_unit(original) + 0.9 / 255)])
    assert truncated.compute()["psnr"] == 100 and rounded.compute()["psnr"] < 50


def test_score_is_called_rfid_only_with_real_weights(tmp_path: Path) -> None:
    inception = InceptionFeatures(None, "tiny")
    assert "rfid_untrained" in score_of(inception, [data(4)]).compute()
    inception.untrained = False  # as after loading a file
    assert "rfid" in score_of(inception, [data(4)]).compute()
    result = score_of(None, [data(4)], lpips=lpips).compute()
    assert {"psnr", "ssim", "lpips", "images"} <= result.keys() and not any("fid" in name for name in result)
    lpips_untrained = InceptionFeatures(None, "tiny")
    lpips_untrained.forward = lpips
    assert "lpips_untrained" in score_of(None, [data(4)], lpips=lpips_untrained).compute()


def test_scoring_has_no_side_effects(inception: InceptionFeatures) -> None:
    original, reconstruction = data(4)
    kept = reconstruction.clone().requires_grad_()
    before = torch.get_rng_state()
    values = score_of(inception, []).update(original, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(kept, reconstruction) and not values["ssim"].requires_grad


def test_few_images_and_non_finite_values_warn(inception: InceptionFeatures, caplog: pytest.LogCaptureFixture) -> None:
    original, reconstruction = data(4)
    reconstruction[1, 0, 0, 0] = float("nan")
    reconstruction[2] = float("inf")
    with caplog.at_level(logging.WARNING):
        result = score_of(inception, [(original, reconstruction)]).compute()
    assert "fewer than its" in caplog.text and "2 of 4 reconstructions" in caplog.text
    broken = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert all(value == value for value in result.values()) and not score_of(None, []).to_bytes(broken).any()
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images.*got {count}"):
            score_of(inception, [(original[:count], reconstruction[:count])] * count).compute()


def test_misuse_is_an_error(inception: InceptionFeatures) -> None:
    original, reconstruction = data(4)
    score = score_of(inception, [(original, reconstruction)])
    with pytest.raises(ValueError, match="one size"):
        score.update(original, reconstruction[:3])
    score.reduce()
    with pytest.raises(RuntimeError, match="once"):
        score.reduce()
    with pytest.raises(RuntimeError, match="new one"):
        score.update(original, reconstruction)


def test_memory_of_a_score_does_not_grow_with_the_images(inception: InceptionFeatures) -> None:
    original, reconstruction = data(8)
    score = score_of(inception, [(original, reconstruction)], lpips=lpips)

    def held() -> int:
        return len(pickle.dumps({name: value for name, value in vars(score).items() if name != "inception"}))

    before = held()
    for _ in range(5):
        score.update(original, reconstruction)
    assert abs(held() - before) < 100  # bytes; the counters may take a digit more
