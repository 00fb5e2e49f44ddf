"""Posed images: reading them, checking them, and making some up.

Zero-1-to-3's layout (its `objaverse-rendering` and `ldm/data/simple.py`), which all of this repository reads:
    ROOT/valid_paths.json   flat list of object folders (names may contain "/"); where absent, ROOT is scanned
    ROOT/<name>/%03d.png    RGBA view, composited onto white (.jpg, .jpeg, .webp too); views per object vary
    ROOT/<name>/%03d.npy    its 3x4 world-to-camera [A | b]: camera centre -A^T b, Blender/OpenGL axes (camera x right,
                            y up, looks along -z), world z up, field of view 49.134 degrees
The object's longest bounding-box edge is 1, centred; cameras look at it from anywhere on spheres of radius 1.5 to 2.2.

    python data.py shapes --out data/shapes --objects 512 --views 12 --size 64     # procedural objects, on the CPU
    python data.py shapes --out data/shapes256 --objects 4096 --size 256 --device cuda
    python data.py check --data data/shapes                                        # validate any tree
"""

import argparse
import colorsys
import functools
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

TAN_HALF_FOV = 16 / 35  # lens 35 mm, sensor 32 mm
FOV_DEGREES = 2 * math.degrees(math.atan(TAN_HALF_FOV))  # 49.134
MAX_PIXELS = 64_000_000  # a larger image is refused before it is decoded
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


class InputError(ValueError):
    """Something that the user gave is wrong: one line that names the file or the flag."""


def run_script(main):
    """Calls `main()`: an InputError (a DataLoader worker's too) becomes one line and exit code 1, Ctrl-C code 130."""
    try:
        main()
    except InputError as error:
        # A DataLoader re-raises its worker's error with the traceback as the message: the last line is the message.
        message = str(error).strip().splitlines()[-1] if str(error).strip() else "invalid input"
        sys.exit("error: " + re.sub(r"^[\w.]*InputError: ", "", message))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: {str(error).splitlines()[0]}; was it killed, for want of memory say? Rerun to go on")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default, where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, argparse.SUPPRESS) else super()._get_help_string(action)


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raises InputError naming the first of the flags that is not above zero."""
    for flag in flags:
        if getattr(args, flag) <= 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be above 0")


# ---- images ----------------------------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """A decoded PIL image, turned upright by its EXIF tag. InputError if absent, too large, or not wholly readable."""
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MAX_PIXELS:
                image.load()
                return ImageOps.exif_transpose(image)
    except Exception as error:  # PIL raises nearly anything on malformed files
        raise InputError(f"{path}: unreadable image ({' '.join(str(error).split())})") from None
    raise InputError(f"{path}: image too large ({image.width}x{image.height}, at most {MAX_PIXELS} pixels)")


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
    planes = [Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in np.moveaxis(rgb, 2, 0)]
    planes = [np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes]
    return torch.from_numpy(np.stack(planes)).clamp(0, 1)


def load_image(path: str | Path, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """File -> (image (3,size,size) float32 in [-1,1] on white, alpha (size,size) float32 in [0,1]).

    What is not square is stretched, as in Zero-1-to-3. InputError as in open_image.
    """
    rgb, alpha = composite(open_image(path))
    planes = resize(np.concatenate([rgb, alpha[..., None]], axis=2), size, size)
    return planes[:3] * 2 - 1, planes[3]


# ---- poses -----------------------------------------------------------------------------------------------------------


def read_pose(path: str | Path) -> np.ndarray:
    """npy -> world-to-camera (3,4) float64. InputError if unreadable, of another shape, not finite or not rigid."""
    try:
        pose = np.load(path, allow_pickle=False)
    except Exception as error:  # np.load raises nearly anything on malformed files
        raise InputError(f"{path}: unreadable pose ({' '.join(str(error).split())})") from None
    if getattr(pose, "shape", None) != (3, 4) or pose.dtype.kind not in "fiu":
        what = f"{pose.shape} of {pose.dtype}" if isinstance(pose, np.ndarray) else "several arrays"
        raise InputError(f"{path}: wrong-shaped pose ({what}, expected a real (3, 4))")
    pose = pose.astype(np.float64)
    if not np.isfinite(pose).all():
        raise InputError(f"{path}: NaN or infinity in pose")
    if np.abs(pose[:, :3] @ pose[:, :3].T - np.eye(3)).max() > 1e-3 or np.linalg.det(pose[:, :3]) < 0:
        raise InputError(f"{path}: pose is not a rigid motion (its left 3x3 is not a rotation)")
    return pose


def camera_centre(w2c: torch.Tensor) -> torch.Tensor:
    """World-to-camera (...,3,4) = [A | b] -> camera centres -A^T b (...,3)."""
    return torch.einsum("...ij,...i->...j", w2c[..., :3], -w2c[..., 3])


def relative_pose(cond: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two (...,3,4) -> (...,4) float32: [theta_t - theta_c, sin dphi, cos dphi, r_t - r_c] (Zero-1-to-3's get_T).

    theta is the polar angle from +z and phi the azimuth from +x, in radians; r the distance to the origin.
    """
    x, y, z = camera_centre(torch.stack(torch.broadcast_tensors(cond, target)).double()).unbind(-1)  # each (2,...)
    theta, phi, r = torch.atan2(torch.hypot(x, y), z), torch.atan2(y, x), torch.sqrt(x * x + y * y + z * z)
    dphi = phi[1] - phi[0]
    return torch.stack([theta[1] - theta[0], dphi.sin(), dphi.cos(), r[1] - r[0]], dim=-1).float()


