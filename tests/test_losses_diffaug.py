"""DiffAug matches a plain version that loops over pixels, and depends only on its draws."""

import numpy as np
import pytest
import torch
from torch import Tensor

from src.core.errors import UserError
from src.core.random_streams import Purpose, uniforms
from src.losses.diffaug import UNIFORMS_PER_BATCH, UNIFORMS_PER_SAMPLE, DiffAug, _to_index

ON = torch.zeros(UNIFORMS_PER_BATCH)
SIZES = [(16, 24), (17, 9), (32, 32)]


def batch(size: tuple[int, int] = (16, 24), count: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, *size, generator=rng, dtype=torch.float64) * 2 - 1
    return images, uniforms(7, Purpose.AUGMENT_REAL, 0, range(count), UNIFORMS_PER_SAMPLE)


def plain(images: Tensor, u: Tensor, switches: tuple[bool, bool, bool], cutout: float) -> Tensor:
    """Augment as published, one image and one pixel at a time, in numpy."""
    out = []
    for image, draw in zip(images.numpy(), u.tolist(), strict=True):
        _, height, width = image.shape
        if switches[0]:
            reach = [round(height * 0.125), round(width * 0.125)]
            dy, dx = (int(draw[i] * (2 * reach[i] + 1)) - reach[i] for i in (0, 1))
            moved = np.zeros_like(image)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        moved[:, y, x] = image[:, y + dy, x + dx]
            image = moved
        if switches[1]:
            image = image + (draw[2] - 0.5)
            grey = image.mean(0, keepdims=True)
            image = (image - grey) * (draw[3] * 2) + grey
            image = (image - image.mean()) * (draw[4] + 0.5) + image.mean()
        if switches[2] and cutout:
            image = image.copy()
            lengths = [round(height * cutout), round(width * cutout)]
            places = [height + 1 - lengths[0] % 2, width + 1 - lengths[1] % 2]
            top, left = (int(draw[5 + i] * places[i]) - lengths[i] // 2 for i in (0, 1))
            image[:, max(0, top) : max(0, top + lengths[0]), max(0, left) : max(0, left + lengths[1])] = 0
        out.append(image)
    return torch.from_numpy(np.stack(out))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cutout", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("off", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_equals_the_plain_version(size: tuple[int, int], cutout: float, off: tuple[int, ...]) -> None:
    images, u = batch(size)
    switches = ON.clone()
    switches[list(off)] = 0.9
    augment = DiffAug(prob=0.5, cutout=cutout)
    got = augment.apply(images, augment.draw(switches, u))
    wanted = plain(images, u, tuple(i not in off for i in range(3)), cutout)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # the draws are float32
    assert off == (0, 1, 2) or not torch.equal(got, images)


@pytest.mark.parametrize("cutout", [0.0, 0.5])
def test_gradient_passes_gradcheck(cutout: float) -> None:
    images, u = batch((8, 9), count=2)
    augment = DiffAug(prob=1, cutout=cutout)
    draws = augment.draw(ON, u)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, draws), images.requires_grad_())


def test_result_depends_only_on_the_draws_and_a_batch_may_be_split() -> None:
    images, u = batch()
    augment = DiffAug(prob=1, cutout=0.3)
    draws = augment.draw(ON, u)
    before, whole = images.clone(), augment.apply(images, draws)
    torch.manual_seed(99)
    assert torch.equal(augment.apply(images, draws), whole) and torch.equal(images, before)
    assert augment.apply(images.bfloat16(), draws).dtype == torch.float32
    split = torch.cat([augment.apply(images[p], draws[p]) for p in (slice(0, 2), slice(2, 3), slice(3, None))])
    assert torch.equal(split, whole)
    with pytest.raises(ValueError, match="slice both"):
        augment.apply(images[:2], draws)


@pytest.mark.parametrize(
    ("prob", "u", "on"), [(1.0, 0.999, True), (0.5, 0.5, True), (0.5, 0.51, False), (0.0, 0.0, False)]
)
def test_switches(prob: float, u: float, on: bool) -> None:
    _, samples = batch()
    draws = DiffAug(prob=prob, cutout=0.1).draw(torch.full((3,), u), samples)
    assert (draws.translation, draws.colour, draws.cutout) == (on, on, on)
    assert not DiffAug(prob=prob, cutout=0).draw(torch.full((3,), u), samples).cutout


def test_largest_draws_stay_in_range() -> None:
    images, _ = batch((256, 256), count=1)
    for u in (0.0, 1 - 2**-24):
        samples = torch.full((1, UNIFORMS_PER_SAMPLE), u)
        augment = DiffAug(prob=1, cutout=0)
        shift = augment.apply(torch.ones_like(images), augment.draw(torch.tensor([0.0, 2.0, 2.0]), samples))
        assert int(shift[0, 0].sum()) == 224 * 224
    largest = torch.tensor(1 - 2**-24)
    assert all(int(_to_index(largest, count)) == count - 1 for count in range(1, 2000))


def test_values_out_of_range_are_rejected() -> None:
    for key, value, said in (("prob", 1.1, "at most 1"), ("cutout", -0.1, "at least 0")):
        with pytest.raises(UserError, match=f"augment.{key}={value}: expected {said}"):
            DiffAug.parse({"prob": 1, "cutout": 0, key: value}, "augment")
