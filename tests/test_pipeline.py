"""The stages put together, on a set of random networks."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from wuerstchen_core import Geometry, WuerstchenError, pipeline
from wuerstchen_core.diffusion.schedule import add_noise, alpha_bar

FEW = {"steps_c": 2, "steps_b": 2}


def text_of(tiny, prompt="a cat"):
    return tiny.text_encoder_c([prompt])


@pytest.mark.parametrize("start", [{}, {"denoise": 0.5}, {"denoise": 0.0}], ids=["text", "image", "variation"])
@pytest.mark.parametrize("width, height", [(256, 256), (320, 264), (72, 648), (1288, 256), (256, 1032)])
def test_pictures_have_the_size_that_was_asked_for(tiny, start, width, height):
    """Whatever the size of the picture that they start from."""
    image = {"image": torch.rand(200, 333, 3)} if start else {}
    pictures = tiny.generate("a cat", width=width, height=height, **image, **start, **FEW)
    assert pictures.shape == (1, height, width, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std() > 0


@pytest.mark.parametrize("width, height", [(4096, 256), (264, 4088)])
def test_the_longest_pictures(tiny, width, height):
    pictures = tiny.generate("a cat", width=width, height=height, steps_c=1, cfg_c=1.0, steps_b=1)
    assert pictures.shape == (1, height, width, 3) and pictures.std() > 0


def test_the_seed_and_the_prompt_decide(tiny):
    one, again = (tiny.generate("a cat", seed=3, **FEW) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, tiny.generate("a cat", seed=4, **FEW))
    assert not torch.equal(one, tiny.generate("a dog", seed=3, **FEW))
    assert not torch.equal(one, tiny.generate("a cat", negative_prompt="a dog", seed=3, **FEW))


def test_pictures_of_a_batch_differ(tiny):
    pictures = tiny.generate("a cat", batch_size=3, **FEW)
    assert all(not torch.equal(pictures[i], pictures[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_every_step_is_reported(tiny):
    steps = []
    tiny.generate("a cat", steps_c=3, steps_b=2, progress=lambda *step: steps.append(step))
    assert steps == [("Stage C", 1, 3), ("Stage C", 2, 3), ("Stage C", 3, 3), ("Stage B", 1, 2), ("Stage B", 2, 2)]


def test_one_step_of_stage_c_by_hand(tiny):
    """From t = 1 to the clean latent in one step of DDIM, guidance 3, in the formulas' own words."""
    text, empty = text_of(tiny), text_of(tiny, "")
    noise = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(9))
    t = torch.ones(1)
    uncond, cond = tiny.stage_c(noise, t, empty), tiny.stage_c(noise, t, text)
    predicted = uncond + 3 * (cond - uncond)
    signal = alpha_bar(torch.ones(1, dtype=torch.float64)).item()
    expected = (noise - (1 - signal) ** 0.5 * predicted) / signal**0.5
    sampled = pipeline.sample_stage_c(
        tiny.stage_c, torch.zeros(1, 16, 6, 6), text, empty, steps=1, cfg=3.0, sampler="ddim", seed=9
    )
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-3)


def test_one_step_of_stage_b_by_hand(tiny):
    """Stage B gets raw features, (latent * 2 - 0.5) here; the unconditional half gets zeros."""
    latent = torch.randn(1, 16, 6, 6)
    features = latent * 2 - 0.5
    text, empty = text_of(tiny), text_of(tiny, "")
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(9))
    t = torch.ones(1)
    cond = tiny.stage_b(noise, t, features, text)
    uncond = tiny.stage_b(noise, t, torch.zeros_like(features), empty)
    signal = alpha_bar(torch.ones(1, dtype=torch.float64)).item()
    for cfg, predicted in ((1.0, cond), (2.0, uncond + 2 * (cond - uncond))):
        expected = (noise - (1 - signal) ** 0.5 * predicted) / signal**0.5
        sampled = pipeline.sample_stage_b(
            tiny.stage_b, latent, Geometry(256, 256), text, empty, steps=1, cfg=cfg, sampler="ddim", seed=9
        )
        torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=2e-3)


