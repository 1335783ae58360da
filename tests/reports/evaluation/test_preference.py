"""Win rates by counting, the interval against the normal one, and what makes two sets comparable."""

import math

import pytest
import torch

from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.preference import counted, paired, win_rate
from wuerstchen_core.reports.evaluation.reading import Scored


def test_wins_are_counted_and_a_tie_is_half_a_win():
    ours, theirs = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([0.0, 2, 4, 3, 2])
    assert counted(ours, theirs) == (3, 1, 1)
    assert win_rate(*counted(ours, theirs)).rate == 3.5 / 5
    assert counted(theirs, ours) == (1, 1, 3)


@pytest.mark.parametrize("wins, ties, losses", [(600, 0, 400), (300, 100, 600), (30, 5, 15)])
def test_the_interval_is_nearly_the_normal_one(wins, ties, losses):
    count = wins + ties + losses
    rate = (wins + ties / 2) / count
    deviation = math.sqrt((wins + ties / 4) / count - rate**2)
    reach = 1.96 * deviation / math.sqrt(count)
    found = win_rate(wins, ties, losses)
    assert found.rate == rate and found == win_rate(wins, ties, losses)
    assert found.low == pytest.approx(rate - reach, abs=0.1 * reach + 0.5 / count)
    assert found.high == pytest.approx(rate + reach, abs=0.1 * reach + 0.5 / count)


def test_what_is_certain_has_no_interval_and_nothing_has_none():
    assert win_rate(7, 0, 0) == (1, 1, 1) and win_rate(0, 0, 3) == (0, 0, 0)
    with pytest.raises(WuerstchenError, match="nothing to compare"):
        win_rate(0, 0, 0)


def scored(*captions):
    return Scored([key for key, _ in captions], [caption for _, caption in captions], {})


A = scored(("x", "a cat"), ("y", "a dog"))


def test_pictures_are_paired_by_name():
    assert paired(A, scored(("y", "a dog"), ("x", "a cat")), ("ours", "theirs")) == [1, 0]


@pytest.mark.parametrize(
    "other, says",
    [
        (scored(("x", "a cat")), "theirs: y is missing"),
        (scored(("x", "a cat"), ("y", "a dog"), ("z", "")), "ours: z is missing"),
        (scored(("x", "a cat"), ("y", "a cow")), "y: the captions differ, 'a dog' and 'a cow'"),
        (scored(("x", "a cat"), ("y", "a dog"), ("y", "a dog")), "theirs: two pictures are called y"),
    ],
)
def test_sets_that_cannot_be_paired_are_named(other, says):
    with pytest.raises(WuerstchenError, match=says):
        paired(A, other, ("ours", "theirs"))
