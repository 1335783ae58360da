"""Which networks a file of weights holds, in whose layout and of which configuration: from names and shapes alone.

The layouts are ours, the authors' ("published"), diffusers', open_clip's and transformers'. The released networks'
attention heads are 64 wide, which shapes do not show.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Size

from ..models.latent_space import LatentSpace
from ..models.semantic_compressor import BackboneStage, SemanticCompressorConfig
from ..models.stage_a import StageAConfig
from ..models.stage_b import StageBConfig
from ..models.stage_c import StageCConfig
from ..models.text_encoder import TextEncoderConfig
from ..util.errors import WuerstchenError
from .archive import Archive

HEAD_WIDTH = 64
CLIP_VOCABULARY = 49408
PATCH = 2  # of Stage B
RELEASED_C, RELEASED_S = StageCConfig(), SemanticCompressorConfig()
RELEASED_TEXT_LAYERS = {1024: 24, 1280: 32}  # CLIP H, bigG
BACKBONE_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # EfficientNetV2's stages; S has no seventh

# Names that only one network has, and that it has many of, so that one tensor missing does not hide what a file is.
SIGNATURES = {
    "stage_a": re.compile(r"(?:down|up)_blocks\.\d+\.gammas$"),
    "stage_b": re.compile(r"effnet_mappers\.\d+\.(?:weight|bias)$"),
    "stage_c": re.compile(r"blocks\.\d+\.kv_mapper\.1\.(?:weight|bias)$"),
    "semantic_compressor": re.compile(r"backbone\.\d+\.\d+\.block\."),
    "text_encoder": re.compile(r"(?:transformer\.resblocks\.\d+\.ln_1|encoder\.layers\.\d+\.layer_norm1)\."),
}

# Where a text tower's names stand for a picture's tower, or for a part of another model's checkpoint.
OTHERS_TOWERS = re.compile(r"visual|vision|conditioner|cond_stage_model")

# Files that are easily taken for ours, the most particular first.
FOREIGN = {
    r"\.(?:hada|lokr)_[wt]\d": "a LoHa or LoKr, not a plain LoRA: try ComfyUI's own LoRA loaders",
    r"lora": "a LoRA, which changes a network and is none by itself (load_lora takes those of Stage C)",
    r"clip_txt_(?:pooled_)?mapper\.": "Stable Cascade's Stage C, another network than Würstchen v2's",
    r"pixels_mapper\.": "Stable Cascade's Stage B, another network than Würstchen v2's",
    r"byt5_mapper\.|out_mapper\.": "Stage B of Würstchen v1 (Paella), which works on Stage A's indices, unlike v2's",
    r"conditioner\.embedders\.|add_embedding\.linear_1|label_emb\.0\.0": "an SDXL checkpoint, another model",
    r"model\.diffusion_model\.|cond_stage_model\.|^input_blocks\.": "a Stable Diffusion checkpoint, another model",
    r"\.resnets\.\d|first_stage_model\.|decoder\.up\.\d": "a Stable Diffusion network, another model",
    r"double_blocks\.|joint_blocks\.|transformer_blocks\.": "a diffusion transformer, another model",
    r"visual\.|vision_model\.": "CLIP's vision tower",
    r"features\.\d+\.\d+\.block\.": "torchvision's EfficientNet, without the semantic compressor's mapper",
    r"encoder\.block\.\d|shared\.weight": "a T5 text encoder; Würstchen's are CLIP's",
}


@dataclass(frozen=True)
class Part:
    """A network in a file. Its tensors' names there begin with `prefix`; `layout` is whose the rest of them is."""

    kind: str
    layout: str
    prefix: str
    config: Any


