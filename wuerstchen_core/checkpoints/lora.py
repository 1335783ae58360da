"""Files of LoRAs for Stage C, as diffusers and peft write them."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..models.lora import MODULES, Change, LoRA, size_text
from ..util.errors import WuerstchenError
from ..util.finite import is_finite
from .archive import Archive, open_archive

METADATA_KEY = "lora_adapter_metadata"  # diffusers': peft's configuration as JSON
CONFIG_FILE = "adapter_config.json"  # peft's: the same, beside `adapter_model.safetensors`

# peft's `lora_A`, with or without an adapter's name; diffusers' `lora.down`, `lora_linear_layer.down` and, of before
# peft, `processor.to_q_lora.down`; `lora_down` with its `alpha`.
FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.\w+)?|[._]lora(?:_linear_layer)?[._](?P<word>down|up))\.weight"
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
PREFIX = re.compile(r"(?:(?:base_model\.model|prior|unet)\.)*")

# Variants of LoRA whose change of a weight is not scale * up @ down.
VARIANTS = ("use_dora", "use_qalora", "use_bdlora")


def load_lora(path: str | Path) -> LoRA:
    """A LoRA for Stage C from `path`: what diffusers, its training script for the prior, peft and we write.

    It is safetensors or a PyTorch file, or a folder of diffusers or peft that holds one. A weight becomes
    W + scale * B @ A with peft's scale, alpha / rank. Alpha is read from the file, its metadata or peft's
    `adapter_config.json`; where there is none it is the rank, as diffusers has it.

    Raises:
        WuerstchenError: the file is no whole LoRA, one of another model, of a variant that is more than a low-rank
            change of weights (DoRA, biases), or its values are not all finite.
    """
    return read_lora(open_archive(path))


def read_lora(archive: Archive) -> LoRA:
    """The LoRA in an open file; see `load_lora`."""
    if not is_lora(archive):
        first = ", ".join(list(archive.tensors)[:3])
        raise WuerstchenError(f"{archive.path}: not a LoRA (the names of its tensors begin with {first})")
    factors, alphas = _sorted(archive)
    config = _config(archive)
    changes = {}
    for module, halves in factors.items():
        down, up = (_half(archive, module, halves, name) for name in ("down", "up"))
        if down.shape[0] != up.shape[1]:
            raise WuerstchenError(
                f"{archive.path}: damaged LoRA, the halves of {module} are of ranks {down.shape[0]} and {up.shape[1]}"
            )
        rank = down.shape[0]
        alpha = alphas.get(module, _alpha(archive, config, module, default=rank))
        changes[module] = Change(down, up, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return LoRA(archive.path, changes)


def is_lora(archive: Archive) -> bool:
    return any(FACTOR.fullmatch(name) for name in archive.tensors)


def describe_lora(archive: Archive) -> Iterator[str]:
    """What a LoRA is, a line a fact. Raises WuerstchenError as `load_lora` does."""
    changes = read_lora(archive).changes
    kinds = dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in changes)
    yield "lora: load_lora takes it"
    yield f"  for a Stage C  of width {_listed(_width(name, change) for name, change in changes.items())}"
    yield f"  modules        {len(changes)}: {', '.join(kinds)}"
    yield f"  rank           {_listed(change.rank for change in changes.values())}"
    yield f"  alpha          {_listed(change.alpha for change in changes.values())}"
    yield f"  parameters     {sum(change.down.numel() + change.up.numel() for change in changes.values()):,}"
    yield f"  dtype          {_listed(str(change.up.dtype).removeprefix('torch.') for change in changes.values())}"


def _sorted(archive: Archive) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Module -> "down" and "up", and module -> alpha."""
    factors: dict[str, dict[str, Tensor]] = {}
    alphas = {}
    for name, tensor in archive.tensors.items():
        match = FACTOR.fullmatch(name) or ALPHA.fullmatch(name)
        if match is None:
            raise WuerstchenError(
                f"{archive.path}: it holds {name}: a LoRA of another kind; low-rank changes of weights are supported, "
                "DoRA, biases and whole modules are not"
            )
        module = _module(match["module"])
        if not MODULES.fullmatch(module):
            raise WuerstchenError(f"{archive.path}: a LoRA of another model: Stage C has nothing to change in {module}")
        if match.re is FACTOR and not tensor.is_floating_point():
            raise WuerstchenError(f"{archive.path}: {name} holds whole numbers: a quantised LoRA is not supported")
        if not is_finite(tensor.float()):
            raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is not finite (NaN or infinity)")
        if match.re is ALPHA:
            alphas[module] = _number(archive, name, tensor)
            continue
        half = match["word"] or {"A": "down", "B": "up"}[match["letter"]]
        if half in factors.setdefault(module, {}):
            raise WuerstchenError(f"{archive.path}: it changes {module} twice: keep one adapter a file")
        factors[module][half] = tensor
    return factors, alphas


def _module(name: str) -> str:
    """A module's name in a file as it is in `Prior`."""
    name = PREFIX.sub("", name, count=1).replace(".processor.", ".")
    return f"{name}.0" if name.endswith(".to_out") else name


def _half(archive: Archive, module: str, halves: Mapping[str, Tensor], name: str) -> Tensor:
    """A matrix, which of a 1x1 convolution is (out, in, 1, 1); a copy, so that the file may change."""
    if name not in halves:
        raise WuerstchenError(f"{archive.path}: an incomplete LoRA, {module} has no {name} half")
    half = halves[name]
    if half.dim() not in (2, 4) or half.numel() == 0 or any(side != 1 for side in half.shape[2:]):
        raise WuerstchenError(
            f"{archive.path}: damaged LoRA, a half of {module} has the shape {size_text(half.shape)} and is no matrix"
        )
    return half.flatten(1).clone()


def _config(archive: Archive) -> dict:
    """peft's configuration, from the metadata or the folder; empty where there is none."""
    beside = archive.path.with_name(CONFIG_FILE)
    if METADATA_KEY in archive.metadata:
        source, text = f"{archive.path}: its metadata {METADATA_KEY!r}", archive.metadata[METADATA_KEY]
    elif archive.path.stem == "adapter_model" and beside.exists():
        source, text = f"{beside}: it", beside.read_text(encoding="utf-8", errors="replace")
    else:
        return {}
    try:
        config = {PREFIX.sub("", key, count=1): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise WuerstchenError(f"{source} is not a configuration of peft: {error}") from error
    for variant in VARIANTS:
        if config.get(variant):
            raise WuerstchenError(f"{archive.path}: a LoRA of a kind that is not supported ({variant})")
    return config


def _alpha(archive: Archive, config: dict, module: str, default: float) -> float:
    """peft's: the `alpha_pattern` that the end of the module's name matches, or else `lora_alpha`."""
    alpha = config.get("lora_alpha", default)
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
    except (re.error, AttributeError) as error:
        raise WuerstchenError(f"{archive.path}: its alpha_pattern is not one of peft: {error}") from error
    return _number(archive, "lora_alpha", alpha)


def _number(archive: Archive, name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is no number") from error
    if not math.isfinite(number):
        raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is {number}")
    return number


def _width(module: str, change: Change) -> int:
    """The width of the Stage C that has a module of this shape."""
    out, into = change.shape
    if module == "out.1" or module.endswith(".channelwise.0"):
        return into
    return out // 2 if re.fullmatch(r"blocks\.\d+\.mapper", module) else out


def _listed(values: Iterable) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(values)))
