"""The tensors of a file under our names: renamed, split and joined."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from .archive import Archive, odd
from .layouts import Part


class Source(NamedTuple):
    """Where a tensor of ours comes from: tensors of one shape, joined along the first axis, and an index into that."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    index: tuple[slice, ...] | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensor, from those of the names."""
        tensor = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        return tensor if self.index is None else tensor[self.index]


def sources(archive: Archive, part: Part, shapes: Mapping[str, torch.Size]) -> dict[str, Source | None]:
    """The source of each of our tensors, whose `shapes` are given by name; None for a BatchNorm's counter that is
    missing, which nothing reads.

    Raises WuerstchenError for the first tensor that is missing, misshapen or not of floating-point numbers, or that the
    network has no place for.
    """
    scaled = next((name for name in archive.tensors if name.startswith(part.prefix) and SCALED.search(name)), None)
    if scaled is not None:
        raise WuerstchenError(
            f"{archive.path}: its weights are scaled 8-bit numbers ({scaled}, as ComfyUI writes fp8_scaled), which are "
            "not supported: take the file in float16, bfloat16 or float32"
        )
    rename = RENAMES.get((part.kind, part.layout), _same)
    found = {}
    for name, shape in shapes.items():
        names, shape, index = rename(name, shapes)
        source = Source(tuple(part.prefix + name for name in names), shape, index)
        missing = [name for name in source.names if name not in archive.tensors]
        if name.endswith("num_batches_tracked") and (missing or archive.tensors[source.names[0]].dtype != torch.int64):
            found[name] = None
            continue
        if missing:
            raise WuerstchenError(f"{archive.path}: an incomplete {part.kind} file, {missing[0]} is missing")
        for given in source.names:
            if archive.tensors[given].shape != shape:
                raise WuerstchenError(
                    f"{archive.path}: {given} of this {part.kind} file has the shape "
                    f"{_text(archive.tensors[given].shape)} where {_text(shape)} was expected"
                )
            flaw = odd(archive.tensors[given]) or _no_float(archive.tensors[given])
            if flaw and not name.endswith("num_batches_tracked"):
                raise WuerstchenError(f"{archive.path}: {given} of this {part.kind} file is {flaw}, not plain weights")
        found[name] = source
    _refuse_more(archive, part, found)
    _refuse_repeated(archive, found)
    return found


def _no_float(tensor: Tensor) -> str | None:
    return None if tensor.dtype in FLOATS else f"of {str(tensor.dtype).removeprefix('torch.')} numbers"


def _refuse_repeated(archive: Archive, found: Mapping[str, Source | None]) -> None:
    """A file may give the same bytes to many tensors; a network is not larger than its file."""
    used = {name for source in found.values() if source for name in source.names}
    total = sum(archive.tensors[name].nbytes for name in used)
    if archive.stored and total > archive.size:
        raise WuerstchenError(f"{archive.path}: damaged: {total:,} bytes of weights in a file of {archive.size:,}")


def _refuse_more(archive: Archive, part: Part, found: Mapping[str, Source | None]) -> None:
    """Beside the network a file may hold what it likes, within it nothing that the network lacks."""
    used = {name for source in found.values() if source for name in source.names}
    modules = {part.prefix + name[len(part.prefix) :].split(".")[0] + "." for name in used}
    for name in archive.tensors:
        if name.startswith(tuple(modules)) and name not in used and not IGNORED.search(name):
            raise WuerstchenError(f"{archive.path}: a {part.kind} of another kind: this one has no place for {name}")


# Buffers that older versions wrote beside the weights; a codebook's training statistics.
IGNORED = re.compile(r"position_ids$|num_batches_tracked$|vquantizer\.ema_|attn_mask$")


# What ComfyUI keeps beside 8-bit weights.
SCALED = re.compile(r"(?:\.scale_weight|\.weight_scale|\.comfy_quant|(?:^|\.)scaled_fp8)$")
FLOATS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


def _text(shape) -> str:
    return "×".join(map(str, shape)) or "()"


def _same(name: str, shapes: Mapping[str, torch.Size]) -> Source:
    return Source((name,), shapes[name])


def _diffusers_stage_a(name: str, shapes: Mapping[str, torch.Size]) -> Source:
    return Source((name.replace("vquantizer.codebook", "vquantizer.embedding"),), shapes[name])


def _fused_attention(name: str, shapes: Mapping[str, torch.Size]) -> Source:
    """PyTorch's MultiheadAttention has queries, keys and values, in that order, in one matrix."""
    shape = shapes[name]
    match = re.fullmatch(r"(.*\.attention\.)to_(q|k|v|out\.0)\.(weight|bias)", name)
    if match is None:
        return Source((name,), shape)
    attention, projection, kind = match.groups()
    if projection == "out.0":
        return Source((f"{attention}attn.out_proj.{kind}",), shape)
    width, third = shape[0], "qkv".index(projection)
    rows = slice(third * width, (third + 1) * width)
    return Source((f"{attention}attn.in_proj_{kind}",), (3 * width, *shape[1:]), (rows,))


def _whole_stage_b(rename: Callable) -> Callable:
    """The semantic latent's columns are the last ones of the first Linear, behind its own and the way down's."""

    def source(name: str, shapes: Mapping[str, torch.Size]) -> Source:
        block = re.sub(r"\.(?:semantic|channelwise\.0)\.weight$", "", name)
        if block == name or f"{block}.semantic.weight" not in shapes:
            return rename(name, shapes)
        rows, own = shapes[f"{block}.channelwise.0.weight"]
        whole = own + shapes[f"{block}.semantic.weight"][1]
        columns = slice(own, whole) if name.endswith(".semantic.weight") else slice(0, own)
        return Source((f"{block}.channelwise.0.weight",), (rows, whole), (slice(None), columns))

    return source


def _open_clip(name: str, shapes: Mapping[str, torch.Size]) -> Source:
    return Source((name.removeprefix("tower."),), shapes[name])


TRANSFORMERS_NAMES = {
    "tower.token_embedding": "embeddings.token_embedding",
    "tower.positional_embedding": "embeddings.position_embedding.weight",
    "tower.ln_final": "final_layer_norm",
    "tower.transformer.resblocks": "encoder.layers",
    ".attn.out_proj": ".self_attn.out_proj",
    ".ln_1": ".layer_norm1",
    ".ln_2": ".layer_norm2",
    ".mlp.c_fc": ".mlp.fc1",
    ".mlp.c_proj": ".mlp.fc2",
}


def _transformers(name: str, shapes: Mapping[str, torch.Size]) -> Source:
    shape = shapes[name]
    for ours, theirs in TRANSFORMERS_NAMES.items():
        name = name.replace(ours, theirs)
    layer, fused, kind = name.partition(".attn.in_proj_")
    if not fused:
        return Source((name,), shape)
    names = tuple(f"{layer}.self_attn.{projection}_proj.{kind}" for projection in "qkv")
    return Source(names, (shape[0] // 3, *shape[1:]))


RENAMES = {
    ("stage_a", "diffusers"): _diffusers_stage_a,
    ("stage_b", "published"): _whole_stage_b(_fused_attention),
    ("stage_b", "diffusers"): _whole_stage_b(_same),
    ("stage_c", "published"): _fused_attention,
    ("text_encoder", "open_clip"): _open_clip,
    ("text_encoder", "transformers"): _transformers,
}
