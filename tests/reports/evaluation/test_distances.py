"""Each figure against its definition, in float64 by numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from wuerstchen_core import WuerstchenError
from wuerstchen_core.reports.evaluation.distances import fid, inception_score, kid, precision_recall


def drawn(seed, count, width=6, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1 + shift, (count, width))).float()


def test_fid_is_the_frechet_distance_by_scipys_root():
    ours, theirs = drawn(0, 50), drawn(1, 80, shift=0.5)
    one, other = ours.double().numpy(), theirs.double().numpy()
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert fid(theirs, ours) == pytest.approx(expected, rel=1e-9) and expected > 1
    assert abs(fid(ours, ours)) < 1e-9


def mmd(real, generated):
    """The unbiased estimate for the kernel (x·y / F + 1)³."""

    def kernel(ones, others):
        return (ones @ others.T / ones.shape[1] + 1) ** 3

    def within(ones):
        return (kernel(ones, ones).sum() - np.trace(kernel(ones, ones))) / (len(ones) * (len(ones) - 1))

    return within(real) + within(generated) - 2 * kernel(real, generated).mean()


def test_kid_of_whole_sets_is_the_unbiased_kernel_distance():
    real, generated = drawn(0, 20), drawn(1, 20, shift=0.3)
    found = kid(real, generated, subsets=3, subset=20)
    assert found.mean == pytest.approx(mmd(real.double().numpy(), generated.double().numpy()), rel=1e-9)
    assert found.deviation == pytest.approx(0, abs=1e-9)


def test_kid_has_the_mean_and_deviation_over_random_halves():
    real, generated = drawn(0, 30), drawn(1, 40, shift=0.3)
    whole = mmd(real.double().numpy(), generated.double().numpy())
    found = kid(real, generated)
    chance = np.random.default_rng(3)
    values = [mmd(*(chance.permutation(one.double().numpy())[:15] for one in (real, generated))) for _ in range(2000)]
    assert found.mean == pytest.approx(whole, abs=4 * np.std(values) / 10)
    assert found.deviation == pytest.approx(np.std(values), rel=0.35)
    state = torch.random.get_rng_state()
    assert kid(real, generated) == found and torch.equal(torch.random.get_rng_state(), state)


def test_the_inception_score_is_its_definition():
    logits = drawn(5, 10, 4) * 3
    one = inception_score(logits)  # ten splits of one picture: nothing to tell them apart
    assert one.mean == pytest.approx(1, rel=1e-9) and one.deviation == pytest.approx(0, abs=1e-9)
    logits = logits.repeat_interleave(100, dim=0)
    found = inception_score(logits)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).numpy()
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p[order], 10)]
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-9) and found.mean > 1.5
    assert found.deviation == pytest.approx(np.std(scores, ddof=1), rel=1e-9)


def test_precision_and_recall_are_counted(monkeypatch):
    monkeypatch.setattr("wuerstchen_core.reports.evaluation.distances.ROWS", 7)
    real, generated = drawn(0, 30, 3), drawn(1, 20, 3, shift=0.8)

    def covered(points, centres):
        hits = 0
        for point in points:
            for centre in centres:
                radius = sorted(np.linalg.norm(centres - centre, axis=1))[3]  # the nearest is itself
                if np.linalg.norm(point - centre) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    r, g = real.double().numpy(), generated.double().numpy()
    expected = covered(g, r), covered(r, g)
    assert precision_recall(real, generated) == expected and expected[0] != expected[1] and 0 < expected[0] < 1
    assert precision_recall(real, real) == (1, 1) and precision_recall(real, real + 100) == (0, 0)


@pytest.mark.parametrize("figure, least", [(fid, 2), (kid, 4), (precision_recall, 4)])
def test_too_few_pictures_are_told(figure, least):
    with pytest.raises(WuerstchenError, match=f"1 generated and 9 real pictures: .* at least {least} of each"):
        figure(drawn(0, 9), drawn(1, 1))
    figure(drawn(0, least), drawn(1, least))


def test_too_few_pictures_for_the_inception_score_are_told():
    with pytest.raises(WuerstchenError, match="9 pictures: the Inception Score needs at least 10"):
        inception_score(drawn(0, 9))
