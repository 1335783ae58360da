"""The options of sampling, for the command line, for `Wuerstchen.generate` and for the samplers."""

from dataclasses import dataclass, field

from ..util.checks import interval, one_of, real_number, whole_number
from .samplers import SAMPLERS
from .schedule import MAX_STEPS, SCHEDULES

MAX_CFG = 100.0
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SamplingOptions:
    """How one stage samples. The defaults are Stage C's; `STAGE_B` has Stage B's.

    Raises:
        WuerstchenError: a value is of another type or out of its range.
    """

    steps: int = _option(12, "steps")
    cfg: float = _option(4.0, "strength of the guidance, 1 is off")
    sampler: str = _option("dpmpp_2m_sde", f"{' or '.join(SAMPLERS)}")
    schedule: str = _option("even", f"where the steps lie, {' or '.join(SCHEDULES)}")
    denoise: float = _option(1.0, "where to start: 1 is pure noise, less keeps that much more of the latent")
    seed: int = _option(0, "the same seed, the same picture")
    cfg_interval: tuple[float, float] = _option(
        (0.0, 1.0), "guidance at these times only, from 0 (picture) to 1 (noise)"
    )
    cfg_rescale: float = _option(0.0, "against colours that guidance makes too strong, 0 (off) to 1")

    def __post_init__(self):
        one_of("sampler", self.sampler, tuple(SAMPLERS))
        one_of("schedule", self.schedule, SCHEDULES)
        numbers = {
            "steps": whole_number("steps", self.steps, 1, MAX_STEPS),
            "cfg": real_number("cfg", self.cfg, -MAX_CFG, MAX_CFG),
            "denoise": real_number("denoise", self.denoise, 0.0, 1.0),
            "seed": whole_number("seed", self.seed, MIN_SEED, MAX_SEED),
            "cfg_interval": interval("cfg_interval", self.cfg_interval, 0.0, 1.0),
            "cfg_rescale": real_number("cfg_rescale", self.cfg_rescale, 0.0, 1.0),
        }
        for name, number in numbers.items():
            object.__setattr__(self, name, number)  # Python's own, whatever type of number it came as


STAGE_C = SamplingOptions()
STAGE_B = SamplingOptions(steps=5, cfg=1.0, schedule="uneven")
