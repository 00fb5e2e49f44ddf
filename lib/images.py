"""Pictures in and out: reading renders and photos, drawing grids, writing views.

Nothing here is the method. In the order of reading:
    reading       open_image, composite, resize; load_image for renders
    photos        list_photos, load_photo: find the object and frame it
    writing       to_pil, enlarged, labelled_grid, save_picture, write_views
"""

import contextlib
import importlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from lib.cli import InputError, one_line
from lib.files import write_atomically

# ----------------------------------------------------------------------------------------- reading

MAX_PIXELS = 64_000_000  # a larger image is refused before it is decoded
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
# By content, not by name. Not all that PIL knows: for an EPS it would run Ghostscript.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")


def open_image(path: str | Path) -> Image.Image:
    """A decoded PIL image, turned upright by its EXIF tag.

    Raises InputError naming the file if it is absent, too large or not wholly readable.
    """
    formats = readable_formats(path)
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.load()
                check_range(image)
                return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL raises nearly anything on malformed files
        raise InputError(f"{path}: unreadable image ({one_line(error)})") from None
    raise InputError(
        f"{path}: image too large ({width}x{height}, at most {MAX_PIXELS} pixels); shrink it first"
    )


def brand(path: str | Path) -> bytes:
    """What HEIC and AVIF, a telephone's formats, begin with: b"heic", b"avif", ...; else b""."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return b""  # opening the file as an image will say why
    is_heif = head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS
    return head[8:] if is_heif else b""


def readable_formats(path: str | Path) -> tuple[str, ...]:
    """The formats to try on a file. Raises InputError where it is HEIC or AVIF and neither is read.

    PIL itself reads AVIF since version 11.3; HEIC takes pillow-heif, an optional package.
    """
    if not brand(path):
        return IMAGE_FORMATS
    pillow_heif = import_optional("pillow_heif")
    if pillow_heif is not None:
        pillow_heif.register_heif_opener()
    Image.init()
    needed = "AVIF" if brand(path).startswith(b"avi") else "HEIF"
    if needed not in Image.OPEN:
        raise InputError(
            f"{path}: a {needed} image; `pip install pillow-heif`, or convert it to PNG or JPEG"
        )
    return (needed,)


def import_optional(name: str):
    """The module of an optional package, or None where it is missing or does not load.

    Some exit on import where another package is missing, as rembg does without onnxruntime.
    """
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit):
        return None


def check_range(image: Image.Image) -> None:
    """Raises ValueError where nothing says which number is white."""
    is_32_bit = image.mode == "I" and image.getextrema()[1] > 65535
    if image.mode == "F" or is_32_bit:
        raise ValueError("of floats or 32-bit numbers, whose range is not known")


def composite(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """PIL image of any mode -> (rgb (H,W,3) composited onto white, alpha (H,W)), float32 in [0,1].

    Deviation: Zero-1-to-3 only whitens pixels whose alpha is exactly 0. That leaves halos on
    antialiased edges.
    """
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion to 8 bits would clip it
        numbers = np.asarray(image)
        alpha = np.ones(numbers.shape, np.float32)
        if "transparency" in image.info:
            alpha[numbers == image.info["transparency"]] = 0
        grey = (numbers.astype(np.float32) / 65535).clip(0, 1)
        rgb = np.repeat(grey[..., None], 3, axis=2)
    else:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
        rgb = rgba[..., :3]
        alpha = rgba[..., 3]
    return rgb * alpha[..., None] + (1 - alpha[..., None]), alpha


def resize(rgb: np.ndarray, height: int, width: int) -> Tensor:
    """(H,W,C) in [0,1] -> (C,height,width) in [0,1], bilinear and antialiased as PIL does it.

    In float: PIL resizes several channels in 8 bits only, which would round twice.
    """
    planes = torch.from_numpy(np.ascontiguousarray(rgb, np.float32)).permute(2, 0, 1)
    resized = F.interpolate(planes[None], size=(height, width), mode="bilinear", antialias=True)
    return resized[0].clamp(0, 1)


def load_image(path: str | Path, size: int) -> tuple[Tensor, Tensor]:
    """A render's file -> (image (3,size,size) in [-1,1] on white, alpha (size,size) in [0,1]).

    Both are float32. What is not square is stretched. Raises InputError as open_image does.
    """
    rgb, alpha = composite(open_image(path))
    planes = resize(np.concatenate([rgb, alpha[..., None]], axis=2), size, size)
    return planes[:3] * 2 - 1, planes[3]


# ------------------------------------------------------------------------------------------ photos

OTHER_EXTENSIONS = (".heic", ".heif", ".avif", ".bmp", ".gif", ".tif", ".tiff")
PHOTO_EXTENSIONS = (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS)
LARGEST_SIDE = 2048  # a telephone's photo would take gigabytes as floats
MARGIN = 28 / 256  # Zero-1-to-3's: the object's long edge takes 200 of 256 pixels


def list_photos(path: str) -> list[Path]:
    """The photo, or a folder's photos by name. Raises InputError naming --image."""
    source = Path(path)
    if not source.exists():
        raise InputError(f"--image {path}: no such file or folder")
    if not source.is_dir():
        return [source]
    photos = [
        file
        for file in sorted(source.iterdir())
        if file.suffix.lower() in PHOTO_EXTENSIONS and file.is_file()
    ]
    if not photos:
        raise InputError(f"--image {path}: no {', '.join(PHOTO_EXTENSIONS)} in it")
    stems = {}
    for photo in photos:
        other = stems.setdefault(photo.stem, photo)
        if other is not photo:
            raise InputError(
                f"--image {path}: {other.name} and {photo.name} would share a folder of --out"
            )
    return photos


