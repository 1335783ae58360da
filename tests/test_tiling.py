"""Stage A in tiles: what the whole picture gives, in less memory."""

import pytest
import torch

from tests.allocated import allocated
from tests.reference import randomise
from wuerstchen_core import Geometry, WuerstchenError, pipeline, tiling
from wuerstchen_core.models.stage_a import VQGAN, StageAConfig
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig

SMALL = StageAConfig(widths=(8, 16), bottleneck_blocks=3, codebook_size=8)


@pytest.fixture(scope="module")
def stage_a():
    return randomise(VQGAN(SMALL))


@pytest.mark.parametrize("widths", [(4,), (4, 8), (4, 8, 8), (4, 4, 8, 8)])
@pytest.mark.parametrize("blocks", [0, 2])
def test_the_reach_is_how_far_gradients_flow(widths, blocks):
    network = randomise(VQGAN(StageAConfig(widths=widths, bottleneck_blocks=blocks, codebook_size=8)))
    factor, middle = 2 ** len(widths), 8
    latent = torch.randn(1, 4, 17, 17, requires_grad=True)
    network.decode(latent)[..., middle * factor : (middle + 1) * factor, :].sum(dim=(0, 1, 3)).square().sum().backward()
    rows = latent.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten() - middle
    assert (-rows.min(), rows.max()) == (tiling.decoder_reach(network.config),) * 2
    image = torch.rand(1, 3, 17 * factor, 17 * factor, requires_grad=True)
    network.encode(image)[..., middle, :].square().sum().backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    reach = tiling.encoder_reach(network.config) * factor
    assert reach - factor < middle * factor - rows.min() <= reach
    assert reach - factor < rows.max() + 1 - (middle + 1) * factor <= reach


SIZES = [(2, 72, 136), (1, 200, 65), (1, 130, 131)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_give_what_the_whole_gives(stage_a, size, monkeypatch):
    batch, rows, columns = size
    latent, image = torch.randn(batch, 4, rows, columns), torch.rand(batch, 3, 4 * rows, 4 * columns)
    largest = watch(monkeypatch)
    for tiled, whole, given in (
        (tiling.decode, stage_a.decode, latent),
        (tiling.encode, stage_a.encode, image),
    ):
        expected = whole(given)
        largest.clear()
        torch.testing.assert_close(tiled(stage_a, given, 256), expected, rtol=0, atol=1e-5)
        assert max(largest) <= (64 + 10) ** 2 < rows * columns  # one picture at a time, and what surrounds a tile
        alone = torch.cat([whole(one) for one in given.split(1)])
        assert torch.equal(tiled(stage_a, given, 0), alone)  # on a CPU one picture after the other
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["decode", "encode"])
def test_tiles_that_overlap_by_less_would_be_found(stage_a, name, monkeypatch):
    monkeypatch.setattr(tiling, f"{name}r_reach", lambda config: 1)
    given = torch.randn(1, 4, 130, 130) if name == "decode" else torch.rand(1, 3, 520, 520)
    tiled, whole = getattr(tiling, name)(stage_a, given, 256), getattr(stage_a, name)(given)
    assert (tiled - whole).abs().max() > 1e-4


def watch(monkeypatch, limit=None):
    """Positions of the latents that the network is given, also those of batches; over the limit there is no memory."""
    given = []
    for name, real, factor in (("decode", VQGAN.decode, 1), ("encode", VQGAN.encode, 4)):

        def watched(self, planes, real=real, factor=factor):
            given.append(len(planes) * planes.shape[2] * planes.shape[3] // factor**2)
            if limit is not None and given[-1] > limit:
                raise torch.OutOfMemoryError
            return real(self, planes)

        monkeypatch.setattr(VQGAN, name, watched)
    return given


def test_short_memory_is_noticed(stage_a, monkeypatch):
    latent = torch.randn(1, 4, 160, 160)
    needed = 160 * 160 * tiling.working_memory(SMALL, 4)
    expected, given = stage_a.decode(latent), watch(monkeypatch)
    for free, count in ((2 * needed, 1), (2 * needed - 2, 4), (0, 9), (None, 1)):
        monkeypatch.setattr(tiling, "free_memory", lambda device, free=free: free)
        given.clear()
        torch.testing.assert_close(tiling.decode(stage_a, latent), expected, rtol=0, atol=1e-5)
        assert len(given) == count, free


def test_without_memory_for_a_tile_smaller_ones_do(stage_a, monkeypatch):
    latent = torch.randn(1, 4, 200, 136)
    expected, given = stage_a.decode(latent), watch(monkeypatch, limit=80 * 80)
    torch.testing.assert_close(tiling.decode(stage_a, latent, 0), expected, rtol=0, atol=1e-5)
    assert max(given) == 200 * 136
    watch(monkeypatch, limit=1000)
    with pytest.raises(torch.OutOfMemoryError):
        tiling.decode(stage_a, latent, 0)


def test_pictures_through_the_pipeline(stage_a):
    geometry = Geometry(712, 584)
    image = torch.rand(1, geometry.height, geometry.width, 3)
    latent = pipeline.encode(stage_a, image, tile=256)
    torch.testing.assert_close(latent, pipeline.encode(stage_a, image, tile=0), rtol=0, atol=1e-5)
    tiled, whole = (pipeline.decode(stage_a, latent, geometry, tile=tile) for tile in (256, 0))
    assert tiled.shape == image.shape and tiled.min() >= 0 and tiled.max() <= 1
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_memory_of_the_released_stage_a_at_4096():
    """Counted, the picture with it. Fewer blocks take less time and no less memory."""
    with torch.device("meta"):
        network = VQGAN(StageAConfig(bottleneck_blocks=1)).eval()
    latent, side = Geometry(4096, 4096).stage_a, 4096
    picture = 3 * side * side * 4
    assert picture < allocated(network, lambda: tiling.decode(network, torch.empty(1, 4, *latent))) < 1.5e9
    assert picture < allocated(network, lambda: tiling.encode(network, torch.empty(1, 3, side, side))) < 1.5e9


def test_memory_of_the_released_stage_b_at_4096():
    """Counted, its weights with it, in float32. Fewer blocks take less time and no less memory."""
    with torch.device("meta"):
        network, whole = DiffNeXt(StageBConfig(blocks=(1, 1, 1, 1))).eval(), DiffNeXt()
    geometry = Geometry(4096, 4096)

    def step():
        x = torch.empty(1, 4, *geometry.stage_a)
        window = tiling.attention_window(*geometry.stage_a)
        condition = network.condition(torch.empty(1, 16, *geometry.stage_c), None, geometry.stage_a, window)
        network.denoise(x, network.modulate(torch.empty(1), torch.float32), condition)

    weights = sum(weight.nbytes for weight in whole.parameters())
    assert weights > 4.2e9 and weights + allocated(network, step) < 8e9


@pytest.mark.parametrize("tile", [-64, 64, 192, 300, 8256, 512.0, "512", True])
def test_tiles_that_cannot_be(tile):
    with pytest.raises(WuerstchenError, match="tile is "):
        tiling.check_tile(tile)
    with pytest.raises(WuerstchenError, match="tile is "):
        pipeline.decode(None, None, tile=tile)
