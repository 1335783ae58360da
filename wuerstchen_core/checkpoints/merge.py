"""Merging: the weighted sum of networks of one configuration, or of LoRAs for one network.

The paper's released model is such a mean of two (paper, appendix E).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..models.lora import DEPTHWISE, Change, LoRA
from ..util.errors import WuerstchenError
from ..util.finite import is_finite
from .archive import Archive, open_archive
from .contents import Contents, network_contents, stored_dtype
from .load import METADATA_KEY, header, parts
from .lora import SAMPLING_KEY, is_lora, read_lora

UNUSED = ("dropout",)  # fields of a configuration that change nothing but training


def merge(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
) -> Contents:
    """The weighted sum of two or more networks or LoRAs, in any layout, to be written.

    Networks are summed tensor by tensor in float64, statistics of BatchNorms too, and their weights must sum to 1.
    Of LoRAs it is the changes that are summed, and so any weights are possible: the factors are stacked along the rank,
    which is exact, and the rank of the result is the sum of theirs.

    Args:
        weights: one per file; by default the mean.
        kind: which network, where the files hold several.
        dtype: of floats in the result; by default the files' own, or float32 where they differ.

    Raises:
        WuerstchenError: the files are not of one kind and configuration, the weights do not fit, or as the loaders do.
    """
    if len(paths) < 2:
        raise WuerstchenError("merging needs at least two files")
    weights = [1 / len(paths)] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise WuerstchenError(f"there are {len(weights)} weights for {len(paths)} files: give one for each file")
    if not all(map(math.isfinite, weights)):
        raise WuerstchenError("the weights must be finite numbers")
    archives = [open_archive(path) for path in paths]
    loras = [archive for archive in archives if is_lora(archive)]
    if not loras:
        return _networks(archives, weights, kind, dtype)
    if len(loras) < len(archives):
        other = next(archive for archive in archives if archive not in loras)
        raise WuerstchenError(f"{loras[0].path} is a LoRA, {other.path} is not: only files of one kind can be merged")
    return _loras([read_lora(archive) for archive in loras], weights, dtype)


def _networks(
    archives: Sequence[Archive], weights: Sequence[float], kind: str | None, dtype: torch.dtype | None
) -> Contents:
    if abs(math.fsum(weights) - 1) > 1e-6:
        given = " ".join(f"{weight:g}" for weight in weights)
        raise WuerstchenError(f"the weights of networks must sum to 1, and {given} sum to {math.fsum(weights):g}")
    held = [parts(archive) for archive in archives]
    common = [one for one in held[0] if all(one in others for others in held)]
    if kind is not None and kind not in common:
        raise WuerstchenError(
            f"there is no {kind} in all of the files, only {' and '.join(common) or 'other networks'}"
        )
    if not common:
        kinds = "; ".join(
            f"{archive.path.name}: {' and '.join(one)}" for archive, one in zip(archives, held, strict=True)
        )
        raise WuerstchenError(f"the files hold networks of different kinds ({kinds}): only the same kind can be merged")
    if kind is None and len(common) > 1:
        raise WuerstchenError(f"the files hold {' and '.join(common)}: name one with --part")
    kind = kind or common[0]
    config = held[0][kind].config
    for archive, one in zip(archives, held, strict=True):
        _check_same(archives[0].path, config, archive.path, one[kind].config)
    exact = [network_contents(archive, kind, torch.float64) for archive in archives]
    stored = [network_contents(archive, kind, dtype).outlines for archive in archives]
    outlines = {
        name: torch.empty(outline.shape, dtype=_common([one[name].dtype for one in stored]), device="meta")
        for name, outline in stored[0].items()
    }

    def read(name: str) -> Tensor:
        if not outlines[name].is_floating_point():
            return exact[0].read(name)  # a BatchNorm's number of batches
        total = sum(weight * one.read(name) for weight, one in zip(weights, exact, strict=True))
        assert isinstance(total, Tensor)
        if name.endswith("running_var") and (total < 0).any():
            raise WuerstchenError(f"{name} would be negative: a variance can't be; take weights between 0 and 1")
        return _narrowed(name, total, outlines[name].dtype)

    return Contents(outlines, read, {METADATA_KEY: header(kind, config)})


def _check_same(first: Path, config, other: Path, others) -> None:
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(others, field.name)
        if ours != theirs and field.name not in UNUSED:
            raise WuerstchenError(
                f"{other}: {field.name} is {theirs}, and in {first} {ours}: only networks of one configuration can be "
                "merged"
            )


def _common(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def _narrowed(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = values.to(dtype)
    if not is_finite(narrow):
        half = str(dtype).removeprefix("torch.")
        raise WuerstchenError(f"{name} would be too large for {half}: choose a wider --dtype")
    return narrow


def _loras(loras: Sequence[LoRA], weights: Sequence[float], dtype: torch.dtype | None) -> Contents:
    stages = {lora.stage for lora in loras}
    if len(stages) > 1:
        raise WuerstchenError(f"{loras[0].path} is for {loras[0].stage}, and another is not: merge LoRAs of one stage")
    prefix = "prior" if stages == {"Stage C"} else "decoder"
    tensors: dict[str, Tensor] = {}
    for module in dict.fromkeys(module for lora in loras for module in lora.changes):
        changing = [
            (lora, lora.changes[module], weight)
            for lora, weight in zip(loras, weights, strict=True)
            if module in lora.changes and weight
        ]
        if not changing:
            continue
        for lora, change, _ in changing:
            if change.shape != changing[0][1].shape:
                raise WuerstchenError(
                    f"{lora.path}: it changes {module} of {change.shape}, and {changing[0][0].path} of "
                    f"{changing[0][1].shape}: LoRAs of different networks can't be merged"
                )
        stored = dtype or _common([change.up.dtype for _, change, _ in changing])
        for half, factor in _stacked([(change, weight) for _, change, weight in changing]).items():
            name = f"{prefix}.{module}.{half}.weight"
            tensors[name] = _narrowed(name, _shaped(module, half, factor), stored_dtype(factor.shape, stored))
        tensors[f"{prefix}.{module}.alpha"] = torch.tensor(float(sum(change.rank for _, change, _ in changing)))
    if not tensors:
        raise WuerstchenError("all weights are 0: nothing is left of the LoRAs")
    sampling = loras[0].sampling
    metadata = {"format": "pt"}
    if sampling and all(lora.sampling == sampling for lora in loras):
        metadata[SAMPLING_KEY] = json.dumps(sampling)
    return Contents(tensors, tensors.__getitem__, metadata)


def _stacked(changes: Sequence[tuple[Change, float]]) -> dict[str, Tensor]:
    """The factors of the weighted sum of changes, whose scale is 1; float64."""
    up = [change.up.double() * (change.scale * weight) for change, weight in changes]
    return {
        "lora_A": torch.cat([change.down.double() for change, _ in changes], dim=0).contiguous(),
        "lora_B": torch.cat(up, dim=1).contiguous(),
    }


def _shaped(module: str, half: str, factor: Tensor) -> Tensor:
    """A 3x3 convolution's factors as such programs have them that know convolutions."""
    if not DEPTHWISE.fullmatch(module):
        return factor
    return factor.unflatten(1, (-1, 3, 3)) if half == "lora_A" else factor[:, :, None, None]