def look_at(theta, phi, radius) -> torch.Tensor:
    """Spherical coordinates (numbers or broadcastable tensors, radians) -> (...,3,4) float64 world-to-camera.

    The camera looks at the origin with world z up. Right and up are the derivatives of its position by phi and -theta,
    which unlike cross products with z stay defined at the poles.
    """
    theta, phi, r = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (theta, phi, radius)))
    st, ct, sp, cp, zero = theta.sin(), theta.cos(), phi.sin(), phi.cos(), torch.zeros_like(r)
    right, up, back = (-sp, cp, zero, zero), (-ct * cp, -ct * sp, st, zero), (st * cp, st * sp, ct, -r)
    return torch.stack([torch.stack(row, dim=-1) for row in (right, up, back)], dim=-2)


# ---- trees -----------------------------------------------------------------------------------------------------------


def _indexed(folder: Path, extensions: tuple[str, ...], names: list[str] | None = None) -> dict[int, Path]:
    """{index: path} of the files called %03d + extension, by index; of several images the first extension counts."""
    found = {}
    for name in os.listdir(folder) if names is None else names:
        match = re.fullmatch(r"(\d{3}|[1-9]\d{3,})(\.\w+)", name)
        if match and match[2] in extensions:
            found.setdefault(int(match[1]), []).append((extensions.index(match[2]), name))
    return {index: folder / min(found[index])[1] for index in sorted(found)}


def list_objects(root: str | Path) -> list[str]:
    """Object names in the order of ROOT/valid_paths.json; without one, all folders that hold %03d.npy, sorted.

    InputError if there is no such folder, no object in it, or the list is malformed, unsafe or has duplicates.
    """
    root, listed = Path(root), Path(root) / "valid_paths.json"
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if listed.exists():
        try:
            names = json.loads(listed.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{listed}: not readable as JSON ({error})") from None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{listed}: expected a flat list of folder names")
        if outside := [name for name in names if os.path.isabs(name) or ".." in name.split("/")]:
            raise InputError(f"{listed}: {outside[0]!r} leads out of the folder")
        if twice := [name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1]:
            raise InputError(f"{listed}: {twice[0]!r} is listed twice")
    else:
        walk = os.walk(root, followlinks=True)  # people collect objects by symbolic links
        names = sorted(os.path.relpath(f, root) for f, _, files in walk if _indexed(Path(f), (".npy",), files))
    if not names:
        raise InputError(f"{root}: no objects (folders that hold 000.npy and 000.png, 001.npy and 001.png, ...)")
    return names


def list_views(root: str | Path, name: str) -> list[tuple[Path, Path]]:
    """(image, npy) of one object's views that have both, by index. InputError if the folder cannot be read."""
    try:
        images, poses = _indexed(Path(root, name), IMAGE_EXTENSIONS), _indexed(Path(root, name), (".npy",))
    except OSError as error:
        raise InputError(f"{Path(root, name)}: unreadable folder ({error.strerror})") from None
    return [(images[index], poses[index]) for index in images if index in poses]


def split_objects(names: list[str], val_fraction: float, split: str) -> list[str]:
    """Zero-1-to-3's split: the first floor((1 - val_fraction) N) names are "train", the rest "val"; or "all"."""
    if not 0 <= val_fraction <= 1:
        raise InputError(f"--val_fraction {val_fraction}: expected a number from 0 to 1")
    n_train = math.floor((1 - Fraction(str(float(val_fraction)))) * len(names))  # exact: 1 - .9 of 10 is 1, not 0
    return {"train": names[:n_train], "val": names[n_train:], "all": list(names)}[split]


