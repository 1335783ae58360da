"""How well pictures match their prompts: CLIP score and PickScore."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...util.errors import WuerstchenError, first_line, readable

Score = Callable[[list[Tensor], list[str]], Tensor]


def clip_score(path: str | Path, name: str, device: str = "cpu") -> Score:
    """The CLIP score, 100 max(cos(picture, prompt), 0) of each picture (arXiv 2104.08718), by open_clip.

    Args:
        path: weights of the model, as open_clip reads them (safetensors or PyTorch; only tensors are read).
        name: of the model's configuration in open_clip, such as ViT-L-14 or ViT-B-32-quickgelu.

    Raises:
        WuerstchenError: open_clip knows no such model, or the file holds no weights of it.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise WuerstchenError(f"--clip-model is {readable(name, 60)}: open_clip has no model of that name")
    if not Path(path).is_file():
        raise WuerstchenError(f"{readable(path)}: there is no such file; --clip takes the weights of {name}")
    try:
        model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(path), device=device)
        tokenize = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises nearly anything for a file of other weights
        raise WuerstchenError(
            f"{path}: not weights of open_clip's {name}, which --clip-model names "
            f"({type(error).__name__}: {readable(first_line(error), 150)})"
        ) from error
    model.eval()

    @torch.inference_mode()
    def score(images: list[Tensor], captions: list[str]) -> Tensor:
        pixels = torch.stack([prepare(picture) for picture in _pillow(images)]).to(device)
        seen = model.encode_image(pixels, normalize=True)
        read = model.encode_text(tokenize(captions).to(device), normalize=True)
        return 100 * (seen * read).sum(dim=1).clamp(min=0).float().cpu()

    return score


def pick_score(folder: str | Path, device: str = "cpu") -> Score:
    """PickScore, the scaled cosine of picture and prompt of a CLIP trained on preferences (arXiv 2305.01569).

    Args:
        folder: in transformers' layout, with config.json, the weights, the tokenizer and the preprocessor.

    Raises:
        WuerstchenError: transformers is missing, or the folder lacks something.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise WuerstchenError(
            f"PickScore needs transformers, which can't be imported ({readable(error)}): pip install -e '.[measure]'"
        ) from error
    if not Path(folder).is_dir():
        raise WuerstchenError(
            f"{readable(folder)}: there is no such folder; --pickscore takes one of PickScore_v1's files"
        )
    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises nearly anything
        raise WuerstchenError(
            f"{folder}: not PickScore in transformers' layout, with tokenizer and preprocessor "
            f"({readable(first_line(error), 150)})"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise WuerstchenError(f"{folder}: not PickScore in transformers' layout, {missing[0]} is missing")
    model = model.eval().to(device)

    @torch.inference_mode()
    def score(images: list[Tensor], captions: list[str]) -> Tensor:
        inputs = processor(
            text=captions, images=_pillow(images), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(device)
        given = model(**inputs)
        return (model.logit_scale.exp() * (given.image_embeds * given.text_embeds).sum(dim=1)).float().cpu()

    return score


def _pillow(images: list[Tensor]) -> list[Image.Image]:
    return [Image.fromarray(rearrange((image * 255).round().byte(), "c h w -> h w c").numpy()) for image in images]
