"""Everything the nodes need from ComfyUI itself: folders, devices and memory, progress and Cancel."""

from .folders import model_sets, places, weight_files
from .loading import LOADERS, PREVIEW_MEMORY, Model, linear_preview, load_network, load_set, to_intermediate, with_lora
from .progress import progress

__all__ = [
    "LOADERS",
    "PREVIEW_MEMORY",
    "Model",
    "linear_preview",
    "load_network",
    "load_set",
    "model_sets",
    "places",
    "progress",
    "to_intermediate",
    "weight_files",
    "with_lora",
]
