"""The nodes: sockets in, one call of the host or the core, sockets out."""

from .load import (
    WuerstchenLoadModel,
    WuerstchenLoadSemanticCompressor,
    WuerstchenLoadStageA,
    WuerstchenLoadStageB,
    WuerstchenLoadStageC,
    WuerstchenLoadTextEncoder,
)
from .lora import WuerstchenLoadLoRA
from .preview import WuerstchenSemanticPreview
from .scheduler import WuerstchenScheduler
from .semantic_compressor import WuerstchenSemanticCompress
from .stage_a import WuerstchenVQGANDecode, WuerstchenVQGANEncode
from .stage_b import WuerstchenStageBConditioning, WuerstchenStageBSampler
from .stage_c import WuerstchenEmptyLatent, WuerstchenStageCSampler
from .text import WuerstchenTextEncode

NODES = [
    WuerstchenLoadModel,
    WuerstchenLoadTextEncoder,
    WuerstchenLoadStageC,
    WuerstchenLoadLoRA,
    WuerstchenLoadStageB,
    WuerstchenLoadStageA,
    WuerstchenLoadSemanticCompressor,
    WuerstchenTextEncode,
    WuerstchenEmptyLatent,
    WuerstchenSemanticCompress,
    WuerstchenStageCSampler,
    WuerstchenSemanticPreview,
    WuerstchenStageBConditioning,
    WuerstchenStageBSampler,
    WuerstchenVQGANDecode,
    WuerstchenVQGANEncode,
    WuerstchenScheduler,
]
