"""The exact size of the picture after ComfyUI's own latent nodes: (height, width) that comes out of VQGAN Decode."""

import pytest
import torch

from tests.nodes import comfyui_nodes as comfyui
from tests.nodes.inputs import noise, picture, same


def test_pictures_come_out_turned_and_resized(run, loaded, stage_c, stage_b):
    """Through all stages, and the turned picture is the one that the turned latent of the whole frame shows."""
    latent = run("WuerstchenSemanticCompress", vae=loaded["semantic"],
                 image=picture(256, 200), width=200, height=256)  # fmt: skip

    def decoded(latent):
        return run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent=latent)

    def drawn(latent):
        return decoded(stage_b(stage_c(latent, denoise=0.3)))

    turned = comfyui.rotate(latent, 1)
    whole, cut = drawn({"samples": turned["samples"]}), drawn(turned)
    assert whole.shape == (1, 256, 256, 3) and cut.shape == (1, 200, 256, 3)
    same(cut, whole[:, 28:228])
    enlarged = comfyui.upscale_by(latent, 2)
    whole, cut = drawn({"samples": enlarged["samples"]}), drawn(enlarged)
    assert whole.shape == (1, 512, 512, 3) and cut.shape == (1, 512, 400, 3)
    same(cut, whole[:, :, 56:456])
    fine = stage_b(latent)
    same(decoded(comfyui.rotate(fine, 1)), decoded({"samples": torch.rot90(fine["samples"], 1, [3, 2])})[:, 28:228])


@pytest.mark.parametrize("stage", ["c", "b"])
def test_a_latent_that_nobody_can_have_meant_is_refused(stage, empty, stage_c, stage_b, of_c):
    sample = {"c": stage_c, "b": stage_b}[stage]
    cases = [
        ({"samples": torch.zeros(1, 16, 32, 32)}, "32x32 stands for 1344x1344 pixels.*take it from Würstchen Empty"),
        ({"samples": noise(1, 16, 97, 3)}, "97x3 is too large for Stage C, 96x96 .4096 pixels a side"),
        (comfyui.upscale(of_c(256, 256), 256, 256), "32x32 is too large.*enlarged from 6x6.*LatentUpscaleBy"),
        (comfyui.upscale(of_c(256, 256), 512, 512), "64x64 is too large.*enlarged from 6x6"),
    ]
    for latent, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            sample(latent)
        assert "42.67 pixels" in str(caught.value) and len(str(caught.value)) < 500


def test_a_latent_of_no_pictures_is_refused(run, loaded, stage_c, stage_b):
    for sample in (stage_c, stage_b, lambda latent: run("WuerstchenSemanticPreview", latent=latent)):
        with pytest.raises(ValueError, match=r"this latent is empty \(0x16x6x6\)"):
            sample({"samples": torch.zeros(0, 16, 6, 6)})
    with pytest.raises(ValueError, match=r"Würstchen VQGAN Decode: this latent is empty \(1x4x0x6\)"):
        run("WuerstchenVQGANDecode", vae=loaded["stage_a"], latent={"samples": torch.zeros(1, 4, 0, 6)})
