"""Where ComfyUI wants tensors to lie."""

import comfy.model_management as management
import torch
from torch import Tensor


def to_intermediate(tensor: Tensor) -> Tensor:
    """As it wants what passes between nodes."""
    return tensor.to(management.intermediate_device(), torch.float32)
