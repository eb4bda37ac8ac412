"""One photograph to one small square: every mode, upright, centred, and never a crash on hostile bytes."""

import numpy as np
import pytest
from PIL import Image

from common.faces import FaceOptions
from common.faces.preprocessing import UnreadableImageError, decode, fit

GREY = FaceOptions(28, 1)
COLOUR = FaceOptions(28, 3)


def plain(mode, colour, size=(40, 50)):
    return Image.new(mode, size, colour)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain("1", 1), (255, 255, 255)),
        (plain("L", 90), (90, 90, 90)),
        (plain("LA", (90, 255)), (90, 90, 90)),
        (plain("LA", (90, 0)), (255, 255, 255)),
        (plain("RGB", (200, 100, 50)), (200, 100, 50)),
        (plain("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
        (plain("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
        (plain("RGB", (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        (plain("CMYK", (0, 0, 0, 255)), (0, 0, 0)),
        (plain("HSV", (0, 0, 128)), (128, 128, 128)),
        (Image.fromarray(np.full((50, 40), 32896, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((50, 40), 65535, np.int32)), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_the_right_bytes(image, expected):
    colour = fit(image, COLOUR)
    assert colour.shape == (3, 28, 28)
    assert colour.dtype == np.uint8
    assert np.abs(colour.astype(int) - np.reshape(expected, (3, 1, 1))).max() <= 1
    grey = fit(image, GREY)
    assert grey.shape == (1, 28, 28)
    assert np.abs(grey.astype(float) - np.dot(expected, [0.299, 0.587, 0.114])).max() <= 1.5


def test_floating_point_pixels_are_refused():
    with pytest.raises(UnreadableImageError):
        fit(plain("F", 0.5), GREY)


def test_the_crop_is_the_central_square():
    pixels = np.zeros((60, 100), np.uint8)
    pixels[:, 20:80] = 100  # the central square
    pixels[15:45, 35:65] = 200  # its central half
    image = Image.fromarray(pixels)
    whole, half = fit(image, FaceOptions(32, 1)), fit(image, FaceOptions(32, 1, 0.5))
    assert np.abs(whole[0, 0].astype(int) - 100).max() <= 8  # the filter reaches a little beyond the crop
    assert abs(int(whole[0, 16, 16]) - 200) <= 1
    assert np.abs(half.astype(int) - 200).max() <= 8


def test_shrinking_averages_over_all_pixels():
    checks = (np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(fit(Image.fromarray(checks), FaceOptions(32, 1)).astype(int) - 127).max() <= 6


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # light above
    for orientation, turned in (
        (1, upright),
        (3, upright[::-1, ::-1]),
        (6, np.rot90(upright)),
        (8, np.rot90(upright, -1)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif, quality=95)
        pixels = decode(path, GREY)[0][0]
        assert pixels[:10].min() > 240, orientation
        assert pixels[-10:].max() < 15, orientation


def test_a_large_jpeg_read_at_reduced_scale_looks_the_same(tmp_path):
    y, x = np.mgrid[0:1200, 0:1600]
    image = Image.fromarray((127 + 90 * np.sin(x / 200) * np.cos(y / 150)).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=95)
    difference = decode(tmp_path / "large.jpg", GREY)[0].astype(int) - fit(image, GREY).astype(int)
    assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp"])
def test_cut_off_files_are_unreadable_never_a_crash(tmp_path, suffix):
    path = tmp_path / f"face.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    assert [pixels.shape for pixels in decode(path, COLOUR)] == [(3, 28, 28)]
    content = path.read_bytes()
    for length in (0, 3, 20, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableImageError):
            decode(path, COLOUR)


def test_decompression_bombs_are_unreadable(tmp_path, monkeypatch):
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    for limit in (30_000, 1_000):  # Pillow warns above its limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImageError, match="pixels"):
            decode(tmp_path / "bomb.png", GREY)


def test_formats_that_start_other_programs_are_not_opened(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "face.eps")
    (tmp_path / "face.eps").rename(tmp_path / "face.jpg")
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(tmp_path / "face.jpg", COLOUR)
