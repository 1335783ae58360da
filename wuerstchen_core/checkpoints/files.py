"""Our own weight files: safetensors whose metadata holds the network's kind and configuration as JSON."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..atomic import replacing
from ..errors import WuerstchenError
from ..models.latent_space import LatentSpace
from ..models.semantic_compressor import BackboneStage, SemanticCompressor, SemanticCompressorConfig
from ..models.stage_a import VQGAN, StageAConfig
from ..models.stage_b import DiffNeXt, StageBConfig
from ..models.stage_c import Prior, StageCConfig
from ..models.text_encoder import TextEncoder, TextEncoderConfig

METADATA_KEY = "wuerstchen"

NETWORKS = {
    "stage_a": (VQGAN, StageAConfig),
    "stage_b": (DiffNeXt, StageBConfig),
    "stage_c": (Prior, StageCConfig),
    "semantic_compressor": (SemanticCompressor, SemanticCompressorConfig),
    "text_encoder": (TextEncoder, TextEncoderConfig),
}

# A folder's whole set, by the names that `Wuerstchen.from_files` has for it; Stage B's own text encoder is optional.
SET = {
    "stage_a": "stage_a.safetensors",
    "stage_b": "stage_b.safetensors",
    "stage_c": "stage_c.safetensors",
    "text_encoder_c": "text_encoder.safetensors",
    "text_encoder_b": "text_encoder_b.safetensors",
    "semantic_compressor": "semantic_compressor.safetensors",
}


def find_set(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that holds a whole set. Raises WuerstchenError naming those that are missing."""
    paths = {role: Path(folder) / name for role, name in SET.items()}
    if not paths["text_encoder_b"].exists():
        paths["text_encoder_b"] = paths["text_encoder_c"]
    missing = [path.name for path in paths.values() if not path.exists()]
    if missing:
        raise WuerstchenError(f"{folder}: not a whole set of weights, {', '.join(dict.fromkeys(missing))} missing")
    return paths


def save(network: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a network's weights and configuration to `path`, whole or not at all; floats as `dtype` if given."""
    kind = next(kind for kind, (cls, _) in NETWORKS.items() if isinstance(network, cls))
    header = json.dumps({"network": kind, "config": dataclasses.asdict(network.config)})
    tensors = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: header})


def load_stage_a(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32, operations=nn) -> VQGAN:
    """Stage A from `path`, ready for inference.

    `operations` is what the layers are made of (ComfyUI's convention). Raises WuerstchenError, as every loader here,
    when the file is not a whole file of this network.
    """
    return _load("stage_a", path, device, dtype, operations=operations)


def load_stage_b(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32, operations=nn) -> DiffNeXt:
    """Stage B from `path`, ready for inference."""
    return _load("stage_b", path, device, dtype, operations=operations)


def load_stage_c(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32, operations=nn) -> Prior:
    """Stage C from `path`, ready for inference."""
    return _load("stage_c", path, device, dtype, operations=operations)


def load_semantic_compressor(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> SemanticCompressor:
    """The semantic compressor from `path`, ready for inference."""
    return _load("semantic_compressor", path, device, dtype)


def load_text_encoder(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
    """A text encoder from `path`, ready for inference."""
    return _load("text_encoder", path, device, dtype)


def _load(kind: str, path: str | Path, device, dtype: torch.dtype, **options) -> nn.Module:
    cls, config_cls = NETWORKS[kind]
    try:
        with safe_open(path, framework="pt") as file:
            config = _read_config(kind, config_cls, path, file.metadata())
            with torch.device("meta"):
                network = cls(config, **options)
            weights = {name: _place(file.get_tensor(name), device, dtype) for name in file.keys()}
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise WuerstchenError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise WuerstchenError(f"{path}: its weights do not fit its own configuration: {first}") from error
    return network.eval().requires_grad_(False)


def _read_config(kind: str, config_cls: type, path: str | Path, metadata: dict[str, str] | None):
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
        found, values = header["network"], header["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise WuerstchenError(f"{path}: not one of our weight files (no {METADATA_KEY!r} in its metadata)") from error
    if found != kind:
        raise WuerstchenError(f"{path}: this is a {found} file; load_{found} takes it, here goes a {kind} file")
    try:
        return config_cls(**{name: _FIELD_READERS.get(name, _hashable)(value) for name, value in values.items()})
    except TypeError as error:
        raise WuerstchenError(f"{path}: its configuration is not one of a {kind}: {error}") from error


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


_FIELD_READERS = {
    "latent_space": lambda value: LatentSpace(**value),
    "stages": lambda value: tuple(BackboneStage(*stage) for stage in value),
}


def _place(tensor: torch.Tensor, device, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)
