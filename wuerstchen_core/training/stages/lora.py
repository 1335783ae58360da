"""The training of a LoRA for Stage C: as Stage C's own, but only the LoRA learns.

peft adds it to the network; its file is in diffusers' layout.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.lora import METADATA_KEY, SAMPLING_KEY
from ...checkpoints.safetensors_file import save_file
from ...models.lora import MODULES, MODULES_B
from ...models.stage_b import DiffNeXt
from ...models.stage_c import Prior, StageCConfig
from ...util.atomic import replacing
from ...util.errors import WuerstchenError, readable
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import option
from . import stage_c

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Options(stage_c.Options):
    init: str = option("mini", "the Stage C that the LoRA is for, in any layout; mini: the embedded one")
    rank: int = option(8, "rank of each weight's change: the higher, the more it can learn")
    alpha: float = option(8.0, "the change is multiplied by alpha / rank")
    targets: tuple[str, ...] = option(TARGETS, "modules of Stage C that it changes, by the ends of their names")
    network: StageCConfig = dataclasses.field(init=False, default=StageCConfig())  # init's own
    train_text_encoder: bool = dataclasses.field(init=False, default=False)
    text_encoder_rate: float = dataclasses.field(init=False, default=1.0)

    def __post_init__(self):
        super().__post_init__()
        if not self.init:
            raise WuerstchenError("init is missing: name the Stage C that the LoRA is for")


def build(options: Options, data: DataOptions) -> "LoRATask":
    """Raises WuerstchenError as `stage_c.build` and `add_lora` do."""
    return LoRATask(stage_c.build(options, data), options)


class LoRATask(Task):
    """A LoRA on the network of Stage C's training, whose own weights do not change."""

    reads_captions = True

    def __init__(self, base: stage_c.StageCTask, options: Options):
        super().__init__()
        base.network.requires_grad_(False)
        add_lora(base.network, options.rank, options.alpha, options.targets)
        self.base = base
        self.frozen, self.feature_files, self.feature_key = base.frozen, base.feature_files, base.feature_key

    def features(self, batch: dict) -> dict[str, Tensor]:
        return self.base.features(batch)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        return self.base(batch, draws)

    def export(self, folder: Path, dtype: torch.dtype) -> list[Path]:
        path = folder / "lora.safetensors"
        save_lora(self.base.network, path, dtype)
        return [path]

    def samples(self) -> Tensor | None:
        return self.base.samples()


def add_lora(
    network: Prior | DiffNeXt, rank: int, alpha: float, targets: Sequence[str] | None = TARGETS
) -> list[nn.Parameter]:
    """Adds a LoRA (arXiv 2106.09685) to the network -> its parameters, in float32, which are the only trainable ones.

    At first it changes nothing, since its second matrix is zero.

    Args:
        rank: of each weight's change, at least 1.
        alpha: the change is multiplied by alpha / rank.
        targets: modules by the ends of their names, such as `to_q` (in every block) or `blocks.2.attention.to_q`;
            None: all that a LoRA can change.

    Raises:
        WuerstchenError: peft can't be imported, rank or alpha is not above 0, or a target is not the name of one of
            the network's Linears and 1x1 convolutions.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise WuerstchenError(
            f"training a LoRA needs peft 0.18 or later, which could not be imported ({readable(error)}): "
            "pip install -U -e '.[train]'"
        ) from error
    if rank < 1 or alpha <= 0:
        raise WuerstchenError(f"rank is {rank} and alpha is {alpha}: rank must be at least 1, alpha above 0")
    if targets is not None and not targets:
        raise WuerstchenError("there are no targets: name the modules that the LoRA changes")
    modules = MODULES if isinstance(network, Prior) else MODULES_B
    names = [name for name, _ in network.named_modules() if modules.fullmatch(name)]
    chosen = set(names) if targets is None else set()
    for target in targets or ():
        meant = {name for name in names if f".{name}".endswith(f".{target}")}
        if not meant:
            kinds = dict.fromkeys(re.sub(r"^(?:\w+_)?blocks\.[\d.]+(attention\.)?", "", name) for name in names)
            raise WuerstchenError(f"{target}: there is no such module to put a LoRA on; choose from {', '.join(kinds)}")
        chosen |= meant
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(chosen)), network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def save_lora(
    network: Prior | DiffNeXt,
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    sampling: Mapping[str, int | float | str] | None = None,
) -> None:
    """Writes the LoRA that `add_lora` has added as safetensors in diffusers' layout, whole or not at all.

    The layout is that of `WuerstchenPriorPipeline.save_lora_weights`: peft's names under `prior.`, or for Stage B
    under `decoder.`, and peft's configuration, alpha included, as the metadata `lora_adapter_metadata`.

    Args:
        sampling: how to sample with it (steps, cfg, sampler), if it needs its own way; as JSON in the metadata.
    """
    from peft.utils import get_peft_model_state_dict

    adapters: Any = network.peft_config
    prefix = "prior" if isinstance(network, Prior) else "decoder"
    config = {
        f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in adapters["default"].to_dict().items()
    }
    tensors = {
        f"{prefix}.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in get_peft_model_state_dict(network).items()
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config)}
    if sampling is not None:
        metadata[SAMPLING_KEY] = json.dumps(dict(sampling))
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)
