"""A small previewer's sizes, and what is drawn for and by it."""

import torch

from wuerstchen_core.models.previewer import PreviewerConfig

SMALL = PreviewerConfig(widths=(16, 8, 8, 4))


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def pictures(height, width, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


def mapped(image):
    return image.permute(0, 2, 3, 1)
