"""Pictures of the small latent while it is being sampled, by a previewer."""

from collections.abc import Callable
from pathlib import Path

import comfy.model_management as management
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import args
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

from ...wuerstchen_core.checkpoints.load import load_previewer
from ...wuerstchen_core.pipeline import preview
from ...wuerstchen_core.util.finite import is_finite

FLAT = 16  # pixels a side of a picture of a single colour


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


def show_latents(latent_format: LatentFormat, encode: Callable[[Tensor], Tensor]) -> None:
    """Lets samplers show latents of Stage B, one colour a position: the affine map that fits best what Stage A's
    `encode` (IMAGE -> raw latents) makes of pictures of a single colour."""
    colours = torch.cartesian_prod(*3 * [torch.linspace(0, 1, 4)])
    latents = encode(colours[:, None, None].expand(-1, FLAT, FLAT, -1))
    latents = latent_format.process_in(latents).float().cpu().mean(dim=(2, 3))
    if not is_finite(latents):
        return  # nor will its pictures be, and decoding says so
    known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    *factors, bias = torch.linalg.lstsq(known, 2 * colours - 1).solution.tolist()
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = factors, bias


class Colours:
    """Shows each position of a latent as one colour, as ComfyUI's latent2rgb does."""

    def __init__(self, latent_format: LatentFormat):
        factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
        self.shown = latent_preview.Latent2RGBPreviewer(factors, bias)

    def load(self) -> None:
        """There is nothing to load."""

    def picture(self, latent: Tensor) -> tuple[str, Image.Image, int] | None:
        return self.shown.decode_latent_to_preview_image("JPEG", latent) if is_finite(latent) else None


def previewer_of(latent_format: LatentFormat) -> Previewer | Colours | None:
    """What can show latents where ComfyUI's own previews are off; None where their colours are not known."""
    previewer = getattr(latent_format, "previewer", None)
    if previewer is None and latent_format.latent_rgb_factors is not None:
        return Colours(latent_format)
    return previewer


def with_previews(callback, previewer: Previewer | Colours, steps: int):
    """A sampler's callback that also shows the first picture of the batch as it is after each step."""
    previewer.load()
    bar = comfy.utils.ProgressBar(steps)

    def report(step, clean, x, total):
        callback(step, clean, x, total)
        bar.update_absolute(step + 1, total, previewer.picture(clean[:1].float()))

    return report
