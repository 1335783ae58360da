"""Weight files: loading a network from any layout, saving it in ours.

Ours are safetensors whose metadata holds the network's kind and configuration as JSON.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..models.config import config_from
from ..models.previewer import Previewer, PreviewerConfig
from ..models.semantic_compressor import SemanticCompressor, SemanticCompressorConfig
from ..models.stage_a import VQGAN, StageAConfig
from ..models.stage_b import DiffNeXt, StageBConfig
from ..models.stage_c import Prior, StageCConfig
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from ..util.atomic import replacing
from ..util.errors import WuerstchenError, first_line
from ..util.finite import is_finite
from .archive import Archive, members, open_archive
from .layouts import Part, foreign, part_at, places
from .mapping import Source, sources
from .safetensors_file import save_file
from .stored import json_object

METADATA_KEY = "wuerstchen"
MAX_HEADER = 100_000  # bytes of a configuration that is a tensor

Network = TypeVar("Network", bound=nn.Module)

NETWORKS = {
    "stage_a": (VQGAN, StageAConfig),
    "stage_b": (DiffNeXt, StageBConfig),
    "stage_c": (Prior, StageCConfig),
    "semantic_compressor": (SemanticCompressor, SemanticCompressorConfig),
    "text_encoder": (TextEncoder, TextEncoderConfig),
    "previewer": (Previewer, PreviewerConfig),
}


# How many blocks a configuration asks for, of which each has tensors.
COUNTS: dict[str, Callable[..., int]] = {
    "stage_a": lambda config: config.bottleneck_blocks + len(config.widths),
    "stage_b": lambda config: sum(config.blocks) + len(config.widths),
    "stage_c": lambda config: config.depth,
    "semantic_compressor": lambda config: sum(stage.layers for stage in config.stages) + len(config.stages),
    "text_encoder": lambda config: config.layers,
    "previewer": lambda config: len(config.widths),
}


def save(network: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a network's weights and configuration to `path`, whole or not at all; floats as `dtype` if given."""
    tensors = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in network.state_dict().items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: _header(network)})


def header_tensor(network: nn.Module) -> torch.Tensor:
    """A network's kind and configuration as bytes, for hosts that write tensors without our metadata.

    A file that holds it as `PREFIXwuerstchen` beside the network's own tensors, whose names begin with the same prefix,
    is read as one in our layout.
    """
    return torch.frombuffer(bytearray(_header(network).encode()), dtype=torch.uint8)


def _header(network: nn.Module) -> str:
    kind = next(kind for kind, (cls, _) in NETWORKS.items() if isinstance(network, cls))
    return header(kind, network.config)


def header(kind: str, config: Any) -> str:
    """A network's kind and configuration, as our files' metadata have them."""
    return json.dumps({"network": kind, "config": dataclasses.asdict(config)})


def load_stage_a(path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, operations=nn) -> VQGAN:
    """Stage A from `path`, ready for inference.

    Every loader here takes our layout, the authors', diffusers' and, for text, open_clip's and transformers', as
    safetensors (in several parts, too) or PyTorch file, or a folder of diffusers or transformers that holds one.
    `dtype` None keeps the file's; `operations` is what the layers are made of (ComfyUI's convention). The network's
    weights are its own: the file may change afterwards.

    Raises:
        WuerstchenError: the file is not a whole file of this network, its weights are not all finite in `dtype`, or
            there is not enough memory for them.
    """
    return _load(VQGAN, "stage_a", path, device, dtype, operations=operations)


def load_stage_b(path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, operations=nn) -> DiffNeXt:
    """Stage B from `path`, ready for inference; see `load_stage_a`."""
    return _load(DiffNeXt, "stage_b", path, device, dtype, operations=operations)


def load_stage_c(path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, operations=nn) -> Prior:
    """Stage C from `path`, its EMA where it has one, ready for inference; see `load_stage_a`."""
    return _load(Prior, "stage_c", path, device, dtype, operations=operations)


def load_semantic_compressor(
    path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32
) -> SemanticCompressor:
    """The semantic compressor from `path`, which may be the published Stage B; see `load_stage_a`."""
    return _load(SemanticCompressor, "semantic_compressor", path, device, dtype)


def load_text_encoder(path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32) -> TextEncoder:
    """A text encoder from `path`, a CLIP's with or without its vision tower; see `load_stage_a`."""
    return _load(TextEncoder, "text_encoder", path, device, dtype)


def load_previewer(
    path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, operations=nn
) -> Previewer:
    """A previewer from `path`, in our layout, which is the only one; see `load_stage_a`."""
    return _load(Previewer, "previewer", path, device, dtype, operations=operations)


def outline(path: str | Path, kind: str) -> nn.Module:
    """The network of that kind in `path`, on the meta device: its weights are not read. Raises as the loaders do."""
    archive = open_archive(path)
    return empty(archive, _part(archive, kind))


def parts(archive: Archive) -> dict[str, Part]:
    """Kind -> network in the file.

    Raises WuerstchenError where there is none, or where it is none that the loaders could take.
    """
    own = _own_parts(archive)
    if METADATA_KEY in archive.metadata:
        return own
    found = {kind: part_at(archive, kind, prefix) for kind, prefix in places(archive).items() if kind not in own} | own
    if not found:
        raise WuerstchenError(f"{archive.path}: this is {_unknown(archive)}")
    return found


