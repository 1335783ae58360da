"""Files of LoRAs for Stage C or Stage B, as diffusers, peft, kohya, OneTrainer, ComfyUI and we write them."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from ..models.lora import DEPTHWISE, MODULES, MODULES_B, Change, LoRA, size_text
from ..util.errors import WuerstchenError
from ..util.finite import is_finite
from .archive import Archive, open_archive
from .mapping import FLOATS
from .peft_pattern import Pattern
from .stored import RegularFile, is_there, json_object

METADATA_KEY = "lora_adapter_metadata"  # diffusers': peft's configuration as JSON
SAMPLING_KEY = "wuerstchen_sampling"  # ours: how to sample with a distilled network's LoRA, as JSON
CONFIG_FILE = "adapter_config.json"  # peft's: the same, beside `adapter_model.safetensors`
LARGEST_CONFIG = 4 << 20  # bytes
MOST_WORK = 100_000  # of patterns: steps per letter, for all modules

# peft's `lora_A`, with or without an adapter's name; diffusers' `lora.down`, `lora_linear_layer.down` and, of before
# peft, `processor.to_q_lora.down`; `lora_down` with its `alpha`.
FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.\w+)?|[._]lora(?:_linear_layer)?[._](?P<word>down|up))\.weight"
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# The network, as the programs name it; kohya's and OneTrainer's names go on with underscores in the place of dots.
PREFIX = re.compile(
    r"(?:(?:base_model\.model|prior|decoder|unet|diffusion_model)\.)*(?:lora_(?:prior_)?(?:unet|prior)[._])?"
)
# What OneTrainer and others put beside it: text encoders and embeddings.
OTHERS = re.compile(
    r"(?:base_model\.model\.)?(?:lora_(?:prior_|decoder_)?te\d?[._]|text_encoders?(?:_\d)?\.|bundle_emb\.)"
)
FLAT_NAMES = {
    name.replace(".", "_"): name
    for name in (
        *("projection", "cond_mapper.0", "cond_mapper.2", "out.1"),
        *("depthwise", "channelwise.0", "channelwise.4", "mapper", "kv_mapper.1"),
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("clip_mapper", "embedding.1", "clf.1", "semantic"),
    )
}

# Variants of LoRA whose change of a weight is not scale * up @ down.
VARIANTS = ("use_dora", "use_qalora", "use_bdlora")
OTHER_KINDS = re.compile(r"\.(hada|lokr|oft|glora|diff)_?\w*(?:\.\w+)?$")


def load_lora(path: str | Path) -> LoRA:
    """A LoRA for Stage C or Stage B from `path`: what diffusers, its training script for the prior, peft, kohya,
    OneTrainer, ComfyUI and we write.

    It is safetensors or a PyTorch file, or a folder of diffusers or peft that holds one. A weight becomes
    W + scale * B @ A with peft's scale, alpha / rank. Alpha is read from the file, its metadata or peft's
    `adapter_config.json`; where there is none it is the rank, as diffusers has it. What a file holds for text encoders,
    and embeddings bundled with it, is left out; `left_out` names it.

    Raises:
        WuerstchenError: the file is no whole LoRA, one of another model, of a variant that is more than a low-rank
            change of weights (DoRA, biases), or its values are not all finite.
    """
    return read_lora(open_archive(path))


def read_lora(archive: Archive) -> LoRA:
    """The LoRA in an open file; see `load_lora`."""
    if not is_lora(archive):
        other = next(filter(None, map(OTHER_KINDS.search, archive.tensors)), None)
        if other:
            raise WuerstchenError(f"{archive.path}: a LoRA of a kind that is not supported ({other[0]})")
        first = ", ".join(list(archive.tensors)[:3])
        raise WuerstchenError(f"{archive.path}: not a LoRA (the names of its tensors begin with {first})")
    factors, alphas, left_out = _sorted(archive)
    if not factors:
        raise WuerstchenError(f"{archive.path}: a LoRA of text encoders alone: it changes nothing in Stage C")
    if len({bool(MODULES_B.fullmatch(module)) for module in factors}) > 1:
        raise WuerstchenError(f"{archive.path}: it changes Stage C and Stage B: keep one network a file")
    config = _config(archive)
    defaults = _default_alphas(archive, config, factors)
    changes = {}
    for module, names in factors.items():
        down, up = (_half(archive, module, names, half) for half in ("down", "up"))
        if down.shape[0] != up.shape[1]:
            raise WuerstchenError(
                f"{archive.path}: damaged LoRA, the halves of {module} are of ranks {down.shape[0]} and {up.shape[1]}"
            )
        rank = down.shape[0]
        alpha = alphas.get(module, defaults.get(module, float(rank)))
        changes[module] = Change(down, up, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return LoRA(archive.path, changes, left_out, _sampling(archive))


def is_lora(archive: Archive) -> bool:
    return any(FACTOR.fullmatch(name) for name in archive.tensors)


def describe_lora(archive: Archive) -> Iterator[str]:
    """What a LoRA is, one line per fact. Raises WuerstchenError as `load_lora` does."""
    lora = read_lora(archive)
    changes = lora.changes
    kinds = dict.fromkeys(re.sub(r"^(?:\w+_)?blocks\.[\d.]+", "", name) for name in changes)
    yield "lora: load_lora takes it"
    if lora.stage == "Stage B":
        yield "  for a Stage B"
    else:
        yield f"  for a Stage C  of width {_listed(_width(name, change) for name, change in changes.items())}"
    yield f"  modules        {len(changes)}: {', '.join(kinds)}"
    yield f"  rank           {_listed(change.rank for change in changes.values())}"
    yield f"  alpha          {_listed(change.alpha for change in changes.values())}"
    yield f"  parameters     {sum(change.down.numel() + change.up.numel() for change in changes.values()):,}"
    yield f"  dtype          {_listed(str(change.up.dtype).removeprefix('torch.') for change in changes.values())}"
    if lora.sampling:
        yield f"  sampling       {', '.join(f'{name} {value}' for name, value in lora.sampling.items())}"
    if lora.left_out:
        more = ", …" if len(lora.left_out) > 3 else ""
        yield f"  left out       {len(lora.left_out)}, not of {lora.stage}: {', '.join(lora.left_out[:3])}{more}"


def _sorted(archive: Archive) -> tuple[dict[str, dict[str, str]], dict[str, float], list[str]]:
    """Module -> the names of its halves, "down" and "up"; module -> alpha; and what is not of Stage C."""
    factors: dict[str, dict[str, str]] = {}
    alphas: dict[str, float] = {}
    left_out: dict[str, None] = {}
    for name, tensor in archive.tensors.items():
        match = FACTOR.fullmatch(name) or ALPHA.fullmatch(name)
        if OTHERS.match(name):
            left_out[match["module"] if match else name] = None
            continue
        if match is None:
            raise WuerstchenError(
                f"{archive.path}: it holds {name}: a LoRA of another kind; low-rank changes of weights are supported, "
                "DoRA, biases and whole modules are not"
            )
        module = _module(match["module"])
        if not _is_changeable(module):
            raise WuerstchenError(
                f"{archive.path}: a LoRA of another model: Stage C has nothing to change in {module}, nor has Stage B"
            )
        if match.re is ALPHA:
            if module in alphas:
                raise WuerstchenError(f"{archive.path}: it has the alpha of {module} twice: keep one adapter a file")
            alphas[module] = _number(archive, name, _finite(archive, name) if tensor.numel() == 1 else None)
            continue
        if tensor.dtype not in FLOATS:
            what = "complex" if tensor.is_complex() else "whole"
            raise WuerstchenError(f"{archive.path}: {name} holds {what} numbers: a quantised LoRA is not supported")
        half = match["word"] or {"A": "down", "B": "up"}[match["letter"]]
        if half in factors.setdefault(module, {}):
            raise WuerstchenError(f"{archive.path}: it changes {module} twice: keep one adapter a file")
        factors[module][half] = name
    read = [name for names in factors.values() for name in names.values()]
    if archive.stored and sum(archive.tensors[name].nbytes for name in read) > archive.size:
        raise WuerstchenError(f"{archive.path}: damaged LoRA, its halves are larger than the file")
    return factors, alphas, list(left_out)


def _module(name: str) -> str:
    """A module's name in a file as it is in `Prior` or `DiffNeXt`."""
    name = PREFIX.sub("", name, count=1).replace(".processor.", ".")
    flat = re.fullmatch(r"(?:(?P<blocks>blocks|(?:down|up)_blocks_\d+)_(?P<block>\d+)_)?(?P<rest>\w+)", name)
    if flat and flat["rest"] in FLAT_NAMES:
        block = f"{flat['blocks'].replace('blocks_', 'blocks.')}.{flat['block']}." if flat["block"] else ""
        return block + FLAT_NAMES[flat["rest"]]
    name = re.sub(r"^effnet_mappers_(?=\d+$)", "effnet_mappers.", name)
    return f"{name}.0" if name.endswith(".to_out") else name


