"""A file of weights, opened: named tensors that are views of the file, mapped into memory."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..util.errors import WuerstchenError

# What diffusers, transformers and, for a LoRA, peft call the weights in a folder of theirs.
FOLDER_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

# How files begin that are often found in the place of weights.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to: download that",
    b"<": "a web page, not weights: download the file itself",
}


@dataclass(frozen=True)
class Archive:
    """The tensors of a file by name; nested dictionaries are joined with dots (`ema_state_dict.out.1.bias`)."""

    path: Path
    format: str
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)
    mapped: bool = False

    def reopened(self) -> "Archive":
        """The same file, mapped anew: the pages of what is only copied from it leave memory together with it."""
        return open_archive(self.path) if self.mapped else self


def open_archive(path: str | Path) -> Archive:
    """Opens safetensors and PyTorch files, told apart by their content, and folders of diffusers and transformers.

    No code in a file is run. Raises WuerstchenError for what is missing, cut short or no file of weights.
    """
    path = _inside(Path(path))
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise WuerstchenError(f"{path}: there is no such file") from error
    except OSError as error:
        raise WuerstchenError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise WuerstchenError(f"{path}: an empty file")
    if start[8:9] == b"{":  # before all else: the eight bytes of a safetensors header's length may spell anything
        archive = _open_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):
        archive = _open_pytorch(path, mapped=start.startswith(b"PK"))
    else:
        impostors = [what for beginning, what in IMPOSTORS.items() if start.lstrip().startswith(beginning)]
        what = impostors[0] if impostors else "not a model: neither a safetensors nor a PyTorch file"
        raise WuerstchenError(f"{path}: {what}")
    if not archive.tensors:
        raise WuerstchenError(f"{path}: not a model: there are no named tensors in it")
    return archive


def _inside(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in FOLDER_NAMES:
        if (path / name).exists():
            return path / name
    raise WuerstchenError(f"{path}: a folder, with none of {', '.join(FOLDER_NAMES)} in it")


def _open_safetensors(path: Path) -> Archive:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return Archive(path, "safetensors", tensors, file.metadata() or {}, mapped=True)
    except (SafetensorError, OSError) as error:
        raise WuerstchenError(f"{path}: not a whole safetensors file, cut short or damaged ({error})") from error


def _open_pytorch(path: Path, mapped: bool) -> Archive:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises nearly anything
        code = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        if code:
            raise WuerstchenError(
                f"{path}: it carries code or Python objects ({code[1]}) where only tensors belong; none of it was run"
            ) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise WuerstchenError(f"{path}: not a whole PyTorch file, cut short or damaged ({first})") from error
    return Archive(path, "PyTorch", dict(_flattened(content)), mapped=mapped)


def _flattened(content, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor) and prefix:
        yield prefix, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))