def test_denoise_starts_from_the_latent_with_noise(tiny):
    latent = torch.randn(1, 16, 6, 6)
    text = text_of(tiny)
    seen = []
    network = tiny.stage_c
    original = network.denoise

    def spy(x, modulation, condition):
        seen.append(x)
        return original(x, modulation, condition)

    network.denoise = spy
    try:
        options = {"steps": 2, "cfg": 1.0, "seed": 5}
        kept = pipeline.sample_stage_c(network, latent, text, denoise=0.0, **options)
        pipeline.sample_stage_c(network, latent, text, denoise=0.4, **options)
        pipeline.sample_stage_c(network, latent, text, denoise=1.0, **options)
    finally:
        del network.denoise
    noise = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(5))
    assert torch.equal(kept, latent)
    torch.testing.assert_close(seen[0], add_noise(latent, noise, 0.4))
    torch.testing.assert_close(seen[2], noise)


def test_outside_of_the_mask_the_latent_stays(tiny):
    latent = torch.randn(2, 16, 6, 6)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 3:] = 1
    sampled = pipeline.sample_stage_c(tiny.stage_c, latent, text_of(tiny), cfg=1.0, steps=2, mask=mask)
    assert torch.equal(sampled[..., :3], latent[..., :3])
    assert not torch.isclose(sampled[..., 3:], latent[..., 3:]).any(dim=1).all()


def test_a_picture_of_a_batch_alone(tiny):
    latent = torch.zeros(3, 16, 6, 6)
    options = {"steps": 4, "cfg": 1.0, "seed": 1, "sampler": "ddpm"}
    batch = pipeline.sample_stage_c(tiny.stage_c, latent, text_of(tiny), **options)
    alone = pipeline.sample_stage_c(tiny.stage_c, latent[:1], text_of(tiny), batch_index=[2], **options)
    first = pipeline.sample_stage_c(tiny.stage_c, latent[:1], text_of(tiny), **options)
    torch.testing.assert_close(alone, batch[2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, batch[:1], rtol=1e-4, atol=1e-4)


def test_a_picture_lies_in_the_middle_of_what_the_networks_work_on(tiny):
    """Stage A's round trip of a picture with a margin is that of the padded picture, cut out."""
    image = torch.rand(1, 200, 136, 3)
    latent = pipeline.encode(tiny.stage_a, image)
    assert latent.shape == (1, 4, 64, 48)
    padded = F.pad(rearrange(image, "b h w c -> b c h w"), (28, 28, 28, 28), mode="replicate")
    expected = tiny.stage_a.decode(tiny.stage_a.encode(padded))[:, :, 28:228, 28:164].clamp(0, 1)
    decoded = pipeline.decode(tiny.stage_a, latent, Geometry(width=136, height=200))
    torch.testing.assert_close(decoded, rearrange(expected, "b c h w -> b h w c"))


def test_compressed_pictures_lie_in_stage_c_space(tiny):
    image = torch.rand(1, 256, 512, 3)
    planes = F.interpolate(rearrange(image, "b h w c -> b c h w"), size=(192, 384), mode="bicubic", antialias=True)
    features = tiny.semantic_compressor(planes.clamp(0, 1))
    latent = pipeline.compress(tiny.semantic_compressor, image)
    assert latent.shape == (1, 16, 6, 12)
    torch.testing.assert_close(latent, (features + 0.5) / 2)


def test_a_picture_counts_less_the_more_is_drawn_anew(tiny):
    images = torch.rand(2, 300, 200, 3)
    pictures = [tiny.generate("a cat", image=image, denoise=0.5, **FEW) for image in images]
    assert not torch.equal(*pictures)
    variations = [tiny.generate("a cat", image=image, denoise=0.0, **FEW) for image in images]
    assert not torch.equal(*variations)
    anew = [tiny.generate("a cat", image=image, denoise=1.0, **FEW) for image in images]
    assert torch.equal(*anew) and torch.equal(anew[0], tiny.generate("a cat", **FEW))


def test_fit_covers_and_takes_the_middle():
    image = torch.zeros(1, 128, 512, 3)
    image[:, :, 192:320] = 1  # the middle square of a wide picture
    fitted = pipeline.fit(image, Geometry(256, 256))
    assert fitted.shape == (1, 256, 256, 3)
    assert fitted[:, :, 8:-8].min() > 0.99


def test_text_of_another_encoder_is_named(tiny):
    with pytest.raises(WuerstchenError, match="Stage C .* width 32, .* width 48"):
        pipeline.sample_stage_c(tiny.stage_c, torch.zeros(1, 16, 6, 6), torch.zeros(1, 77, 48), cfg=1.0)
    with pytest.raises(WuerstchenError, match="Stage B .* width 32, .* width 48"):
        pipeline.sample_stage_b(tiny.stage_b, torch.zeros(1, 16, 6, 6), Geometry(256, 256), torch.zeros(1, 77, 48))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"width": 100}, "width"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps_c": 0}, "steps"),
        ({"sampler": "euler"}, "euler"),
        ({"schedule": "karras"}, "karras"),
        ({"image": torch.rand(64, 64, 3), "denoise": 2.0}, "denoise"),
    ],
)
def test_bad_options_are_named(tiny, options, word):
    with pytest.raises(WuerstchenError, match=word):
        tiny.generate("a cat", **{**FEW, **options})


