"""Networks in ComfyUI's hands: it decides on devices, precision and memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import comfy.model_management as management
import comfy.ops
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...wuerstchen_core import LoRA, load_lora
from ...wuerstchen_core.checkpoints.load import (
    load_previewer,
    load_semantic_compressor,
    load_stage_a,
    load_stage_b,
    load_stage_c,
    load_text_encoder,
)
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, find_set
from .folders import listed_file, model_set, warn_once

PREVIEW_MEMORY = 72 * 1024  # peak memory of the paper's previewer in bytes per position of the latent
TEXT_OPTIONS = ("fp32_text_enc", "bf16_text_enc", "fp16_text_enc", "fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Model:
    """A network whose place ComfyUI decides; `dtype` is what it computes in."""

    network: nn.Module
    patcher: ModelPatcher
    dtype: torch.dtype
    splits: bool = False  # its layers cast and move their weights when used, so that it may be loaded in part
    loras: tuple[tuple[LoRA, float], ...] = ()  # with their strengths; Stage C applies them while it samples

    def load(self, memory: int = 0) -> torch.device:
        """Loads it and keeps `memory` bytes free to compute in; returns the device to compute on."""
        changed = {name for lora, _ in self.loras for name in lora.changes}
        memory += sum(self.network.get_submodule(name).weight.nbytes for name in changed)
        management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=not self.splits)
        return self.patcher.load_device if self.splits else next(self.network.parameters()).device


def load_set(name: str) -> dict[str, Model]:
    """The networks of a set under their names in `SET`; what is optional there only if the set has it.

    Raises WuerstchenError if there is no such set, or if one of its files is missing or can't be loaded.
    """
    paths = find_set(model_set(name))
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
    """The network in a file, by its name in `weight_files`. Raises WuerstchenError as the core's loaders do."""
    return LOADERS[kind](listed_file(kind, name))


def with_lora(model: Model, name: str, strength: float) -> Model:
    """Stage C with one more LoRA, by its name in `weight_files`; the model that came in does not change.

    Raises WuerstchenError as `load_lora` does, and for a LoRA of another network.
    """
    lora = load_lora(listed_file("lora", name))
    lora.check(model.network)
    return replace(model, loras=(*model.loras, (lora, strength)))


@cache
def linear_preview() -> Model:
    """The pack's own previewer: one colour per position, fitted to the mini's latents."""
    return _previewer(LINEAR_PREVIEW)


def to_intermediate(tensor: Tensor) -> Tensor:
    """The tensor where and as ComfyUI passes it between nodes, in float32."""
    return tensor.to(management.intermediate_device(), torch.float32)


def _diffusion(load: Callable[..., nn.Module], path: Path) -> Model:
    device, offload = management.get_torch_device(), management.unet_offload_device()
    stored = management.unet_dtype(device=device, supported_dtypes=DTYPES)
    dtype = management.unet_manual_cast(stored, device, DTYPES) or stored
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
    dtype = _text_dtype(device)
    network = load_text_encoder(path, offload, dtype)
    return Model(network, ModelPatcher(network, device, offload), dtype)


def _text_dtype(device: torch.device) -> torch.dtype:
    """What --fp32-text-enc, --bf16-text-enc or --fp16-text-enc asks for, else what the device computes fast.

    ComfyUI's own default is float16 on every device, since it computes in another precision than it stores.
    """
    asked = management.text_encoder_dtype(device) if any(getattr(args, name, False) for name in TEXT_OPTIONS) else None
    if asked in DTYPES:
        return asked
    dtype = torch.float16 if management.should_use_fp16(device) else torch.float32
    if asked is not None:
        warn_once(f"Würstchen: its text encoders do not run in {asked}, {dtype} is used")
    return dtype


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
