"""Large pictures in little memory and time: Stage A in tiles, Stage B's attention in windows.

Stage A is local: what a pixel becomes depends on no more than its surroundings (`decoder_reach`, `encoder_reach`).
Tiles that overlap by as much give what the whole picture gives. Where a tile ends at the picture's edge, the network
pads it as it pads the whole; elsewhere what its padding spoils is cut off. If a tile is too large after all, smaller
ones take its place.

Stage B's convolutions and norms run over the whole picture; only its attention, whose time grows with the fourth power
of the sides, looks no farther than a window around each position (`attention_window`). Its deepest level always attends
to the whole picture.

`tile` is the side of a tile and of a window in pixels, 0 for the whole picture, or None for what fits.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from .geometry import MAX_SIDE, STAGE_A_FACTOR, WORK_STEP
from .models.stage_a import VQGAN, StageAConfig
from .util import checks
from .util.errors import WuerstchenError
from .util.memory import free_memory

SMALLEST = 256  # pixels a side of what can be asked for
TILE_MEMORY = 1 << 30  # bytes that a tile takes at most
NUMBERS_PER_CHANNEL = 10  # that Stage A holds at a time, for every position and channel of its widest level

WINDOW = 1024  # pixels a side: the size that the released Stage B was trained at
WHOLE = 1536  # pixels a side up to which attention sees the whole picture


def check_tile(tile: object) -> int | None:
    """The option itself. Raises WuerstchenError if it is neither None, nor 0, nor a multiple of 64 from 256 on."""
    if tile is None:
        return None
    whole = checks.whole_number("tile", tile, 0, MAX_SIDE, multiple_of=WORK_STEP)
    if 0 < whole < SMALLEST:
        raise WuerstchenError(f"tile is {whole}: it must be at least {SMALLEST} pixels, or 0 for the whole picture")
    return whole


def attention_window(height: int, width: int, tile: int | None = None) -> int | None:
    """Side of Stage B's windows of attention, in positions of its latent (height, width); None is no windows."""
    if tile is None:
        tile = WINDOW if max(height, width) * STAGE_A_FACTOR > WHOLE else 0
    return tile // STAGE_A_FACTOR or None


def decode(stage_a: VQGAN, latent: Tensor, tile: int | None = None) -> Tensor:
    """`stage_a.decode`, in tiles if `tile` says so or memory is short. The picture's memory is laid out by pixels."""
    factor = _factor(stage_a.config)
    batch, _, rows, columns = latent.shape
    picture = latent.new_empty(batch, rows * factor, columns * factor, 3).permute(0, 3, 1, 2)
    return _in_tiles(stage_a, VQGAN.decode, latent, picture, (1, factor), decoder_reach(stage_a.config), tile)


def encode(stage_a: VQGAN, image: Tensor, tile: int | None = None) -> Tensor:
    """`stage_a.encode`, in tiles if `tile` says so or memory is short."""
    factor = _factor(stage_a.config)
    batch, _, height, width = image.shape
    latent = image.new_empty(batch, stage_a.config.latent_channels, height // factor, width // factor)
    return _in_tiles(stage_a, VQGAN.encode, image, latent, (factor, 1), encoder_reach(stage_a.config), tile)


def decoder_reach(config: StageAConfig) -> int:
    """How many positions of the latent beside its own a pixel depends on."""
    reach = 0
    for _ in config.widths[1:]:
        reach += 1  # the block's 3x3 convolution
        reach = (reach + 2) // 2  # the transposed 4x4 convolution of stride 2
    return reach + config.bottleneck_blocks


def encoder_reach(config: StageAConfig) -> int:
    """How many positions of the latent away a pixel can be that a position depends on."""
    reach = 1  # the deepest block's 3x3 convolution
    for _ in config.widths[1:]:
        reach = 2 * reach + 1  # the 4x4 convolution of stride 2
        reach += 1  # the block's
    return -(-reach // 2 ** (len(config.widths) - 1))


def working_memory(config: StageAConfig, itemsize: int) -> int:
    """Bytes that Stage A takes for every position of a picture's latent, beside weights, input and output."""
    levels = enumerate(reversed(config.widths))  # the deepest first, four times the positions each
    return NUMBERS_PER_CHANNEL * itemsize * max(4**level * width for level, width in levels)


def _in_tiles(
    stage_a: VQGAN,
    method: Callable[[VQGAN, Tensor], Tensor],
    whole: Tensor,
    result: Tensor,
    steps: tuple[int, int],
    reach: int,
    tile: int | None,
) -> Tensor:
    """Fills `result`; `steps` are the positions of `whole` and of `result` to one of the latent, a side."""
    step_in, step_out = steps
    rows, columns = (side // step_in for side in whole.shape[2:])
    longest, least = max(rows, columns), SMALLEST // _factor(stage_a.config)
    together = 1 if whole.device.type == "cpu" else len(whole)  # pictures; several don't fit into a processor's cache
    if tile is None:
        bytes_each = working_memory(stage_a.config, whole.element_size())
        side = _fitting(rows * columns, together, bytes_each, reach, free_memory(whole.device)) or longest
    else:
        side = tile // _factor(stage_a.config) or longest

    def fill(side: int) -> Tensor:
        if side >= longest:
            for pictures, filled in zip(whole.split(together), result.split(together), strict=True):
                filled.copy_(method(stage_a, pictures))
            return result
        for picture, filled in zip(whole.split(1), result.split(1), strict=True):
            for (top, bottom), (left, right) in product(_cuts(rows, side), _cuts(columns, side)):
                above, before = max(0, top - reach), max(0, left - reach)
                around = _part(picture, step_in, above, bottom + reach, before, right + reach)
                found = method(stage_a, around)
                own = _part(found, step_out, top - above, bottom - above, left - before, right - before)
                _part(filled, step_out, top, bottom, left, right).copy_(own)
        return result

    while True:
        try:
            return fill(side)
        except torch.OutOfMemoryError:
            if side <= least:
                raise
        side = max(least, min(side, longest) // 2)


def _part(planes: Tensor, step: int, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Of (B, C, H, W), from positions of the latent, each `step` wide."""
    return planes[:, :, top * step : bottom * step, left * step : right * step]


def _fitting(positions: int, pictures: int, bytes_each: int, reach: int, free: int | None) -> int | None:
    """None if half of the free memory holds the whole; else the side of tiles that TILE_MEMORY and that half hold."""
    if free is not None and pictures * positions * bytes_each <= free // 2:
        return None
    most = TILE_MEMORY if free is None else min(TILE_MEMORY, free // 2)
    return max(SMALLEST // STAGE_A_FACTOR, int((most / bytes_each) ** 0.5) - 2 * reach)


def _cuts(length: int, side: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the fewest parts of a length that are no longer than `side`, all about as long."""
    count = -(-length // side)
    edges = [length * i // count for i in range(count + 1)]
    return zip(edges, edges[1:], strict=False)


def _factor(config: StageAConfig) -> int:
    return 2 ** len(config.widths)
