"""Posed images: reading them, checking them, and making some up.

Zero-1-to-3's layout (its `objaverse-rendering` and `ldm/data/simple.py`), which all of this repository reads:
    ROOT/valid_paths.json   flat list of object folders (names may contain "/"); where absent, ROOT is scanned
    ROOT/<name>/%03d.png    RGBA view, composited onto white (.jpg, .jpeg, .webp too); views per object vary
    ROOT/<name>/%03d.npy    its 3x4 world-to-camera [A | b]: camera centre -A^T b, Blender/OpenGL axes (camera x right,
                            y up, looks along -z), world z up, field of view 49.134 degrees
The object's longest bounding-box edge is 1, centred; cameras look at it from anywhere on spheres of radius 1.5 to 2.2.

    python -m tools.shapes --out data/shapes --objects 512 --views 12 --size 64     # procedural objects, on the CPU
    python -m tools.shapes --out data/shapes256 --objects 4096 --size 256 --device cuda
    python -m tools.check --data data/shapes                                        # validate any tree
"""

import contextlib
import functools
import json
import math
import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from lib.archives import ROW_KEYS, checksum, open_shard, read_manifest, shard_path
from lib.cli import InputError
from lib.images import IMAGE_EXTENSIONS, load_image

TAN_HALF_FOV = 16 / 35  # lens 35 mm, sensor 32 mm: 49.134 degrees


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
    if (
        np.abs(pose[:, :3] @ pose[:, :3].T - np.eye(3)).max() > 1e-3
        or np.linalg.det(pose[:, :3]) < 0
    ):
        raise InputError(f"{path}: pose is not a rigid motion (its left 3x3 is not a rotation)")
    return pose


def camera_centre(w2c: torch.Tensor) -> torch.Tensor:
    """World-to-camera (...,3,4) = [A | b] -> camera centres -A^T b (...,3)."""
    return torch.einsum("...ij,...i->...j", w2c[..., :3], -w2c[..., 3])


