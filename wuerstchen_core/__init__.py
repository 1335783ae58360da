"""Würstchen (arXiv 2306.00637): text to image in three stages. The interface is what is named here."""

from .checkpoints.load import (
    load_previewer,
    load_semantic_compressor,
    load_stage_a,
    load_stage_b,
    load_stage_c,
    load_text_encoder,
    save,
)
from .checkpoints.lora import load_lora
from .geometry import Geometry
from .models.lora import LoRA, apply_loras
from .pipeline import Wuerstchen
from .training.command import train
from .util.errors import WuerstchenError

__all__ = [
    "Geometry",
    "LoRA",
    "Wuerstchen",
    "WuerstchenError",
    "apply_loras",
    "load_lora",
    "load_previewer",
    "load_semantic_compressor",
    "load_stage_a",
    "load_stage_b",
    "load_stage_c",
    "load_text_encoder",
    "save",
    "train",
]