def load_photo(path: Path, size: int, crop: bool = True) -> Tensor:
    """A photo of any shape and mode as the model is to see it: (3,size,size) in [-1,1], on white.

    crop: frame the object as Zero-1-to-3 does, its bounding box centred and the long edge at
    200/256 of the image. Without crop the whole photo is set on a white square.
    Deviation: Zero-1-to-3 does not enlarge an object that is smaller than that.
    Raises InputError where no object can be told from the background.
    """
    photo = open_image(path)
    if photo.mode == "I;16B":  # PIL shrinks this mode wrongly
        photo = Image.fromarray(np.asarray(photo).astype(np.uint16))
    # Without reducing_gap, because 16-bit images cannot do what it asks for.
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE), reducing_gap=None)
    rgb, alpha = composite(photo)
    if not crop:
        return fit(rgb, 0, size)
    if (alpha > 0.5).all():  # some programs write a few pixels of alpha 254
        rgb, alpha = cut_out(rgb, path)
    is_object = alpha > 0.5
    rows = np.flatnonzero(is_object.any(axis=1))
    columns = np.flatnonzero(is_object.any(axis=0))
    if len(rows) == 0:
        raise InputError(f"{path}: holds no object: it is all background")
    box = rgb[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return fit(box, round(size * MARGIN), size)


def cut_out(rgb: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """An opaque photo (H,W,3) in [0,1] -> (its object on white (H,W,3), alpha (H,W)).

    The object is what differs from a plain background or, before any other background, what rembg
    cuts out. Raises InputError where it can't.
    """
    alpha = off_plain_background(rgb)
    if alpha is not None:
        return rgb * alpha[..., None] + (1 - alpha[..., None]), alpha
    photo = Image.fromarray((255 * rgb).round().astype(np.uint8))
    return composite(remove_background(photo, path))


def off_plain_background(rgb: np.ndarray) -> np.ndarray | None:
    """What differs in colour from a plain, evenly lit background: rgb (H,W,3) -> alpha (H,W).

    Alpha is 0 or 1 and has no specks. The background is what the border shows; the result is None
    where the border shows no plain one.
    """
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    background = np.median(border, axis=0)
    unevenness = np.quantile(np.abs(border - background).max(axis=1), 0.95)  # noise, vignetting
    if unevenness > 0.06:
        return None
    threshold = np.clip(2 * unevenness, 0.04, 0.12)
    differs = np.abs(rgb - background).max(axis=2) > threshold
    # A speck has few neighbours: keep pixels where at least 5 of 5 x 5 differ.
    at_least_5 = ImageFilter.RankFilter(5, 20)
    in_company = np.asarray(Image.fromarray(differs).convert("L").filter(at_least_5)) > 0
    return (differs & in_company).astype(np.float32)


def remove_background(photo: Image.Image, path: Path) -> Image.Image:
    """An RGB photo with its object cut out (RGBA), by rembg's default network.

    rembg is an optional package and downloads the network when it is first used.
    """
    rembg = import_optional("rembg")
    if rembg is None:
        raise InputError(
            f"{path}: no alpha and no plain background, and no working rembg to remove it; "
            '`pip install "rembg[cpu]"`, cut the object out, or --no-crop'
        )
    try:
        return rembg.remove(photo)
    except (Exception, SystemExit) as error:  # its network's download fails in many ways
        raise InputError(
            f"{path}: rembg could not remove the background ({one_line(error)})"
        ) from None


def fit(rgb: np.ndarray, margin: int, size: int) -> Tensor:
    """rgb (H,W,3) in [0,1] -> (3,size,size) in [-1,1]: resized to leave the margin, on white."""
    inner = size - 2 * margin
    longest = max(rgb.shape[:2])
    # At least 2 pixels: F.interpolate on a CPU errs by up to .15 in a result one pixel wide.
    height = max(2, round(rgb.shape[0] * inner / longest))
    width = max(2, round(rgb.shape[1] * inner / longest))
    top = (size - height) // 2
    left = (size - width) // 2
    canvas = torch.ones(3, size, size)
    canvas[:, top : top + height, left : left + width] = resize(rgb, height, width) * 2 - 1
    return canvas


# ----------------------------------------------------------------------------------------- writing


def to_pil(image: Tensor) -> Image.Image:
    """(3,H,W) in [-1,1] -> an RGB picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def enlarged(image: Tensor, width: int = 128) -> Image.Image:
    """(3,H,W) in [-1,1] -> a picture to look at: a small one magnified, by whole pixels."""
    scale = max(1, width // image.shape[-1])
    return ImageOps.scale(to_pil(image), scale, Image.Resampling.NEAREST)


def labelled_grid(rows: list[list[Tensor]], labels: list[str]) -> Image.Image:
    """Rows of images (3,H,W) in [-1,1], small ones enlarged, with a label above each column."""
    gap = 4
    label_height = 14
    grey = 0.84
    images = torch.stack([image.float().cpu() for row in rows for image in row])
    scale = max(1, 128 // images.shape[3])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    from torchvision.utils import make_grid  # here: it takes a second, also of --help

    grid = make_grid(images, len(labels), padding=gap, pad_value=grey)
    canvas = to_pil(F.pad(grid, (0, 0, label_height, 0), value=grey))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(11)
    width = images.shape[3]
    for column, label in enumerate(labels):
        middle = gap + column * (width + gap) + width // 2
        draw.text((middle, 3), label, fill=(0, 0, 0), anchor="ma", font=font)
    return canvas


def save_picture(path: Path, picture: Image.Image, **options) -> None:
    """In the format of the path's suffix, or PNG. Raises InputError naming the path."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    write_atomically(path, lambda temporary: picture.save(temporary, format=form, **options))


def write_views(
    folder: Path,
    image: Tensor,
    views: Tensor,
    labels: list[str],
    trajectory: dict[int, list[Tensor]] | None = None,
) -> None:
    """sample.py's output: input.png, 000.png ..., grid.png, orbit.gif and, of a trajectory, x0.npz.

    image (3,H,W), views (N,3,H,W). trajectory: {timestep: batches of its predicted x0}, noisiest
    first; x0.npz is what `visualize.py trajectory` reads. Clears away the views of an earlier run.
    """
    old_views = views_of_an_earlier_run(folder)
    save_picture(folder / "input.png", to_pil(image))
    if old_views:
        print(f"{folder}/: an earlier run's views give way")
    for path in old_views:
        with contextlib.suppress(OSError):
            path.unlink()
    for i, view in enumerate(views):
        save_picture(folder / f"{i:03d}.png", to_pil(view))
    save_picture(folder / "grid.png", labelled_grid([[image, *views]], ["input", *labels]))
    if len(views) > 1:
        first, *others = [enlarged(view) for view in views]
        animation = {"save_all": True, "append_images": others, "duration": 150, "loop": 0}
        save_picture(folder / "orbit.gif", first, **animation)
    if trajectory:
        write_trajectory(folder / "x0.npz", trajectory)


def views_of_an_earlier_run(folder: Path) -> list[Path]:
    """Files to clear away. There are none where the folder is not one that sample.py wrote."""
    if not (folder / "input.png").exists() or not (folder / "grid.png").exists():
        return []
    others = [folder / name for name in ("orbit.gif", "x0.npz", "transforms.json")]
    return [*folder.glob("[0-9][0-9][0-9].png"), *others]


def write_trajectory(path: Path, trajectory: dict[int, list[Tensor]]) -> None:
    """x0 (T,N,H,W,3) uint8 and its timesteps t (T,), from {timestep: batches (B,3,H,W)}."""
    x0 = []
    for batches in trajectory.values():
        views = torch.cat(batches)
        x0.append(np.stack([np.asarray(to_pil(view)) for view in views]))

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # np.savez given a path would add a suffix to it
            np.savez_compressed(file, x0=np.stack(x0), t=np.array(list(trajectory)))

    write_atomically(path, write)