# ---- check -----------------------------------------------------------------------------------------------------------

NOTES = ("image without alpha", "nothing visible in image", "image not square", "pose looks like camera-to-world",
         "object behind camera (OpenCV axes?)", "camera does not look at the origin")  # fmt: skip
SUMMARY = "an object is sound if it has two sound views or more, and all views that have image and pose are readable"


def check_pose(pose: np.ndarray, tolerance: float = 5) -> str | None:
    """The note that a rigid (3,4) deserves, if any; tolerance in degrees.

    b, the origin seen from a world-to-camera, is (0,0,-r); read as camera-to-world, -A^T b is. OpenCV's is (0,0,r).
    """
    w2c, c2w = (math.degrees(math.atan2(math.hypot(x, y), -z)) for x, y, z in (pose[:, 3], -pose[:, 3] @ pose[:, :3]))
    return None if w2c <= tolerance else NOTES[3 if c2w <= tolerance else 4 if w2c >= 180 - tolerance else 5]


def check_object(root: Path, name: str) -> tuple[str, list[tuple[str, str]], int, bool]:
    """-> name, [(finding, path)], number of sound views, whether the object is sound."""

    def check_image(path):
        image = open_image(path)
        low, high = image.convert("RGBA").getchannel("A").getextrema()
        return [n for n, so in zip(NOTES, (low == 255, high == 0, image.width != image.height), strict=False) if so]

    folder, findings, n_sound, n_bad = Path(root, name), [], 0, 0
    try:
        images, poses = _indexed(folder, IMAGE_EXTENSIONS), _indexed(folder, (".npy",))
    except OSError:
        return name, [("missing folder", str(folder))], 0, False
    findings += [("missing pose", path) for index, path in images.items() if index not in poses]
    findings += [("missing image", path) for index, path in poses.items() if index not in images]
    for index in sorted(images.keys() & poses.keys()):
        bad = False
        for path, test in ((images[index], check_image), (poses[index], lambda p: [check_pose(read_pose(p))])):
            try:
                findings += [(note, path) for note in test(path) if note]
            except InputError as error:
                findings.append((str(error).removeprefix(f"{path}: ").split(" (")[0], path))
                bad = True
        n_sound, n_bad = n_sound + (not bad), n_bad + bad
    findings += [("fewer than two sound views", folder)] if n_sound < 2 else []
    return name, [(kind, str(path)) for kind, path in findings], n_sound, n_sound >= 2 and not n_bad


def check(root: Path, workers: int) -> int:
    """Prints what is wrong with a tree; writes its valid_paths.json if it has none. Returns the number of defects."""
    names, counts, first, sound, views = list_objects(root), Counter(), defaultdict(list), [], 0
    # The DataLoader as an ordered parallel map: collate_fn runs in the workers.
    loader = DataLoader(names, batch_size=None, collate_fn=partial(check_object, root), num_workers=workers)
    for name, findings, n_sound, is_sound in tqdm(loader, desc="check", unit="object"):
        views += n_sound
        sound += [name] if is_sound else []
        for kind, path in findings:
            counts[kind] += 1
            first[kind] += [path] if len(first[kind]) < 3 else []
    print(f"{root}: {len(names)} objects, {len(sound)} of them sound; {views} sound views")
    for kind in sorted(counts, key=lambda kind: (kind in NOTES, -counts[kind])):
        title, more = "note" if kind in NOTES else "defect", ", ..." * (counts[kind] > 3)
        print(f"{title}: {kind}: {counts[kind]} ({', '.join(first[kind])}{more})")
    if not (root / "valid_paths.json").exists() and sound:
        write_list(root, sound)
        print(f"wrote valid_paths.json with {len(sound)} objects")
    return sum(count for kind, count in counts.items() if kind not in NOTES)


def write_list(root: Path, names: list[str]):
    """ROOT/valid_paths.json, whole or not at all."""
    try:
        (root / "valid_paths.json.tmp").write_text(json.dumps(names))
        os.replace(root / "valid_paths.json.tmp", root / "valid_paths.json")
    except OSError as error:
        raise InputError(f"{root / 'valid_paths.json'}: cannot be written ({error.strerror})") from None


# ---- shapes: procedural objects --------------------------------------------------------------------------------------
# K primitives, all of one formula: the distance to a box of half-edges (hx,hy,hz), rounded by `rounding`, whose hx
# grows by `slope` per unit of z (wedges, cones), over local (x,y,z), or (rho - ring,y,z) where ring >= 0 (revolved).
# Primitive 0 is the body, the next are added to it, and those marked `cut`, which come last, carve it.
KINDS = ("sphere", "box", "pillow", "wedge", "capsule", "cylinder", "cone", "torus", "tube")  # bodies, cuts: first six