class Shapes(dict[str, Size]):
    """Shapes by name, of the tensors whose names begin with a prefix (which is left out)."""

    def __init__(self, archive: Archive, kind: str, prefix: str, shapes: Iterable[tuple[str, Size]] | None = None):
        self.archive, self.kind, self.prefix = archive, kind, prefix
        if shapes is None:
            tensors = archive.tensors.items()
            shapes = ((name[len(prefix) :], tensor.shape) for name, tensor in tensors if name.startswith(prefix))
        super().__init__(shapes)

    def __missing__(self, name: str) -> Size:
        raise WuerstchenError(f"{self.archive.path}: an incomplete {self.kind} file, {self.prefix}{name} is missing")

    @cached_property
    def _groups(self) -> dict[str, list[tuple[str, Size]]]:
        """By the first two words of a name, the rest of it."""
        groups: dict[str, list[tuple[str, Size]]] = {}
        for name, shape in self.items():
            first, _, rest = name.partition(".")
            second, _, rest = rest.partition(".")
            groups.setdefault(f"{first}.{second}.", []).append((rest, shape))
        return groups

    def within(self, group: str) -> "Shapes":
        """Those whose names begin with two words, such as `blocks.3.`."""
        return Shapes(self.archive, self.kind, self.prefix + group, self._groups.get(group, []))

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self)

    def first(self, pattern: str) -> Size:
        """The shape of the first tensor whose name matches."""
        for name in self:
            if re.fullmatch(pattern, name):
                return self[name]
        return self[pattern.replace(r"\d+", "*").replace("\\", "")]

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group matches at the start of a name, or 0.

        Raises WuerstchenError for a number that there are not enough tensors for.
        """
        matches = (re.match(pattern, name) for name in self)
        count = max((int(match[1]) + 1 for match in matches if match), default=0)
        if count > len(self):
            raise WuerstchenError(
                f"{self.archive.path}: an incomplete {self.kind} file: a name counts to {count - 1}, and there are "
                f"only {len(self)} tensors"
            )
        return count

    def check_whole(self, count: int, released: int, what: str) -> None:
        """Raises WuerstchenError where a network of the released width has fewer of something than the released one."""
        if count < released:
            raise WuerstchenError(
                f"{self.archive.path}: an incomplete {self.kind} file: it has {count} of the {released} {what} that "
                "the released network of this width has"
            )

    def heads(self, width: int) -> int:
        if width % HEAD_WIDTH:
            raise WuerstchenError(
                f"{self.archive.path}: a {self.kind} file whose number of attention heads cannot be told: its width "
                f"{width} is not a multiple of the released models' {HEAD_WIDTH}, and it has no configuration of ours"
            )
        return width // HEAD_WIDTH


def places(archive: Archive) -> dict[str, str]:
    """Kind -> prefix of every network in the file; of several of a kind the EMA, or else the one of most weights."""
    found: dict[str, dict[str, None]] = {}  # kind -> prefixes, in their order
    for name in archive.tensors:
        for kind, signature in SIGNATURES.items():
            match = signature.search(name)
            if match and name[: match.start()][-1:] in ("", ".") and not OTHERS_TOWERS.search(name[: match.start()]):
                found.setdefault(kind, {})[name[: match.start()]] = None
    sizes = dict.fromkeys((prefix for prefixes in found.values() for prefix in prefixes), 0)
    for name, tensor in archive.tensors.items():
        for end in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            if name[:end] in sizes:
                sizes[name[:end]] += tensor.numel()
    return {
        kind: max(prefixes, key=lambda prefix: ("ema" in prefix, sizes[prefix]))
        for kind, prefixes in sorted(found.items())
    }


def part_at(archive: Archive, kind: str, prefix: str) -> Part:
    """The network of a kind whose names begin with the prefix.

    Raises WuerstchenError where a tensor is missing that shows the configuration, or is not as the network has it.
    """
    shapes = Shapes(archive, kind, prefix)
    try:
        layout, config = READERS[kind](shapes)
    except WuerstchenError:
        raise
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise WuerstchenError(f"{archive.path}: its tensors do not have the shapes of a {kind}") from error
    return Part(kind, layout, prefix, config)


def foreign(archive: Archive, besides: tuple[str, ...] = ()) -> str | None:
    """What a file is, or what its names are that begin with none of the prefixes; None for what is not known."""
    names = [name for name in archive.tensors if not name.startswith(besides)] if besides else archive.tensors
    for pattern, what in FOREIGN.items():
        if any(re.search(pattern, name) for name in names):
            return what
    return None


def _stage_a(shapes: Shapes) -> tuple[str, StageAConfig]:
    diffusers = "vquantizer.embedding.weight" in shapes
    codebook = shapes["vquantizer.embedding.weight" if diffusers else "vquantizer.codebook.weight"]
    halvings = sorted(int(name.split(".")[1]) for name in shapes if re.fullmatch(r"down_blocks\.\d+\.weight", name))
    widths = [shapes["in_block.1.weight"][0], *(shapes[f"down_blocks.{i}.weight"][0] for i in halvings)]
    growing = [int(name.split(".")[1]) for name in shapes if re.fullmatch(r"up_blocks\.\d+\.weight", name)]
    bottleneck = min(growing, default=shapes.count(r"up_blocks\.(\d+)\.gammas")) - 1
    config = StageAConfig(tuple(widths), bottleneck, latent_channels=codebook[1], codebook_size=codebook[0])
    return "diffusers" if diffusers else "published", config


def _stage_b(shapes: Shapes) -> tuple[str, StageBConfig]:
    levels = [shapes.within(f"down_blocks.{i}.") for i in range(shapes.count(r"down_blocks\.(\d+)\."))]
    widths = tuple(level.first(r"\d+\.depthwise\.weight")[0] for level in levels)
    attentive = [level.has(r"\d+\.kv_mapper\.1\.weight") for level in levels]
    modules = [level.count(r"(\d+)\.") - (i > 0) for i, level in enumerate(levels)]  # less the one that halves
    mapped = [shapes.within(f"effnet_mappers.{i}.") for i in range(len(levels))]
    condition_width, semantic_channels = shapes.first(r"effnet_mappers\.\d+\.weight")[:2]
    config = StageBConfig(
        latent_channels=shapes["clf.1.weight"][0] // (2 * PATCH**2),
        patch=PATCH,
        widths=widths,
        heads=tuple(shapes.heads(width) if attends else 0 for width, attends in zip(widths, attentive, strict=True)),
        blocks=tuple(-(-count // (3 if attends else 2)) for count, attends in zip(modules, attentive, strict=True)),
        semantic=tuple("weight" in mapper or "bias" in mapper for mapper in mapped),
        semantic_channels=semantic_channels,
        condition_width=condition_width,
        text_width=shapes["clip_mapper.weight"][1],
        time_width=shapes.first(r"down_blocks\.\d+\.\d+\.mapper\.weight")[1],
    )
    if shapes.has(r".*\.semantic\.weight"):
        return "ours", config
    return _attention_layout(shapes), config


def _stage_c(shapes: Shapes) -> tuple[str, StageCConfig]:
    width, latent_channels = shapes["projection.weight"][:2]
    config = StageCConfig(
        latent_channels=latent_channels,
        width=width,
        depth=-(-shapes.count(r"blocks\.(\d+)\.") // 3),
        heads=shapes.heads(width),
        text_width=shapes["cond_mapper.0.weight"][1],
        time_width=shapes.first(r"blocks\.\d+\.mapper\.weight")[1],
    )
    if width == RELEASED_C.width:
        shapes.check_whole(config.depth, RELEASED_C.depth, "groups of blocks")
    return _attention_layout(shapes), config


def _attention_layout(shapes: Shapes) -> str:
    return "published" if shapes.has(r".*\.attention\.attn\.in_proj_(?:weight|bias)") else "diffusers"


def _semantic_compressor(shapes: Shapes) -> tuple[str, SemanticCompressorConfig]:
    if "mapper.1.running_mean" in shapes and not shapes.has(r"mapper\.1\.(?:weight|bias)"):
        raise WuerstchenError(
            f"{shapes.archive.path}: this is Stable Cascade's semantic compressor (its BatchNorm has no weight and "
            "bias), another one than Würstchen's"
        )
    last = shapes.count(r"backbone\.(\d+)\.") - 1
    stages = tuple(_backbone_stage(shapes.within(f"backbone.{i}."), i) for i in range(1, last))
    config = SemanticCompressorConfig(
        stem=shapes["backbone.0.0.weight"][0],
        stages=stages,
        features=shapes[f"backbone.{last}.0.weight"][0],
        latent_channels=shapes["mapper.0.weight"][0],
        # v1's compressor is EfficientNetV2-L, of seven stages, and its features are Stage C's space as they are.
        latent_space=LatentSpace(0.0, 1.0) if len(stages) > 6 else LatentSpace(),
    )
    if (config.stem, config.features, len(stages)) == (RELEASED_S.stem, RELEASED_S.features, len(RELEASED_S.stages)):
        for i, (stage, released) in enumerate(zip(stages, RELEASED_S.stages, strict=True), start=1):
            shapes.check_whole(stage.layers, released.layers, f"layers in backbone.{i}")
    return "published", config


def _backbone_stage(shapes: Shapes, stage: int) -> BackboneStage:
    wide, narrow, kernel = shapes["0.block.0.0.weight"][:3]
    fused = kernel == 3
    expansion = wide // narrow if "0.block.1.0.weight" in shapes else 1
    projection = f"0.block.{0 if fused and expansion == 1 else 1 if fused else 3}.0.weight"
    layers = shapes.count(r"(\d+)\.")
    return BackboneStage(fused, expansion, BACKBONE_STRIDES[stage - 1], shapes[projection][0], layers)


def _text_encoder(shapes: Shapes) -> tuple[str, TextEncoderConfig]:
    if shapes.has(r"encoder\.layers\..*"):
        layout, embeddings, layers = "transformers", "embeddings.", r"encoder\.layers\.(\d+)\."
        context_length = shapes["embeddings.position_embedding.weight"][0]
    else:
        layout, embeddings, layers = "open_clip", "", r"transformer\.resblocks\.(\d+)\."
        context_length = shapes["positional_embedding"][0]
    vocabulary, width = shapes[f"{embeddings}token_embedding.weight"]
    if vocabulary != CLIP_VOCABULARY:
        raise WuerstchenError(
            f"{shapes.archive.path}: a text encoder of {vocabulary} tokens; "
            f"Würstchen's are CLIP's, of {CLIP_VOCABULARY}"
        )
    config = TextEncoderConfig(width, shapes.count(layers), shapes.heads(width), context_length, vocabulary)
    shapes.check_whole(config.layers, RELEASED_TEXT_LAYERS.get(width, 0), "layers")
    return layout, config


READERS = {
    "stage_a": _stage_a,
    "stage_b": _stage_b,
    "stage_c": _stage_c,
    "semantic_compressor": _semantic_compressor,
    "text_encoder": _text_encoder,
}
