"""What a set of networks draws best with, where nobody asks for anything else."""

from dataclasses import dataclass

from ..diffusion.options import STAGE_B, SamplingOptions
from .semantic_compressor import SemanticCompressorConfig
from .stage_c import StageCConfig


@dataclass(frozen=True)
class Defaults:
    side: int  # pixels: width and height
    cfg: float  # Stage C's
    few_steps_b: SamplingOptions = STAGE_B  # Stage B's as it is, beside a distilled Stage C


RELEASED = Defaults(side=1024, cfg=4.0)
# Measured on the mini (docs/sampling.md): the guidance with the most accurate colours, and the fewest steps of Stage B.
SMALL = Defaults(side=256, cfg=2.0, few_steps_b=SamplingOptions(steps=3, cfg=1.0, sampler="lcm"))


def defaults_of(config: StageCConfig | SemanticCompressorConfig) -> Defaults:
    """By the size of a network, since published files say nothing of the pictures that they were trained on.

    Stage C is a released one if the text that it reads is as wide as CLIP H's or bigG's, and the compressor if its
    features are as wide as EfficientNetV2's.
    """
    if isinstance(config, StageCConfig):
        return RELEASED if config.text_width >= 1024 else SMALL
    return RELEASED if config.features >= 1280 else SMALL
