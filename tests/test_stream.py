"""Draws depend on (seed, purpose, epoch, position) and on nothing else."""

import itertools

import numpy as np
import pytest
import torch

from src.core import random_streams as stream
from src.core.random_streams import Purpose
from src.data.mix import feistel

CPU = torch.device("cpu")


def test_draws_do_not_depend_on_the_split_into_batches():
    together = stream.uniforms(7, Purpose.CROP, 3, range(10), 4)
    apart = torch.cat([stream.uniforms(7, Purpose.CROP, 3, part, 4) for part in (range(1), range(1, 7), range(7, 10))])
    assert torch.equal(together, apart)
    noise = stream.normals(7, Purpose.LATENT_NOISE, 3, [5, 6], (2, 3), CPU)
    assert torch.equal(noise[1:], stream.normals(7, Purpose.LATENT_NOISE, 3, [6], (2, 3), CPU))


def test_moved_generator_equals_a_fresh_one_at_each_position():
    places = [4, 0, 2**62 + 7, 4]
    for numbers, place in zip(stream.generators(7, Purpose.CROP, 3, places), places, strict=True):
        fresh = stream.generator(7, Purpose.CROP, 3, place)
        assert numbers.integers(0, 2**63 - 1) == fresh.integers(0, 2**63 - 1)
        assert numbers.random(3, dtype=np.float32).tolist() == fresh.random(3, dtype=np.float32).tolist()


def test_draws_ignore_and_keep_global_generators():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = stream.normals(0, Purpose.LATENT_NOISE, 0, [1], (4,), CPU)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, stream.normals(0, Purpose.LATENT_NOISE, 0, [1], (4,), CPU))


def test_draws_depend_on_every_key():
    keys = itertools.product((0, 1), (Purpose.CROP, Purpose.AUGMENT_REAL), (0, 1), (0, 1))
    first_numbers = {float(stream.generator(s, p, e, i).random()) for s, p, e, i in keys}
    assert len(first_numbers) == 16


def test_draws_have_the_moments_of_their_distribution():
    uniform = stream.uniforms(0, Purpose.CROP, 0, range(2000), 2)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.02 and abs(float(np.corrcoef(uniform.T.numpy())[0, 1])) < 0.06
    normal = stream.normals(0, Purpose.LATENT_NOISE, 0, range(50), (64,), CPU)
    assert abs(float(normal.mean())) < 0.06 and abs(float(normal.std()) - 1) < 0.05


def test_purposes_keep_their_numbers():
    """So do the draws: a changed number would change every seeded run."""
    assert [p.value for p in Purpose] == list(range(20))
    assert stream.uniforms(7, Purpose.CROP, 1, [2], 2).tolist() == [pytest.approx([0.04396969, 0.82623363], abs=1e-7)]
    assert stream.permutation(7, 1, 6).tolist() == [2, 4, 5, 1, 0, 3]
    assert feistel((1, 2, 3, 4), 5000, np.arange(3)).tolist() == [278, 2699, 2820]
    normals = stream.normals(7, Purpose.SAMPLE_NOISE, 1, [2], (2,), CPU)
    assert normals.tolist() == [pytest.approx([-0.50004590, 0.84696782], abs=1e-6)]
