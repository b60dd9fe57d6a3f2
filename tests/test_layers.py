"""Choice of encoder blocks, random subsets of them, and the other random draws of a step."""

import math
from collections import Counter
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.losses.diffaug import UNIFORMS_PER_BATCH, DiffAug
from src.models.layers import parse_layers, random_subset
from src.training.settings import LatentNoiseSettings, LayerSubset
from src.training.step_noise import StepNoise


@pytest.mark.parametrize(("layers", "depth", "expected"), [
    (None, 24, [23]),
    ("k1", 24, [23]),
    ("k7", 24, [11, 13, 15, 17, 19, 21, 23]),  # RAEv2
    ("k23", 24, list(range(1, 24))),
    ("k7", 32, [19, 21, 23, 25, 27, 29, 31]),
    ("k7", 13, [0, 2, 4, 6, 8, 10, 12]),
    ("k23", 23, list(range(23))),
    ("11.13.15", 24, [11, 13, 15]),
    ("3", 12, [3]),
    (3, 12, [3]),
    ([5, 2], 12, [2, 5]),
])  # fmt: skip
def test_blocks_by_name_and_by_number(layers, depth, expected):
    assert parse_layers(layers, depth) == tuple(expected)


@pytest.mark.parametrize(("layers", "depth", "message"), [
    ([], 12, r"layers is empty: name at least one block \(0 to 11\), or null for the last one"),
    ([12], 12, r"this encoder has 12 blocks, numbered 0 to 11; got \[12\]"),
    ([-1], 12, r"got \[-1\]"),
    ("11.24", 24, r"got \[24\]"),
    ([1.5], 12, r"got \[1.5\]"),
    ([True], 12, r"got \[True\]"),
    (["5"], 12, r"got \['5'\]"),
    ([3, 3], 12, "lists a block twice"),
    ("k7", 12, "k7 needs more than the 12 blocks of this encoder. Names that fit: k1; or list"),
    ("k23", 22, "Names that fit: k1, k7;"),
    ("", 24, "expected null, k1, k7, k23, a list like"),
    ("11,13", 24, "numbers like 5.11"),
    (5.11, 24, r"was read as a decimal number. Write a list, \[5,11\], or quote it"),
])  # fmt: skip
def test_invalid_blocks_are_rejected(layers, depth, message):
    with pytest.raises(UserError, match=message):
        parse_layers(layers, depth)


def test_error_names_the_key_of_the_caller():
    with pytest.raises(UserError, match=r"^--layers='k9': expected"):
        parse_layers("k9", 24, "--layers")


# -- random subsets

BLOCKS = (4, 7, 9)
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(BLOCKS, size)]
STEPS = 7_000


def probability(subset, p, blocks=BLOCKS):
    """Return the probability of a subset: independent choices with p, given that at least one block is chosen."""
    return p ** len(subset) * (1 - p) ** (len(blocks) - len(subset)) / (1 - (1 - p) ** len(blocks))


@pytest.mark.parametrize("p", [0.5, 0.2, 0.9, 1.0])
def test_subset_distribution_is_exact(p):
    """The draw is constant on boxes of [0, 1)^3; their volumes add up to the probabilities."""
    first = np.cumsum([p * (1 - p) ** i for i in range(3)]) / (1 - (1 - p) ** 3)
    edges = [[0.0, *first], [0.0, p, 1.0], [0.0, p, 1.0]]
    volumes = dict.fromkeys(SUBSETS, 0.0)
    for box in product(*(list(zip(e[:-1], e[1:], strict=True)) for e in edges)):
        volume = np.prod([high - low for low, high in box])
        if volume > 0:
            volumes[random_subset(BLOCKS, p, np.array([(low + high) / 2 for low, high in box]))] += volume
    assert volumes == pytest.approx({subset: probability(subset, p) for subset in SUBSETS}, abs=1e-12)
    assert p != 0.5 or volumes == pytest.approx(dict.fromkeys(SUBSETS, 1 / 7))


def test_subsets_at_the_limits_of_the_draw():
    zeros, ones = np.zeros(3), np.full(3, np.nextafter(1, 0))
    assert random_subset(BLOCKS, 1.0, ones) == BLOCKS
    assert random_subset(BLOCKS, 1e-12, zeros + 0.999) == (9,)  # rare blocks: one at a time, and no endless loop
    assert random_subset(BLOCKS, 0.5, ones) == (9,)
    assert random_subset(BLOCKS, 0.5, zeros) == BLOCKS
    assert random_subset((3,), 0.5, ones[:1]) == (3,)


def test_chi_square_over_many_steps():
    draws = stand_in(0.3)
    counts = Counter(draws.blocks(step) for step in range(STEPS))
    chi_square = sum((counts[s] - STEPS * probability(s, 0.3)) ** 2 / (STEPS * probability(s, 0.3)) for s in SUBSETS)
    assert chi_square < 22.46  # 6 degrees of freedom, one in a thousand; the seed is fixed
    pairs = sum(draws.blocks(step) == draws.blocks(step + 1) for step in range(0, STEPS, 2))
    same = sum(probability(s, 0.3) ** 2 for s in SUBSETS)
    assert abs(pairs / (STEPS / 2) - same) < 4 * (same * (1 - same) / (STEPS / 2)) ** 0.5  # steps are independent


