"""Posed images: cameras, trees of renders, pairs of views, and the archive that training reads.

Everything here reads Zero-1-to-3's layout (its `objaverse-rendering` and `ldm/data/simple.py`):

    ROOT/valid_paths.json   flat list of object folders, names may contain "/"; if absent, ROOT is
                            scanned
    ROOT/<name>/%03d.png    RGBA view, composited onto white (.jpg, .jpeg, .webp too); the number of
                            views per object varies
    ROOT/<name>/%03d.npy    its 3x4 world-to-camera matrix [A | b]; the camera's centre is -A^T b

Axes are Blender's and OpenGL's: camera x right, y up, looking along -z; world z up. The field of
view is 49.134 degrees. The object's longest bounding-box edge is 1 and its centre is the origin.
Cameras look at the origin from anywhere on spheres of radius 1.5 to 2.2.

    python -m tools.shapes --out data/shapes --objects 512 --views 12 --size 64     # makes a tree
    python -m tools.shapes --out data/shapes256 --objects 4096 --size 256 --device cuda
    python -m tools.check --data data/shapes                                        # checks a tree

B is the batch size, N a number of views, C latent channels, T patch tokens, K and D widths.
"""

import functools
import json
import math
import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from lib.archives import ROW_KEYS, checksum, open_shard, read_manifest, shard_path
from lib.cli import InputError, is_rank_0
from lib.images import IMAGE_EXTENSIONS, load_image

POSE_ENCODINGS = ("zero123", "elevation")  # see relative_pose
TAN_HALF_FOV = 16 / 35  # lens 35 mm, sensor 32 mm: 49.134 degrees
SHARD_OBJECTS = 256  # objects a shard of an archive


# ------------------------------------------------------------------------------------------- poses


def read_pose(path: str | Path) -> np.ndarray:
    """A .npy file -> its world-to-camera matrix (3,4), float64.

    Raises InputError where it is unreadable, of another shape, not finite, or not a rigid motion.
    """
    try:
        pose = np.load(path, allow_pickle=False)
    except Exception as error:  # np.load raises nearly anything on malformed files
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: unreadable pose ({reason})") from None
    if not isinstance(pose, np.ndarray):
        raise InputError(f"{path}: wrong-shaped pose (several arrays, expected a real (3, 4))")
    if pose.shape != (3, 4) or pose.dtype.kind not in "fiu":
        found = f"{pose.shape} of {pose.dtype}"
        raise InputError(f"{path}: wrong-shaped pose ({found}, expected a real (3, 4))")
    pose = pose.astype(np.float64)
    if not np.isfinite(pose).all():
        raise InputError(f"{path}: NaN or infinity in pose")
    rotation = pose[:, :3]
    from_orthogonal = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if from_orthogonal > 1e-3 or np.linalg.det(rotation) < 0:
        raise InputError(f"{path}: pose is not a rigid motion (its left 3x3 is not a rotation)")
    return pose


def camera_centre(w2c: Tensor) -> Tensor:
    """World-to-camera matrices [A | b] (...,3,4) -> camera centres -A^T b (...,3)."""
    return torch.einsum("...ij,...i->...j", w2c[..., :3], -w2c[..., 3])


