"""Prompts, and what ComfyUI's nodes make of them: combined, concatenated, for times, areas and masks."""

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.host import apart, noise
from tests.reference import distance


@pytest.mark.parametrize("prompt", ["a cat", "", "a (red:1.4) cat, ((big)) \\(dog\\)", "a cat on a mat, " * 40])
def test_clip_text_encode_is_the_cores_text_encoder(call, run, mini, minis, prompt):
    [[states, _]] = call("CLIPTextEncode", clip=minis.clip_c, text=prompt)
    expected = mini.text_encoder_c([prompt])
    assert states.shape == expected.shape and distance(states, expected) < 1e-4
    [[ours, _]] = run("WuerstchenTextEncode", clip=minis.clip_c, text=prompt)
    assert torch.equal(ours, states)


def test_embeddings_are_read_by_name(call, tinies, tmp_path, monkeypatch):
    """OneTrainer's files have the key clip_g."""
    tokenizer = tinies.clip_c.tokenizer.clip_g
    monkeypatch.setattr(tokenizer, "embedding_directory", [str(tmp_path)])
    word = tinies.clip_c.cond_stage_model.clip_g.transformer.get_input_embeddings().weight[2368:2369].clone()
    save_file({"clip_g": word}, tmp_path / "thing.safetensors")
    [[named, _]] = call("CLIPTextEncode", clip=tinies.clip_c, text="a embedding:thing")
    [token] = tinies.clip_c.tokenizer.clip_g.tokenizer("cat")["input_ids"][1:-1]
    [[spoken, _]] = call("CLIPTextEncode", clip=tinies.clip_c, text="a cat")
    assert token == 2368 and distance(named, spoken) < 1e-5


def test_the_last_layer_is_the_one_that_is_read(call, tinies, text):
    same = call("CLIPSetLastLayer", clip=tinies.clip_c, stop_at_clip_layer=-1)
    assert torch.equal(call("CLIPTextEncode", clip=same, text="a cat")[0][0], text("a cat")[0][0])


def test_mixed_prompts(call, text, ksampler, empty):
    cat, dog, long = text("a cat"), text("a dog"), text("a cat " * 60)
    plain, other = ksampler(empty()), ksampler(empty(), positive=dog)
    mixed = {
        "combine": call("ConditioningCombine", conditioning_1=cat, conditioning_2=dog),
        "concat": call("ConditioningConcat", conditioning_to=cat, conditioning_from=dog),
        "average": call("ConditioningAverage", conditioning_to=cat, conditioning_from=dog,
                        conditioning_to_strength=0.5),
        "long": long,
        "zero": call("ConditioningZeroOut", conditioning=cat),
    }  # fmt: skip
    drawn = {name: ksampler(empty(), positive=positive) for name, positive in mixed.items()}
    assert all(1e-4 < apart(one, plain) < 1.5 for one in drawn.values())
    # the mean of two predictions lies between them
    assert apart(drawn["combine"], plain) < apart(other, plain) > apart(drawn["combine"], other)
    same = call("ConditioningAverage", conditioning_to=cat, conditioning_from=dog, conditioning_to_strength=1.0)
    assert apart(ksampler(empty(), positive=same), plain) < 1e-5


def test_time_ranges(call, text, ksampler, empty):
    def during(prompt, start, end):
        return call("ConditioningSetTimestepRange", conditioning=text(prompt), start=start, end=end)

    both = call("ConditioningCombine", conditioning_1=during("a cat", 0.0, 0.5), conditioning_2=during("a dog", 0.5, 1))
    drawn = ksampler(empty(), positive=both)
    assert apart(drawn, ksampler(empty())) > 1e-4 and apart(drawn, ksampler(empty(), positive=text("a dog"))) > 1e-4
    assert apart(ksampler(empty(), positive=during("a cat", 0.0, 1.0)), ksampler(empty())) < 1e-5


@pytest.fixture
def halves(call, text):
    """Two prompts for the left and the right half of a picture of 512 x 256, by a node of ComfyUI's."""

    def halves(node, **pair):
        entries = [
            call(node, conditioning=text(prompt), strength=1.0, **{name: values[i] for name, values in pair.items()})
            for i, prompt in enumerate(("a cat", "a dog"))
        ]
        return call("ConditioningCombine", conditioning_1=entries[0], conditioning_2=entries[1])

    return halves


def test_areas_in_pixels_are_those_in_shares(halves, ksampler, empty):
    """ComfyUI takes eighths of pixels for positions of the latent; a position of Stage C's is 42.67 pixels."""
    pixels = halves("ConditioningSetArea", width=(256, 256), height=(256, 256), x=(0, 256), y=(0, 0))
    shares = halves("ConditioningSetAreaPercentage", width=(0.5, 0.5), height=(1.0, 1.0), x=(0, 0.5), y=(0, 0))
    by_pixels, by_shares = (ksampler(empty(512, 256), positive=positive) for positive in (pixels, shares))
    assert apart(by_pixels, by_shares) < 1e-5
    assert apart(by_pixels, ksampler(empty(512, 256))) > 1e-3