def relative_pose(cond: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two (...,3,4) -> (...,4) float32: [theta_t - theta_c, sin dphi, cos dphi, r_t - r_c] (Zero-1-to-3's get_T).

    theta is the polar angle from +z and phi the azimuth from +x, in radians; r the distance to the origin.
    """
    x, y, z = camera_centre(torch.stack(torch.broadcast_tensors(cond, target)).double()).unbind(
        -1
    )  # each (2,...)
    theta, phi, r = (
        torch.atan2(torch.hypot(x, y), z),
        torch.atan2(y, x),
        torch.sqrt(x * x + y * y + z * z),
    )
    dphi = phi[1] - phi[0]
    return torch.stack([theta[1] - theta[0], dphi.sin(), dphi.cos(), r[1] - r[0]], dim=-1).float()


# ---- trees -----------------------------------------------------------------------------------------------------------


def indexed(
    folder: Path, extensions: tuple[str, ...], names: list[str] | None = None
) -> dict[int, Path]:
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
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{listed}: not readable as JSON ({error})") from None
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise InputError(f"{listed}: expected a flat list of folder names")
        if strange := [name for name in names if re.search("[\0\ud800-\udc7f\udd00-\udfff]", name)]:
            raise InputError(f"{listed}: {strange[0]!r} can't be a folder's name")
        if outside := [name for name in names if os.path.isabs(name) or ".." in name.split("/")]:
            raise InputError(f"{listed}: {outside[0]!r} leads out of the folder")
        if twice := [
            name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1
        ]:
            raise InputError(f"{listed}: {twice[0]!r} is listed twice")
    else:
        names, seen = [], set()
        for folder, below, files in os.walk(
            root, followlinks=True
        ):  # people collect objects by symbolic links
            below.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
            real = os.path.realpath(folder)
            if real in seen:  # by another name; it might be on either side of the split, or a loop
                below.clear()
            elif indexed(Path(folder), (".npy",), files):
                names.append(os.path.relpath(folder, root))
            seen.add(real)
        names.sort()
    if not names:
        raise InputError(
            f"{root}: no objects (folders that hold 000.npy and 000.png, 001.npy and 001.png, ...)"
        )
    return names


def list_views(root: str | Path, name: str) -> list[tuple[Path, Path]]:
    """(image, npy) of one object's views that have both, by index. InputError if the folder cannot be read."""
    folder = Path(root, name)
    try:
        files = os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: unreadable folder ({error.strerror})") from None
    images, poses = (
        indexed(folder, extensions, files) for extensions in (IMAGE_EXTENSIONS, (".npy",))
    )
    return [(images[index], poses[index]) for index in images if index in poses]


def split_objects(names: list[str], val_fraction: float, split: str) -> list[str]:
    """Zero-1-to-3's split: the first floor((1 - val_fraction) N) names are "train", the rest "val"; or "all"."""
    if not 0 <= val_fraction <= 1:
        raise InputError(f"--val_fraction {val_fraction}: expected a number from 0 to 1")
    n_train = math.floor(
        (1 - Fraction(str(float(val_fraction)))) * len(names)
    )  # exact: 1 - .9 of 10 is 1, not 0
    return {"train": names[:n_train], "val": names[n_train:], "all": list(names)}[split]


# ---- seeds


def seeded(*entropy: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on all the numbers given (seed, object, view, ...)."""
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(seed))


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

    def __init__(
        self, root: str, names: list[str], size: int, seed: int = 0, skip_bad: bool = False
    ):
        self.root, self.names, self.size, self.seed, self.skip_bad = (
            root,
            names,
            size,
            seed,
            skip_bad,
        )

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
            raise InputError(
                f"{Path(self.root) / name}: {len(views)} complete view(s), a pair takes two"
            )
        cond, target = (views[v] for v in draw_pair(self.seed, epoch, index, len(views)))
        poses = [torch.from_numpy(read_pose(npy)) for _, npy in (cond, target)]
        images = [load_image(image, self.size)[0] for image, _ in (cond, target)]
        return *images, relative_pose(*poses)


# ---- the archive -----------------------------------------------------------------------------------------------------

SHARD_OBJECTS = 256


class Archive(torch.utils.data.Dataset):
    """The objects of a split that an archive holds with at least two views; a list of positions gives a batch.

    Returns {"target_mean", "target_logvar" (B,C,h,w), "latent" (B,C,h,w), "cls" (B,D), "patch" (B,T,K), "pose" (B,4)}:
    the target's posterior moments, and the condition's latent (posterior mode, unscaled), features and camera move.
    Reads only the rows it needs, through one memory map a shard and process. fp8 patches come as they lie on disk.
    images: the tree that was archived, to give "cond" (B,3,H,W), the condition's image, in place of its features.
    patch: whether to read patch features, where there are any.
    """

    def __init__(
        self, root: str, split: str, seed: int = 0, images: str | None = None, patch: bool = True
    ):
        self.root, self.seed, self.images, self.patch, self.maps, self.count = (
            root,
            seed,
            images,
            patch,
            {},
            0,
        )
        self.manifest = read_manifest(root)
        names, encoder, codec = (self.manifest[key] for key in ("objects", "encoder", "codec"))
        side = self.manifest["image_size"] // codec["factor"]
        latent, patch = (codec["channels"], side, side), (encoder["tokens"], encoder["feature_dim"])
        self.shapes = {
            "latent_mean": latent,
            "latent_logvar": latent,
            "cls": (encoder["cls_dim"],),
            "pose": (3, 4),
        }
        self.shapes |= {"alpha": patch[:1], "crc32": (len(ROW_KEYS),)} | (
            {"patch": patch} if patch[1] else {}
        )
        chosen = set(split_objects(names, self.manifest["val_fraction"], split))
        rows, self.names = [], []
        for shard, first in enumerate(range(0, len(names), SHARD_OBJECTS)):
            if not shard_path(root, shard).exists():
                continue  # a partial archive is an archive
            handle = open_shard(shard_path(root, shard))
            offsets = handle.get_tensor("view_offset").flatten().tolist()
            members = names[first : first + SHARD_OBJECTS]
            shapes = {
                key: handle.get_slice(key).get_shape()
                for key in self.shapes.keys() & set(handle.keys())
            }
            expected = {key: [offsets[-1], *shape] for key, shape in self.shapes.items()}
            if (
                len(offsets) != len(members) + 1
                or offsets[0]
                or offsets != sorted(offsets)
                or shapes != expected
            ):
                raise InputError(
                    f"{shard_path(root, shard)}: its views disagree with {root}/manifest.json"
                )
            for name, start, stop in zip(members, offsets, offsets[1:], strict=False):
                if name in chosen and stop - start >= 2:
                    rows.append((shard, start, stop - start))
                    self.names.append(name)
        if not rows and split != "val":
            what = f"no object of the {split} split (val_fraction {self.manifest['val_fraction']})"
            raise InputError(f"{root}: {what} has two archived views")
        self.rows = np.array(rows, dtype=int).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "maps": {}
        }  # workers that are not forked would be sent whole shards

    def map(self, shard: int) -> None:
        """Memory-map a shard's tensors, if they are not yet: what is not touched is not read. Raises InputError."""
        path = shard_path(self.root, shard)
        try:
            size = path.stat().st_size
            if shard not in self.maps:
                handle = open_shard(path)
                tensors = {key: handle.get_tensor(key) for key in self.shapes}
                self.maps[shard] = (
                    size,
                    tensors | {"crc32": tensors["crc32"].numpy()},
                )  # whose elements come cheaper
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: unreadable shard ({error})") from None
        opened_size = self.maps[shard][0]
        if size != opened_size:  # to read a memory map beyond its file's end would kill the process
            raise InputError(f"{path}: changed from {opened_size} to {size} bytes while in use")

    def read(self, shard: int, key: str, row: int) -> torch.Tensor:
        """A row of a shard that is mapped. Raises InputError where its checksum does not match."""
        tensors = self.maps[shard][1]
        value = tensors[key][row]
        if checksum(key, value) != tensors["crc32"][row, ROW_KEYS.index(key)]:
            what = f"{shard_path(self.root, shard)}: damaged shard ({key} of its view {row})"
            raise InputError(f"{what}; delete it and rerun precompute_dino.py")
        return value

    def view(self, index: int, view: int, keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Rows of one view of object `index`, each without its batch axis."""
        shard, start, _ = self.rows[index].tolist()
        self.map(shard)
        return {key: self.read(shard, key, start + view) for key in keys}

    def image(self, index: int, view: int) -> torch.Tensor:
        """The image (3,H,W) that a view was archived of, found by its pose. Raises InputError."""
        pose = self.view(index, view, ("pose",))["pose"].numpy()
        for image, npy in list_views(self.images, self.names[index])[
            view:
        ]:  # --skip_bad only moves views forward
            with contextlib.suppress(InputError):
                if np.allclose(read_pose(npy), pose, atol=1e-5):
                    return load_image(image, self.manifest["image_size"])[0]
        raise InputError(
            f"--data {Path(self.images) / self.names[index]}: no readable view has view {view}'s pose"
        )

    def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        self.count += len(positions)
        if (
            self.count > 50_000
        ):  # a map's page tables, one more page for nearly each row, go only with it
            self.maps, self.count = {}, 0
        draws = [locate(position, self.seed, self.rows[:, 2]) for position in positions]
        places = [self.rows[index, :2].tolist() for index, _, _ in draws]
        for shard in {shard for shard, _ in places}:  # their sizes are looked at once a batch
            self.map(shard)

        def gather(
            key: str, which: int
        ) -> torch.Tensor:  # which view of the draws: 1 the condition, 2 the target
            both = zip(places, draws, strict=True)
            rows = [self.read(shard, key, start + draw[which]) for (shard, start), draw in both]
            return torch.utils.data.default_collate(
                rows
            )  # a worker's in shared memory: its heap would be fragmented

        batch = {
            "target_mean": gather("latent_mean", 2),
            "target_logvar": gather("latent_logvar", 2),
        }
        batch |= {"latent": gather("latent_mean", 1), "cls": gather("cls", 1)}
        batch["pose"] = relative_pose(gather("pose", 1), gather("pose", 2))
        if self.images:
            batch["cond"] = torch.stack([self.image(index, cond) for index, cond, _ in draws])
        elif self.patch and "patch" in self.shapes:
            batch["patch"] = gather("patch", 1)
        return batch
