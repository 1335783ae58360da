"""Batches of prompts become the pictures that `Wuerstchen.generate` draws of each."""

from dataclasses import replace

import torch

from wuerstchen_core import Geometry
from wuerstchen_core.reports.evaluation.drawing import batches, draw_latent, finish

PROMPTS = ["a cat", "a dog " * 60, "", "a house", "two cats"]  # the second one has two chunks


def drawn(model, sampling, size):
    found = {}
    for batch in batches(model, PROMPTS, 3, size):
        latent = draw_latent(model, batch, Geometry(64, 64), sampling.stage_c)
        images = finish(model, latent, batch, Geometry(64, 64), sampling.stage_b)
        found.update(zip(batch.numbers, images, strict=True))
    return torch.stack([found[i] for i in range(len(PROMPTS))])


def test_each_picture_is_the_one_that_generate_draws(tiny):
    options = {"steps_c": 2, "steps_b": 2, "cfg_c": 3.0}
    sampling = tiny.sampling(**options)
    expected = torch.cat(
        [tiny.generate(one, seed=3 + i, width=64, height=64, **options) for i, one in enumerate(PROMPTS)]
    )
    assert (expected[0] - expected[3]).abs().max() > 0.01
    for size in (2, 8):
        assert (drawn(tiny, sampling, size) - expected).abs().max() < 1e-4
    guided = replace(sampling.stage_b, cfg=2.0)
    expected = tiny.generate(PROMPTS[3], seed=6, width=64, height=64, **options, cfg_b=2.0)[0]
    assert (drawn(tiny, sampling._replace(stage_b=guided), 8)[3] - expected).abs().max() < 1e-3


def test_without_text_stage_b_draws_as_for_no_prompt(tiny):
    sampling = tiny.sampling(steps_c=1, steps_b=1)
    (batch,) = batches(tiny, PROMPTS[3:], 0, 8)
    latent = draw_latent(tiny, batch, Geometry(64, 64), sampling.stage_c)
    with_text, without = (
        finish(tiny, latent, batch, Geometry(64, 64), sampling.stage_b, with_text) for with_text in (True, False)
    )
    unread = replace(tiny, text_encoder_b=None)
    assert torch.equal(finish(unread, latent, batch, Geometry(64, 64), sampling.stage_b), without)
    assert (with_text - without).abs().max() > 1e-3