def test_an_area_beside_the_picture_is_a_position_at_its_edge(call, text, ksampler, empty):
    share = {"width": 0.001, "height": 0.001, "x": 0.9999, "y": 0.9999}
    pixels = {"width": 64, "height": 64, "x": 8192, "y": 8192}
    drawn = []
    for node, area in (("ConditioningSetAreaPercentage", share), ("ConditioningSetArea", pixels)):
        corner = call(node, conditioning=text("a dog"), strength=1.0, **area)
        both = call("ConditioningCombine", conditioning_1=text("a cat"), conditioning_2=corner)
        drawn.append(ksampler(empty(), positive=both, steps=1)["samples"])
    plain = ksampler(empty(), steps=1)["samples"]
    assert torch.equal(*drawn) and not torch.equal(drawn[0][..., 5:, 5:], plain[..., 5:, 5:])


def test_areas_draw_what_their_prompts_say(halves, text, ksampler, empty):
    """Far from the seam each half is nearer to what its own prompt draws in its place."""
    shares = halves("ConditioningSetAreaPercentage", width=(0.5, 0.5), height=(1.0, 1.0), x=(0, 0.5), y=(0, 0))
    drawn = ksampler(empty(512, 256), positive=shares, cfg=6.0)["samples"]
    cat, dog = (ksampler(empty(512, 256), positive=text(prompt), cfg=6.0)["samples"] for prompt in ("a cat", "a dog"))
    assert distance(drawn[..., :4], cat[..., :4]) < distance(drawn[..., :4], dog[..., :4])
    assert distance(drawn[..., -4:], dog[..., -4:]) < distance(drawn[..., -4:], cat[..., -4:])


@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_masks_on_prompts(halves, ksampler, empty, bounds):
    left, right = torch.zeros(1, 256, 512), torch.ones(1, 256, 512)
    left[..., :256], right[..., :256] = 1, 0
    masked = halves("ConditioningSetMask", mask=(left, right), set_cond_area=(bounds, bounds))
    drawn = ksampler(empty(512, 256), positive=masked)
    assert drawn["samples"].isfinite().all() and apart(drawn, ksampler(empty(512, 256))) > 1e-4


def test_an_area_of_stage_b_gets_its_part_of_the_semantic_latent(call, tinies, text, ksampler):
    """Two areas that together are the whole picture draw it nearly as one does, whatever its size."""
    for size in ((6, 12), (5, 9)):
        latent = {"samples": noise(1, 16, *size)}
        positive, negative, start = call("WuerstchenStageBConditioning", latent=latent, positive=text("a cat"))
        parts = [
            call(
                "ConditioningSetAreaPercentage", conditioning=positive, width=0.5, height=1.0, x=x, y=0.0, strength=1.0
            )
            for x in (0.0, 0.5)
        ]
        both = call("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])
        options = {"model": tinies.model_b, "negative": negative, "cfg": 1.0}
        whole = ksampler(start, positive=positive, **options)
        left = ksampler(start, positive=both, **options)
        wrong = [[both[0][0], {**both[0][1], "wuerstchen_semantic": latent["samples"].flip(3)}], both[1]]
        assert apart(left, whole) < 0.6 * apart(ksampler(start, positive=wrong, **options), whole)


def test_what_a_run_does_not_change_is_computed_once(call, tinies, text, ksampler, empty, condition_calls):
    def computed(*inputs, **options):
        condition_calls.clear()
        ksampler(*inputs, **options)
        return len(condition_calls)

    assert computed(empty(), steps=6) == 1
    assert computed(empty(), steps=6, negative=text("a dog " * 60)) == 1
    both = call("ConditioningCombine", conditioning_1=text("a cat"), conditioning_2=text("a dog"))
    assert computed(empty(), steps=6, positive=both) == 1
    positive, negative, start = call("WuerstchenStageBConditioning", latent=empty(), positive=text("a cat"))
    assert computed(start, tinies.model_b, positive, negative, steps=6, cfg=2.0) <= 2


def test_what_is_kept_is_what_would_be_computed(call, module, tinies, text, ksampler, empty, monkeypatch):
    both = call("ConditioningCombine", conditioning_1=text("a cat"), conditioning_2=text("a dog " * 60))
    kept = ksampler(empty(batch_size=2), positive=both)
    monkeypatch.setattr(module("nodes.host.models"), "remembered", lambda memories, inputs, compute: compute())
    assert torch.equal(ksampler(empty(batch_size=2), positive=both)["samples"], kept["samples"])
