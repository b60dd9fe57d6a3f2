"""PSNR by definition, SSIM against torchmetrics, and running means."""

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from src.core.errors import UserError
from src.metrics.quality import MAX_PSNR_DB, RunningMeans, psnr, ssim


def pair(height: int, width: int, noise: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return smooth images and noisy copies, uint8 4 x 3 x H x W."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(4, 3, 4, 4, generator=generator) * 255
    a = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").round().clamp(0, 255)
    b = a + torch.randint(-noise, noise + 1, a.shape, generator=generator)
    return a.to(torch.uint8), b.clamp(0, 255).to(torch.uint8)


def test_psnr_follows_its_definition_per_image() -> None:
    a, b = pair(20, 24, 30)
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    values = psnr(a, b)
    assert values.dtype == torch.float64 and values.shape == (4,)
    torch.testing.assert_close(values, 20 * torch.log10(255 / mse.sqrt()), rtol=1e-12, atol=0)
    black, white = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert psnr(black, white).item() == 0  # differences don't wrap around in uint8
    assert psnr(white, black).item() == 0


def test_psnr_of_identical_images_is_the_ceiling_and_never_below_a_worse_one() -> None:
    a = torch.zeros(2, 3, 700, 700, dtype=torch.uint8)
    b = a.clone()
    b[1, 0, 0, 0] = 1  # 109 dB by the formula
    assert psnr(a, b).tolist() == [MAX_PSNR_DB, MAX_PSNR_DB]
    assert psnr(a[:, :, :8, :8], b[:, :, :8, :8])[1] < MAX_PSNR_DB


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (6, 6), (11, 128)])
@pytest.mark.parametrize("noise", [0, 3, 60])
def test_ssim_matches_torchmetrics(size: tuple[int, int], noise: int) -> None:
    a, b = pair(*size, noise)
    expected = structural_similarity_index_measure(a / 255, b / 255, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), expected, atol=1e-5, rtol=0)


def test_ssim_of_flat_identical_and_opposite_images() -> None:
    a = torch.stack([torch.full((3, 16, 16), value) for value in (0, 255, 200)]).to(torch.uint8)
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    b = torch.stack([torch.full((3, 16, 16), value) for value in (255, 0, 200)]).to(torch.uint8)
    expected = structural_similarity_index_measure(a / 255, b / 255, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), expected, atol=1e-4, rtol=0)


def test_ssim_does_not_depend_on_the_batch_or_on_autocast() -> None:
    a, b = pair(24, 24, 20)
    many_a, many_b = a.repeat(5, 1, 1, 1), b.repeat(5, 1, 1, 1)  # more than one chunk
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(many_a, many_b), ssim(a, b).repeat(5))


def test_unlike_or_too_small_images_are_errors() -> None:
    a = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="one size"):
            metric(a, a[..., :7])
        with pytest.raises(ValueError, match="float32"):
            metric(a, a.float())
    with pytest.raises(UserError, match="at least 6 px"):
        ssim(a[..., :5], a[..., :5])


def test_means_add_up_over_batches() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    means = RunningMeans(["a", "b"])
    assert all(value != value for value in means.means().values())  # nan without images
    for part in values.split(7):
        means.update({"b": -part, "a": part})
    mean = values.double().mean().item()
    assert means.count == 30 and means.means() == pytest.approx({"a": mean, "b": -mean}, rel=1e-12)
    for wrong in ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(3)}):
        with pytest.raises(ValueError, match="expected"):
            means.update(wrong)
