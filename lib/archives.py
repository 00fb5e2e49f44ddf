"""An archive's files, ARCHIVE/manifest.json and its shards: written whole, and checked when read.

Nothing here is needed to understand the method; precompute_dino.py says what the files hold.
"""

import json
import zlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.cli import InputError
from lib.files import save_tensors, write_atomically

ARCHIVE_FORMAT = 3
# What a shard holds for each view, and what it holds once: the first row of each object, and a
# checksum of each row by ROW_KEYS, in their order. Safetensors has no checksums of its own.
ROW_KEYS = ("latent_mean", "latent_logvar", "cls", "patch", "alpha", "pose", "view")
TABLES = ("view_offset", "crc32")

# What is read from a manifest, and its types.
MANIFEST_TYPES = {"objects": list, "image_size": int, "val_fraction": float}
ENCODER_TYPES = {
    "name": str,
    "weights": str,
    "layers": list,
    "image_size": int,
    "cls_dim": int,
    "feature_dim": int,
    "tokens": int,
    "sha256": str,
}
CODEC_TYPES = {"name": str, "channels": int, "factor": int, "scale": float, "sha256": str}


# --------------------------------------------------------------------------------------- checksums


def checksum(key: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, with its name and type."""
    if tensor.ndim == 0:
        tensor = tensor[None]  # a scalar can't be viewed as bytes
    start = zlib.crc32(f"{key} {tensor.dtype}".encode())
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), start)


def json_checksum(value) -> int:
    """CRC-32 of what json makes of a value."""
    return zlib.crc32(json.dumps(value).encode())


def list_id(names: list[str]) -> str:
    """How many objects, and which: 512 (00c0ffee)."""
    return f"{len(names)} ({json_checksum(names):08x})"


# ---------------------------------------------------------------------------------------- manifest


def read_manifest(root: str | Path) -> dict:
    """ARCHIVE/manifest.json, without its checksum. Raises InputError naming the file."""
    path = Path(root) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; is --archive a folder that precompute_dino.py wrote?"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not an archive's manifest ({what})") from None
    if version != ARCHIVE_FORMAT:
        raise InputError(
            f"{path}: archive format {version}, this code reads {ARCHIVE_FORMAT}; "
            "write it again by precompute_dino.py"
        )
    stored = manifest.pop("crc32", None)
    if stored is not None and stored != json_checksum(manifest):
        raise InputError(
            f"{path}: damaged, its checksum does not match (edited by hand? then take crc32 out)"
        )
    check_types(path, "", manifest, MANIFEST_TYPES)
    check_types(path, "encoder ", manifest.get("encoder"), ENCODER_TYPES)
    check_types(path, "codec ", manifest.get("codec"), CODEC_TYPES)
    if not all(isinstance(name, str) for name in manifest["objects"]):
        raise InputError(f"{path}: malformed, objects")
    if manifest["codec"]["factor"] < 1:
        raise InputError(f"{path}: malformed, codec factor {manifest['codec']['factor']}")
    return manifest


def check_types(path: Path, part: str, values, types: dict[str, type]) -> None:
    """Raises InputError naming the file and the first value that is missing or of another type."""
    for key, kind in types.items():
        value = values.get(key) if isinstance(values, dict) else None
        if kind is float and isinstance(value, int):
            continue  # other programs write 1.0 as 1
        if not isinstance(value, kind):
            raise InputError(f"{path}: malformed, {part}{key} is {repr(value)[:50]}")


def save_manifest(root: str | Path, manifest: dict) -> None:
    """ARCHIVE/manifest.json with its checksum. Raises InputError naming the file."""
    text = json.dumps({**manifest, "crc32": json_checksum(manifest)}, indent=1)
    write_atomically(Path(root) / "manifest.json", lambda path: path.write_text(text))


# ------------------------------------------------------------------------------------------ shards


def shard_path(root: str | Path, shard: int) -> Path:
    return Path(root) / f"{shard:05d}.safetensors"


def open_shard(path: Path) -> safe_open:
    """A memory-mapped shard. Raises InputError naming a file that is damaged or not a shard."""
    try:
        handle = safe_open(path, framework="pt")
        missing = {*ROW_KEYS, *TABLES} - {"patch"} - set(handle.keys())
        if missing:
            raise InputError(f"{path}: not an archive shard (no {', '.join(sorted(missing))})")
        found = str([checksum(key, handle.get_tensor(key)) for key in TABLES])
        if (handle.metadata() or {}).get("crc32") != found:
            raise SafetensorError("its checksum does not match")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: unreadable shard ({error}); delete it and rerun precompute_dino.py"
        ) from None
    return handle


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard, with a checksum of each row and table.

    tensors: those of ROW_KEYS, (N, ...) each ("patch" may be absent), and "view_offset"
    (objects + 1,). Raises InputError naming the file.
    """
    crc32 = torch.zeros(len(tensors["pose"]), len(ROW_KEYS), dtype=torch.int64)
    for column, key in enumerate(ROW_KEYS):
        if key in tensors:
            crc32[:, column] = torch.tensor([checksum(key, row) for row in tensors[key]])
    stored = {**tensors, "crc32": crc32}
    tables = str([checksum(key, stored[key]) for key in TABLES])
    write_atomically(path, partial(save_tensors, stored, metadata={"crc32": tables}))
