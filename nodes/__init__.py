"""The nodes: sockets in, one call of the core, sockets out."""

from .load import (
    WuerstchenLoadModel,
    WuerstchenLoadPreviewer,
    WuerstchenLoadSemanticCompressor,
    WuerstchenLoadStageA,
    WuerstchenLoadStageB,
    WuerstchenLoadStageC,
    WuerstchenLoadTextEncoder,
)
from .lora import WuerstchenLoadLoRA
from .preview import WuerstchenSemanticPreview
from .semantic_compressor import WuerstchenSemanticCompress
from .stage_a import WuerstchenVQGANDecode, WuerstchenVQGANEncode
from .stage_b import WuerstchenStageBSampler
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
    WuerstchenLoadPreviewer,
    WuerstchenTextEncode,
    WuerstchenEmptyLatent,
    WuerstchenSemanticCompress,
    WuerstchenStageCSampler,
    WuerstchenSemanticPreview,
    WuerstchenStageBSampler,
    WuerstchenVQGANDecode,
    WuerstchenVQGANEncode,
]