def run_stage(tiny, stage, network, dtype):
    latent, semantic = torch.ones(1, 4, 32, 32), torch.ones(1, 16, 3, 3)
    text, image, geometry = text_of(tiny), torch.rand(1, 128, 128, 3), Geometry(128, 128)
    return {
        "stage_c": lambda: pipeline.sample_stage_c(network, semantic, text, cfg=1.0, steps=2, dtype=dtype),
        "stage_b": lambda: pipeline.sample_stage_b(network, semantic, geometry, text, steps=2, dtype=dtype),
        "stage_a, decoding": lambda: pipeline.decode(network, latent, geometry, dtype),
        "stage_a, encoding": lambda: pipeline.encode(network, image, dtype),
        "semantic_compressor": lambda: pipeline.compress(network, image, dtype),
    }[stage]()


@pytest.mark.parametrize(
    "stage, layer, named",
    [
        ("stage_c", "projection", "Stage C"),
        ("stage_a, decoding", "up_blocks.0.0", "Stage A"),
        ("stage_a, encoding", "in_block.1", "Stage A"),
        ("semantic_compressor", "backbone.0.0", "the semantic compressor"),
    ],
)
def test_what_overflows_half_precision_says_so(tiny, stage, layer, named):
    """Weights that float16 can hold, and sums of them that it can't."""
    network = deepcopy(getattr(tiny, stage.split(",")[0])).requires_grad_(False)
    weight = network.get_submodule(layer).weight
    weight.copy_(60_000 * weight.sign())
    for dtype in (torch.bfloat16, torch.float32):
        assert run_stage(tiny, stage, network.to(dtype), dtype).isfinite().all()
    says = f"^{named} gave values that are not finite in float16: run it in bfloat16 or float32$"
    with pytest.raises(WuerstchenError, match=says):
        run_stage(tiny, stage, network.to(torch.float16), torch.float16)


def test_what_was_damaged_before_is_not_blamed_on_the_precision(tiny):
    latent = torch.full((1, 4, 32, 32), float("nan"))
    with pytest.raises(WuerstchenError, match="Stage A gave .* in bfloat16: run it in float32$"):
        pipeline.decode(deepcopy(tiny.stage_a).bfloat16(), latent)
    with pytest.raises(WuerstchenError, match="Stage A gave .* in float32: what it was given is not finite"):
        pipeline.decode(tiny.stage_a, latent)
    text = torch.full((1, 77, 32), float("inf"))
    with pytest.raises(WuerstchenError, match="text for Stage C is not finite"):
        pipeline.sample_stage_c(tiny.stage_c, torch.zeros(1, 16, 3, 3), text, cfg=1.0)


@pytest.mark.parametrize("prompt", ["", "猫", "🍕", "\x00\x1b", "\ud800", "word " * 300])
def test_any_text_is_a_prompt(tiny, prompt):
    assert torch.isfinite(tiny.generate(prompt, **FEW)).all()