def _is_changeable(module: str) -> bool:
    return any(pattern.fullmatch(module) for pattern in (MODULES, DEPTHWISE, MODULES_B))


def _finite(archive: Archive, name: str) -> Tensor:
    tensor = archive.read(name)
    if not is_finite(tensor.float()):
        raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is not finite (NaN or infinity)")
    return tensor


def _half(archive: Archive, module: str, names: dict[str, str], half: str) -> Tensor:
    """A matrix, which of a 1x1 convolution is (out, in, 1, 1), and of a 3x3 one's lower half (rank, in, 3, 3)."""
    if half not in names:
        raise WuerstchenError(f"{archive.path}: an incomplete LoRA, {module} has no {half} half")
    shape = archive.tensors[names[half]].shape
    kernel = 3 if half == "down" and DEPTHWISE.fullmatch(module) else 1
    taps = kernel**2 if len(shape) == 2 else 1  # a 3x3 convolution's, where they are flattened already
    if len(shape) not in (2, 4) or 0 in shape or any(side != kernel for side in shape[2:]) or shape[1] % taps:
        raise WuerstchenError(
            f"{archive.path}: damaged LoRA, a half of {module} has the shape {size_text(shape)} and is no matrix"
        )
    return _finite(archive, names[half]).flatten(1)


