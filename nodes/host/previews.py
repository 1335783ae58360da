"""Pictures of the small latent while it is being sampled, by a previewer."""

from pathlib import Path

import comfy.model_management as management
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...wuerstchen_core.checkpoints.load import load_previewer
from ...wuerstchen_core.checkpoints.sets import LINEAR_PREVIEW
from ...wuerstchen_core.pipeline import preview
from ...wuerstchen_core.util.finite import is_finite


class Previewer:
    """A previewer in ComfyUI's hands."""

    def __init__(self, path: Path):
        device, offload = management.vae_device(), management.vae_offload_device()
        self.network = load_previewer(path, offload)
        self.patcher = ModelPatcher(self.network, device, offload)

    def load(self) -> None:
        management.load_models_gpu([self.patcher], force_full_load=True)

    def picture(self, latent: Tensor) -> tuple[str, Image.Image, int] | None:
        """latent (1, 16, p, q) -> format, picture and longest side in pixels, as ComfyUI sends them to its page.

        It is computed where the previewer lies, which may have been moved since to make room. None where the latent is
        not finite: what went wrong is the sampler's to say.
        """
        if not is_finite(latent):
            return None
        device = next(self.network.parameters()).device
        [picture] = preview(self.network, latent.to(device), torch.float32)
        pixels = (picture * 255).round().byte().cpu().numpy()
        return "JPEG", Image.fromarray(pixels), args.preview_size


def linear_previewer() -> Previewer:
    """Each position as one colour, as fits the mini."""
    return Previewer(LINEAR_PREVIEW)


def with_previews(callback, previewer: Previewer, steps: int):
    """A sampler's callback that also shows the first picture of the batch as it is after each step."""
    previewer.load()
    bar = comfy.utils.ProgressBar(steps)

    def report(step, clean, x, total):
        callback(step, clean, x, total)
        bar.update_absolute(step + 1, total, previewer.picture(clean[:1].float()))

    return report
