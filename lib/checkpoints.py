"""Our own checkpoints, as files: what is written appears whole or not at all and is checksummed.

    RUN/step_0001000/model.safetensors   EMA weights, with what rebuilds the model as metadata
    RUN/step_0001000/state.pt            what else resuming takes: raw weights, optimiser, flags
    RUN/latest                           the name of the newest of these folders

pretrained.py builds models from them.
"""

import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lib.cli import InputError, one_line
from lib.files import flush, save_tensors, write_text
from lib.formats import read_tensors

# ------------------------------------------------------------------------------- model.safetensors

MODEL_FORMAT = 1


def save_model(path: Path, model: nn.Module, meta: dict, tensors: dict[str, Tensor]) -> None:
    """Writes model.safetensors: the weights in float32, and `tensors` of the image encoder.

    meta: "encoder" and "codec" specs, "image_size", "val_fraction", "step", "args" of training, ...
    """
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.cpu().float().contiguous()  # one at a time leaves the GPU
    tensors = {**weights, **tensors}
    meta = {
        "format": MODEL_FORMAT,
        "model": model.args,
        **meta,
    }
    write_model_file(path, meta, tensors)


def write_model_file(path: Path, meta: dict, tensors: dict[str, Tensor]) -> None:
    """Writes model.safetensors, with a checksum of all that it holds."""
    meta = {**meta, "sha256": checksum(meta, tensors)}
    save_tensors(tensors, path, metadata={"efficient_3dim": json.dumps(meta)})


def checksum(meta: dict, tensors: dict[str, Tensor]) -> str:
    """Of all that model.safetensors holds, because the format itself has no checksum."""
    return hashlib.sha256((json.dumps(meta) + tensor_hash(tensors)).encode()).hexdigest()


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, sorted by name: the same in any file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_meta(path: Path) -> dict | None:
    """The metadata that `save_model` wrote; None where the file is another program's.

    Raises InputError where it can't be read, or is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("efficient_3dim")
        meta = json.loads(text) if text else None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({one_line(error)})") from None
    if meta is None:
        return None
    form = meta.get("format") if isinstance(meta, dict) else "unknown"
    if form != MODEL_FORMAT:
        raise InputError(f"{path}: checkpoint format {form}, this code reads {MODEL_FORMAT}")
    return meta


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """(metadata, all tensors) that `save_model` wrote; None where the file is another program's.

    Raises InputError where it is damaged.
    """
    meta = read_meta(path)
    if meta is None:
        return None
    tensors = read_tensors(path)
    expected = meta.pop("sha256", None)
    if checksum(meta, tensors) != expected:
        raise InputError(f"{path}: damaged, its checksum does not match")
    meta["sha256"] = expected
    return meta, tensors


# ---------------------------------------------------------------------------------- run folders

STATE_FORMAT = 2
STEP_FOLDERS = "step_" + 7 * "[0-9]"


def save_checkpoint(
    out: Path, state: dict, ema: nn.Module, frozen: dict, keep: int, keep_every: int
) -> None:
    """Writes OUT/step_*/, which appears whole or not at all, and removes older ones.

    state: what resuming takes, with "step", "seconds" and "args"; frozen: what the checkpoint says
    of encoder and codec, with "tensors" of its own. The newest `keep` checkpoints stay, those at
    multiples of keep_every steps for good. Raises InputError naming the folder.
    """
    folder = out / f"step_{state['step']:07d}"
    temporary = out / ".step.tmp"
    meta = {key: value for key, value in frozen.items() if key != "tensors"}
    for key in ("step", "seconds", "args"):
        meta[key] = state[key]
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_model(temporary / "model.safetensors", ema, meta, frozen["tensors"])
        torch.save({"format": STATE_FORMAT, **state}, temporary / "state.pt")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)  # only an unreadable one can be there
        os.rename(temporary, folder)
        flush(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save: RuntimeError, disk full
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{folder}: could not be written ({error}); older checkpoints are intact"
        ) from None
    point_at(folder)
    remove_old_checkpoints(folder, keep, keep_every)


def point_at(folder: Path) -> None:
    """RUN/latest names this checkpoint."""
    write_text(folder.parent / "latest", folder.name)


def remove_old_checkpoints(newest: Path, keep: int, keep_every: int) -> None:
    """Removes those before the newest `keep`, except at multiples of keep_every steps (0: none)."""
    folders = sorted(newest.parent.glob(STEP_FOLDERS))
    readable = [folder for folder in folders if folder <= newest]
    for folder in readable[:-keep]:
        step = int(folder.name.removeprefix("step_"))
        if keep_every == 0 or step % keep_every != 0:
            shutil.rmtree(folder, ignore_errors=True)


def any_checkpoint(out: Path) -> bool:
    """Whether a run has been started in this folder."""
    return any(out.glob(STEP_FOLDERS))


def newest_checkpoint(out: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """(state, EMA weights) of the newest readable checkpoint; None where there is no checkpoint.

    An unreadable one is named and passed over. Raises InputError where none can be read, or where
    the newest is of another format.
    """
    folders = sorted(out.glob(STEP_FOLDERS), reverse=True)
    for folder in folders:
        try:
            state = read_state(folder / "state.pt")
            weights = read_checkpoint(folder / "model.safetensors")[1]
        except Exception as error:  # a torn file can make torch.load raise nearly anything
            why = one_line(error)
            print(f"{folder}: unreadable ({why}); trying the one before it", file=sys.stderr)
            continue
        if state["format"] != STATE_FORMAT:
            form = state["format"]
            raise InputError(f"{folder}: checkpoint format {form}, this code reads {STATE_FORMAT}")
        return state, weights
    if folders:
        raise InputError(f"--out {out}: none of its {len(folders)} checkpoints is readable")
    return None


def read_state(path: Path) -> dict:
    """state.pt, memory-mapped: the processes of a node share one copy. Raises whatever is wrong."""
    damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare checksums
    if damaged:
        raise ValueError(f"{damaged} does not match its checksum")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "format" not in state:
        raise ValueError("not a training state")
    return state


# ------------------------------------------------------------------------------ flags when resuming

FIXED_FLAGS = (
    "width",
    "channel_mult",
    "res_blocks",
    "attention",
    "heads",
    "context_dim",
    "amalgamate",
    "prediction",
    "pose",
    "pose_embedding",
    "seed",
)


def compare_flags(out: str, now: dict, saved: dict) -> list[str]:
    """What differs between a run's flags and facts and those of its checkpoint, in words.

    Raises InputError naming the flag where it is one that can't change within a run.
    """
    changes = []
    for key, value in now.items():
        if key not in saved or saved[key] == value:
            continue
        if key in ("frozen_ids", "encoder_pixels"):
            raise InputError(
                f"--archive or --data: {out} was started with another encoder, codec or image size"
            )
        if key in FIXED_FLAGS:
            raise InputError(f"--{key}: {out} was started with {saved[key]}; it can't change")
        change = f"{key}: {saved[key]} -> {value}"
        if key == "init":
            change += ", not read: the checkpoint's weights go on"
        if key == "accumulate":
            change += ", which keeps the global batch"
        changes.append(change)
    return changes


def keep_global_batch(global_batch: int, batch_size: int, world: int) -> int:
    """The accumulation with which a run keeps its samples a step on another number of processes.

    Raises InputError where that is no whole number.
    """
    if global_batch % (batch_size * world):
        raise InputError(
            f"--batch_size {batch_size} on {world} process(es) does not divide the run's "
            f"global batch of {global_batch}"
        )
    return global_batch // (batch_size * world)
