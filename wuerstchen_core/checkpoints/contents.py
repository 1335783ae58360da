"""What is to be written to a file in our layout: converted from any other, bundled, in one part or several.

Tensors are read one at a time, when they are written, so that a file may be larger than memory.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..util.atomic import replacing
from ..util.errors import WuerstchenError
from .archive import BUNDLE_KEY, Archive, open_archive
from .load import METADATA_KEY, empty, header, parts, placed, shapes
from .lora import is_lora
from .mapping import sources
from .safetensors_file import save_file

# What a float8 file has in float16: all that is not a large matrix (biases, norms and their statistics, gammas, input
# and output layers, depthwise convolutions, the codebook), which is small and matters most.
FLOAT8 = ("stage_b", "stage_c")  # of a set
NARROWEST = 128  # sides of a matrix in float8, at least
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Contents:
    """The tensors of a file by name: their outlines, on the meta device, and `read(name)`, which gives the values."""

    outlines: dict[str, Tensor]
    read: Callable[[str], Tensor]
    metadata: dict[str, str]


def network_contents(archive: Archive, kind: str, dtype: torch.dtype | None = None) -> Contents:
    """The network of a kind in a file of any layout; floats in `dtype`, by default the file's own.

    Raises WuerstchenError as the loaders do.
    """
    part = parts(archive)[kind]
    network = empty(archive, part)
    expected = shapes(network)
    found = sources(archive, part, expected)

    def values(name: str) -> Tensor:
        source = found[name]
        return torch.tensor(0) if source is None else source.of([archive.read(theirs) for theirs in source.names])

    outlines = {}
    for name, source in found.items():
        own = archive.tensors[source.names[0]].dtype if source else torch.int64
        wanted = own if dtype is None or not own.is_floating_point else stored_dtype(expected[name], dtype)
        if wanted == torch.float8_e4m3fn and values(name).float().abs().max() > torch.finfo(wanted).max:
            wanted = torch.float16
        outlines[name] = torch.empty(expected[name], dtype=wanted, device="meta")

    def read(name: str) -> Tensor:
        return placed(archive, name, values(name), "cpu", outlines[name].dtype).contiguous()

    return Contents(outlines, read, {METADATA_KEY: header(kind, part.config)})


def file_contents(archive: Archive) -> Contents:
    """A file as it is."""
    return Contents(archive.tensors, lambda name: archive.read(name).contiguous(), archive.metadata)


def stored_dtype(shape: torch.Size, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a file of `dtype`: another one only for what float8 would spoil."""
    if dtype.itemsize > 1 or len(shape) > 1 and min(shape[0], shape.numel() // max(1, shape[0])) >= NARROWEST:
        return dtype
    return torch.float16


def bundle(files: Mapping[str, Path], dtype: torch.dtype | None = None) -> Contents:
    """Several files in one, by the names that they have in it; floats of networks in `dtype`, LoRAs as they are.

    Of float8 only Stages B and C are made, the others of float16: of the mini's networks its text encoder loses most.

    Raises WuerstchenError where a file is neither a LoRA nor holds exactly one network, or as the loaders do.
    """
    held: dict[str, Contents] = {}
    for name, path in files.items():
        archive = open_archive(path)
        if is_lora(archive):
            held[name] = file_contents(archive)
            continue
        kinds = [kind for kind in parts(archive) if name.startswith(kind)]
        if len(kinds) != 1:
            raise WuerstchenError(f"{path}: expected a {name} file, and this is {' and '.join(parts(archive))}")
        spared = dtype == torch.float8_e4m3fn and kinds[0] not in FLOAT8
        held[name] = network_contents(archive, kinds[0], torch.float16 if spared else dtype)
    outlines = {f"{name}.{key}": tensor for name, one in held.items() for key, tensor in one.outlines.items()}

    def read(key: str) -> Tensor:
        name, _, rest = key.partition(".")
        return held[name].read(rest)

    return Contents(outlines, read, {BUNDLE_KEY: json.dumps({name: one.metadata for name, one in held.items()})})


def write(contents: Contents, path: Path, largest: int | None = None) -> list[Path]:
    """Writes safetensors, each file whole or not at all, and returns the files.

    What has more than `largest` bytes of tensors is written in parts of at most that many (a larger tensor has one of
    its own), as Hugging Face's libraries do: `NAME-00001-of-00002.safetensors` and so on, and at last the index
    `NAME.safetensors.index.json`.

    Raises WuerstchenError, also where values are read or a file cannot be written.
    """
    split = _split(contents.outlines, largest)
    index = path.with_name(f"{path.name}.index.json")
    names = [f"{path.stem}-{number:05}-of-{len(split):05}.safetensors" for number in range(1, len(split) + 1)]
    try:
        if len(split) == 1:
            with replacing(path) as partial:
                save_file(contents.outlines, partial, contents.metadata, contents.read)
            return [path]
        with ExitStack() as stack:  # which is left from its end: the index takes its place when all parts are there
            list_of_parts = stack.enter_context(replacing(index))
            for name, outlines in zip(names, split, strict=True):
                partial = stack.enter_context(replacing(path.with_name(name)))
                save_file(outlines, partial, contents.metadata, contents.read)
            places = {key: name for name, outlines in zip(names, split, strict=True) for key in outlines}
            total = sum(tensor.nbytes for tensor in contents.outlines.values())
            listed = {"metadata": {"total_size": total}, "weight_map": places}
            list_of_parts.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            index.unlink(missing_ok=True)  # it lists parts that are about to go
        return [index, *(path.with_name(name) for name in names)]
    except OSError as error:
        raise WuerstchenError(f"{error.filename or path}: could not be written ({error.strerror})") from error


def size_in_bytes(option: str, text: str) -> int:
    """2GB, 500MB, 1.5GiB. Raises WuerstchenError naming the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = float(match[1]) * UNITS.get(match[2].upper() or "B", 0) if match else 0
    if not 1 <= size < 2**63:
        raise WuerstchenError(f"{option} is {text!r:.60}: it must be a size such as 2GB, 500MB or 1.5GiB")
    return int(size)


def _split(outlines: Mapping[str, Tensor], largest: int | None) -> list[dict[str, Tensor]]:
    split: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, outline in outlines.items():
        if largest is not None and split[-1] and size + outline.nbytes > largest:
            split.append({})
            size = 0
        split[-1][name] = outline
        size += outline.nbytes
    return split
