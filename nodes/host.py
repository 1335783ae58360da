"""All that the nodes need of ComfyUI itself: folders, devices and memory, progress and Cancel."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import comfy.model_management as management
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor, nn

from ..wuerstchen_core import LoRA, WuerstchenError, load_lora
from ..wuerstchen_core.checkpoints import files
from ..wuerstchen_core.finite import is_finite
from ..wuerstchen_core.pipeline import LINEAR_PREVIEW, MINI, Progress, preview

FOLDER = "wuerstchen"
# Where ComfyUI's users keep what, the likeliest first; the authors' file of Stage B holds the semantic compressor too.
FOLDERS = {
    "stage_a": ("vae", "checkpoints", FOLDER),
    "stage_b": ("diffusion_models", "checkpoints", FOLDER),
    "stage_c": ("diffusion_models", "checkpoints", FOLDER),
    "text_encoder": ("text_encoders", "checkpoints", FOLDER),
    "semantic_compressor": ("clip_vision", "diffusion_models", "checkpoints", FOLDER),
    "previewer": ("vae_approx", "checkpoints", FOLDER),
    "lora": ("loras",),
}
DIFFUSION_DTYPES = [torch.bfloat16, torch.float16, torch.float32]

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


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


def model_sets() -> dict[str, Path]:
    """Name -> folder of every whole set of weights: the mini, and the subfolders of ComfyUI's models/wuerstchen."""
    sets = {"mini": MINI}
    for root in folder_paths.get_folder_paths(FOLDER):
        for folder in sorted(path for path in Path(root).glob("*") if path.is_dir()):
            try:
                files.find_set(folder)
            except WuerstchenError:
                continue
            sets.setdefault(folder.name, folder)
    return sets


def load_set(name: str) -> dict[str, Model]:
    """The networks of a set, by the names that `files.SET` has for them; a previewer only if it has one.

    Raises WuerstchenError.
    """
    sets = model_sets()
    if name not in sets:
        raise WuerstchenError(
            f"{name}: there is no whole set of that name in models/{FOLDER}; take {' or '.join(sets)}"
        )
    paths = files.find_set(sets[name])
    networks = {
        "text_encoder_c": _text_encoder(paths["text_encoder_c"]),
        **{kind: LOADERS[kind](paths[kind]) for kind in ("stage_a", "stage_b", "stage_c", "semantic_compressor")},
    }
    shared = paths["text_encoder_b"] == paths["text_encoder_c"]
    networks["text_encoder_b"] = networks["text_encoder_c"] if shared else _text_encoder(paths["text_encoder_b"])
    if "previewer" in paths:
        networks["previewer"] = _previewer(paths["previewer"])
    return networks


def weight_files(kind: str) -> dict[str, Path]:
    """Name -> file of everything that ComfyUI lists in the folders of a kind of network.

    The names are those that ComfyUI's own loaders show. Of several files of one name, all but the first have their
    folder behind it: `model.safetensors [checkpoints]`, or `[checkpoints 2]` in the second of that folder's places.
    """
    found: dict[str, dict[str, Path]] = {}  # name -> folder -> file
    for folder in FOLDERS[kind]:
        names = folder_paths.get_filename_list(folder)
        for name in folder_paths.filter_files_extensions(names, folder_paths.supported_pt_extensions):
            others = found.setdefault(name, {})
            for place, root in enumerate(folder_paths.get_folder_paths(folder), start=1):
                path = Path(root, name)
                if path.is_file() and not any(path.samefile(other) for other in others.values()):
                    others[folder if place == 1 else f"{folder} {place}"] = path
    return {
        f"{name} [{folder}]" if i else name: path
        for name, others in found.items()
        for i, (folder, path) in enumerate(others.items())
    }


def load_network(kind: str, name: str) -> Model:
    """The network in a file, by the name that `weight_files` has for it. Raises WuerstchenError."""
    return LOADERS[kind](_listed(kind, name))