def spherical(w2c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """World-to-camera (...,3,4) -> the camera's theta, phi and r, (...) each.

    theta is the polar angle from +z and phi the azimuth from +x, in radians; r is the distance to
    the origin.
    """
    x, y, z = camera_centre(w2c).unbind(-1)
    theta = torch.atan2(torch.hypot(x, y), z)
    phi = torch.atan2(y, x)
    r = torch.sqrt(x * x + y * y + z * z)
    return theta, phi, r


def relative_pose(cond: Tensor, target: Tensor, encoding: str = "zero123") -> Tensor:
    """The camera move from cond to target, two (...,3,4) -> (...,4) float32.

    "zero123": [theta_t - theta_c, sin(dphi), cos(dphi), r_t - r_c], as Zero-1-to-3's get_T has it.
    "elevation": the fourth number is theta_c in radians, as in Stable Zero123. It tells from which
    elevation the move starts; "zero123" does not.
    """
    both = torch.stack(torch.broadcast_tensors(cond, target))
    theta, phi, r = spherical(both.double())  # (2,...) each: cond's and target's
    dphi = phi[1] - phi[0]
    if encoding == "zero123":
        fourth = r[1] - r[0]
    elif encoding == "elevation":
        fourth = theta[0]
    else:
        raise ValueError(f"pose encoding is one of {POSE_ENCODINGS}, not {encoding!r}")
    return torch.stack([theta[1] - theta[0], dphi.sin(), dphi.cos(), fourth], dim=-1).float()


def check_pose(pose: np.ndarray, tolerance: float = 5) -> list[str]:
    """What is odd about a rigid (3,4), in words; nothing for Zero-1-to-3's. tolerance: in degrees.

    The last column of a world-to-camera matrix is where its camera sees the origin: (0, 0, -r).
    A camera-to-world matrix sees it there only after it is inverted. OpenCV's cameras look along
    +z and see it at (0, 0, r).
    """
    as_w2c = degrees_off_axis(pose[:, 3])
    as_c2w = degrees_off_axis(-pose[:, :3].T @ pose[:, 3])
    notes = []
    if as_w2c > tolerance:
        if as_c2w <= tolerance:
            notes.append("pose looks like camera-to-world")
        elif as_w2c >= 180 - tolerance:
            notes.append("object behind camera (OpenCV axes?)")
        else:
            notes.append("camera does not look at the origin")
    distance = np.linalg.norm(pose[:, 3])
    if not 0.5 < distance < 6.6:  # a third of 1.5, three times 2.2
        notes.append("camera's distance is far from 1.5 to 2.2 (is the object's longest edge 1?)")
    return notes


def degrees_off_axis(point: np.ndarray) -> float:
    """The angle between a point (3,) in camera coordinates and the viewing direction, -z."""
    x, y, z = point
    return math.degrees(math.atan2(math.hypot(x, y), -z))


# ------------------------------------------------------------------------------------------- trees


def list_objects(root: str | Path) -> list[str]:
    """Object names in the order of ROOT/valid_paths.json.

    Without that file: all folders that hold %03d.npy, sorted, and a line that says so. Raises
    InputError where there is no such folder, no object in it, or the list is malformed or unsafe.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if (root / "valid_paths.json").exists():
        names = read_list(root / "valid_paths.json")
    else:
        say_it_scans(root)
        names = scan(root)
    if not names:
        raise InputError(
            f"{root}: no objects (folders that hold 000.npy and 000.png, 001.npy and 001.png, ...)"
        )
    return names


def read_list(path: Path) -> list[str]:
    """valid_paths.json. Raises InputError naming the file, and the name that is at fault."""
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{path}: expected a flat list of folder names")
    folders = []
    seen = set()
    for name in names:
        try:
            folder = os.fsdecode(name.encode("utf-8", "surrogateescape"))  # for any locale
        except UnicodeError:
            folder = "\0"
        if "\0" in folder:
            raise InputError(f"{path}: {name!r} can't be a folder's name")
        if os.path.isabs(folder) or ".." in folder.split("/"):
            raise InputError(f"{path}: {name!r} leads out of the folder")
        if os.path.normpath(folder) in seen:
            raise InputError(f"{path}: {name!r} is listed twice")
        seen.add(os.path.normpath(folder))
        folders.append(folder)
    return folders


def scan(root: Path) -> list[str]:
    """All folders below root that hold %03d.npy, sorted, each once. Symbolic links are followed."""
    names = []
    seen = set()
    for folder, below, files in os.walk(root, followlinks=True):
        # Real folders come before links, so that an object keeps its own name.
        below[:] = [name for name in below if not name.startswith(".")]  # half-written ones
        below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        real = os.path.realpath(folder)
        if real in seen:  # a loop, or an object's second name: it could be in both splits
            below.clear()
            continue
        seen.add(real)
        if indexed(Path(folder), (".npy",), files):
            names.append(os.path.relpath(folder, root))
    return sorted(names)


@functools.cache
def say_it_scans(root: Path) -> None:
    """Prints that there is no list: once a process, and once a job of several ranks."""
    if is_rank_0():
        print(
            f"note: {root} has no valid_paths.json, so its folders are listed by name. Objaverse's "
            "renders have such a list, a separate download (valid_paths.json.zip of the zero123 "
            "repository): without it, other objects are held out than in Zero-1-to-3"
        )


def indexed(
    folder: Path, extensions: tuple[str, ...], names: list[str] | None = None
) -> dict[int, Path]:
    """{index: path} of the files called %03d + extension, in the order of the index.

    names: the folder's files, if they are known. Extensions may be in upper case; of several images
    of one index the first extension counts.
    """
    candidates = {}
    for name in os.listdir(folder) if names is None else names:
        match = re.fullmatch(r"(\d{3}|[1-9]\d{3,})(\.\w+)", name)
        if match and match[2].lower() in extensions:
            preference = extensions.index(match[2].lower())
            candidates.setdefault(int(match[1]), []).append((preference, name))
    return {index: folder / min(candidates[index])[1] for index in sorted(candidates)}


def list_views(root: str | Path, name: str) -> list[tuple[Path, Path]]:
    """(image, pose) of one object's views that have both, in the order of their index.

    Raises InputError where the folder can't be read.
    """
    folder = Path(root, name)
    try:
        files = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: unreadable folder ({error.strerror})") from None
    images = indexed(folder, IMAGE_EXTENSIONS, files)
    poses = indexed(folder, (".npy",), files)
    return [(images[index], poses[index]) for index in images if index in poses]


def split_objects(names: list[str], val_fraction: float, split: str) -> list[str]:
    """The names of a split, "train", "val" or "all", in their order.

    Zero-1-to-3's split: the first floor((1 - val_fraction) N) names train, the rest are held out.
    """
    if not 0 <= val_fraction <= 1:
        raise InputError(f"--val_fraction {val_fraction}: expected a number from 0 to 1")
    train_share = 1 - Fraction(str(float(val_fraction)))  # exact: .1 of 10 is 1, and in floats 0
    n_train = math.floor(train_share * len(names))
    return {"train": names[:n_train], "val": names[n_train:], "all": list(names)}[split]


def some_of(names: list[str], count: int = 256) -> list[str]:
    """At most `count` of the names, evenly spaced."""
    step = max(1, math.ceil(len(names) / count))
    return names[::step]


def warn_of_odd_poses(root: str | Path, names: list[str]) -> None:
    """Prints a line where poses don't look like Zero-1-to-3's, by a view of up to 256 objects."""
    counts = Counter()
    examples = {}
    looked_at = some_of(names)
    for name in looked_at:
        try:
            path = list_views(root, name)[0][1]
            notes = check_pose(read_pose(path))
        except (InputError, IndexError):
            continue  # whoever reads this object will name what is wrong
        for note in notes:
            counts[note] += 1
            examples.setdefault(note, path)
    if counts:
        found = "; ".join(f"{note}: {counts[note]} ({examples[note]})" for note in counts)
        print(
            f"WARNING: {found}; of {len(looked_at)} objects, one view each; "
            f"`python -m tools.check --data {root}` looks at all"
        )


# ------------------------------------------------------------------------------------------- seeds


def seeded(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on all the numbers given (seed, object, view, ...)."""
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(seed))


