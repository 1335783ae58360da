"""The tensors of a file under our names: renamed, split and joined, each as a view of the file where it can be."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..util.errors import WuerstchenError
from .archive import Archive
from .layouts import Part


class Source(NamedTuple):
    """Where a tensor of ours comes from: tensors of one shape, joined along the first axis, and an index into that."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    index: tuple[slice, ...] | None = None

    @property
    def is_joined(self) -> bool:
        return len(self.names) > 1

    def read(self, archive: Archive) -> Tensor:
        tensors = [archive.tensors[name] for name in self.names]
        tensor = torch.cat(tensors) if self.is_joined else tensors[0]
        return tensor if self.index is None else tensor[self.index]


def sources(archive: Archive, part: Part, shapes: Mapping[str, torch.Size]) -> dict[str, Source | None]:
    """The source of each of our tensors, whose `shapes` are given by name; None for a BatchNorm's counter that is
    missing, which nothing reads.

    Raises WuerstchenError for the first tensor that is missing or misshapen, or that the network has no place for.
    """
    rename = RENAMES.get((part.kind, part.layout), _same)
    found = {}
    for name, shape in shapes.items():
        names, shape, index = rename(name, shapes)
        source = Source(tuple(part.prefix + name for name in names), shape, index)
        missing = [name for name in source.names if name not in archive.tensors]
        if missing and name.endswith("num_batches_tracked"):
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
        found[name] = source
    _refuse_more(archive, part, found)
    return found


def _refuse_more(archive: Archive, part: Part, found: Mapping[str, Source | None]) -> None:
    """Beside the network a file may hold what it likes, within it nothing that the network lacks."""
    used = {name for source in found.values() if source for name in source.names}
    modules = {part.prefix + name[len(part.prefix) :].split(".")[0] + "." for name in used}
    for name in archive.tensors:
        if name.startswith(tuple(modules)) and name not in used and not IGNORED.search(name):
            raise WuerstchenError(f"{archive.path}: a {part.kind} of another kind: this one has no place for {name}")


# Buffers that older versions wrote beside the weights; a codebook's training statistics.
IGNORED = re.compile(r"position_ids$|num_batches_tracked$|vquantizer\.ema_|attn_mask$")


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
