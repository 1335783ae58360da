"""Picture size <-> latent sizes, in one place: 42.67:1 a side in Stage C, 4:1 in Stages A and B."""

from dataclasses import dataclass

from .util.checks import whole_number

STEP = 8  # a picture's sides are multiples of this
WORK_STEP = 64  # Stage B: Stage A's factor 4 times patch 2 times three halvings
STAGE_A_FACTOR = 4
SEMANTIC_FACTOR = 32  # the compressor's own stride, on a picture resized to three quarters
MAX_SIDE = 8192


@dataclass(frozen=True)
class Geometry:
    """Every size that belongs to a picture of `width` x `height` pixels.

    The networks work on the next larger picture whose sides are multiples of 64; the picture asked for lies in its
    middle.

    Raises:
        WuerstchenError: a side is not a multiple of 8 between 8 and 8192.
    """

    width: int
    height: int

    def __post_init__(self):
        for name in ("width", "height"):
            whole = whole_number(name, getattr(self, name), STEP, MAX_SIDE, multiple_of=STEP)
            object.__setattr__(self, name, whole)  # an int, whatever integer type it came as

    @property
    def work(self) -> tuple[int, int]:
        """(height, width) in pixels that the networks work on: multiples of 64."""
        return _round_up(self.height, WORK_STEP), _round_up(self.width, WORK_STEP)

    @property
    def stage_a(self) -> tuple[int, int]:
        """(rows, columns) of the latent of Stages A and B."""
        return tuple(side // STAGE_A_FACTOR for side in self.work)

    @property
    def stage_c(self) -> tuple[int, int]:
        """(rows, columns) of the latent of Stage C: ceil(side / 42.67)."""
        return tuple(-(-side * 3 // 128) for side in self.work)

    @property
    def compressor(self) -> tuple[int, int]:
        """(height, width) in pixels that the semantic compressor sees."""
        return tuple(side * SEMANTIC_FACTOR for side in self.stage_c)

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) pixels between the picture and the one that the networks work on."""
        rows, columns = self.work[0] - self.height, self.work[1] - self.width
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2

    @classmethod
    def of_stage_c(cls, rows: int, columns: int) -> "Geometry":
        """The largest picture whose Stage C latent has this size."""
        height, width = (max(1, count * 2 // 3) * WORK_STEP for count in (rows, columns))
        return cls(width, height)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