def make_primitive(kind: str, size: float, rng: np.random.Generator, plain: float = 0.2) -> dict:
    """A primitive about `size` in half-extent at the origin, with random proportions and texture."""
    a, b = rng.uniform(0, 1, 2)
    geometry = {  # ring, hx, hy, hz, rounding, slope; hy = 9 where y bounds nothing
        "sphere": (-1, 0, 0, 0, 0.9, 0),
        "box": (-1, 0.5 + 0.5 * a, 0.8, 0.5 + 0.5 * b, 0.02, 0),
        "pillow": (-1, 0.3 + 0.4 * a, 0.5, 0.3 + 0.4 * b, 0.3, 0),
        "wedge": (-1, 0.45, 0.5 + 0.4 * a, 0.5 + 0.3 * b, 0.02, -0.45 / (0.5 + 0.3 * b)),
        "capsule": (-1, 0, 0, 0.5 + 0.4 * a, 0.35 + 0.2 * b, 0),
        "cylinder": (0, 0.4 + 0.4 * a, 9, 0.4 + 0.5 * b, 0.04, 0),
        "cone": (0, 0.4, 9, 0.6 + 0.3 * b, 0.02, -0.4 / (0.6 + 0.3 * b)),
        "torus": (0.6 + 0.2 * a, 0, 9, 0, 0.2 + 0.15 * b, 0),
        "tube": (0.55 + 0.2 * a, 0.12, 9, 0.25 + 0.4 * b, 0.03, 0),
    }[kind]
    # A colour for each of the six local directions, or the parity of floor(local * frequency) chooses one of two:
    # frequency 0 gives a plain colour, a tiny one two halves, one axis stripes, three axes checks.
    style = rng.choice(["faces", "halves", "stripes", "checks", "plain"], p=[0.55 - plain, 0.2, 0.15, 0.1, plain])
    axis = np.eye(3)[rng.integers(3)]
    frequency = {"halves": 1e-3 * axis, "stripes": 3 * axis, "checks": np.full(3, 2.5)}.get(style, np.zeros(3))
    hues = (rng.uniform() + rng.permutation(6) / 6) % 1
    palette = [colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 1), rng.uniform(0.7, 1)) for hue in hues]
    return {"geometry": np.array(geometry) * [*[size] * 5, 1], "rotation": np.eye(3), "centre": np.zeros(3),
            "cut": False, "frequency": frequency / size, "faces": style == "faces", "palette": palette}  # fmt: skip


