"""An archive's files, ARCHIVE/manifest.json and its shards: written whole, checksummed, and checked when read.

Nothing here is needed to understand the method; precompute_dino.py says what the files hold.
"""

import json
import shutil
import zlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.cli import InputError, check_specs
from lib.files import write_atomically

ARCHIVE_FORMAT = 2
TABLES = ("view_offset", "crc32")  # objects' first rows, and a checksum of each row by the ROW_KEYS
ROW_KEYS = ("latent_mean", "latent_logvar", "cls", "patch", "alpha", "pose")


def read_manifest(root: str) -> dict:
    """ARCHIVE/manifest.json, checked. Raises InputError naming the file."""
    path = Path(root) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        version, names = manifest["format"], manifest["objects"]
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; is --archive a folder that precompute_dino.py wrote?"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not an archive's manifest ({type(error).__name__}: {error})"
        ) from None
    if version != ARCHIVE_FORMAT:
        raise InputError(f"{path}: archive format {version}, this code reads {ARCHIVE_FORMAT}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: malformed metadata, objects")
    crc = json_checksum({key: value for key, value in manifest.items() if key != "crc32"})
    if manifest.pop("crc32", crc) != crc:
        raise InputError(
            f"{path}: damaged, its checksum does not match (edited by hand? then take crc32 out)"
        )
    check_specs(path, manifest)
    return manifest


def save_manifest(root: str, manifest: dict) -> None:
    """ARCHIVE/manifest.json with its checksum. Raises InputError naming the file."""
    text = json.dumps(manifest | {"crc32": json_checksum(manifest)}, indent=1)
    write_atomically(Path(root) / "manifest.json", lambda path: path.write_text(text))


def json_checksum(value) -> int:
    """CRC-32 of what json makes of a value."""
    return zlib.crc32(json.dumps(value).encode())


def list_id(names: list[str]) -> str:
    """How many objects, and which: 512 (00c0ffee)."""
    return f"{len(names)} ({json_checksum(names):08x})"


def checksum(key: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor, with its name and type: safetensors has none."""
    return zlib.crc32(
        tensor.contiguous().view(torch.uint8).numpy(), zlib.crc32(f"{key} {tensor.dtype}".encode())
    )


def shard_path(root: str, shard: int) -> Path:
    return Path(root) / f"{shard:05d}.safetensors"


def open_shard(path: Path):
    """A memory-mapped shard. Raises InputError naming the file when it is truncated, damaged or not a shard."""
    try:
        handle = safe_open(path, framework="pt")
        if missing := {"view_offset", "crc32", *ROW_KEYS} - {"patch"} - set(handle.keys()):
            raise InputError(f"{path}: not an archive shard (no {', '.join(sorted(missing))})")
        if (handle.metadata() or {}).get("crc32") != str(
            [checksum(k, handle.get_tensor(k)) for k in TABLES]
        ):
            raise SafetensorError("its checksum does not match")
        return handle
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: unreadable shard ({error}); delete it and rerun precompute_dino.py"
        ) from None


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard with its checksums."""
    tensors["crc32"] = torch.zeros(len(tensors["pose"]), len(ROW_KEYS), dtype=torch.int64)
    for column, key in enumerate(ROW_KEYS):
        if key in tensors:
            tensors["crc32"][:, column] = torch.tensor([checksum(key, row) for row in tensors[key]])
    meta = {"crc32": str([checksum(key, tensors[key]) for key in TABLES])}
    write_atomically(path, partial(save_file, tensors, metadata=meta))


def check_manifest(args, manifest: dict) -> bool:
    """Whether the archive was begun before. Raises InputError naming the flag by which it differs from `manifest`."""
    path = Path(args.archive) / "manifest.json"
    if not path.exists():
        return False
    there = read_manifest(args.archive)
    for flag, value in manifest["flags"].items():
        if there.get("flags", {}).get(flag) != value:
            raise InputError(f"--{flag} {value}: {path} says {there.get('flags', {}).get(flag)}")
    if there["objects"] != manifest["objects"]:
        raise InputError(
            f"--data {args.data}: its objects are not the {len(there['objects'])} that {path} lists"
        )
    for key, flag in (("encoder", "--weights"), ("codec", "--vae")):
        if key in manifest and there[key]["sha256"] != manifest[key]["sha256"]:
            raise InputError(
                f"{flag}: not the weights that {path} was written with (sha256 differs)"
            )
    return True


def check_space(args, objects: int, views: float, encoder, codec) -> None:
    """Print what so many objects of so many views each will take. Raises InputError when the disk lacks it."""
    latent = codec.channels * (args.image_size // codec.factor) ** 2
    patch = encoder.tokens * encoder.feature_dim * {"fp16": 2, "fp8": 1}[args.patch_dtype]
    size = 2 * 2 * latent + 2 * encoder.cls_dim + patch + encoder.tokens + 48 + 48  # pose, crc32
    need, free = objects * views * size, shutil.disk_usage(args.archive).free
    what = f"{objects} objects x {views:.1f} views x {size:,} bytes"
    print(f"{what} = {need / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free")
    if need > free:
        raise InputError(
            f"--archive {args.archive}: {need / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free"
        )