def test_subset_is_a_function_of_seed_and_step_alone(monkeypatch):
    """The same after a resume, on every rank, whatever ran before."""
    reference = [stand_in(0.5).blocks(step) for step in range(50)]
    resumed = stand_in(0.5)
    np.random.seed(1)
    torch.manual_seed(1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [resumed.blocks(step) for step in range(25, 50)] == reference[25:]
    assert [resumed.blocks(step) for step in reversed(range(50))] == reference[::-1]
    assert [stand_in(0.5, seed=1).blocks(step) for step in range(50)] != reference


def test_no_subsets_for_kind_none_or_a_single_block():
    assert stand_in(0.5, kind="none").blocks(3) is None
    with pytest.raises(UserError, match=r"layer_subset.kind=uniform needs several blocks .* block 4 alone"):
        stand_in(0.5, blocks=(4,))


@pytest.mark.parametrize(("kind", "keep", "message"), [
    ("random", 0.5, "kind='random': expected none or uniform"), ("uniform", 0.0, "probability=0.0: expected more than 0"),
    ("uniform", 1.5, "probability=1.5: expected at most 1"),
])  # fmt: skip
def test_settings_are_checked(kind, keep, message):
    with pytest.raises(UserError, match=message):
        LayerSubset.parse({"kind": kind, "keep_probability": keep}, "model.layer_subset")


def stand_in(p, kind="uniform", seed=0, blocks=BLOCKS, tau=0.8, **noise):
    """Build a StepNoise on a stub with the few attributes of a model that it reads."""
    rae = SimpleNamespace(noise_tau=tau, latent_shape=(8, 2, 2), encoder=SimpleNamespace(layers=blocks))
    levels = LatentNoiseSettings(**{"level": "uniform", "mu": 0.0, "s": 1.0, "per": "image"} | noise)
    return StepNoise(rae, DiffAug(prob=0.5, cutout=0.1), levels, LayerSubset(kind=kind, keep_probability=p), seed)


# -- latent noise and augmentation


def batch(*positions, epoch=1):
    return {"epoch": epoch, "position": torch.tensor(positions)}


def test_noise_is_a_function_of_epoch_and_position_for_any_split_of_a_batch():
    noise, cpu = stand_in(0.5), torch.device("cpu")
    whole, halves = noise.latents(batch(5, 6, 7), cpu), [noise.latents(batch(*p), cpu) for p in ((5,), (6, 7))]
    assert torch.equal(whole.sigma, torch.cat([half.sigma for half in halves]))
    assert torch.equal(whole.normal, torch.cat([half.normal for half in halves]))
    assert whole.normal.shape == (3, 8, 2, 2) and whole.sigma.min() >= 0 and whole.sigma.max() < 0.8
    assert not torch.equal(whole.sigma, noise.latents(batch(5, 6, 7, epoch=2), cpu).sigma)
    assert stand_in(0.5, tau=0.0).latents(batch(5), cpu) is None
    published = 0.8 * streams.uniforms(0, Purpose.NOISE_LEVEL, 1, [5, 6, 7], 1)
    assert torch.equal(whole.sigma.flatten(), published.flatten()), "U(0, tau), one draw per image"


def moments_of_logit_normal(mu, s):
    """Return mean and mean square of sigmoid(N(mu, s^2)), by the trapezoid rule."""
    x = np.linspace(-9, 9, 20_001)
    weight = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    values = 1 / (1 + np.exp(-(mu + s * x)))
    return [float(np.trapezoid(values**k * weight, x)) for k in (1, 2)]


@pytest.mark.parametrize(("noise", "mean", "square"), [
    ({"level": "uniform"}, 0.4, 0.64 / 3), ({"level": "half_normal"}, 0.4 * math.sqrt(2 / math.pi), 0.16),
    ({"level": "logit_normal", "mu": -1.0, "s": 0.5}, *(0.8**k * m for k, m in enumerate(moments_of_logit_normal(-1, 0.5), 1))),
])  # fmt: skip
@pytest.mark.parametrize("per", ["image", "token"])
def test_noise_levels_have_their_distribution(noise, mean, square, per):
    places = range(4000) if per == "image" else range(1000)
    found, cpu = stand_in(0.5, per=per, **noise), torch.device("cpu")
    sigma = found.latents(batch(*places), cpu).sigma
    assert sigma.shape == ((4000, 1, 1, 1) if per == "image" else (1000, 1, 2, 2))
    assert abs(float(sigma.mean()) - mean) < 0.015 and abs(float((sigma**2).mean()) - square) < 0.015
    assert bool(sigma.isfinite().all()) and float(sigma.min()) >= 0
    assert torch.equal(sigma[3:5], found.latents(batch(3, 4), cpu).sigma), "a function of the image's position"


def test_each_update_and_each_purpose_draws_its_own_augmentation():
    noise, cpu = stand_in(0.5), torch.device("cpu")

    def draw(purpose=Purpose.AUGMENT_FAKE, positions=(5, 6, 7), number=0, update=0):
        return noise.augment(purpose, batch(*positions), number, update, cpu)

    first, switches = draw().samples, lambda d: (d.translation, d.colour, d.cutout)
    assert torch.equal(first[1:], draw(positions=(6, 7)).samples)
    others = [draw(update=1), draw(update=2), draw(purpose=Purpose.AUGMENT_REAL)]
    assert len({tuple(d.samples[0].tolist()) for d in (draw(), *others)}) == 4
    places = [2**62 + number for number in range(20)]  # positions of whole batches, beyond those of images
    values = streams.uniforms(0, Purpose.AUGMENT_FAKE, 1, places, 2 * UNIFORMS_PER_BATCH)[:, UNIFORMS_PER_BATCH:]
    expected = [switches(noise.augmentation.draw(value, first)) for value in values]
    assert [switches(draw(number=number, update=1)) for number in range(20)] == expected
    assert switches(draw(positions=(9,))) == switches(draw())
