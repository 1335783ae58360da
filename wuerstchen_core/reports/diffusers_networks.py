"""diffusers' and transformers' networks with the weights of ours, whose tensors they share where the layouts agree."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.stage_a import VQGAN
from ..models.stage_b import DiffNeXt
from ..models.stage_c import Prior
from ..models.text_encoder import TextEncoder
from ..util.errors import WuerstchenError, first_line, one_line


def require_diffusers() -> str:
    """The version of diffusers. Raises WuerstchenError if it or transformers cannot be imported."""
    try:
        import diffusers
        import transformers  # noqa: F401
        from diffusers.pipelines.deprecated import wuerstchen  # noqa: F401
    except ImportError as error:
        raise WuerstchenError(
            f"--against diffusers needs diffusers 0.42 and transformers ({one_line(first_line(error))}): "
            "pip install -e '.[measure]'"
        ) from error
    return diffusers.__version__


def prior(ours: Prior) -> Any:
    """Stage C in diffusers. Raises WuerstchenError, as all of these, if diffusers has no network of such a size."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    config = ours.config
    return _sharing(
        ours.state_dict(),
        lambda: WuerstchenPrior(
            c_in=config.latent_channels,
            c=config.width,
            c_cond=config.text_width,
            c_r=config.time_width,
            depth=config.depth,
            nhead=config.heads,
        ),
    )


def decoder(ours: DiffNeXt) -> Any:
    """Stage B in diffusers."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    config, weights = ours.config, ours.state_dict()
    for name in [name for name in weights if name.endswith(".semantic.weight")]:
        first = name.replace("semantic.weight", "channelwise.0.weight")
        weights[first] = torch.cat([weights[first], weights.pop(name)], dim=1)
    return _sharing(
        weights,
        lambda: WuerstchenDiffNeXt(
            c_in=config.latent_channels,
            c_out=config.latent_channels,
            c_r=config.time_width,
            patch_size=config.patch,
            c_cond=config.condition_width,
            c_hidden=list(config.widths),
            nhead=[heads or -1 for heads in config.heads],
            blocks=list(config.blocks),
            level_config=["CTA" if heads else "CT" for heads in config.heads],
            inject_effnet=list(config.semantic),
            effnet_embd=config.semantic_channels,
            clip_embd=config.text_width,
        ),
    )


def vqgan(ours: VQGAN) -> Any:
    """Stage A in diffusers."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    config, weights = ours.config, ours.state_dict()
    weights["vquantizer.embedding.weight"] = weights.pop("vquantizer.codebook.weight")
    return _sharing(
        weights,
        lambda: PaellaVQModel(
            levels=len(config.widths),
            embed_dim=config.widths[-1],
            bottleneck_blocks=config.bottleneck_blocks,
            latent_channels=config.latent_channels,
            num_vq_embeddings=config.codebook_size,
            scale_factor=config.scale_factor,
        ),
    )


def clip(encoder: TextEncoder) -> Any:
    """A text encoder in transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = encoder.config
    weights = {}
    for name, tensor in encoder.tower.state_dict().items():
        name = name.replace("transformer.resblocks.", "encoder.layers.")
        for part, theirs in _CLIP_PARTS.items():
            name = name.replace(part, theirs)
        if "in_proj_" in name:
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{projection}_proj.")] = part
        else:
            weights[name] = tensor
    length = config.context_length
    settings = CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=length,
        vocab_size=config.vocabulary,
        hidden_act="gelu",
    )

    def build() -> nn.Module:
        network = CLIPTextModel(settings)
        return getattr(network, "text_model", network)  # before transformers 5 the network lay in it

    network = _sharing(weights, build)
    network.embeddings.position_ids = torch.arange(length, device=encoder.tower.positional_embedding.device)[None]
    return network


_CLIP_PARTS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.": "self_attn.",
    "c_fc": "fc1",
    "c_proj": "fc2",
}


def _sharing(weights: dict[str, Tensor], build: Callable[[], nn.Module]) -> Any:
    """A network of diffusers' with these tensors as its weights.

    Raises:
        WuerstchenError: its weights are not of these names and shapes.
    """
    with torch.device("meta"):
        network = build()
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise WuerstchenError(
            f"diffusers has no network of such a size: its {type(network).__name__} differs from ours"
        ) from error
    return network.eval().requires_grad_(False)
