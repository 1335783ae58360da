"""LoRAs: by our node, and under the names that trainers give to our modules by ComfyUI's own loaders."""

import logging
import re

import comfy.weight_adapter as weight_adapter
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Tensor, nn

from ...wuerstchen_core import load_lora
from .folders import listed_file

MODULE = re.compile(
    r"diffusion_model\.(projection|cond_mapper\.[02]|out\.1"
    r"|clip_mapper|effnet_mappers\.\d+|embedding\.1|clf\.1"
    r"|(?:blocks\.\d+|(?:down|up)_blocks\.\d+\.\d+)"
    r"\.(?:depthwise|semantic|channelwise\.[04]|mapper|kv_mapper\.1|attention\.to_(?:[qkv]|out\.0)))"
)
PREFIXES = ("", "prior.", "decoder.", "unet.", "base_model.model.", "prior.base_model.model.", "unet.base_model.model.")
FLAT_PREFIXES = ("lora_prior_unet_", "lora_prior_", "lycoris_")


class TrainersNames(WeightAdapterBase):
    """One of ComfyUI's adapters that reads nothing itself: the others do, under diffusers', peft's and OneTrainer's
    names of the module that is asked for by ComfyUI's."""

    name = "wuerstchen"

    @classmethod
    def load(cls, x, lora, alpha, dora_scale, loaded_keys=None):
        match = MODULE.fullmatch(x)
        if match is None:
            return None
        loaded_keys = set() if loaded_keys is None else loaded_keys
        for name in _names(match[1]):
            for adapter_class in weight_adapter.adapters:
                if adapter_class is cls:
                    continue
                alpha, dora_scale = lora.get(f"{name}.alpha"), lora.get(f"{name}.dora_scale")
                alpha = None if alpha is None else alpha.item()
                adapter = adapter_class.load(name, lora, alpha, dora_scale, loaded_keys)
                if adapter is not None:
                    loaded_keys.update(key for key in (f"{name}.alpha", f"{name}.dora_scale") if key in lora)
                    return adapter
        return None


def _names(module: str) -> list[str]:
    names = [module]
    if ".attention.to_" in module:
        processor = module.replace(".attention.to_", ".attention.processor.to_").replace("to_out.0", "to_out")
        names += [processor, module.removesuffix(".0")] if module.endswith(".0") else [processor]
    return [prefix + name for prefix in PREFIXES for name in names] + [
        prefix + module.replace(".", "_") for prefix in FLAT_PREFIXES
    ]


def fits(patch, model: nn.Module, name: str) -> bool:
    """Whether a model has a weight of this name, and, for a LoRA or another model's weight, one of its size."""
    *modules, last = name.split(".")
    try:
        weight = getattr(model.get_submodule(".".join(modules)), last)
    except AttributeError:
        return False
    if isinstance(patch, LoRAAdapter):
        up, down, _, core = patch.weights[:4]
        return core is not None or len(up) * down[0].numel() == weight.numel()
    if isinstance(patch, list) and patch and isinstance(patch[0], tuple) and isinstance(patch[0][0], Tensor):
        return patch[0][0].shape == weight.shape
    return True


def register() -> None:
    """Once, however often the pack is loaded."""
    if all(adapter.name != TrainersNames.name for adapter in weight_adapter.adapters):
        weight_adapter.adapters.append(TrainersNames)


def with_lora(model: ModelPatcher, file: str, strength: float) -> ModelPatcher:
    """Stage C or B with one more LoRA, by the name that `weight_files` has for it; the model itself stays as it is.

    What the file holds for other networks is named in the log.

    Raises WuerstchenError as `load_lora` does, and for a LoRA of another network.
    """
    lora = load_lora(listed_file("lora", file))
    lora.check(model.model.diffusion_model)
    if lora.left_out:
        logging.getLogger(__name__).warning(
            "%s: %d parts are not of %s and left out: %s%s. ComfyUI's LoraLoader gives text encoders their parts.",
            file,
            len(lora.left_out),
            lora.stage,
            ", ".join(lora.left_out[:3]),
            ", …" if len(lora.left_out) > 3 else "",
        )
    patches = {
        f"diffusion_model.{name}.weight": LoRAAdapter(
            set(), (change.up, change.down, change.scale * change.rank, None, None, None)
        )
        for name, change in lora.changes.items()
    }
    model = model.clone()
    model.add_patches(patches, strength)
    return model