def pack(primitives: list[dict], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Primitives -> what the renderer takes: each entry stacked to (K,...), float32."""
    return {key: torch.tensor(np.stack([p[key] for p in primitives]), dtype=torch.float32, device=device)
            for key in primitives[0]}  # fmt: skip


def make_object(rng: np.random.Generator) -> list[dict]:
    """A body, two to four parts on its surface, up to two cuts: longest bounding-box edge 1, centred (cuts ignored)."""
    body, n_parts, n_cuts = make_primitive(rng.choice(KINDS[:6]), 1, rng, 0.05), rng.integers(2, 5), rng.integers(0, 3)
    primitives, sides = [], rng.permutation(np.concatenate([np.eye(3), -np.eye(3)]))
    for i, out in enumerate([np.eye(3)[2], *sides[: n_parts + n_cuts]]):
        # Local z points outwards, give or take, but rings stand on their rim, with x outwards.
        q = np.linalg.qr(np.stack([out + rng.normal(0, 0.15, 3), *rng.normal(size=(2, 3))], axis=1))[0].T
        out, size = q[0] * np.sign(q[0] @ out), rng.uniform(0.3, 0.6)
        part = make_primitive(rng.choice(KINDS if i <= n_parts else KINDS[:6]), size, rng) if i else body
        ring, hx, _, hz, rounding, _ = part["geometry"]
        frame = np.stack([q[1] * np.linalg.det(np.stack([q[1], q[2], out])), q[2], out])  # a rotation
        part["rotation"], part["cut"] = np.roll(frame, ring > 0, axis=0), i > n_parts
        if i:
            along, ray, solid = torch.tensor(3.0), torch.tensor(out[:, None]).float(), pack([body])
            for _ in range(16):  # from outside to the body's surface, not past its centre
                along = (along - distance(solid, along * ray)[0]).clamp(min=0)
            reach = 0 if part["cut"] else rng.uniform(0.4, 0.85) * ((ring + hx if ring > 0 else hz) + rounding)
            part["centre"] = out * (along.item() + reach)
        primitives.append(part)

    # Bounds: each primitive's support along the world's axes (K,3), at either end of its z.
    solids = primitives[: n_parts + 1]
    ring, hx, hy, hz, rounding, slope = np.stack([p["geometry"] for p in solids], axis=1)[..., None]
    ax, ay, az = np.stack([p["rotation"] for p in solids], axis=1)
    reach = [np.where(ring >= 0, (ring + hx + slope * z) * np.hypot(ax, ay), (hx + slope * z) * abs(ax) + hy * abs(ay))
             for z in (hz, -hz)]  # fmt: skip
    centres, z = np.stack([p["centre"] for p in solids]), hz * az
    high = (centres + np.maximum(reach[0] + z, reach[1] - z) + rounding).max(0)
    low = (centres - np.maximum(reach[0] - z, reach[1] + z) - rounding).min(0)
    scale = 1 / (high - low).max()
    for p in primitives:
        p["centre"], p["frequency"] = (p["centre"] - (high + low) / 2) * scale, p["frequency"] / scale
        p["geometry"] = p["geometry"] * [*[scale] * 5, 1]
    return primitives


def field(geometry: torch.Tensor, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Signed distance (a lower bound at slopes) at local x, y, z (...) to primitives (6,...), broadcast together."""
    ring, hx, hy, hz, rounding, slope = geometry
    across = torch.where(ring >= 0, torch.hypot(x, y) - ring, x).abs()
    cosine = (1 + slope**2).rsqrt()
    qx, qy, qz = (across - hx - slope * z) * cosine, y.abs() - hy, z.abs() - hz
    outside = (qx.relu() ** 2 + qy.relu() ** 2 + qz.relu() ** 2).sqrt()
    inside = torch.maximum(torch.maximum(qx, qy), qz).clamp(max=0)
    return (outside + inside - rounding) * (1 + slope.abs() * cosine).rsqrt()  # the factor: edges more obtuse than 90


def distance(shape: dict[str, torch.Tensor], points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """World points (3,N) -> distance to the surface (N,), index of the nearest primitive (N,), locals (K,3,N)."""
    rotation, n_solid = shape["rotation"], int((shape["cut"] == 0).sum())
    local = (rotation.flatten(0, 1) @ points).unflatten(0, (-1, 3)) - rotation @ shape["centre"][..., None]
    each = field(shape["geometry"].T[..., None], *local.unbind(1))  # (K,N)
    carved, carver = torch.cat([each[:1], -each[n_solid:]]).max(0)
    nearest, index = torch.cat([carved[None], each[1:n_solid]]).min(0)
    return nearest, torch.where((index == 0) & (carver > 0), n_solid - 1 + carver, index), local


def march(shape, origin, direction, t, far, cone: float, steps: int):
    """Sphere tracing of rays (3,N) from t (N,), which it moves: whether each met the surface; those undecided (M,).

    What a ray passes is free to a width of cone * t on either side; it meets what is within twice that.
    """
    active, hit = torch.arange(len(t), device=t.device), torch.zeros_like(t, dtype=torch.bool)
    for _ in range(steps):
        here, o, d = t[active], origin.index_select(1, active), direction.index_select(1, active)
        free = distance(shape, torch.addcmul(o, here, d))[0]
        hit[active] = free < 2 * cone * here
        t[active] = here = here + ((free - cone * here) / (1 + cone)).clamp(min=0)
        active = active[~hit[active] & (here < far[active])]
        if not len(active):
            break
    return hit, active


def render(primitives: list[dict], w2c: torch.Tensor, size: int, light: np.ndarray, device: str = "cpu"):
    """Cameras (V,3,4) -> numpy RGBA uint8 (V,size,size,4), straight alpha, and depth float16 (V,size,size).

    Five rays a pixel give colour and coverage; depth is along the optical axis at the pixel's centre, 0 for background.
    """
    shape, w2c, light = pack(primitives, device), w2c.to(device).float(), torch.tensor(light, device=device).float()
    pixel, centre, bound = 2 * TAN_HALF_FOV / size, camera_centre(w2c), 0.75**0.5  # objects lie in the unit cube

    def rays(view, y, x):  # view (P,), pixel coordinates (S,P) -> origins, unit directions (3,SP), cosines to the axis
        x, y = x * pixel - TAN_HALF_FOV, TAN_HALF_FOV - y * pixel
        cosine, w = (x * x + y * y + 1).rsqrt(), w2c[view, :, :3].permute(1, 2, 0)[..., None, :]  # w: (3,3,1,P)
        direction = (w[0] * x + w[1] * y - w[2]) * cosine
        return centre[view].T[:, None].expand_as(direction).flatten(1), direction.flatten(1), cosine.flatten()

    rgba, depth = torch.zeros(len(w2c), size, size, 4, device=device), torch.zeros(len(w2c), size, size, device=device)
    pixels = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (len(w2c), size, size)))
    dx, dy = torch.tensor([[0, 1, 3, -1, -3], [0, 3, -1, -3, 1]], device=device)[..., None] / 8  # centre, rotated grid
    for view, y, x in (chunk.unbind(1) for chunk in pixels.split(1 << 16)):
        # First a cone around each pixel, to its first touch of the object; its five rays need only start from there.
        origin, direction, _ = rays(view, y[None] + 0.5, x[None] + 0.5)
        t, far = origin.norm(dim=0) - bound, origin.norm(dim=0) + bound
        near, undecided = march(shape, origin, direction, t, far, pixel * 0.5**0.5, steps=24)  # half its diagonal
        near[undecided] = True
        view, y, x, t, far = view[near], y[near], x[near], t[near].repeat(5), far[near].repeat(5)
        origin, direction, cosine = rays(view, y + 0.5 + dy, x + 0.5 + dx)  # (3,5P)
        hit, _ = march(shape, origin, direction, t, far, pixel * 0.02, steps=48)

        _, index, local = distance(shape, (origin + t * direction)[:, hit])
        local = local.gather(0, index.expand(1, 3, -1))[0]  # (3,H), in the frame of the nearest primitive
        taps = local[:, None] + 1e-3 * torch.cat([torch.eye(3), -torch.eye(3)], dim=1).to(device)[..., None]  # (3,6,H)
        ahead, behind = field(shape["geometry"].T[:, None, index], *taps).split(3)
        normal = torch.nn.functional.normalize(ahead - behind, dim=0)  # (3,H)
        lit = (normal * (shape["rotation"] @ light).T[:, index]).sum(0) * (1 - 2 * shape["cut"])[index]
        parity = (local * shape["frequency"].T[:, index]).floor().sum(0).long() % 2
        side = torch.cat([normal, -normal]).argmax(0)  # the local direction that the surface faces
        colour = shape["palette"][index, torch.where(shape["faces"][index] > 0, side, parity)]  # (H,3)
        rgb = torch.zeros(len(t), 3, device=device)
        rgb[hit] = colour * (0.72 + 0.28 * lit)[:, None]  # wrapped Lambert, from .44 to 1: no side black

        cover = hit.view(5, -1).float()
        rgb = rgb.view(5, -1, 3).sum(0) / cover.sum(0).clamp(min=1)[:, None]
        rgba[view, y, x] = torch.cat([rgb, cover.mean(0)[:, None]], dim=1)
        depth[view, y, x] = (t * cosine).view(5, -1)[0] * cover[0]
    return (rgba * 255).round().byte().cpu().numpy(), depth.half().cpu().numpy()


