"""Pictures from files."""

import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.pictures import encoded
from wuerstchen_core.util import pictures


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_their_size_is_known_without_decoding(format, orientation, monkeypatch):
    rows, columns = np.mgrid[0:40, 0:64]
    upright = np.stack([rows * 6, columns * 4, 0 * rows], axis=-1).astype(np.uint8)
    transposed = {  # EXIF 2.3, "Orientation": how the stored rows and columns lie in the picture
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: upright.swapaxes(0, 1)[::-1], 7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(np.ascontiguousarray(transposed[orientation]), format, exif=exif, quality=95)
    decoded = pictures.decode(io.BytesIO(content))
    assert decoded.shape == (40, 64, 3)
    assert (decoded * 255 - torch.from_numpy(upright)).abs().mean() < 3
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        assert pictures.size_of(io.BytesIO(content)) == (40, 64)


def test_transparency_is_laid_on_white_and_grey_of_16_bits_keeps_its_tones():
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 51], [1, 2, 3, 0]]], dtype=np.uint8)
    decoded = pictures.decode(io.BytesIO(encoded(pixels)))[0] * 255
    expected = [[200, 100, 0], [255 - 55 / 5, 255 - 155 / 5, 255 - 255 / 5], [255, 255, 255]]
    torch.testing.assert_close(decoded, torch.tensor(expected), rtol=0, atol=1)
    grey = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = pictures.decode(io.BytesIO(encoded(grey)))[0] * 255
    torch.testing.assert_close(decoded, torch.tensor([0.0, 0x12, 0x80, 0xFF])[:, None].expand(4, 3))