def with_lora(model: Model, name: str, strength: float) -> Model:
    """Stage C with one more LoRA, by the name that `weight_files` has for it; the model itself stays as it is.

    Raises WuerstchenError as `load_lora` does, and for a LoRA of another network.
    """
    lora = load_lora(_listed("lora", name))
    lora.check(model.network)
    return replace(model, loras=(*model.loras, (lora, strength)))


@cache
def linear_preview() -> Model:
    """The previewer that is in the pack: a colour for each position, fitted to the mini's latents."""
    return _previewer(LINEAR_PREVIEW)


def places(kind: str) -> str:
    """The folders of a kind of network, for people."""
    *others, last = (f"models/{folder}" for folder in FOLDERS[kind])
    return f"{', '.join(others)} or {last}" if others else last


def progress(steps: int, previewer: Model | None = None) -> Progress:
    """Moves the node's bar after every step, and raises ComfyUI's interruption after Cancel.

    With a previewer it shows the first of the batch as it is then, unless the user has chosen no previews (ComfyUI's
    --preview-method, or its page's setting).
    """
    bar = comfy.utils.ProgressBar(steps)
    shows = previewer is not None and args.preview_method != LatentPreviewMethod.NoPreviews
    if shows:
        previewer.load()

    def report(step: int, steps: int, clean: Tensor) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(step, steps, _preview(previewer, clean[:1]) if shows else None)

    return report


def to_intermediate(tensor: Tensor) -> Tensor:
    """As ComfyUI wants what passes between nodes."""
    return tensor.to(management.intermediate_device(), torch.float32)


def _preview(previewer: Model, latent: Tensor) -> tuple[str, Image.Image, int] | None:
    """latent (1, 16, p, q) -> format, picture and longest side in pixels, as ComfyUI sends them to its page.

    It is computed where the previewer lies, which may have been moved since to make room. None where the latent is not
    finite: what went wrong is the sampler's to say.
    """
    if not is_finite(latent):
        return None
    device = next(previewer.network.parameters()).device
    [picture] = preview(previewer.network, latent.to(device), previewer.dtype)
    pixels = (picture * 255).round().byte().cpu().numpy()
    return "JPEG", Image.fromarray(pixels), args.preview_size


def _listed(kind: str, name: str) -> Path:
    """The file of a name; nothing but the names that `weight_files` has is a way to one."""
    listed = weight_files(kind)
    if name not in listed:
        place = "one of them" if len(FOLDERS[kind]) > 1 else "it"
        raise WuerstchenError(
            f"{name}: there is no such file in {places(kind)}: put it into {place} and press R, or choose another"
        )
    return listed[name]


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
    network = files.load_stage_a(path, offload, dtype)
    return Model(network, ModelPatcher(network, device, offload), dtype)


def _text_encoder(path: Path) -> Model:
    device, offload = management.text_encoder_device(), management.text_encoder_offload_device()
    dtype = torch.float16 if management.should_use_fp16(device) else torch.float32
    network = files.load_text_encoder(path, offload, dtype)
    return Model(network, ModelPatcher(network, device, offload), dtype)


def _semantic_compressor(path: Path) -> Model:
    device, offload = management.text_encoder_device(), management.text_encoder_offload_device()
    network = files.load_semantic_compressor(path, offload)
    return Model(network, ModelPatcher(network, device, offload), torch.float32)


def _previewer(path: Path) -> Model:
    device, offload = management.vae_device(), management.vae_offload_device()
    network = files.load_previewer(path, offload)
    return Model(network, ModelPatcher(network, device, offload), torch.float32)


LOADERS: dict[str, Callable[[Path], Model]] = {
    "stage_a": _stage_a,
    "stage_b": partial(_diffusion, files.load_stage_b),
    "stage_c": partial(_diffusion, files.load_stage_c),
    "text_encoder": _text_encoder,
    "semantic_compressor": _semantic_compressor,
    "previewer": _previewer,
}
