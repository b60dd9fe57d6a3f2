"""Inception features match an independent forward pass of the published graph; other files are rejected."""

import logging
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.core.errors import UserError
from src.metrics.inception import InceptionFeatures, resize_tf1


def published_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Run the FID network in functional form and float64, written independently of src: names, outputs and kernels are
    those of pt_inception-2015-12-05-6726825d.pth. A layer missing from `state` gets random weights in it, with
    non-trivial norms."""

    def conv(name: str, x: Tensor, outputs: int, height: int = 1, width: int = 1, stride: int = 1, same: bool = True):
        if f"{name}.conv.weight" not in state:
            generator = torch.Generator().manual_seed(len(state))
            shape = (outputs, x.shape[1], height, width)
            state[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
            for key, low in (("weight", 0.8), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.5)):
                state[f"{name}.bn.{key}"] = low + 0.4 * torch.rand(outputs, generator=generator)
        bn = [state[f"{name}.bn.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")]
        padding = (height // 2, width // 2) if same else 0
        x = F.conv2d(x, state[f"{name}.conv.weight"].double(), stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, *bn, training=False, eps=0.001))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)

    def block_5(n: str, x: Tensor, pool: int) -> Tensor:
        b5 = conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x, 48), 64, 5, 5)
        b3 = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x, 64), 96, 3, 3)
        b3 = conv(f"{n}.branch3x3dbl_3", b3, 96, 3, 3)
        return torch.cat([conv(f"{n}.branch1x1", x, 64), b5, b3, conv(f"{n}.branch_pool", average(x), pool)], 1)

    def block_6(n: str, x: Tensor, c: int) -> Tensor:
        b7 = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x, c), c, 1, 7)
        b7 = conv(f"{n}.branch7x7_3", b7, 192, 7, 1)
        bd = conv(f"{n}.branch7x7dbl_2", conv(f"{n}.branch7x7dbl_1", x, c), c, 7, 1)
        bd = conv(f"{n}.branch7x7dbl_4", conv(f"{n}.branch7x7dbl_3", bd, c, 1, 7), c, 7, 1)
        bd = conv(f"{n}.branch7x7dbl_5", bd, 192, 1, 7)
        return torch.cat([conv(f"{n}.branch1x1", x, 192), b7, bd, conv(f"{n}.branch_pool", average(x), 192)], 1)

    def block_7(n: str, x: Tensor, pooled: Tensor) -> Tensor:
        b3 = conv(f"{n}.branch3x3_1", x, 384)
        bd = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x, 448), 384, 3, 3)
        parts = [conv(f"{n}.branch1x1", x, 320)]
        parts += [conv(f"{n}.branch3x3_2a", b3, 384, 1, 3), conv(f"{n}.branch3x3_2b", b3, 384, 3, 1)]
        parts += [conv(f"{n}.branch3x3dbl_3a", bd, 384, 1, 3), conv(f"{n}.branch3x3dbl_3b", bd, 384, 3, 1)]
        return torch.cat([*parts, conv(f"{n}.branch_pool", pooled, 192)], 1)

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 32, 3, 3, stride=2, same=False), 32, 3, 3, same=False)
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, 64, 3, 3), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x, 80), 192, 3, 3, same=False), 3, 2)
    for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = block_5(name, x, pool)
    b3 = conv("Mixed_6a.branch3x3dbl_2", conv("Mixed_6a.branch3x3dbl_1", x, 64), 96, 3, 3)
    b3 = conv("Mixed_6a.branch3x3dbl_3", b3, 96, 3, 3, stride=2, same=False)
    whole = conv("Mixed_6a.branch3x3", x, 384, 3, 3, stride=2, same=False)
    x = torch.cat([whole, b3, F.max_pool2d(x, 3, 2)], 1)
    for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = block_6(name, x, c)
    b3 = conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x, 192), 320, 3, 3, stride=2, same=False)
    b7 = conv("Mixed_7a.branch7x7x3_2", conv("Mixed_7a.branch7x7x3_1", x, 192), 192, 1, 7)
    b7 = conv("Mixed_7a.branch7x7x3_3", b7, 192, 7, 1)
    b7 = conv("Mixed_7a.branch7x7x3_4", b7, 192, 3, 3, stride=2, same=False)
    x = torch.cat([b3, b7, F.max_pool2d(x, 3, 2)], 1)
    x = block_7("Mixed_7b", x, average(x))
    return block_7("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1)).mean((2, 3))


@cache
def standard_state() -> dict[str, Tensor]:
    """Return random weights laid out like the standard file."""
    state: dict[str, Tensor] = {}
    published_forward(state, torch.zeros(1, 3, 75, 75).double())
    return {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def standard_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(standard_state(), path)
    return path


def test_features_match_the_published_graph(standard_file: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 299, 299), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    inception = InceptionFeatures(standard_file)
    features = inception(images)
    expected = published_forward(standard_state(), (images.double() - 128) / 128)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert not inception.untrained and inception.feature_dim == 2048
    assert expected.std() > 0.01  # so that the comparison means something
    torch.testing.assert_close(features.double(), expected, atol=1e-4, rtol=1e-4)


def test_file_resaved_with_counters_loads_too(standard_file: Path, tmp_path: Path) -> None:
    state = dict(standard_state())
    state |= {name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in state if "_var" in name}
    torch.save(state, tmp_path / "resaved.pth")
    images = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    again = InceptionFeatures(tmp_path / "resaved.pth")(images)
    assert torch.equal(again, InceptionFeatures(standard_file)(images))


def test_resize_matches_tensorflow_1_computed_by_hand() -> None:
    # 2 -> 3: positions 0, 2/3, 4/3; the last one reads beyond the edge, which repeats
    row = resize_tf1(torch.tensor([[[[0.0, 3.0], [0.0, 3.0]]]]), 3)
    torch.testing.assert_close(row, torch.tensor([0.0, 2.0, 3.0]).expand(1, 1, 3, 3))
    column = resize_tf1(torch.tensor([[[[0.0, 0.0], [6.0, 6.0]]]]), 3)
    torch.testing.assert_close(column[0, 0, :, 0], torch.tensor([0.0, 4.0, 6.0]))
    # shrinking 4 -> 2 takes every second pixel: no antialias
    shrunk = resize_tf1(torch.arange(16.0).view(1, 1, 4, 4), 2)
    assert shrunk.flatten().tolist() == [0, 2, 8, 10]
    # a product of both directions, and not square
    both = resize_tf1(torch.tensor([[[[0.0, 4.0, 8.0], [12.0, 16.0, 20.0]]]]), 4)
    assert both[0, 0, 1].tolist() == pytest.approx([6, 9, 12, 14])
    images = torch.rand(1, 3, 299, 299)
    assert resize_tf1(images, 299) is images


def test_autocast_and_chunks_do_not_change_the_features() -> None:
    inception = InceptionFeatures(None, "tiny")
    images = torch.randint(0, 256, (5, 3, 48, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = inception(images)
    assert whole.std(dim=0).mean() > 1e-4  # random weights tell images apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inception(images), whole)
    torch.testing.assert_close(torch.cat([inception(x) for x in images.split(2)]), whole, rtol=1e-5, atol=1e-6)


def test_error_of_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)nowhere\.pth.*--inception.*download_weights"):
        InceptionFeatures(tmp_path / "nowhere.pth", key="--inception")
    with pytest.raises(UserError, match="download_weights.*untrained"):
        InceptionFeatures(None)


def test_other_networks_and_damaged_files_are_rejected(tmp_path: Path) -> None:
    def refused(state: object, match: str) -> None:
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=match):
            InceptionFeatures(tmp_path / "bad.pth")

    state = {name: value[:1] if "Mixed" in name else value for name, value in standard_state().items()}
    refused({**state, "fc.weight": torch.zeros(1000, 2048)}, "1000 classes.*torchvision")
    refused({name: value for name, value in state.items() if "fc" not in name}, "no classifier")
    refused([1, 2], "list")
    refused({**state, "AuxLogits.fc.bias": torch.zeros(1)}, r"(?s)unexpected \(1\): AuxLogits.*wrong shape")
    (tmp_path / "short.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="short.pth"):
        InceptionFeatures(tmp_path / "short.pth")


def test_file_other_than_the_published_one_is_logged(standard_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        InceptionFeatures(standard_file)
    assert "6726825d" in caplog.text


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_only_batches_of_uint8_rgb_are_accepted(images: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8 B x 3"):
        InceptionFeatures(None, "tiny")(images)
