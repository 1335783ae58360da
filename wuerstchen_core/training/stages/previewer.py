"""The training of a previewer (paper, appendix D): from a picture's semantic latent to the picture, small."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...checkpoints.load import load_previewer, load_semantic_compressor
from ...checkpoints.sets import SET
from ...geometry import Geometry
from ...models.previewer import FACTOR, Previewer, PreviewerConfig
from ...models.semantic_compressor import SemanticCompressor
from ...pipeline import preview
from ...util.errors import WuerstchenError
from ..data.options import DataOptions
from ..loop.draws import Draws
from ..loop.task import Task
from ..options import check_at_least, option
from .conditioning import check_precision, check_size, computed_in, copied, semantic, weight_file


@dataclass(frozen=True)
class Options:
    semantic_compressor: str = option("mini", "the semantic compressor's file; mini: the embedded one")
    frozen_precision: str = option(
        "float32", "precision in which the frozen networks compute features: float32, bfloat16 or float16"
    )
    init: str = option("", "a previewer to start from; [network] is then taken from it")
    sample_count: int = option(4, "how many of the data's pictures the samples show, each beside its preview")
    network: PreviewerConfig = option(PreviewerConfig(), "the network's sizes, if init is empty")

    def __post_init__(self):
        check_at_least(0, self, "sample_count")
        check_precision(self.frozen_precision)


def build(options: Options, data: DataOptions) -> "PreviewerTask":
    """Raises WuerstchenError if a file is missing or the previewer does not fit the compressor's latents."""
    check_size(data.size)
    compressor_file = weight_file("semantic_compressor", options.semantic_compressor, SET["semantic_compressor"])
    compressor = load_semantic_compressor(compressor_file)
    if options.init:
        network = copied(load_previewer(weight_file("init", options.init, SET["previewer"])))
    else:
        network = Previewer(options.network)
        *_, last = (layer for layer in network.layers if isinstance(layer, nn.Conv2d))
        nn.init.constant_(last.bias, 0.5)  # grey
    channels = compressor.config.latent_channels, network.config.latent_channels
    if len(set(channels)) > 1:
        raise WuerstchenError(
            f"semantic_compressor: its latents have {channels[0]} channels, and the previewer is for {channels[1]}"
        )
    task = PreviewerTask(network, compressor, options, data)
    task.feature_files = (compressor_file,)
    return task


class PreviewerTask(Task):
    """`network` learns to draw small pictures from the frozen compressor's latents of large ones."""

    def __init__(self, network: Previewer, compressor: SemanticCompressor, options: Options, data: DataOptions):
        super().__init__()
        self.network = network
        self.options, self.data = options, data
        self.frozen = (compressor,)
        self.feature_key = options.frozen_precision
        self.pictures: tuple[Tensor, ...] = ()

    def features(self, batch: dict) -> dict[str, Tensor]:
        image = batch["image"]
        with computed_in(self.options.frozen_precision, image.device):
            return {"semantic": semantic(self.frozen[0], image), "small": small(image)}

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        found = batch["features"]
        return {"picture": F.mse_loss(self.network(found["semantic"]), found["small"])}

    def exported(self) -> dict[str, nn.Module]:
        return {"previewer": self.network}

    def samples(self) -> Tensor | None:
        if not self.options.sample_count:
            return None
        if not self.pictures:
            self.pictures = (self.data.first_pictures(self.options.sample_count),)
        image = self.pictures[0].to(next(self.network.parameters()).device)
        drawn = preview(self.network, semantic(self.frozen[0], image))
        return torch.stack([rearrange(small(image), "b c h w -> b h w c"), drawn], dim=1).flatten(0, 1)


def small(image: Tensor) -> Tensor:
    """image (B, 3, H, W), sides multiples of 64 -> the picture that a previewer should draw of it (B, 3, 8p, 8q)"""
    geometry = Geometry(width=image.shape[3], height=image.shape[2])
    size = [FACTOR * side for side in geometry.stage_c]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def fit_linear_preview(latents: Tensor, pictures: Tensor) -> Previewer:
    """The linear previewer with the least squared error, solved for in float64.

    Args:
        latents: (N, C, p, q) in Stage C's space.
        pictures: (N, 3, 8p, 8q), their pictures after `small`.
    """
    colours = F.avg_pool2d(pictures.double().cpu(), FACTOR)
    seen = rearrange(latents.double().cpu(), "n c h w -> (n h w) c")
    seen = F.pad(seen, (0, 1), value=1.0)  # the constant
    solution = torch.linalg.lstsq(seen, rearrange(colours, "n c h w -> (n h w) c"), driver="gelsd").solution
    previewer = Previewer(PreviewerConfig(latents.shape[1], widths=())).requires_grad_(False)
    convolution = previewer.layers[0]
    convolution.weight.copy_(solution[:-1].T[:, :, None, None])
    convolution.bias.copy_(solution[-1])
    return previewer.eval()
