"""LPIPS (arXiv 1801.03924): how far apart two pictures are in the features of VGG16."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.archive import open_archive
from ...models.semantic_compressor import IMAGENET_MEAN, IMAGENET_STD
from ...util.errors import WuerstchenError

# Channels of the convolutions of VGG16 (arXiv 1409.1556, table 1, D); between the blocks the sides are halved.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class PerceptualDistance(nn.Module):
    """The distance between two pictures, and the gradient towards the first.

    Of the last features of each of VGG16's five blocks, scaled to length 1 at every position, the squared differences
    are added up over the channels, averaged over the positions and added up over the blocks. LPIPS weights the channels
    by what people have judged; without its weights they all count 1 (the paper's "baseline").
    """

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        self.taps: list[int] = []  # layers after which the features are compared
        for block in BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(torch.ones(block[-1]) for block in BLOCKS)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, drawn: Tensor, pictures: Tensor) -> Tensor:
        """drawn, pictures (B, 3, H, W) in [0, 1], sides at least 16 -> (B,) distances in float32"""
        with torch.no_grad():
            expected = self._unit_features(pictures)
        total = drawn.new_zeros(len(drawn), dtype=torch.float32)
        for weight, one, other in zip(self.weights, self._unit_features(drawn), expected, strict=True):
            total = total + torch.einsum("c, b c h w -> b h w", weight, (one - other).square()).mean(dim=(1, 2))
        return total

    def _unit_features(self, pictures: Tensor) -> list[Tensor]:
        x = (pictures.float() - self.mean) / self.std
        kept = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                kept.append(F.normalize(x.float(), dim=1, eps=1e-8))
        return kept


def load_perceptual(vgg: str | Path, lpips: str | Path | None = None) -> PerceptualDistance:
    """The distance by torchvision's weights of VGG16, and LPIPS's of the channels if they are given.

    Args:
        vgg: the state dictionary of `torchvision.models.vgg16`, as safetensors or PyTorch file.
        lpips: LPIPS's own weights for VGG16 (`weights/v0.1/vgg.pth` of its package), names `lin0.model.1.weight`, …

    Raises:
        WuerstchenError: a file isn't there, is damaged, or lacks weights.
    """
    with torch.device("meta"):
        distance = PerceptualDistance()
    wanted = {f"features.{name}": f"features.{name}" for name in distance.features.state_dict()}
    state = _weights(vgg, wanted, distance, "torchvision's vgg16")
    if lpips is None:
        state |= {f"weights.{i}": torch.ones(block[-1]) for i, block in enumerate(BLOCKS)}
    else:
        wanted = {f"lin{i}.model.1.weight": f"weights.{i}" for i in range(len(BLOCKS))}
        state |= _weights(lpips, wanted, distance, "LPIPS's weights for VGG16")
    distance.load_state_dict(state, assign=True)
    distance.mean, distance.std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return distance.eval().requires_grad_(False)


def _weights(path: str | Path, wanted: dict[str, str], distance: nn.Module, what: str) -> dict[str, Tensor]:
    archive = open_archive(path)
    tensors = archive.tensors
    shapes = {name: value.shape for name, value in distance.state_dict().items()}
    found = {}
    for theirs, ours in wanted.items():
        if theirs not in tensors or tensors[theirs].numel() != shapes[ours].numel():
            raise WuerstchenError(f"{path}: this is not {what}, {theirs} is missing or of another size")
        found[ours] = archive.read(theirs).float().reshape(shapes[ours])
    return found