def write_object(out: Path, views: int, size: int, seed: int, device: str, digits: int, index: int) -> str:
    """Makes and renders object `index`, which depends on (seed, index) only. Returns its name."""
    rng, folder = np.random.default_rng((seed, index)), out / f"{index:0{digits}d}"
    primitives, light = make_object(rng), rng.normal(size=3) + [0, 0, 1]
    z, phi, radius = torch.tensor(rng.uniform((-1, -math.pi, 1.5), (1, math.pi, 2.2), (views, 3))).unbind(1)
    w2c = look_at(torch.acos(z), phi, radius)
    rgba, depth = render(primitives, w2c, size, light / np.linalg.norm(light), device)
    folder.mkdir(parents=True)
    for i in range(views):
        Image.fromarray(rgba[i]).save(folder / f"{i:03d}.png")
        np.save(folder / f"{i:03d}.npy", w2c[i].float().numpy())
        np.save(folder / f"{i:03d}_depth.npy", depth[i])
    return folder.name


def shapes(out: Path, objects: int, views: int, size: int, seed: int, device: str, workers: int):
    """Writes a data set of procedural objects."""
    if seed < 0:
        raise InputError(f"--seed {seed}: must not be negative")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not an empty folder")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no CUDA device")
    work = partial(write_object, out, views, size, seed, device, max(5, len(str(objects - 1))))
    workers = 0 if device == "cuda" else workers
    loader = DataLoader(range(objects), batch_size=None, collate_fn=work, num_workers=workers)
    write_list(out, list(tqdm(loader, desc="shapes", unit="object")))


