"""What is drawn at random."""

import torch

from wuerstchen_core.training.loop.draws import Draws


def test_draws_follow_from_a_samples_number_alone():
    alone = Draws(7, 3, 4)
    halves = [Draws(7, 3, 2, rank=rank, world=2) for rank in range(2)]
    micros = [Draws(7, 3, 2, micro=micro) for micro in (6, 7)]
    for parts in (halves, micros):
        together = torch.cat([part.normal((2, 3)) for part in parts])
        assert torch.equal(together, Draws(7, 3, 4).normal((2, 3)))
    assert halves[0].common.random() == halves[1].common.random() == alone.common.random()
    drawn = torch.cat([Draws(0, step, 64).normal((8,)) for step in range(40)])
    assert drawn.unique().numel() > 0.99 * drawn.numel()
    assert drawn.mean().abs() < 0.03 and abs(drawn.std() - 1) < 0.03
    assert not torch.equal(Draws(0, 0, 1).normal((4,)), Draws(1, 0, 1).normal((4,)))
    uniform = torch.cat([Draws(0, step, 64).uniform(4) for step in range(40)])
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
