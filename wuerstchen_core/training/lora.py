"""LoRA for Stage C by peft: what is trained is added to the network, and written as diffusers writes it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..atomic import replacing
from ..checkpoints.lora import METADATA_KEY, MODULES
from ..errors import WuerstchenError
from ..models.stage_c import Prior

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(network: Prior, rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> list[nn.Parameter]:
    """Adds a LoRA (arXiv 2106.09685) to the network and gives its parameters, in float32; they alone are trained.

    At first it changes nothing: its second half is zero.

    Args:
        rank: of the change, at least 1.
        alpha: the change is scaled by alpha / rank.
        targets: modules by the ends of their names, such as `to_q` (in every block) or `blocks.2.attention.to_q`.

    Raises:
        WuerstchenError: rank or alpha is not above 0, or a target is none of Stage C's Linears and 1x1 convolutions.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or alpha <= 0:
        raise WuerstchenError(f"rank is {rank} and alpha is {alpha}: rank must be at least 1, alpha above 0")
    if not targets:
        raise WuerstchenError("there are no targets: name a module to put a LoRA on")
    names = [name for name, _ in network.named_modules() if MODULES.fullmatch(name)]
    chosen = set()
    for target in targets:
        meant = {name for name in names if f".{name}".endswith(f".{target}")}
        if not meant:
            kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.(attention\.)?", "", name) for name in names)
            raise WuerstchenError(f"{target}: there is no such module to put a LoRA on; take of {', '.join(kinds)}")
        chosen |= meant
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(chosen)), network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def save_lora(network: Prior, path: str | Path) -> None:
    """Writes the LoRA that `add_lora` has added, whole or not at all, as float32 safetensors in diffusers' layout.

    The layout is that of `WuerstchenPriorPipeline.save_lora_weights`: peft's names under `prior.`, and peft's
    configuration, alpha among it, as the metadata `lora_adapter_metadata`.
    """
    from peft.utils import get_peft_model_state_dict

    config = {
        f"prior.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in network.peft_config["default"].to_dict().items()
    }
    tensors = {
        f"prior.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(network).items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", METADATA_KEY: json.dumps(config)})
