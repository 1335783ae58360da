"""Pictures from files."""

import io
import logging
import os
import random
import struct
import time

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from tests.pictures import encoded, picture
from wuerstchen_core import WuerstchenError
from wuerstchen_core.util import pictures
from wuerstchen_core.util.notices import tell_once


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


def exchanged_profile():
    """sRGB's profile with the primaries of red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    at = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    red, green = at[b"rXYZ"] + 4, at[b"gXYZ"] + 4
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


def meant(image, profile):
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return torch.from_numpy(np.array(converted)).float() / 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_colours_are_those_that_the_profile_means(tmp_path, mode, format):
    profile, image = exchanged_profile(), Image.new("RGB", (4, 4), (200, 30, 30))
    path = tmp_path / f"a.{format.lower()}"
    image.convert(mode).save(path, format, icc_profile=profile)
    expected = meant(image.convert(mode).convert("RGB"), profile)
    assert (expected[0, 0] * 255).tolist() != [200, 30, 30]
    torch.testing.assert_close(pictures.read_picture(path), expected, rtol=0, atol=1e-6)


def test_half_transparent_colours_are_converted_before_they_lie_on_white():
    profile, image = exchanged_profile(), Image.new("RGBA", (2, 2), (200, 30, 30, 128))
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=profile)
    expected = meant(image.convert("RGB"), profile) * 128 / 255 + (1 - 128 / 255)
    torch.testing.assert_close(pictures.decode(file), expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("mode, profile", [("RGB", b"no profile"), ("CMYK", None), ("L", None)])
def test_a_profile_that_cannot_be_used_is_left_out_and_told_once(caplog, mode, profile):
    """Broken, or of another colour space than the pixels."""
    image = Image.new(mode, (4, 4), {"RGB": (200, 30, 30), "CMYK": (55, 225, 225, 0), "L": 90}[mode])
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            file = io.BytesIO()
            image.save(file, "TIFF", icc_profile=profile or exchanged_profile())
            decoded = pictures.decode(file)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    assert torch.equal(decoded, expected) and len(caplog.records) == 1


def test_formats_that_start_programs_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(WuerstchenError, match="not a picture that can be read .in none of the formats AVIF"):
        pictures.read_picture(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without FIFOs")
def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", "/dev/zero", tmp_path):
        with pytest.raises(WuerstchenError, match="not a regular file"):
            pictures.read_picture(path)


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (30_000, 4_000)).save(path)
    start = time.process_time()
    with pytest.raises(WuerstchenError, match="decompression bomb"):
        pictures.read_picture(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "format", [name for name in pictures.FORMATS if Image.init() is not None or name in Image.SAVE]
)
def test_damaged_files_of_every_format_are_one_line(tmp_path, format):
    if format not in Image.SAVE:
        pytest.skip("this Pillow cannot write it")
    chance, path = random.Random(format), tmp_path / "a.bin"
    whole = encoded(picture(1, (32, 32)), format)
    assert pictures.decode(io.BytesIO(whole)).shape == (32, 32, 3)
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 3, 30])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        try:
            pictures.read_picture(path)
        except WuerstchenError as error:
            assert "\n" not in str(error) and len(str(error)) < 500


def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(1, (8, 8))))
    for error in (RuntimeError("a\nb"), TypeError(), AttributeError("x" * 900), MemoryError(), NotImplementedError()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
        with pytest.raises(WuerstchenError, match="a.png: not a picture that can be read") as told:
            pictures.read_picture(path)
        assert "\n" not in str(told.value) and len(str(told.value)) < 500
