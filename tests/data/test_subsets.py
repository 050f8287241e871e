import pytest
import torch

from ssl_samix.data.subsets import hold_out, stratified
from ssl_samix.errors import DataError


def labels(*counts):
    """Return labels with the given count per class, shuffled."""
    made = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    return made[torch.randperm(len(made), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    ("counts", "n", "expected"),
    [
        ((50, 30, 20), 10, [5, 3, 2]),
        ((60, 30, 10), 4, [2, 1, 1]),  # quotas 2.4, 1.2, 0.4
        ((97, 1, 1, 1), 10, [7, 1, 1, 1]),  # each class at least once
        ((70, 30), 3, [2, 1]),
        ((5, 5), 100, [5, 5]),  # an upper bound
    ],
)
def test_shares_of_the_classes(counts, n, expected):
    y = labels(*counts)
    chosen = stratified(y, n, seed=0)
    assert y[chosen].bincount(minlength=len(counts)).tolist() == expected
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.dtype == torch.int64


def test_the_seed_fixes_the_choice():
    y = labels(40, 40)
    assert torch.equal(stratified(y, 20, seed=3), stratified(y, 20, seed=3))
    assert not torch.equal(stratified(y, 20, seed=3), stratified(y, 20, seed=4))


def test_every_image_of_a_class_can_be_chosen():
    y = labels(6, 6)
    seen = {int(i) for seed in range(60) for i in stratified(y, 4, seed)}
    assert seen == set(range(12))


def test_fewer_than_classes_is_not_always_the_first_classes():
    y = labels(*[5] * 10)
    seen = {int(k) for seed in range(40) for k in y[stratified(y, 3, seed)]}
    assert seen == set(range(10))


def test_unlabelled_is_uniform():
    chosen = stratified(torch.full((1000,), -1), 500, seed=0)
    assert len(chosen) == 500
    assert 200 < int((chosen < 500).sum()) < 300


@pytest.mark.parametrize("n", [0, -3])
def test_a_limit_below_one_is_refused(n):
    with pytest.raises(DataError, match=r"data.limit must be at least 1"):
        stratified(labels(5), n, seed=0)


def test_hold_out_parts_each_class():
    y = labels(50, 30, 20)
    train, val = hold_out(y, 0.1, seed=0)
    assert y[val].bincount().tolist() == [5, 3, 2]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))


def test_a_single_image_of_a_class_stays_in_train():
    y = torch.tensor([0, 0, 0, 0, 1])
    train, val = hold_out(y, 0.2, seed=0)
    assert y[val].tolist() == [0]
    assert 4 in train.tolist()
    train, val = hold_out(torch.tensor([0, 1, 2]), 0.2, seed=0)
    assert (train.tolist(), val.tolist()) == ([0, 1, 2], [])
