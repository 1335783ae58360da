"""Networks in ComfyUI's hands: it decides about devices, precision and memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import comfy.model_management as management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...wuerstchen_core import LoRA, WuerstchenError, load_lora
from ...wuerstchen_core.checkpoints.load import (
    load_previewer,
    load_semantic_compressor,
    load_stage_a,
    load_stage_b,
    load_stage_c,
    load_text_encoder,
)
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, find_set
from .folders import FOLDER, listed_file, model_sets

DIFFUSION_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Model:
    """A network in ComfyUI's hands: it decides where the network lies; `dtype` is what it computes in."""

    network: nn.Module
    patcher: ModelPatcher
    dtype: torch.dtype
    splits: bool = False  # its layers cast and move their weights on use, so that it may be loaded in part
    loras: tuple[tuple[LoRA, float], ...] = ()  # with their strengths; of Stage C, which applies them while it samples

    def load(self, memory: int = 0) -> torch.device:
        """Has it loaded, with `memory` bytes to spare for the work; gives the device to compute on."""
        changed = {name for lora, _ in self.loras for name in lora.changes}
        memory += sum(self.network.get_submodule(name).weight.nbytes for name in changed)
        management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=not self.splits)
        return self.patcher.load_device if self.splits else next(self.network.parameters()).device


def load_set(name: str) -> dict[str, Model]:
    """The networks of a set, by the names that `SET` has for them; what is optional there only if it has one.

    Raises WuerstchenError.
    """
    sets = model_sets()
    if name not in sets:
        raise WuerstchenError(
            f"{name}: there is no whole set of that name in models/{FOLDER}; take {' or '.join(sets)}"
        )
    paths = find_set(sets[name])
    networks = {
        "text_encoder_c": _text_encoder(paths["text_encoder_c"]),
        **{kind: LOADERS[kind](paths[kind]) for kind in ("stage_a", "stage_b", "stage_c", "semantic_compressor")},
    }
    if paths.get("text_encoder_b") == paths["text_encoder_c"]:
        networks["text_encoder_b"] = networks["text_encoder_c"]
    elif "text_encoder_b" in paths:
        networks["text_encoder_b"] = _text_encoder(paths["text_encoder_b"])
    if "previewer" in paths:
        networks["previewer"] = _previewer(paths["previewer"])
    return networks


def load_network(kind: str, name: str) -> Model:
    """The network in a file, by the name that `weight_files` has for it. Raises WuerstchenError."""
    return LOADERS[kind](listed_file(kind, name))


def with_lora(model: Model, name: str, strength: float) -> Model:
    """Stage C with one more LoRA, by the name that `weight_files` has for it; the model itself stays as it is.

    Raises WuerstchenError as `load_lora` does, and for a LoRA of another network.
    """
    lora = load_lora(listed_file("lora", name))
    lora.check(model.network)
    return replace(model, loras=(*model.loras, (lora, strength)))


@cache
def linear_preview() -> Model:
    """The previewer that is in the pack: a colour for each position, fitted to the mini's latents."""
    return _previewer(LINEAR_PREVIEW)


def to_intermediate(tensor: Tensor) -> Tensor:
    """As ComfyUI wants what passes between nodes."""
    return tensor.to(management.intermediate_device(), torch.float32)


def _diffusion(load: Callable[..., nn.Module], path: Path) -> Model:
    device, offload = management.get_torch_device(), management.unet_offload_device()
    stored = management.unet_dtype(device=device, supported_dtypes=DIFFUSION_DTYPES)
    dtype = management.unet_manual_cast(stored, device, DIFFUSION_DTYPES) or stored
    operations = comfy.ops.disable_weight_init if dtype == stored else comfy.ops.manual_cast
    network = load(path, offload, stored, operations=operations)
    return Model(network, ModelPatcher(network, device, offload), dtype, splits=True)


def _stage_a(path: Path) -> Model:
    device, offload = management.vae_device(), management.vae_offload_device()
    dtype = management.vae_dtype(device, [torch.float16, torch.bfloat16])
    network = load_stage_a(path, offload, dtype)
    return Model(network, ModelPatcher(network, device, offload), dtype)


def _text_encoder(path: Path) -> Model:
    device, offload = management.text_encoder_device(), management.text_encoder_offload_device()
    dtype = torch.float16 if management.should_use_fp16(device) else torch.float32
    network = load_text_encoder(path, offload, dtype)
    return Model(network, ModelPatcher(network, device, offload), dtype)


def _semantic_compressor(path: Path) -> Model:
    device, offload = management.text_encoder_device(), management.text_encoder_offload_device()
    network = load_semantic_compressor(path, offload)
    return Model(network, ModelPatcher(network, device, offload), torch.float32)


def _previewer(path: Path) -> Model:
    device, offload = management.vae_device(), management.vae_offload_device()
    network = load_previewer(path, offload)
    return Model(network, ModelPatcher(network, device, offload), torch.float32)


LOADERS: dict[str, Callable[[Path], Model]] = {
    "stage_a": _stage_a,
    "stage_b": partial(_diffusion, load_stage_b),
    "stage_c": partial(_diffusion, load_stage_c),
    "text_encoder": _text_encoder,
    "semantic_compressor": _semantic_compressor,
    "previewer": _previewer,
}