# ------------------------------------------------------------------------------------------- pairs
#
# Training samples form one endless sequence. What stands at a position depends on (seed, position)
# alone: not on the number of processes, on accumulation, on data workers, or on restarts.


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, objects: int) -> np.ndarray:
    """The order of the objects in an epoch, a permutation of 0..objects-1."""
    return np.random.default_rng((seed, epoch)).permutation(objects)


def object_at(position: int, seed: int, objects: int) -> tuple[int, int]:
    """(epoch, object) at a position of the sequence: every epoch has each object once."""
    epoch, place = divmod(position, objects)
    return epoch, int(epoch_order(seed, epoch, objects)[place])


def draw_pair(seed: int, epoch: int, index: int, views: int) -> tuple[int, int]:
    """A random ordered pair (4.1): two distinct views (condition, target) of object `index`."""
    cond, target = np.random.default_rng((seed, epoch, index)).choice(views, 2, replace=False)
    return int(cond), int(target)


def batch_positions(start: int, stop: int, accumulate: int, batch: int, rank: int, world: int):
    """Lists of positions, one a micro-batch: what this rank reads in optimiser steps start..stop-1.

    batch: samples in a micro-batch of one rank.
    """
    for step in range(start, stop):
        for micro in range(accumulate):
            first = ((step * accumulate + micro) * world + rank) * batch
            yield list(range(first, first + batch))