def _config(archive: Archive) -> dict:
    """peft's configuration, from the metadata or the folder; empty where there is none."""
    beside = archive.path.with_name(CONFIG_FILE)
    text: str | bytearray
    if METADATA_KEY in archive.metadata:
        source, text = f"{archive.path}: its metadata {METADATA_KEY!r}", archive.metadata[METADATA_KEY]
    elif archive.path.stem == "adapter_model" and is_there(beside):
        file = RegularFile(beside)
        if file.size > LARGEST_CONFIG:
            raise WuerstchenError(f"{beside}: {file.size:,} bytes: not a configuration of peft")
        source, text = f"{beside}", file.read(0, file.size)
    else:
        return {}
    content = json_object(f"{source}, not a configuration of peft: it", text)
    config = {PREFIX.sub("", key, count=1): value for key, value in content.items()}
    for variant in VARIANTS:
        if config.get(variant):
            raise WuerstchenError(f"{archive.path}: a LoRA of a kind that is not supported ({variant})")
    return config


def _sampling(archive: Archive) -> dict[str, int | float | str]:
    """How to sample with it, where the file says so; a value that is neither a number nor a text is left out."""
    if SAMPLING_KEY not in archive.metadata:
        return {}
    content = json_object(f"{archive.path}: its metadata {SAMPLING_KEY!r}", archive.metadata[SAMPLING_KEY])
    return {name: value for name, value in content.items() if isinstance(value, int | float | str)}


def _default_alphas(archive: Archive, config: dict, modules: Iterable[str]) -> dict[str, float]:
    """peft's: that of the first `alpha_pattern` that the end of a module's name matches, or else `lora_alpha`."""
    given = config.get("alpha_pattern") or {}
    try:
        patterns = [(Pattern(text), _number(archive, "alpha_pattern", alpha)) for text, alpha in given.items()]
    except (ValueError, AttributeError) as error:
        if isinstance(error, WuerstchenError):
            raise
        raise WuerstchenError(f"{archive.path}: its alpha_pattern is not one of peft: {error}") from error
    modules = list(modules)
    if len(patterns) > len(archive.tensors) or sum(p.work for p, _ in patterns) * len(modules) > MOST_WORK:
        raise WuerstchenError(f"{archive.path}: its alpha_pattern has more patterns than modules: write the names out")
    common = _number(archive, "lora_alpha", config["lora_alpha"]) if "lora_alpha" in config else None
    alphas = {}
    for module in modules:
        alpha = next((alpha for pattern, alpha in patterns if pattern.matches(module)), common)
        if alpha is not None:
            alphas[module] = alpha
    return alphas


def _number(archive: Archive, name: str, value) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is no number") from error
    if not math.isfinite(number):
        raise WuerstchenError(f"{archive.path}: damaged LoRA, {name} is {number}")
    return number


def _width(module: str, change: Change) -> int:
    """The width of the Stage C that has a module of this shape."""
    out, into = change.shape
    if DEPTHWISE.fullmatch(module):
        return out if out > 1 else into // 9
    if module == "out.1" or module.endswith(".channelwise.0"):
        return into
    return out // 2 if re.fullmatch(r"blocks\.\d+\.mapper", module) else out


def _listed(values: Iterable) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(values)))
