"""LPIPS matches the plain formula; its hand-written backward, half precision, weight files and compilation."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.core.errors import UserError
from src.core.precision import full_float32
from src.losses import lpips_distance
from src.losses.lpips import LPIPS
from src.losses.lpips_distance import feature_distance
from src.training.module import compile_in_place

CHANNELS = (4, 6, 8, 8, 8)
CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
POOL_BEFORE = (5, 10, 17, 24)
TAPS = (2, 7, 14, 21, 28)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use files of a narrow VGG16 in place of the published ones."""
    monkeypatch.setattr("src.losses.lpips.CHANNELS", CHANNELS)


def plain_distance(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    def unit(z: Tensor) -> Tensor:
        return z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    return F.conv2d((unit(x) - unit(y)) ** 2, weight[None, :, None, None]).mean((1, 2, 3))


def plain_lpips(vgg: dict[str, Tensor], linear: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Compute LPIPS from the tensors of the two files."""

    def maps(z: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]  # float32
        z = (z - shift) / scale
        out = []
        for n in CONVS:
            if n in POOL_BEFORE:
                z = F.max_pool2d(z, kernel_size=2, stride=2)
            z = F.conv2d(z, vgg[f"features.{n}.weight"].to(z), vgg[f"features.{n}.bias"].to(z), padding=1).relu()
            if n in TAPS:
                out.append(z)
        return out

    pairs = zip(maps(x), maps(y), strict=True)
    return sum(plain_distance(a, b, linear[f"lin{i}.model.1.weight"].to(a).flatten()) for i, (a, b) in enumerate(pairs))


def make_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write files laid out like those of torchvision and LPIPS; `plain_lpips` uses the same names."""
    model, rng = untrained(), torch.Generator().manual_seed(0)
    vgg = {name: w + 0.1 * torch.randn(w.shape, generator=rng) for name, w in model.vgg.state_dict().items()}
    vgg |= {f"classifier.{n}.{kind}": torch.zeros(2, 2) for n in (0, 3, 6) for kind in ("weight", "bias")}
    linear = {f"lin{i}.model.1.weight": w.view(1, -1, 1, 1) for i, w in enumerate(model.linear)}
    torch.save(vgg, folder / "vgg.pth")
    torch.save(linear, folder / "linear.pth")
    return vgg, linear


def pretrained(folder: Path) -> LPIPS:
    return LPIPS(folder / "vgg.pth", folder / "linear.pth")


def untrained(seed: int = 0) -> LPIPS:
    return LPIPS(None, None, "untrained", seed)


def images(count: int = 3, size: int = 48, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x, y = (torch.rand(count, 3, size, size, generator=rng, dtype=torch.float64).mul(2).sub(1) for _ in range(2))
    return x.to(dtype), (0.6 * x + 0.4 * y).to(dtype)


def test_equals_the_plain_formula_with_its_gradient(tmp_path: Path) -> None:
    """In float64: a ReLU near 0 amplifies rounding."""
    vgg, linear = make_files(tmp_path)
    model = pretrained(tmp_path).double()
    assert not model.untrained
    x, y = images(dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    distance, wanted = model(ours, y), plain_lpips(vgg, linear, theirs, y)
    assert distance.shape == (3,) and distance.dtype == torch.float64
    torch.testing.assert_close(distance, wanted, rtol=0, atol=1e-10)
    (got,), (grad,) = torch.autograd.grad(distance.sum(), ours), torch.autograd.grad(wanted.sum(), theirs)
    assert grad.abs().max() > 1e-4
    torch.testing.assert_close(got, grad, rtol=0, atol=1e-10)


def test_symmetric_zero_for_equal_differentiable_in_both_and_the_same_in_chunks() -> None:
    model = untrained().double()
    x, y = images(dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    torch.testing.assert_close(model(x, y), model(y, x))
    torch.testing.assert_close(torch.cat([model(x[:1], y[:1]), model(x[1:], y[1:])]), model(x, y))
    assert model(x, x).tolist() == [0, 0, 0]
    gx, gy = torch.autograd.grad(model(x, y).sum(), (x, y))
    hy, hx = torch.autograd.grad(model(y, x).sum(), (y, x))
    torch.testing.assert_close(gx, hx)
    torch.testing.assert_close(gy, hy)


@pytest.mark.parametrize("part", [1, 1 << 18])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_backward_passes_gradcheck(
    monkeypatch: pytest.MonkeyPatch, part: int, memory_format: torch.memory_format
) -> None:
    monkeypatch.setattr(lpips_distance, "PART_ON_CPU", part)
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 4, 2, dtype=torch.float64).to(memory_format=memory_format) for _ in range(2))
    x, y, weight = x.requires_grad_(), y.requires_grad_(), torch.rand(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: feature_distance(a, b, weight), (x, y))
    torch.testing.assert_close(feature_distance(x, y, weight), plain_distance(x, y, weight), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_fused_kernels_give_the_same_numbers_for_any_batch() -> None:
    torch.manual_seed(0)
    weight = torch.rand(16)
    for batch in (3, 2):
        x, y = (torch.randn(batch, 16, 6, 6).to(memory_format=torch.channels_last) for _ in range(2))
        x.data[:, :, 1, 2] = 0
        x.requires_grad_()
        tiled, fused = feature_distance(x, y, weight), feature_distance(x, y, weight, fused=True)
        torch.testing.assert_close(fused, tiled, rtol=1e-5, atol=0)
        (wanted,), (got,) = (torch.autograd.grad(d.sum(), x) for d in (tiled, fused))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert got.stride() == wanted.stride()


def test_pixel_without_features_has_a_finite_gradient() -> None:
    x, y = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    x[:, :, 1, 2] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(feature_distance(x, y, torch.ones(3)).sum(), x)
    assert grad.isfinite().all() and grad[:, :, 1, 2].eq(0).all() and grad.abs().max() < 10
    (plain,) = torch.autograd.grad(plain_distance(x, y, torch.ones(3)).sum(), x)
    assert plain.isnan().any(), "the plain formula gives NaN here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_features_do_not_overflow_the_scaled_gradient(dtype: torch.dtype) -> None:
    x, y = (0.1 + torch.rand(2, 8, 4, 4) for _ in range(2))
    for column, norm in ((1, 1e-6), (2, 2.0**-9)):
        x[:, :, 1, column] = torch.eye(8)[0] * norm
    x = x.to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(feature_distance(x, y.to(dtype), torch.ones(8)).sum() * 2.0**8, x)
    assert grad.isfinite().all()
    largest = grad.abs().amax((0, 1))
    assert largest[1, 1] == 0 if dtype == torch.float16 else largest[1, 1] > 65504
    assert largest[1, 2] > 100 and (largest > 0).sum() >= 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_keeps_no_float32_feature_maps(dtype: torch.dtype) -> None:
    model = untrained()
    x, y = images()
    x.requires_grad_()
    exact = model(x, y)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x)
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        rough = model(x, y)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
    maps = [t.dtype for t in kept if t.ndim > 2 and t.shape[1] > 3 and t.shape[-1] > 3]  # not images, not kernels
    assert dtype in maps and torch.float32 not in maps
    (grad,) = torch.autograd.grad(rough.sum(), x)
    assert F.cosine_similarity(grad.flatten(), exact_grad.flatten(), dim=0) > 0.95


def test_untrained_weights_give_positive_distances() -> None:
    x, y = images()
    tiny = LPIPS(None, None, "tiny")
    assert [len(w) for w in tiny.linear] == [4, 8, 8, 16, 16] and all((w >= 0).all() for w in tiny.linear)
    assert (tiny(x, y) > 0).all() and (untrained()(x, y) > 0).all()


def test_missing_and_wrong_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vgg, linear = make_files(tmp_path)
    with pytest.raises(UserError, match="nowhere.pth"):
        LPIPS("nowhere.pth", tmp_path / "linear.pth")
    with pytest.raises(UserError, match="vgg_path is not set.*untrained"):
        LPIPS(None, None)
    other = {k: v for k, v in vgg.items() if k != "features.5.bias"} | {"stray": torch.zeros(1)}
    for name, content, said in (
        ("vgg.pth", other, r"features.5.bias(.|\n)*stray"),
        ("linear.pth", {k: v for k, v in linear.items() if "lin3" not in k}, r"missing \(1\): 3"),
    ):
        make_files(tmp_path)
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=said):
            pretrained(tmp_path)
    make_files(tmp_path)
    monkeypatch.undo()  # back to the published width
    with pytest.raises(UserError, match="wrong shape"):
        pretrained(tmp_path)


def test_wrong_shapes_are_rejected() -> None:
    x = torch.zeros(1, 3, 32, 32)
    for pair, said in (((x[..., :8, :8], x[..., :8, :8]), "16 px"), ((x, torch.cat([x, x])), "one shape")):
        with pytest.raises(ValueError, match=said):
            untrained()(*pair)


def test_training_validation_and_scores_stay_within_the_recompile_limit(monkeypatch):
    """Beyond the recompile limit torch runs uncompiled code and only logs it; here that is an error."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    lpips_distance._compiled.cache_clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        lpips = LPIPS(None, None, "tiny")
        compile_in_place([lpips])
        x, y = (image.requires_grad_(number == 0) for number, image in enumerate(torch.rand(2, 3, 3, 64, 64)))
        half = partial(torch.autocast, "cpu", torch.bfloat16)
        with half():
            lpips(x, y).sum().backward()
        for surroundings in (half, partial(full_float32, torch.device("cpu"))):
            for size in (3, 2):
                with torch.no_grad(), surroundings():
                    lpips(x[:size], y[:size])
    lpips_distance._compiled.cache_clear()
    torch._dynamo.reset()
