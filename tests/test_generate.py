"""`Wuerstchen.generate`: what it is given is used, or refused in one line before any network runs."""

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_core import Geometry, WuerstchenError, pipeline
from wuerstchen_core.util.pictures import as_images

FEW = {"steps_c": 1, "steps_b": 1, "width": 64, "height": 64}


@pytest.fixture
def idle(tiny, monkeypatch):
    """A set whose networks must not run."""

    def run(*_, **__):
        raise AssertionError("a network ran")

    for network in (tiny.stage_a, tiny.stage_b, tiny.stage_c, tiny.text_encoder_c, tiny.semantic_compressor):
        monkeypatch.setattr(network, "forward", run)
    return tiny


PICTURE = torch.rand(64, 64, 3)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompt": ["a cat", "a dog"]}, "prompt is of type list"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": b"a cat"}, "prompt is b'a cat'"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"negative_prompt": ["x"]}, "negative_prompt is of type list"),
        ({"width": "256"}, "width is '256'"),
        ({"height": 256.0}, "height is 256.0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": 10**12}, "batch_size is 1000000000000"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": False}, "seed is False"),
        ({"steps_c": 2**63}, "steps_c is 9223372036854775808"),
        ({"steps_b": "x"}, "steps_b is 'x'"),
        ({"cfg_c": float("nan")}, "cfg_c is nan"),
        ({"cfg_b": float("inf")}, "cfg_b is inf"),
        ({"sampler": 3}, "unknown sampler 3"),
        ({"schedule": 1}, "unknown schedule 1"),
        ({"denoise": 0.5}, "denoise is 0.5, but there is no image"),
        ({"denoise": "x"}, "denoise is 'x'"),
        ({"image": PICTURE, "denoise": float("nan")}, "denoise is nan"),
        ({"progress": 3}, "progress is 3"),
        ({"image": torch.rand(64, 64)}, "image has the shape 64x64"),
        ({"image": torch.rand(3, 64, 64)}, "image has the shape 3x64x64"),
        ({"image": torch.rand(1, 1, 64, 64, 3)}, "image has the shape 1x1x64x64x3"),
        ({"image": torch.rand(64, 64, 5)}, "image has the shape 64x64x5"),
        ({"image": torch.rand(0, 64, 64, 3)}, "image has the shape 0x64x64x3: there is no picture"),
        ({"image": torch.rand(1, 0, 64, 3)}, "image has the shape 1x0x64x3: there is no picture"),
        ({"image": Image.new("RGB", (0, 5))}, "image has the size 0x5: there is no picture"),
        ({"image": Image.new("LA", (5, 0))}, "image has the size 5x0: there is no picture"),
        ({"image": PICTURE * 255}, "image holds values from"),
        ({"image": PICTURE * float("nan")}, "image holds values from nan"),
        ({"image": PICTURE.long()}, "image holds torch.int64"),
        ({"image": PICTURE > 0.5}, "image holds torch.bool"),
        ({"image": PICTURE.numpy() > 0.5}, "image is an array of bool"),
        ({"image": PICTURE.to("meta")}, "image is of type Tensor"),
        ({"image": [PICTURE]}, "image is of type list"),
        ({"image": "cat.png"}, "image is 'cat.png'"),
        ({"image": torch.rand(4, 64, 64, 3), "batch_size": 1}, "batch_size is 1, but image holds 4"),
        ({"image": torch.rand(4, 64, 64, 3), "batch_size": 6}, "batch_size is 6, but image holds 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_is_wrong_is_one_line_before_any_work(idle, options, says):
    with pytest.raises(WuerstchenError, match=f"^{says}") as error:
        idle.generate(**{"prompt": "a cat", **FEW, **options})
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_every_picture_of_a_batch_gives_one(tiny):
    images = torch.rand(3, 64, 64, 3)
    drawn = tiny.generate("a cat", image=images, denoise=0.0, **FEW)
    assert len(drawn) == 3
    one = tiny.generate("a cat", image=images[:1], denoise=0.0, **FEW)
    torch.testing.assert_close(drawn[:1], one, rtol=0, atol=1e-4)
    twice = tiny.generate("a cat", image=images, denoise=0.0, batch_size=6, **FEW)
    assert len(twice) == 6
    torch.testing.assert_close(twice[:3], drawn, rtol=0, atol=1e-4)


def test_a_picture_alone_is_redrawn_by_six_tenths(tiny):
    drawn = tiny.generate("a cat", image=PICTURE, **FEW)
    assert torch.equal(drawn, tiny.generate("a cat", image=PICTURE, denoise=0.6, **FEW))
    assert not torch.equal(drawn, tiny.generate("a cat", **FEW))
    assert torch.equal(tiny.generate("a cat", denoise=1.0, **FEW), tiny.generate("a cat", **FEW))


def test_the_same_picture_of_any_kind_is_the_same():
    """As a float tensor; others hold the same bytes."""
    data = torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8)
    expected = data[None].float() / 255
    alpha = torch.full((40, 56, 1), 255, dtype=torch.uint8)
    for image in (
        data,
        data[None],
        data.numpy(),
        np.flip(data.numpy()[:, ::-1], 1),
        data.numpy() / 255,
        (data.double() / 255),
        torch.cat([data, alpha], dim=2),
        Image.fromarray(data.numpy()),
        Image.fromarray(torch.cat([data, alpha], dim=2).numpy()),
    ):
        torch.testing.assert_close(as_images(image), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_transparent_lies_on_white(tiny, channels):
    image = torch.rand(64, 64, channels)
    image[..., -1] = 0.25
    seen = (image[..., :-1] * 0.25 + 0.75).expand(64, 64, 3)
    torch.testing.assert_close(as_images(image), seen[None])
    drawn = (tiny.generate("a cat", image=picture, denoise=0.0, **FEW) for picture in (image, seen))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cfg_c, cfg_b", [(1.0, 1.0), (4.0, 1.0), (1.0, 2.0)])
def test_no_negative_is_encoded_where_guidance_is_off(tiny, own, cfg_c, cfg_b):
    """And each encoder reads a prompt once."""
    read = []

    def reader(name):
        return lambda prompts: read.append((name, *prompts)) or tiny.text_encoder_c(prompts)

    encoder = reader("c")
    parts = {name: getattr(tiny, name) for name in ("stage_a", "stage_b", "stage_c", "semantic_compressor")}
    model = pipeline.Wuerstchen(**parts, text_encoder_c=encoder, text_encoder_b=reader("b") if own else encoder)
    model.generate("a cat", negative_prompt="a dog", cfg_c=cfg_c, cfg_b=cfg_b, **FEW)
    both = ("a cat", "a dog")
    if own:
        expected = [("b", *both[: 1 + (cfg_b != 1)]), ("c", *both[: 1 + (cfg_c != 1)])]
    else:
        expected = [("c", *both[: 1 + (cfg_c != 1 or cfg_b != 1)])]
    assert sorted(read) == expected


@pytest.mark.parametrize("network", ["stage_c", "stage_b"])
def test_text_that_does_not_fit_is_refused(tiny, network):
    latent, text = torch.zeros(2, 16, 3, 3), tiny.text_encoder_c(["a cat"])

    def run(text, negative=None, cfg=1.0, latent=latent, **more):
        if network == "stage_c":
            return pipeline.sample_stage_c(tiny.stage_c, latent, text, negative, steps=1, cfg=cfg, **more)
        size = Geometry(128, 128)
        return pipeline.sample_stage_b(tiny.stage_b, latent, size, text, negative, steps=1, cfg=cfg, **more)

    assert run(text.expand(2, -1, -1)).isfinite().all()
    with pytest.raises(WuerstchenError, match="3 rows, but there are 2 latents"):
        run(text.expand(3, -1, -1))
    with pytest.raises(WuerstchenError, match="width 32, .* width 7"):
        run(text, torch.zeros(1, 77, 7))
    with pytest.raises(WuerstchenError, match="shape"):
        run(text[0])
    with pytest.raises(WuerstchenError, match="shape"):
        run(text[:, :0])
    with pytest.raises(WuerstchenError, match=r"shape \(0, 16, 3, 3\)"):
        run(text, latent=latent[:0])
    with pytest.raises(WuerstchenError, match=r"shape \(2, 4, 3, 3\)"):
        run(text, latent=torch.zeros(2, 4, 3, 3))
    with pytest.raises(WuerstchenError, match="batch_index"):
        run(text, batch_index=[1])
    with pytest.raises(WuerstchenError, match="batch_index"):
        run(text, batch_index=[0, 10**9])


@pytest.mark.parametrize("shape", [(1, 7, 7, 3), (1, 64, 64, 4), (64, 64, 3), (0, 64, 64, 3)])
def test_pictures_that_stage_a_and_the_compressor_do_not_take_are_refused(tiny, shape):
    for work in (
        lambda: pipeline.encode(tiny.stage_a, torch.rand(shape)),
        lambda: pipeline.compress(tiny.semantic_compressor, torch.rand(shape)),
    ):
        with pytest.raises(WuerstchenError, match="width is 7|image has the shape"):
            work()