class ImagePairs(torch.utils.data.Dataset):
    """Pairs of rendered views, for training with the encoders in the loop.

    A list of positions gives {"cond", "target": (B,3,size,size) in [-1,1], "pose": (B,4)}.
    pose_encoding: see relative_pose.
    Raises InputError naming a file that is bad (`python -m tools.check` lists what is sound).
    """

    def __init__(
        self,
        root: str,
        names: list[str],
        size: int,
        seed: int = 0,
        pose_encoding: str = "zero123",
    ):
        self.pose_encoding = pose_encoding
        self.root = root
        self.names = names
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        samples = [self.read(position) for position in positions]
        cond, target, pose = (torch.stack(column) for column in zip(*samples, strict=True))
        return {"cond": cond, "target": target, "pose": pose}

    def read(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """One sample: condition image, target image (3,size,size), camera move (4,)."""
        epoch, index = object_at(position, self.seed, len(self.names))
        name = self.names[index]
        views = list_views(self.root, name)
        if len(views) < 2:
            folder = Path(self.root, name)
            raise InputError(f"{folder}: {len(views)} complete view(s), a pair takes two")
        cond, target = draw_pair(self.seed, epoch, index, len(views))
        cond_image, cond_pose = views[cond]
        target_image, target_pose = views[target]
        move = relative_pose(
            torch.from_numpy(read_pose(cond_pose)),
            torch.from_numpy(read_pose(target_pose)),
            self.pose_encoding,
        )
        return load_image(cond_image, self.size)[0], load_image(target_image, self.size)[0], move


# ----------------------------------------------------------------------------------------- archive


RELEASE_EVERY = 50_000  # samples


class MappedShard(NamedTuple):
    """A shard in a process's memory map: what is not touched is not read from disk."""

    size: int  # the file's, in bytes
    tensors: dict[str, Tensor]
    crc32: np.ndarray  # (N, keys), of each row by ROW_KEYS; numpy indexes faster than torch


class Archive(torch.utils.data.Dataset):
    """What precompute_dino.py archived of a split's objects, those with two views or more.

    A list of positions gives a batch:
        target_mean, target_logvar   (B,C,h,w)   the target's posterior moments
        latent                       (B,C,h,w)   the condition's latent: posterior mode, unscaled
        cls, patch                   (B,D), (B,T,K)   the condition's features, as stored
        pose                         (B,4)       the camera move
    Only the rows that a batch needs are read, and each is held against its checksum.

    images: the tree that was archived; batches then hold "cond" (B,3,H,W), the condition's image,
        in place of "cls" and "patch".
    patch: whether to read patch features, where there are any. pose_encoding: see relative_pose.
    Raises InputError naming a file that is missing, damaged, or of another archive.
    """

    def __init__(
        self,
        root: str,
        split: str,
        seed: int = 0,
        images: str | None = None,
        patch: bool = True,
        pose_encoding: str = "zero123",
    ):
        self.pose_encoding = pose_encoding
        self.root = root
        self.seed = seed
        self.images = images
        self.patch = patch
        self.maps: dict[int, MappedShard] = {}
        self.samples_since_release = 0
        self.manifest = read_manifest(root)
        self.shapes = row_shapes(self.manifest)
        self.names, self.rows = self.find_objects(split)
        if not self.names and split != "val":
            what = f"no object of the {split} split (val_fraction {self.manifest['val_fraction']})"
            raise InputError(f"{root}: {what} has two archived views")

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        """What a spawned data worker gets: no maps, because pickling would copy whole shards."""
        return {**self.__dict__, "maps": {}}

    def find_objects(self, split: str) -> tuple[list[str], np.ndarray]:
        """Names, and (shard, first row, views) of each (objects,3), in the manifest's order."""
        listed = self.manifest["objects"]
        chosen = set(split_objects(listed, self.manifest["val_fraction"], split))
        names, rows = [], []
        for shard, first in enumerate(range(0, len(listed), SHARD_OBJECTS)):
            if not shard_path(self.root, shard).exists():
                continue  # a partial archive is an archive
            members = listed[first : first + SHARD_OBJECTS]
            offsets = self.read_offsets(shard, len(members))
            for name, start, stop in zip(members, offsets[:-1], offsets[1:], strict=True):
                if name in chosen and stop - start >= 2:
                    names.append(name)
                    rows.append((shard, start, stop - start))
        return names, np.array(rows, dtype=int).reshape(-1, 3)

    def read_offsets(self, shard: int, objects: int) -> list[int]:
        """The first row of each of a shard's objects, and the end: objects + 1 numbers."""
        path = shard_path(self.root, shard)
        handle = open_shard(path)
        offsets = handle.get_tensor("view_offset").tolist()
        fits = len(offsets) == objects + 1 and offsets[0] == 0 and offsets == sorted(offsets)
        stored = {key: handle.get_slice(key).get_shape() for key in set(handle.keys())}
        for key, shape in self.shapes.items():
            fits = fits and stored.get(key) == [offsets[-1], *shape]
        if not fits:
            raise InputError(f"{path}: its views disagree with {self.root}/manifest.json")
        return offsets

    def map_shard(self, shard: int) -> None:
        """Memory-maps a shard, unless it is mapped. Raises InputError, also where it has changed.

        Where a file was truncated, reading the map beyond its end would kill the process.
        """
        path = shard_path(self.root, shard)
        try:
            size = path.stat().st_size
            if shard not in self.maps:
                handle = open_shard(path)
                tensors = {key: handle.get_tensor(key) for key in self.shapes}
                self.maps[shard] = MappedShard(size, tensors, tensors["crc32"].numpy())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: unreadable shard ({error})") from None
        mapped_size = self.maps[shard].size
        if size != mapped_size:
            raise InputError(f"{path}: changed from {mapped_size} to {size} bytes while in use")

    def release_maps_now_and_then(self, samples: int) -> None:
        """Lets go of all maps after every 50,000 samples; they are mapped again when needed.

        For nearly each row that is read, the kernel keeps one more page of page tables. It frees
        them only with the map, so that over an epoch they would fill gigabytes.
        """
        self.samples_since_release += samples
        if self.samples_since_release > RELEASE_EVERY:
            self.maps = {}
            self.samples_since_release = 0

    def read_row(self, shard: int, key: str, row: int) -> Tensor:
        """A row of a shard that is mapped. Raises InputError where its checksum does not match."""
        mapped = self.maps[shard]
        value = mapped.tensors[key][row]
        if checksum(key, value) != mapped.crc32[row, ROW_KEYS.index(key)]:
            raise InputError(
                f"{shard_path(self.root, shard)}: damaged shard ({key} of its view {row}); "
                "delete it and rerun precompute_dino.py"
            )
        return value

    def read_view(self, index: int, view: int, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Rows of object `index`'s view number `view`, without batch axis. Raises InputError."""
        shard, first_row, _ = self.rows[index].tolist()
        self.map_shard(shard)
        return {key: self.read_row(shard, key, first_row + view) for key in keys}

    def image(self, index: int, view: int) -> Tensor:
        """The image (3,H,W) that a view was archived of. Raises InputError."""
        archived = self.read_view(index, view, ("view", "pose"))
        file_index = archived["view"].item()  # the number in the file's name
        folder = Path(self.images, self.names[index])
        try:
            path = indexed(folder, IMAGE_EXTENSIONS)[file_index]
        except (OSError, KeyError):
            raise InputError(f"--data {folder}: no image {file_index:03d} in it") from None
        check_same_pose(self.root, folder, file_index, archived["pose"])
        return load_image(path, self.manifest["image_size"])[0]

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        self.release_maps_now_and_then(len(positions))
        cond, target = [], []  # (shard, row) of the views
        cond_views = []  # (object, view)
        for position in positions:
            epoch, index = object_at(position, self.seed, len(self.rows))
            shard, first_row, views = self.rows[index].tolist()
            cond_view, target_view = draw_pair(self.seed, epoch, index, views)
            cond.append((shard, first_row + cond_view))
            target.append((shard, first_row + target_view))
            cond_views.append((index, cond_view))
        for shard in {shard for shard, _ in cond}:
            self.map_shard(shard)

        batch = {
            "target_mean": self.gather("latent_mean", target),
            "target_logvar": self.gather("latent_logvar", target),
            "latent": self.gather("latent_mean", cond),
            "pose": relative_pose(
                self.gather("pose", cond), self.gather("pose", target), self.pose_encoding
            ),
        }
        if self.images:
            batch["cond"] = torch.stack([self.image(*view) for view in cond_views])
            return batch
        batch["cls"] = self.gather("cls", cond)
        if self.patch and "patch" in self.shapes:
            batch["patch"] = self.gather("patch", cond)
        return batch

    def gather(self, key: str, places: list[tuple[int, int]]) -> Tensor:
        """The rows at these places (shard, row), of shards that are mapped: (B, ...)."""
        return stack_for_the_trainer([self.read_row(shard, key, row) for shard, row in places])


def stack_for_the_trainer(rows: list[Tensor]) -> Tensor:
    """Rows of one shape -> (B, ...). In a data worker default_collate makes it in shared memory.

    The worker sends the batch through shared memory anyway. If torch.stack made it in the worker's
    own memory first, large batches would fragment the heap, which then grows for hours.
    """
    return torch.utils.data.default_collate(rows)


def check_same_pose(archive: Path, folder: Path, view: int, archived: Tensor) -> None:
    """Raises InputError where a view of an object's folder is not the one that was archived.

    That is told from its pose (3,4): trees of other renders often have the same names.
    """
    path = indexed(folder, (".npy",)).get(view, folder / f"{view:03d}.npy")
    if not torch.equal(archived, torch.from_numpy(read_pose(path)).to(archived.dtype)):
        raise InputError(
            f"--data {path}: not the pose that --archive {archive} has of this view; "
            "was the archive made from another tree?"
        )


def row_shapes(manifest: dict) -> dict[str, tuple[int, ...]]:
    """{key: a row's shape} of what a shard of this archive holds for each view."""
    encoder, codec = manifest["encoder"], manifest["codec"]
    side = manifest["image_size"] // codec["factor"]
    shapes = {
        "latent_mean": (codec["channels"], side, side),
        "latent_logvar": (codec["channels"], side, side),
        "cls": (encoder["cls_dim"],),
        "alpha": (encoder["tokens"],),
        "pose": (3, 4),
        "view": (),
        "crc32": (len(ROW_KEYS),),
    }
    if encoder["feature_dim"]:
        shapes["patch"] = (encoder["tokens"], encoder["feature_dim"])
    return shapes
