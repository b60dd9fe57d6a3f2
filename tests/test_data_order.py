"""Order of an epoch: any split of a global batch into ranks and micro-batches gives the same images, each once."""

import itertools

import numpy as np
import pytest

from src.core.errors import UserError
from src.data.order import EpochOrder, evaluation_rows, split_rows


def global_batches(length: int, seed: int, epoch: int, b: int, w: int, k: int) -> list[list[tuple[int, int]]]:
    """Return the (position, row) pairs of each global batch, in position order."""
    ranks = [list(EpochOrder(length, seed, b, w, r, k).epoch(epoch)) for r in range(w)]
    assert len({len(rank) for rank in ranks}) == 1
    out = []
    for g in range(len(ranks[0]) // k):
        micro = itertools.chain.from_iterable(rank[g * k + i] for i in range(k) for rank in ranks)
        out.append([(item.position, item.row) for item in micro])
    return out


@pytest.mark.parametrize("length", [24, 25, 131, 500])
@pytest.mark.parametrize("epoch", [0, 3])
def test_same_global_batches_for_equal_products(length: int, epoch: int) -> None:
    reference = global_batches(length, 5, epoch, 24, 1, 1)
    for b, w, k in ((12, 2, 1), (12, 1, 2), (6, 2, 2), (3, 8, 1), (1, 4, 6), (2, 3, 4)):
        got = global_batches(length, 5, epoch, b, w, k)
        assert got == reference
    seen = [row for batch in reference for _, row in batch]
    assert len(seen) == len(set(seen)) == length // 24 * 24 and set(seen) <= set(range(length))
    assert [p for batch in reference for p, _ in batch] == list(range(len(seen)))


def test_epochs_and_seeds_differ() -> None:
    first, later, other = ([i.row for i in next(EpochOrder(64, s, 64).epoch(e))] for s, e in ((9, 0), (9, 1), (10, 0)))
    assert first != later and first != other and sorted(first) == list(range(64))


@pytest.mark.parametrize(
    ("length", "b", "w", "k", "says"),
    [
        (10, 16, 1, 1, "data.batch_size=10"),
        (100, 64, 2, 1, "data.batch_size=50"),
        (100, 64, 2, 4, "data.batch_size=12"),
        (5, 4, 2, 8, "accumulate_grad_batches=2"),
        (3, 4, 8, 1, "at most 3 processes"),
        (0, 4, 1, 1, "data.data_dir"),
    ],
)
def test_too_few_images_suggests_a_value_that_fits(length: int, b: int, w: int, k: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        EpochOrder(length, 0, b, w, 0, k)
    if "batch_size=" in says:  # the suggestion works
        EpochOrder(length, 0, int(says.split("=")[1]), w, 0, k)
    assert str(length) in str(caught.value)


def test_split_is_exact_mixed_and_a_function_of_length_and_share() -> None:
    train, held = split_rows(20, 0.8)
    assert (len(train), len(held)) == (16, 4)
    assert sorted([*train, *held]) == list(range(20))
    np.testing.assert_array_equal(split_rows(20, 0.8)[1], held)
    train, held = split_rows(1000, 0.9)
    assert held.min() < 100
    assert held.max() > 900
    assert (np.diff(held) > 1).any()
    assert len(split_rows(50, 1.0)[1]) == 0
    assert [len(split_rows(100, s)[0]) for s in (0.29, 0.57, 0.07)] == [29, 57, 7]  # products inexact in floats


def test_evaluation_rows_partition_and_nest() -> None:
    whole = evaluation_rows(103)
    assert sorted(whole) == list(range(103))
    np.testing.assert_array_equal(evaluation_rows(103, 40), whole[:40])
    shares = [evaluation_rows(103, 40, 3, r) for r in range(3)]
    assert [len(s) for s in shares] == [14, 13, 13]
    assert sorted(np.concatenate(shares)) == sorted(whole[:40])
    assert len(evaluation_rows(5, 1000)) == 5