# ---- pairs of views --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n objects in an epoch, by (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def draw_pair(seed: int, epoch: int, index: int, views: int) -> tuple[int, int]:
    """A random ordered pair (4.1): distinct views (condition, target) of object `index`, by (seed, epoch, index)."""
    cond, target = np.random.default_rng((seed, epoch, index)).choice(views, 2, replace=False)
    return int(cond), int(target)


def locate(position: int, seed: int, view_counts: np.ndarray) -> tuple[int, int, int]:
    """(object, condition view, target view) at a position of the endless sequence of training samples.

    A sample depends on (seed, position) alone: not on world size, accumulation, workers or how often a job restarted.
    """
    epoch, k = divmod(position, len(view_counts))
    index = int(epoch_order(seed, epoch, len(view_counts))[k])
    return index, *draw_pair(seed, epoch, index, int(view_counts[index]))


def batch_positions(start: int, stop: int, accumulate: int, batch: int, rank: int, world: int):
    """Lists of positions, one a micro-batch, that this rank reads for optimiser steps start..stop-1."""
    for step in range(start, stop):
        for micro in range(accumulate):
            first = ((step * accumulate + micro) * world + rank) * batch
            yield list(range(first, first + batch))


class ImagePairs(torch.utils.data.Dataset):
    """Pairs of rendered views, for training with the encoders in the loop. Index with a list of positions.

    Returns {"cond", "target": (B,3,size,size) in [-1,1], "pose": (B,4), "bad": messages}. A bad file raises
    InputError; with skip_bad the sample is taken from the next object in list order, and the message is returned.
    """

    def __init__(self, root: str, names: list[str], size: int, seed: int = 0, skip_bad: bool = False):
        self.root, self.names, self.size, self.seed, self.skip_bad = root, names, size, seed, skip_bad

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, positions: list[int]) -> dict:
        rows, bad = [], []
        for position in positions:
            epoch, k = divmod(position, len(self.names))
            index = int(epoch_order(self.seed, epoch, len(self.names))[k])
            for attempt in range(len(self.names)):
                try:
                    rows.append(self.read(epoch, (index + attempt) % len(self.names)))
                    break
                except InputError as error:
                    if not self.skip_bad:
                        raise
                    bad.append(str(error))
            else:
                raise InputError(f"{self.root}: no object has two sound views")
        cond, target, pose = (torch.stack(column) for column in zip(*rows, strict=True))
        return {"cond": cond, "target": target, "pose": pose, "bad": bad}

    def read(self, epoch: int, index: int) -> tuple[torch.Tensor, ...]:
        name = self.names[index]
        views = list_views(self.root, name)
        if len(views) < 2:
            raise InputError(f"{Path(self.root) / name}: {len(views)} complete view(s), a pair takes two")
        cond, target = (views[v] for v in draw_pair(self.seed, epoch, index, len(views)))
        poses = [torch.from_numpy(read_pose(npy)) for _, npy in (cond, target)]
        images = [load_image(image, self.size)[0] for image, _ in (cond, target)]
        return *images, relative_pose(*poses)


# ---- the archive -----------------------------------------------------------------------------------------------------

ARCHIVE_FORMAT = 1
SHARD_OBJECTS = 256
ROW_KEYS = ("latent_mean", "latent_logvar", "cls", "patch", "alpha", "pose")


