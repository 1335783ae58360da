"""Attention in windows against a formula, position by position."""

import torch

from tests.reference import distance, randomise
from wuerstchen_core import tiling
from wuerstchen_core.models.blocks import AttnBlock
from wuerstchen_core.models.stage_b import DiffNeXt, StageBConfig

CONFIG = StageBConfig(
    widths=(16, 32, 32, 32), heads=(0, 2, 2, 2), blocks=(1, 1, 1, 1), condition_width=24, text_width=32, dropout=0.0
)


def seen_from(place, length, window):
    """What a position sees along one side: the window that has its square of half a window in its middle, moved into
    the picture; the last square ends at the edge."""
    if length <= window:
        return range(length)
    half = window // 2
    corners = [min(corner, length - half) for corner in range(0, length, half)]
    corner = [corner for corner in corners if corner <= place < corner + half][-1]  # the last one to be written
    first = corner - (window - half) // 2
    first = max(0, min(first, length - window))
    return range(first, first + window)


def one_by_one(block, x, text, window):
    """AttnBlock in float64, a query at a time."""
    attention, (batch, channels, rows, columns) = block.attention, x.shape
    width = channels // attention.heads
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    tokens = normed.permute(0, 2, 3, 1)
    context = block.kv_mapper(text)
    out = torch.empty_like(x)
    for b in range(batch):
        for row in range(rows):
            for column in range(columns):
                around = [
                    tokens[b, i, j] for i in seen_from(row, rows, window) for j in seen_from(column, columns, window)
                ]
                around = torch.stack([*around, *context[b % len(context)]])
                query, keys, values = attention.to_q(tokens[b, row, column]), *map(
                    lambda layer, around=around: layer(around), (attention.to_k, attention.to_v)
                )  # fmt: skip
                heads = []
                for head in range(attention.heads):
                    part = slice(head * width, (head + 1) * width)
                    weights = (keys[:, part] @ query[part] / width**0.5).softmax(0)
                    heads.append(weights @ values[:, part])
                out[b, :, row, column] = x[b, :, row, column] + attention.to_out[0](torch.cat(heads))
    return out


@torch.no_grad()
def test_windows_are_the_formula():
    block = randomise(AttnBlock(8, 6, 2)).double()
    for rows, columns, window, texts in ((8, 8, 4, 2), (11, 5, 4, 1), (4, 13, 6, 2), (6, 6, 8, 1), (7, 9, 3, 2)):
        x, text = torch.randn(2, 8, rows, columns).double(), torch.randn(texts, 5, 6).double()
        found = block(x, block.condition(text), window)
        torch.testing.assert_close(found, one_by_one(block, x, text, window), rtol=0, atol=1e-10)
        whole = block(x, block.condition(text))
        assert (found - whole).abs().max() < 1e-12 if max(rows, columns) <= window else distance(found, whole) > 1e-3


@torch.no_grad()
def test_the_deepest_level_sees_the_whole_picture():
    """Of the released network 1024 pixels are 64 and 32 positions a side, as when it was trained."""
    network = randomise(DiffNeXt(CONFIG))
    semantic = torch.randn(1, 16, 6, 6)
    assert network.condition(semantic, None, (128, 128), 256).windows == [64, 32, None, None, 32, 64]
    assert network.condition(semantic, None, (128, 128)).windows == [None] * 6


@torch.no_grad()
def test_windows_as_large_as_the_picture_change_nothing():
    network = randomise(DiffNeXt(CONFIG))
    x, semantic, text = torch.randn(2, 4, 64, 96), torch.randn(2, 16, 6, 9), torch.randn(1, 9, 32)

    def noise(window):
        modulation = network.modulate(torch.tensor([0.5]), torch.float32)
        return network.denoise(x, modulation, network.condition(semantic, text, (64, 96), window))

    assert torch.equal(noise(96), noise(None)) and distance(noise(32), noise(None)) > 1e-3


def test_windows_are_for_large_pictures():
    assert tiling.attention_window(384, 384) is None  # 1536 pixels
    assert tiling.attention_window(64, 400) == tiling.attention_window(1024, 1024) == 256
    assert tiling.attention_window(1024, 1024, 0) is None and tiling.attention_window(64, 64, 512) == 128
