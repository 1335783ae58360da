"""Pictures that are told apart, their files, and how much they differ."""

import io
import math

import numpy as np
from PIL import Image


def picture(number, shape=(64, 64)):
    """Noise of its own for every number, so that no two pictures are taken for each other."""
    return np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def psnr(image, other):
    """The peak signal-to-noise ratio of two tensors of pictures in [0, 1], in dB; infinite where they are equal."""
    error = (image.double() - other.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf
