"""What the nodes make of an IMAGE: transparency, channels, and what is too small."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nodes.inputs import picture, same
from wuerstchen_core.util.pictures import read_picture


@pytest.fixture(params=["compress", "encode"])
def latent(request, run, loaded):
    """IMAGE -> the samples of its latent, by either of the nodes that take one."""

    def compress(image):
        return run("WuerstchenSemanticCompress", vae=loaded["semantic"], image=image,
                   width=128, height=128)["samples"]  # fmt: skip

    def encode(image):
        return run("WuerstchenVQGANEncode", vae=loaded["stage_a"], image=image)["samples"]

    return {"compress": compress, "encode": encode}[request.param]


def test_transparency_lies_on_white_as_in_the_command_line(latent, tmp_path):
    pixels = (picture(64, 64, channels=4)[0] * 255).round().byte()
    pixels[:16, :, 3], pixels[16:32, :, 3] = 0, 255
    Image.fromarray(np.asarray(pixels)).save(tmp_path / "a.png")
    ours, theirs = latent(pixels[None].float() / 255), latent(read_picture(tmp_path / "a.png")[None])
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # the file has 8 bits
    same(latent(torch.cat([picture(64, 64), torch.zeros(1, 64, 64, 1)], dim=-1)), latent(torch.ones(1, 64, 64, 3)))
    opaque = torch.cat([picture(64, 64), torch.ones(1, 64, 64, 1)], dim=-1)
    same(latent(opaque), latent(picture(64, 64)))


def test_one_channel_is_grey(latent):
    grey = picture(64, 64, channels=1)
    same(latent(grey), latent(grey.repeat(1, 1, 1, 3)))


@pytest.mark.parametrize("channels", [2, 5, 48])
def test_other_numbers_of_channels_are_refused(latent, channels):
    with pytest.raises(ValueError, match=f"this image has {channels} channels: 1 .grey., 3 .RGB. or 4"):
        latent(picture(64, 64, channels=channels))


def test_what_is_no_image_is_refused(latent):
    for wrong in (
        "example.png",
        None,
        torch.zeros(64, 64, 3),
        torch.zeros(1, 2, 64, 64, 3),
        torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="expected an IMAGE, floats of .pictures, height, width, channels., got "):
            latent(wrong)
    for empty in (torch.zeros(0, 64, 64, 3), torch.zeros(1, 0, 64, 3), torch.zeros(1, 64, 64, 0)):
        with pytest.raises(ValueError, match="this image is empty"):
            latent(empty)


@pytest.mark.parametrize(("width", "height"), [(7, 7), (1, 1), (7, 64), (64, 7)])
def test_an_image_that_is_too_small_for_a_latent_is_named_by_its_size(run, loaded, width, height):
    with pytest.raises(ValueError, match=f"this image is {width}x{height} pixels, at least 8x8 are needed"):
        run("WuerstchenVQGANEncode", vae=loaded["stage_a"], image=picture(height, width))
    run("WuerstchenVQGANEncode", vae=loaded["stage_a"], image=picture(8, 15))
