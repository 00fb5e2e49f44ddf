"""Photos in, pictures out: what sample.py and the others read and draw. Nothing here is the method."""

import contextlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor
from torchvision.utils import make_grid

from lib.cli import InputError
from lib.files import write_atomically

MAX_PIXELS = 64_000_000  # a larger image is refused before it is decoded
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # by content: PIL would run Ghostscript on an EPS


def open_image(path: str | Path) -> Image.Image:
    """A decoded PIL image, turned upright by its EXIF tag. InputError if absent, too large, or not wholly readable."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.load()
                if image.mode == "F" or image.mode == "I" and image.getextrema()[1] > 65535:
                    raise ValueError("of floats or 32-bit numbers, whose range is anybody's guess")
                return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL raises nearly anything on malformed files
        raise InputError(f"{path}: unreadable image ({' '.join(str(error).split())})") from None
    raise InputError(
        f"{path}: image too large ({image.width}x{image.height}, at most {MAX_PIXELS} pixels)"
    )


def composite(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """PIL image of any mode -> (rgb (H,W,3) composited onto white, alpha (H,W)), float32 in [0,1].

    Deviation: Zero-1-to-3 only whitens pixels of alpha exactly 0, which leaves halos on antialiased edges.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion to 8 bits would clip
        grey = (np.asarray(image, np.float32) / 65535).clip(0, 1)
        alpha = (np.asarray(image) != image.info.get("transparency", -1)).astype(np.float32)
        rgb = np.repeat(grey[..., None], 3, axis=2)
    else:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
        rgb, alpha = rgba[..., :3], rgba[..., 3]
    return rgb * alpha[..., None] + (1 - alpha[..., None]), alpha


def resize(rgb: np.ndarray, height: int, width: int) -> torch.Tensor:
    """(H,W,C) in [0,1] -> (C,height,width) in [0,1], bilinear, antialiased (PIL's).

    In float, a channel at a time: PIL resizes several channels in 8 bits only, which would round twice.
    """
    planes = [
        Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in np.moveaxis(rgb, 2, 0)
    ]
    planes = [
        np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes
    ]
    return torch.from_numpy(np.stack(planes)).clamp(0, 1)


