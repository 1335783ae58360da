"""The adversary of Stage A: which patches of a picture are drawn (VQGAN, arXiv 2012.09841)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004): a logit for every patch, high for those of real pictures.

    The norms are over groups of channels of one picture: they depend neither on the rest of the batch nor on whether
    the batch is real.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        net: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        narrow = width
        for i in range(1, layers + 1):
            wide = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            net += [nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
            narrow = wide
        self.net = nn.Sequential(*net, nn.Conv2d(narrow, 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (B, 3, H, W) in [0, 1] -> logits (B, 1, h, w)"""
        return self.net(pictures * 2 - 1)


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """The hinge loss of the logits of real and of drawn patches (arXiv 1705.02894)."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + drawn.float()).mean()) / 2


def adversarial_loss(drawn: Tensor) -> Tensor:
    """What the network that has drawn the patches is to lower, of their logits."""
    return -drawn.float().mean()
