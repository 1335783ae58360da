"""Stage A in exact tiles and Stage B in windows, as ComfyUI calls them."""

import sys

import pytest
import torch

from tests.comfyui.host import noise
from tests.reference import distance


@pytest.fixture
def tiling(tinies):
    """The module as the pack has it."""
    return sys.modules[type(tinies.stage_a).__module__].tiling


@pytest.fixture
def watched(tiling, monkeypatch):
    """Sizes of what Stage A is given at a time; more than `limit` positions are too much for the memory."""
    sizes, limit, network = [], [1 << 60], tiling.VQGAN
    for name, real, factor in (("decode", network.decode, 1), ("encode", network.encode, 4)):

        def method(self, planes, real=real, factor=factor):
            sizes.append(planes.shape[2] * planes.shape[3] // factor**2)
            if sizes[-1] > limit[0]:
                raise torch.OutOfMemoryError
            return real(self, planes)

        monkeypatch.setattr(network, name, method)
    return sizes, limit


@pytest.mark.parametrize("short", ["foreseen", "met"])
def test_vae_decode_and_encode_are_exact_where_memory_is_short(call, tinies, tiling, watched, monkeypatch, short):
    sizes, limit = watched
    latent, image = {"samples": noise(1, 4, 128, 160)}, torch.rand(1, 512, 640, 3)
    whole = call("VAEDecode", vae=tinies.stage_a, samples=latent), call("VAEEncode", vae=tinies.stage_a, pixels=image)
    assert max(sizes) == 128 * 160
    sizes.clear()
    if short == "foreseen":
        monkeypatch.setattr(tiling, "free_memory", lambda device: 0)
    else:
        limit[0] = 10_000
    parts = call("VAEDecode", vae=tinies.stage_a, samples=latent), call("VAEEncode", vae=tinies.stage_a, pixels=image)
    assert min(sizes) < 10_000 and (short == "met" or max(sizes) < 10_000)
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[1]["samples"], whole[1]["samples"], rtol=0, atol=1e-5)


def test_vae_decode_tiled_blends_as_comfyui_does(call, tinies, watched):
    sizes, _ = watched
    latent = {"samples": noise(1, 4, 128, 160)}
    tiled = call("VAEDecodeTiled", vae=tinies.stage_a, samples=latent, tile_size=256, overlap=64)
    assert tiled.shape == (1, 512, 640, 3) and max(sizes) < 128 * 160
    assert distance(tiled, call("VAEDecode", vae=tinies.stage_a, samples=latent)) < 0.2


def test_other_networks_need_not_make_room_for_more_than_tiles(tinies, tiling):
    vae = tinies.stage_a
    small, large = (vae.memory_used_decode((1, 4, side, side), torch.float32) for side in (32, 4096))
    assert small == 32 * 32 * (tiling.working_memory(vae.first_stage_model.config, 4) + 3 * 16 * 4)
    assert large == 4096**2 * 3 * 16 * 4 + 2 * tiling.TILE_MEMORY
    assert vae.memory_used_encode((1, 3, 128, 128), torch.float32) == small


def test_stage_b_has_windows_above_1536_pixels_in_the_ksampler(call, tinies, ksampler, monkeypatch):
    network, seen = tinies.model_b.model.diffusion_model, []
    real = network.condition
    monkeypatch.setattr(network, "condition", lambda *given: seen.append(real(*given)) or seen[-1])
    for width, windows in ((1536, {None}), (1600, {64, 32, None})):
        semantic = {"samples": noise(1, 16, 6, -(-width * 3 // 128))}
        positive, negative, start = call("WuerstchenStageBConditioning", latent=semantic)
        drawn = ksampler(start, tinies.model_b, positive, negative, steps=1, cfg=1.0)
        assert drawn["samples"].isfinite().all() and set(seen[-1].windows) == windows