def read_manifest(root: str) -> dict:
    """ARCHIVE/manifest.json, checked. Raises InputError naming the file."""
    path = Path(root) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, names = manifest["format"], manifest["objects"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is --archive a folder that precompute_dino.py wrote?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an archive's manifest ({type(error).__name__}: {error})") from None
    if version != ARCHIVE_FORMAT:
        raise InputError(f"{path}: archive format {version}, this code reads {ARCHIVE_FORMAT}")
    missing = {"val_fraction", "image_size", "encoder", "codec"} - manifest.keys()
    if missing or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: not an archive's manifest (missing or malformed: {', '.join(missing) or 'objects'})")
    return manifest


def shard_path(root: str, shard: int) -> Path:
    return Path(root) / f"{shard:05d}.safetensors"


def open_shard(path: Path):
    """A memory-mapped shard. Raises InputError naming the file when it is truncated or is not a shard."""
    try:
        handle = safe_open(path, framework="pt")
        if missing := {"view_offset", *ROW_KEYS} - {"patch"} - set(handle.keys()):
            raise InputError(f"{path}: not an archive shard (no {', '.join(sorted(missing))})")
        return handle
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: unreadable shard ({error}); delete it and rerun precompute_dino.py") from None


class Archive(torch.utils.data.Dataset):
    """The objects of a split that an archive holds with at least two views; a list of positions gives a batch.

    Returns {"target_mean", "target_logvar" (B,C,h,w), "latent" (B,C,h,w), "cls" (B,D), "patch" (B,T,K), "pose" (B,4)}:
    the target's posterior moments, and the condition's latent (posterior mode, unscaled), features and camera move.
    Reads only the rows it needs, through one memory map a shard and process. fp8 patches come as they lie on disk.
    """

    def __init__(self, root: str, split: str, seed: int = 0):
        self.root, self.seed, self.handles = root, seed, {}
        self.manifest = read_manifest(root)
        names = self.manifest["objects"]
        chosen = set(split_objects(names, self.manifest["val_fraction"], split))
        rows, self.names, self.shards, self.skipped = [], [], 0, 0
        for shard, first in enumerate(range(0, len(names), SHARD_OBJECTS)):
            if not shard_path(root, shard).exists():
                continue  # a partial archive is an archive
            self.shards += 1
            handle = open_shard(shard_path(root, shard))
            offsets = handle.get_tensor("view_offset").tolist()
            members = names[first : first + SHARD_OBJECTS]
            if len(offsets) != len(members) + 1 or offsets[-1] != handle.get_slice("pose").get_shape()[0]:
                raise InputError(f"{shard_path(root, shard)}: its views disagree with {root}/manifest.json")
            for name, start, stop in zip(members, offsets, offsets[1:], strict=False):
                if name in chosen and stop - start >= 2:
                    rows.append((shard, start, stop - start))
                    self.names.append(name)
                self.skipped += name in chosen and stop - start < 2
        if not rows:
            raise InputError(f"{root}: no object of the {split} split has two archived views")
        self.rows = np.array(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, index: int, view: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Rows of one view of object `index`, each without its batch axis."""
        shard, start, _ = self.rows[index]
        path = shard_path(self.root, shard)
        try:
            size = path.stat().st_size
            handle, opened_size = self.handles.get(shard) or (open_shard(path), size)
            if size != opened_size:  # to read a memory map beyond its file's end would kill the process
                raise InputError(f"{path}: changed from {opened_size} to {size} bytes while in use")
            self.handles[shard] = handle, opened_size
            return {key: handle.get_slice(key)[int(start) + view] for key in keys}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: unreadable shard ({error})") from None

    def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        cond_keys = ("latent_mean", "cls", "pose") + (("patch",) if self.manifest["encoder"]["feature_dim"] else ())
        rows = []
        for position in positions:
            index, cond, target = locate(position, self.seed, self.rows[:, 2])
            c = self.view(index, cond, cond_keys)
            t = self.view(index, target, ("latent_mean", "latent_logvar", "pose"))
            row = {"target_mean": t["latent_mean"], "target_logvar": t["latent_logvar"]}
            row |= {"latent": c["latent_mean"], "cls": c["cls"], "pose": relative_pose(c["pose"], t["pose"])}
            if "patch" in c:
                row["patch"] = c["patch"]
            rows.append(row)
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Validate posed images, or make some up.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = f"Validate a tree; exit code 1 if it has defects. Write its valid_paths.json if it has none: {SUMMARY}."
    p = commands.add_parser("check", help="validate a tree", description=text, formatter_class=HelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="the tree, in Zero-1-to-3's layout")
    text = "Render procedural objects: RGBA, poses and depth."
    q = commands.add_parser("shapes", help="make a data set", description=text, formatter_class=HelpFormatter)
    q.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    q.add_argument("--objects", type=int, default=512, help="number of objects")
    q.add_argument("--views", type=int, default=12, help="views of each object (Zero-1-to-3: 12)")
    q.add_argument("--size", type=int, default=64, help="width and height in pixels")
    q.add_argument("--seed", type=int, default=0, help="object i depends on this and i only")
    q.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to render")
    for command in (p, q):
        command.add_argument("--workers", type=int, default=min(os.cpu_count(), 16), help="processes; 0: this one only")
    args = parser.parse_args(argv)
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must not be negative")
    if args.command == "check":
        sys.exit(int(check(args.data, args.workers) > 0))
    require_positive(args, "objects", "views", "size")
    shapes(args.out, args.objects, args.views, args.size, args.seed, args.device, args.workers)


if __name__ == "__main__":
    run_script(main)
