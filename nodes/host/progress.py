"""The node's progress bar, its live previews, and Cancel."""

import comfy.model_management as management
import comfy.utils
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor

from ...wuerstchen_core.pipeline import Progress, preview
from ...wuerstchen_core.util.finite import is_finite
from .loading import Model


def progress(steps: int, previewer: Model | None = None) -> Progress:
    """Moves the node's bar after every step, and raises ComfyUI's interruption after Cancel.

    With a previewer it also shows the first picture of the batch at that step, unless the user has turned
    previews off (ComfyUI's --preview-method, or its page's setting).
    """
    bar = comfy.utils.ProgressBar(steps)
    shows = previewer is not None and args.preview_method != LatentPreviewMethod.NoPreviews
    if shows:
        previewer.load()

    def report(step: int, steps: int, clean: Tensor) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(step, steps, _preview(previewer, clean[:1]) if shows else None)

    return report


def _preview(previewer: Model, latent: Tensor) -> tuple[str, Image.Image, int] | None:
    """latent (1, 16, p, q) -> format, picture and longest side in pixels, as ComfyUI sends them to its page.

    Computed on the previewer's current device, since ComfyUI may have moved it to make room. None if the latent is not
    finite: the sampler reports that.
    """
    if not is_finite(latent):
        return None
    device = next(previewer.network.parameters()).device
    [picture] = preview(previewer.network, latent.to(device), previewer.dtype)
    pixels = (picture * 255).round().byte().cpu().numpy()
    return "JPEG", Image.fromarray(pixels), args.preview_size
