"""Text encoders as ComfyUI's CLIP: emphasis, long prompts, embeddings, LoRAs and hooks are its own."""

from functools import partial
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

from ...wuerstchen_core import WuerstchenError, load_text_encoder
from ...wuerstchen_core.models.text_encoder import TextEncoderConfig

START, END = 49406, 49407
WIDTH_OF_H = 1024


class Tower(comfy.sd1_clip.SDClipModel):
    """CLIP's text tower as Würstchen reads it: the last layer's states after the final norm, padding masked."""

    def __init__(self, config: TextEncoderConfig, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(
            device=device,
            dtype=dtype,
            layer="last",
            textmodel_json_config={
                "hidden_size": config.width,
                "intermediate_size": config.width * 4,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "hidden_act": "gelu",
                "max_position_embeddings": config.context_length,
                "vocab_size": config.vocabulary,
                "eos_token_id": END,
            },
            special_tokens={"start": START, "end": END, "pad": END},
            enable_attention_masks=True,
            return_projected_pooled=False,
            model_options=model_options,
        )


def load_clip(path: Path) -> comfy.sd.CLIP:
    """A text encoder as a CLIP. Raises WuerstchenError as `load_text_encoder` does."""
    encoder = load_text_encoder(path, dtype=None)
    config = encoder.config
    name = "h" if config.width == WIDTH_OF_H else "g"  # by which ComfyUI finds LoRAs' and embeddings' tensors
    weights = comfy.utils.clip_text_transformers_convert(dict(encoder.tower.state_dict()), "", "")
    weights["text_projection.weight"] = torch.eye(config.width)  # the pooled output is nothing that Würstchen reads
    tokenizer = partial(comfy.sd1_clip.SDTokenizer, embedding_size=config.width, embedding_key=f"clip_{name}")
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            partial(comfy.sd1_clip.SD1Tokenizer, clip_name=name, tokenizer=tokenizer),
            partial(comfy.sd1_clip.SD1ClipModel, clip_name=name, clip_model=partial(Tower, config)),
        ),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in weights.values()),
    )
    missing, unexpected = clip.cond_stage_model.load_sd(weights)
    if missing or unexpected:
        raise WuerstchenError(f"{path}: this version of ComfyUI has another CLIP ({(missing or unexpected)[0]})")
    return clip
