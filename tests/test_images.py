"""lib/images.py: how the object in a photo is found and framed.

test_data.py has how renders are read, test_sample.py rembg and other formats.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from lib import images
from lib.cli import InputError

OBJECT = (slice(10, 20), slice(50, 70))  # rows and columns of a photo of 64 x 96 pixels
# Zero-1-to-3 makes the long edge 200 of 256 pixels: first and last row, first and last column.
FRAMED = (78, 178, 28, 228)


def box(mask: np.ndarray) -> tuple:
    """First row, row after the last, first column, column after the last."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def save(tmp_path, pixels: np.ndarray, name: str = "photo.png"):
    Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path / name


def test_an_object_before_transparency_is_framed(tmp_path):
    photo = np.zeros((64, 96, 4), np.uint8)
    photo[OBJECT] = (255, 0, 0, 255)
    image = images.load_photo(save(tmp_path, photo), 256)
    assert box(image[1].numpy() < 0) == FRAMED
    assert image[:, 0, 0].tolist() == [1, 1, 1]


def test_an_object_before_a_plain_background_is_framed(tmp_path):
    photo = np.full((64, 96, 3), (90, 120, 90), np.uint8)
    photo[OBJECT] = (255, 0, 0)
    image = images.load_photo(save(tmp_path, photo), 256)
    assert box(image[1].numpy() < 0) == FRAMED
    assert image[:, 0, 0].tolist() == [1, 1, 1]


def test_a_faint_object_before_a_noisy_background_is_framed(tmp_path):
    noise = np.random.default_rng(0).integers(-2, 3, (64, 96, 1))
    photo = (np.full((64, 96, 3), 160) + noise).astype(np.uint8)
    photo[OBJECT] = 176
    photo[60, 90] = 255  # a speck
    image = images.load_photo(save(tmp_path, photo), 256)
    found = box(image[1].numpy() < 0.8)
    assert np.abs(np.subtract(found, FRAMED)).max() < 3


def test_a_frame_one_pixel_wide_is_framed(tmp_path):
    photo = np.full((64, 96, 3), 255, np.uint8)
    photo[10:20, (50, 69)] = 0
    photo[(10, 19), 50:70] = 0
    image = images.load_photo(save(tmp_path, photo), 256)
    darkest = image[:, 80:176, 28:228].amin((0, 1))  # of each column
    assert (darkest < 0.5).all()


def test_an_unevenly_lit_background_is_refused(tmp_path):
    """Its corners differ, so that no colour tells the object from them."""
    photo = np.full((64, 96, 3), 240, np.uint8)
    photo[:, :12] = 180
    photo[OBJECT] = 30
    path = save(tmp_path, photo, "corners.png")
    with pytest.raises(InputError, match="corners.png: no alpha and no plain background"):
        images.load_photo(path, 256)


def test_a_busy_photo_is_refused_unless_it_is_not_cropped(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    path = save(tmp_path, photo, "busy.png")
    with pytest.raises(InputError, match="busy.png"):
        images.load_photo(path, 32)
    assert images.load_photo(path, 32, crop=False).shape == (3, 32, 32)


def test_16_bits_in_either_byte_order_are_read_alike(tmp_path):
    ramp = np.linspace(0, 65535, 3000).astype(np.uint16)[None].repeat(40, 0)
    little = save(tmp_path, ramp, "little.png")
    Image.frombytes("I;16B", (3000, 40), ramp.astype(">u2").tobytes()).save(tmp_path / "big.tiff")
    big = tmp_path / "big.tiff"
    difference = images.load_photo(big, 64, crop=False) - images.load_photo(little, 64, crop=False)
    assert difference.abs().max() < 0.01


def test_a_wide_photo_of_16_bits_is_read(tmp_path):
    """PIL cannot shrink it in its usual way."""
    photo = np.full((90, 9000), 65535, np.uint16)
    photo[30:60, 3000:6000] = 20000
    assert images.load_photo(save(tmp_path, photo), 64).min() < 0


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70_000)])
def test_photos_of_unknown_range_are_refused(tmp_path, mode, value):
    Image.new(mode, (8, 8), value).save(tmp_path / "photo.tiff")
    with pytest.raises(InputError, match="photo.tiff: unreadable image .of floats or 32-bit"):
        images.load_photo(tmp_path / "photo.tiff", 32)


def test_a_few_pixels_that_are_not_opaque_are_no_cut_out_object(tmp_path):
    photo = np.full((64, 96, 4), (90, 120, 90, 255), np.uint8)
    photo[OBJECT] = (255, 0, 0, 255)
    photo[3, 3, 3] = 254
    assert box(images.load_photo(save(tmp_path, photo), 256)[1].numpy() < 0) == FRAMED


def test_a_grey_that_counts_as_transparent_is_background(tmp_path):
    photo = np.full((64, 96), 40_000, np.uint16)
    photo[OBJECT] = 20_000
    Image.fromarray(photo).save(tmp_path / "photo.png", transparency=40_000)
    image = images.load_photo(tmp_path / "photo.png", 256)
    assert box(image[0].numpy() < 0) == FRAMED
    assert image[:, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".tif", ".TIFF"])
def test_a_folders_photos_are_of_every_format_that_is_read(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / f"photo{suffix}")
    assert images.list_photos(str(tmp_path)) == [tmp_path / f"photo{suffix}"]
    (tmp_path / "photo.webp").touch()
    with pytest.raises(InputError, match=f"photo{suffix} and photo.webp would share"):
        images.list_photos(str(tmp_path))
    images.load_photo(tmp_path / f"photo{suffix}", 8, crop=False)


def test_views_stand_beside_no_cameras_of_an_earlier_run(tmp_path):
    image = torch.zeros(3, 8, 8)
    images.write_views(tmp_path, image, image.expand(3, -1, -1, -1), ["a", "b", "c"])
    (tmp_path / "transforms.json").write_text("{}")
    images.write_views(tmp_path, image, image[None], ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "grid.png", "input.png"]