def load_image(path: str | Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """File -> (image (3,size,size) float32 in [-1,1] on white, alpha (size,size) float32 in [0,1]).

    What is not square is stretched. InputError as in open_image.
    """
    rgb, alpha = composite(open_image(path))
    planes = resize(np.concatenate([rgb, alpha[..., None]], axis=2), size, size)
    return planes[:3] * 2 - 1, planes[3]


def list_photos(path: str) -> list[Path]:
    """The image, or a folder's images by name. Raises InputError naming --image."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"--image {path}: no such file or folder")
    photos = [source]
    if source.is_dir():
        photos = sorted(
            p for p in source.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file()
        )
    if not photos:
        raise InputError(f"--image {path}: no {', '.join(IMAGE_EXTENSIONS)} in it")
    if len({photo.stem for photo in photos}) < len(photos):
        raise InputError(
            f"--image {path}: two of its images share a name, and would share a folder of --out"
        )
    return photos


def load_photo(path: Path, size: int, crop: bool = True) -> Tensor:
    """A photo of any shape and mode as the model is to see it (3,size,size): its object on white.

    crop: Zero-1-to-3's framing, the object's bounding box centred with its long edge at 200/256 of the image
    (Deviation: what is smaller is enlarged, too). The object is where alpha says or, without alpha, what differs from a
    plain background or what rembg (an optional package) cuts out of another. Without crop the whole image is set on a
    white square. Raises InputError where no object can be told from the background.
    """
    photo = open_image(path)
    if photo.mode == "I;16B":  # which PIL shrinks wrongly
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16))
    photo.thumbnail(
        (2048, 2048), reducing_gap=None
    )  # a telephone's would take gigabytes; 16 bits have no reduce()
    rgb, alpha = composite(photo)
    if not crop:
        return fit(rgb, 0, size)
    if alpha.min() == 1:
        alpha = off_plain_background(rgb)
        if alpha is None:
            rgb, alpha = composite(
                remove_background(Image.fromarray((255 * rgb).round().astype(np.uint8)), path)
            )
        else:
            rgb = rgb * alpha[..., None] + 1 - alpha[..., None]
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise InputError(f"{path}: holds no object: it is all background")
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return fit(rgb[box], round(size * 28 / 256), size)


def off_plain_background(rgb: np.ndarray) -> np.ndarray | None:
    """What differs in colour from a plain, evenly lit background, the border's: rgb (H,W,3) in [0,1] -> alpha (H,W) of
    zeros and ones, without specks. None where the border shows no such background."""
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = np.median(border, axis=0)
    uneven = np.quantile(np.abs(border - background).max(axis=1), 0.95)  # noise, vignetting
    if uneven > 0.06:
        return None
    differs = np.abs(rgb - background).max(axis=2) > np.clip(2 * uneven, 0.04, 0.12)
    company = (
        Image.fromarray(differs).convert("L").filter(ImageFilter.RankFilter(5, 20))
    )  # 5 of 5 x 5 differ
    return (differs & (np.asarray(company) > 0)).astype(np.float32)


def remove_background(photo: Image.Image, path: Path) -> Image.Image:
    """The photo (RGB) with its object cut out (RGBA), by rembg's default network, which it downloads at first."""
    try:
        import rembg  # optional: pip install "rembg[cpu]"

        return rembg.remove(photo)
    except ImportError:
        why = "no alpha and no plain background, and no rembg to remove it"
        raise InputError(
            f'{path}: {why}; `pip install "rembg[cpu]"`, cut the object out, or --no-crop'
        ) from None
    except Exception as error:  # its network's download fails in many ways
        raise InputError(
            f"{path}: rembg could not remove the background ({' '.join(str(error).split())})"
        ) from None


def fit(rgb: np.ndarray, margin: int, size: int) -> Tensor:
    """rgb (H,W,3) in [0,1] -> (3,size,size) in [-1,1]: resized to leave the margin in pixels, centred on white."""
    inner = size - 2 * margin
    height, width = (max(1, round(n * inner / max(rgb.shape[:2]))) for n in rgb.shape[:2])
    canvas = torch.ones(3, size, size)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[:, top : top + height, left : left + width] = resize(rgb, height, width) * 2 - 1
    return canvas


def to_pil(image: Tensor) -> Image.Image:
    """(3,H,W) in [-1,1] -> an RGB picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def labelled_grid(rows: list[list[Tensor]], labels: list[str], scale: int = 1) -> Image.Image:
    """Rows of images (3,H,W) in [-1,1] under one label a column; `scale` enlarges small images by whole pixels."""
    images = torch.stack([image.float().cpu() for row in rows for image in row])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    canvas = to_pil(
        F.pad(make_grid(images, len(labels), padding=4, pad_value=0.84), (0, 0, 14, 0), value=0.84)
    )
    draw, width, font = ImageDraw.Draw(canvas), images.shape[3], ImageFont.load_default(11)
    for j, label in enumerate(labels):
        draw.text(
            (4 + j * (width + 4) + width // 2, 3), label, fill=(0, 0, 0), anchor="ma", font=font
        )
    return canvas


def save_picture(path: Path, picture: Image.Image, **options) -> None:
    """In the format of the path's suffix, or PNG. Raises InputError naming the path when it can't be written."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    write_atomically(path, lambda temporary: picture.save(temporary, format=form, **options))


def write_views(
    folder: Path, image: Tensor, views: Tensor, labels: list[str], trajectory=None
) -> None:
    """sample.py's output: input.png, %03d.png, grid.png, orbit.gif and, of a trajectory, x0.npz for `visualize.py
    trajectory`. image (3,H,W), views (N,3,H,W), trajectory {timestep: batches of its predicted x0}, noisiest first."""
    old = [*folder.glob("[0-9][0-9][0-9].png"), folder / "orbit.gif", folder / "x0.npz"]
    ours = (folder / "input.png").exists() and (
        folder / "grid.png"
    ).exists()  # an earlier run's, to be cleared away
    save_picture(folder / "input.png", to_pil(image))
    for path in old if ours else ():
        with contextlib.suppress(OSError):
            path.unlink()
    for i, view in enumerate(views):
        save_picture(folder / f"{i:03d}.png", to_pil(view))
    save_picture(folder / "grid.png", labelled_grid([[image, *views]], ["input", *labels]))
    if len(views) > 1:
        first, *rest = (to_pil(view) for view in views)
        save_picture(
            folder / "orbit.gif", first, save_all=True, append_images=rest, duration=150, loop=0
        )
    if trajectory:  # x0 (N,views,H,W,3) uint8 and its timesteps t (N,)
        x0 = [
            [np.asarray(to_pil(view)) for batch in batches for view in batch]
            for batches in trajectory.values()
        ]
        write_atomically(folder / "x0.npz", lambda path: save_npz(path, x0=x0, t=list(trajectory)))


def save_npz(path: Path, **arrays) -> None:
    with open(path, "wb") as file:  # np.savez given a path would add a suffix to it
        np.savez_compressed(file, **arrays)
