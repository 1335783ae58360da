"""A file of weights, opened: the names, shapes and dtypes of its tensors, and their values when they are asked for."""

import re
import stat
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from .pytorch_file import read_stream, read_zip
from .safetensors_file import read_header
from .stored import RegularFile, Stored, check_name, file_status, is_there, json_object

MOST_TENSORS = 100_000
LARGEST_INDEX = 32 << 20  # bytes

# In the metadata of a bundle, several files in one: name -> metadata of each, as JSON. The names of a file's tensors
# begin with its own and a dot.
BUNDLE_KEY = "wuerstchen_bundle"

# What diffusers, transformers and, for a LoRA, peft call the weights in a folder of theirs.
FOLDER_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
INDEX = re.compile(r".+\.index(?:\.\w+)?\.json")
SHARD = re.compile(r"(.+)-\d{1,6}-of-\d{1,6}\.safetensors")

# How files begin that are often found in the place of weights.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to: download that",
    b"<": "a web page, not weights: download the file itself",
}


@dataclass(frozen=True)
class Archive:
    """The tensors of a file by name; nested dictionaries are joined with dots (`ema_state_dict.out.1.bias`).

    `tensors` are outlines, on the meta device, except where a file could only be read whole.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        files = {stored.file for stored in self.stored.values()}
        return sum(file.size for file in files) or file_status(self.path).st_size

    def read(self, name: str) -> Tensor:
        """The values of a tensor, in memory of their own, on the CPU.

        Raises WuerstchenError where there is no room for them, the file has changed, or it is no plain tensor.
        """
        tensor = self.tensors[name]
        flaw = odd(tensor)
        if flaw or tensor.is_meta and name not in self.stored:
            raise WuerstchenError(f"{self.path}: {name} is {flaw or 'without values'}, not a tensor of weights")
        return self.stored[name].read(tensor) if tensor.is_meta else tensor


def odd(tensor: Tensor) -> str | None:
    """What a tensor is that is more, or less, than its values in a row; None for one of weights."""
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    steps = sorted((stride, side) for stride, side in zip(tensor.stride(), tensor.shape, strict=True) if side > 1)
    reach = 1
    for stride, side in steps:
        if stride < reach and tensor.numel():
            return "repeated or overlapping in its own memory"
        reach = stride * (side - 1) + reach
    return None


def open_archive(path: str | Path) -> Archive:
    """Opens safetensors and PyTorch files, told apart by their content, and folders of diffusers and transformers; of
    safetensors in several parts also the index or one of the parts; `BUNDLE/NAME` is a file in a bundle.

    No code in a file is run. Raises WuerstchenError for what is missing, cut short or no file of weights.
    """
    path = Path(path)
    if not is_there(path) and is_there(path.parent) and not stat.S_ISDIR(file_status(path.parent).st_mode):
        return _member(open_archive(path.parent), path.name)
    path = _inside(path)
    if INDEX.fullmatch(path.name):
        return _open_sharded(path)
    shard = SHARD.fullmatch(path.name)
    if shard is not None:
        index = path.with_name(f"{shard[1]}.safetensors.index.json")
        if not is_there(index):
            raise WuerstchenError(f"{path}: one part of several (sharded); {index.name}, which lists them, is missing")
        return _open_sharded(index)
    return _open_file(path)


def members(archive: Archive) -> dict[str, dict[str, str]]:
    """Name -> metadata of the files in a bundle; empty for any other file. Raises WuerstchenError for a damaged one."""
    if BUNDLE_KEY not in archive.metadata:
        return {}
    where = f"{archive.path}: {BUNDLE_KEY!r} in its metadata"
    found = json_object(where, archive.metadata[BUNDLE_KEY])
    for metadata in found.values():
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WuerstchenError(f"{where} is not as we write it")
    return found


def _member(bundle: Archive, name: str) -> Archive:
    held, prefix = members(bundle), f"{name}."
    if name not in held:
        what = f"a bundle of {', '.join(held)}" if held else "a file, and no bundle"
        raise WuerstchenError(f"{bundle.path}: there is no {name} in it: it is {what}")
    archive = replace(
        bundle,
        path=bundle.path / name,
        tensors={key[len(prefix) :]: tensor for key, tensor in bundle.tensors.items() if key.startswith(prefix)},
        stored={key[len(prefix) :]: stored for key, stored in bundle.stored.items() if key.startswith(prefix)},
        metadata=held[name],
    )
    _check_names(archive)
    return archive


def _open_file(path: Path) -> Archive:
    file = RegularFile(path)
    start = bytes(file.read(0, min(64, file.size)))
    if not start:
        raise WuerstchenError(f"{path}: an empty file")
    if start[8:9] == b"{":  # before all else: the eight bytes of a safetensors header's length may spell anything
        outlines, stored, metadata = read_header(file)
        archive = Archive(path, "safetensors", outlines, metadata, stored)
    elif start.startswith(b"PK"):
        outlines, stored = read_zip(file)
        archive = Archive(path, "PyTorch", outlines, stored=stored)
    elif start.startswith(b"\x80"):
        archive = Archive(path, "PyTorch", read_stream(file))
    else:
        impostors = [what for beginning, what in IMPOSTORS.items() if start.lstrip().startswith(beginning)]
        what = impostors[0] if impostors else "not a model: neither a safetensors nor a PyTorch file"
        raise WuerstchenError(f"{path}: {what}")
    _check_names(archive)
    return archive


def _check_names(archive: Archive) -> None:
    if not archive.tensors:
        raise WuerstchenError(f"{archive.path}: not a model: there are no named tensors in it")
    if len(archive.tensors) > MOST_TENSORS:
        raise WuerstchenError(f"{archive.path}: not a model: {len(archive.tensors):,} tensors are more than any has")
    check_name(archive.path, max(archive.tensors, key=len))


def _inside(path: Path) -> Path:
    if not stat.S_ISDIR(file_status(path).st_mode):
        return path
    for name in FOLDER_NAMES:
        if is_there(path / name):
            return path / name
    raise WuerstchenError(f"{path}: a folder, with none of {', '.join(FOLDER_NAMES[:2])} or the like in it")


def _open_sharded(index: Path) -> Archive:
    """All the parts that an index lists, as one file."""
    file = RegularFile(index)
    if file.size > LARGEST_INDEX:
        raise WuerstchenError(f"{index}: not a list of parts: {file.size:,} bytes")
    places = json_object(f"{index}: it", file.read(0, file.size)).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise WuerstchenError(f"{index}: not a list of the parts of a model: it has no weight_map of names and files")
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for name, count in Counter(places.values()).items():
        if not name or Path(name).name != name or "\\" in name or name == "..":
            raise WuerstchenError(f"{index}: it lists {name}, which is not beside it")
        part = _open_file(index.with_name(name))
        if part.format != "safetensors":
            raise WuerstchenError(f"{part.path}: parts (sharded) are read as safetensors only")
        listed = {key for key in part.tensors if places.get(key) == name}
        if len(listed) < count:
            missing = next(key for key, place in places.items() if place == name and key not in listed)
            raise WuerstchenError(f"{part.path}: incomplete, {missing} is missing, which {index.name} lists")
        tensors |= {key: part.tensors[key] for key in listed}
        stored |= {key: part.stored[key] for key in listed}
        metadata |= part.metadata
    archive = Archive(index, "safetensors, in parts", tensors, metadata, stored)
    _check_names(archive)
    return archive
