"""Files and folders of ComfyUI's users -> networks on its sockets."""

import comfy.sd
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...wuerstchen_core import WuerstchenError
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW, find_set
from ...wuerstchen_core.pipeline import preview
from . import lora
from .devices import to_intermediate
from .folders import listed_file, model_set
from .models import load_diffusion
from .previews import Previewer, show_latents
from .text import load_clip
from .vae import SemanticVAE, StageAVAE

lora.register()


def load_set(name: str, weight_dtype: str = "default") -> tuple:
    """A whole set by its name: Stage C and its CLIP, Stage B and its CLIP or None, Stage A's VAE, the semantic VAE.

    Raises WuerstchenError.
    """
    paths = find_set(model_set(name))
    stage_c = load_diffusion("stage_c", paths["stage_c"], weight_dtype)
    if "previewer" in paths:
        stage_c.model.latent_format.previewer = Previewer(paths["previewer"])
    stage_b, stage_a = load_diffusion("stage_b", paths["stage_b"], weight_dtype), StageAVAE(paths["stage_a"])
    show_latents(stage_b.model.latent_format, stage_a.encode)
    clip_c = load_clip(paths["text_encoder_c"])
    path_b = paths.get("text_encoder_b")
    if path_b == paths["text_encoder_c"]:
        clip_b = clip_c
    else:
        clip_b = None if path_b is None else load_clip(path_b)
    return (
        stage_c,
        clip_c,
        stage_b,
        clip_b,
        stage_a,
        SemanticVAE(paths["semantic_compressor"], paths.get("previewer")),
    )


def load_stage(kind: str, file: str, weight_dtype: str) -> ModelPatcher:
    """Stage C or Stage B from a file, by the name that `weight_files` has for it. Raises WuerstchenError."""
    return load_diffusion(kind, listed_file(kind, file), weight_dtype)


def load_text_encoder(file: str) -> comfy.sd.CLIP:
    """The same for a text encoder."""
    return load_clip(listed_file("text_encoder", file))


def load_stage_a(file: str) -> StageAVAE:
    """The same for Stage A."""
    return StageAVAE(listed_file("stage_a", file))


def load_semantic(file: str, previewer: str | None) -> SemanticVAE:
    """The same for a semantic compressor, and for a previewer if one is named."""
    path = None if previewer is None else listed_file("previewer", previewer)
    return SemanticVAE(listed_file("semantic_compressor", file), path)


def linear_preview(latent: Tensor) -> Tensor:
    """latent of Stage C (B, 16, p, q) -> small pictures (B, 8p, 8q, 3), each position one colour, as fits the mini."""
    return to_intermediate(preview(Previewer(LINEAR_PREVIEW).network, latent.float()))


def require_semantic(vae: comfy.sd.VAE, node: str) -> None:
    """Raises WuerstchenError if a VAE is another than the semantic one."""
    if not isinstance(vae, SemanticVAE):
        raise WuerstchenError(
            f"{node} takes the semantic VAE, and this is {'Stage A' if isinstance(vae, StageAVAE) else 'another VAE'}: "
            "take it from Würstchen Load Model or Würstchen Load Semantic Compressor"
        )


def require_stage_a(vae: comfy.sd.VAE, node: str) -> None:
    """Raises WuerstchenError if a VAE is another than Stage A. ComfyUI's own of the same file is as good as ours."""
    ours = isinstance(vae, comfy.sd.VAE) and (vae.latent_channels, vae.spacial_compression_decode())
    if ours != (StageAVAE.CHANNELS, StageAVAE.RATIO):
        raise WuerstchenError(
            f"{node} takes Stage A, and this is {'the semantic' if isinstance(vae, SemanticVAE) else 'another'} VAE: "
            "take it from Würstchen Load Model, Würstchen Load Stage A, or Load VAE with Stage A's file"
        )