def load_network(
    kind: str, path: str | Path, device="cpu", dtype: torch.dtype | None = torch.float32, **options
) -> nn.Module:
    """The network of a kind from `path`; see `load_stage_a`.

    `network`, an option, is the class to make it of in place of the kind's own, of which it is a subclass.
    """
    archive = open_archive(path)
    part = _part(archive, kind)
    network = empty(archive, part, **options)
    found = sources(archive, part, shapes(network))
    try:
        network.load_state_dict(dict(_read(archive, found, device, dtype)), assign=True)
    except MemoryError as error:
        raise WuerstchenError(f"{archive.path}: there is not enough memory for it") from error
    return network.eval().requires_grad_(False)


def _load(cls: type[Network], kind: str, path: str | Path, device, dtype: torch.dtype | None, **options) -> Network:
    network = load_network(kind, path, device, dtype, **options)
    assert isinstance(network, cls)
    return network


def _read(archive: Archive, found: Mapping[str, Source | None], device, dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Our tensors by name. One of the file is read once, and kept until all that it is split into have been given."""
    left = Counter(name for source in found.values() if source for name in source.names)
    held: dict[str, torch.Tensor] = {}
    for name, source in found.items():
        given = []
        for theirs in source.names if source else ():
            if theirs not in held:
                held[theirs] = archive.read(theirs)
            left[theirs] -= 1
            given.append(held[theirs] if left[theirs] else held.pop(theirs))
        yield name, placed(archive, name, source.of(given) if source else torch.tensor(0), device, dtype)


def _part(archive: Archive, kind: str) -> Part:
    own = _own_parts(archive)
    if kind in own:
        return own[kind]
    found = {part.kind: part.prefix for part in own.values()}
    if METADATA_KEY not in archive.metadata:
        found = places(archive) | found
        if kind in found:
            return part_at(archive, kind, found[kind])
    if not found:
        raise WuerstchenError(f"{archive.path}: this is {_unknown(archive)}; expected a {kind} file")
    beside = foreign(archive, tuple(found.values()))
    what = f"a {' and '.join(found)} file" + (f", with {beside}" if beside else "")
    loaders = " and ".join(f"load_{other}" for other in found) + (" takes" if len(found) == 1 else " take")
    raise WuerstchenError(f"{archive.path}: this is {what}; {loaders} it, expected a {kind} file")


def _unknown(archive: Archive) -> str:
    first = ", ".join(list(archive.tensors)[:3])
    return foreign(archive) or f"no network of Würstchen (the names of its tensors begin with {first})"


def empty(archive: Archive, part: Part, network: type[nn.Module] | None = None, **options) -> nn.Module:
    """The network of a part, an instance of `network` or else of its kind's class, without memory for its weights.

    Raises WuerstchenError where there is no such network.
    """
    _check_count(archive, COUNTS[part.kind](part.config))
    try:
        with torch.device("meta"):
            return (network or NETWORKS[part.kind][0])(part.config, **options)
    except WuerstchenError as error:
        raise WuerstchenError(f"{archive.path}: there is no {part.kind} of its configuration: {error}") from error


def _check_count(archive: Archive, count: int) -> None:
    """Every block has tensors: no more are built than there can be."""
    if count > len(archive.tensors):
        raise WuerstchenError(
            f"{archive.path}: its configuration has {count} blocks, and there are only {len(archive.tensors)} tensors"
        )


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _own_parts(archive: Archive) -> dict[str, Part]:
    """Kind -> network that is in our layout: by the file's metadata, or by tensors as `header_tensor` makes them.

    Of a bundle those of its files.
    """
    if METADATA_KEY in archive.metadata:
        headers = {"": archive.metadata[METADATA_KEY]}
    elif bundled := members(archive):  # of two text encoders the first, Stage C's
        own = {f"{name}.": metadata for name, metadata in bundled.items() if METADATA_KEY in metadata}
        headers = {prefix: own[prefix][METADATA_KEY] for prefix in reversed(own)}
    else:
        headers = {
            name.removesuffix(METADATA_KEY): bytes(archive.read(name).tolist()).decode(errors="replace")
            for name, tensor in archive.tensors.items()
            if name.split(".")[-1] == METADATA_KEY
            and tensor.dtype == torch.uint8
            and tensor.dim() == 1
            and len(tensor) <= MAX_HEADER
        }
    found = (_own_part(archive, header, prefix) for prefix, header in headers.items())
    return {part.kind: part for part in found}


def _own_part(archive: Archive, text: str, prefix: str) -> Part:
    where = f"{archive.path}: {METADATA_KEY!r} in its metadata"
    header = json_object(where, text)
    kind = header.get("network")
    if not isinstance(kind, str) or kind not in NETWORKS or "config" not in header:
        raise WuerstchenError(f"{where} is not as we write it")
    values = header["config"].values() if isinstance(header["config"], dict) else ()
    _check_count(archive, max((len(value) for value in values if isinstance(value, list)), default=0))
    try:
        config = config_from(NETWORKS[kind][1], header["config"])
    except WuerstchenError as error:
        raise WuerstchenError(f"{archive.path}: its configuration is not one of a {kind}: {error}") from error
    return Part(kind, "ours", prefix, config)


def placed(archive: Archive, name: str, tensor: torch.Tensor, device, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of a file, floats in `dtype`. Raises WuerstchenError where a value is not finite."""
    if not tensor.is_floating_point():
        return tensor.to(device)
    try:
        result = tensor.to(device, dtype)
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):  # a host makes room and tries again
            raise
        raise WuerstchenError(f"{archive.path}: {name} could not be put into memory: {first_line(error)}") from error
    if not is_finite(result):
        if is_finite(tensor):
            half = str(dtype).removeprefix("torch.")
            raise WuerstchenError(f"{archive.path}: {name} is too large for {half}; load it as bfloat16 or float32")
        raise WuerstchenError(f"{archive.path}: damaged weights, {name} is not finite (NaN or infinity)")
    return result
