"""Our own checkpoints: model.safetensors, which anything can open, and state.pt, which resuming takes.

Nothing here is needed to understand the method. What is written appears whole or not at all and is checksummed; what is
read is checked before it is believed.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.cli import InputError, check_specs, one_line
from lib.files import flush, write_atomically
from lib.formats import find_weights, read_tensors

# ------------------------------------------------------------------------------------------------- model.safetensors

CHECKPOINT_FORMAT = 1


def save_model(path: Path, model: nn.Module, meta: dict, tensors: dict[str, Tensor]) -> None:
    """model.safetensors: the model's weights in float32, what rebuilds it as metadata, and `tensors` of the encoder.

    meta: "encoder" and "codec" specs, "image_size", "val_fraction", "step", "args" of training, ...
    """
    tensors = {
        name: value.float().contiguous() for name, value in model.state_dict().items()
    } | tensors
    meta = {"format": CHECKPOINT_FORMAT, "model": model.args} | meta
    meta |= {"sha256": checksum(meta, tensors)}
    save_file(tensors, path, metadata={"efficient_3dim": json.dumps(meta)})


def checksum(meta: dict, tensors: dict[str, Tensor]) -> str:
    """Of all that model.safetensors holds: safetensors has none of its own."""
    return hashlib.sha256((json.dumps(meta) + tensor_hash(tensors)).encode()).hexdigest()


def read_meta(path: Path) -> dict | None:
    """The metadata that `save_model` wrote, checked; None where the file is another program's. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("efficient_3dim")
        meta = json.loads(text) if text else None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({one_line(error)})") from None
    if meta is None:
        return None
    if not isinstance(meta, dict) or meta.get("format") != CHECKPOINT_FORMAT:
        form = meta.get("format") if isinstance(meta, dict) else "unknown"
        raise InputError(f"{path}: checkpoint format {form}, this code reads {CHECKPOINT_FORMAT}")
    if not isinstance(meta.get("model"), dict):
        raise InputError(f"{path}: malformed metadata, model")
    check_specs(path, meta)
    return meta


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]] | None:
    """(metadata, all tensors) that `save_model` wrote; None where the file is another program's.

    Raises InputError where it is damaged.
    """
    if (meta := read_meta(path)) is None:
        return None
    tensors = read_tensors(path)
    digest = checksum({key: value for key, value in meta.items() if key != "sha256"}, tensors)
    if meta.get("sha256", digest) != digest:
        raise InputError(f"{path}: damaged, its checksum does not match")
    return meta, tensors


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of the names: the same in every container."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def image_size(path: str) -> int:
    """The side in pixels of the images that a --ckpt makes: its own, or Zero-1-to-3's. Raises InputError."""
    file = find_weights(path)
    meta = read_meta(file) if file.suffix == ".safetensors" and file.is_file() else None
    return meta["image_size"] if meta else 256


# ---------------------------------------------------------------------------------------------------------- state.pt

STATE_FORMAT = 1
FIXED = (
    "width",
    "channel_mult",
    "res_blocks",
    "attention",
    "heads",
    "context_dim",
    "amalgamate",
    "prediction",
    "seed",
)
FIXED += ("frozen",)
STEP = "step_" + 7 * "[0-9]"


def save_checkpoint(out: Path, state: dict, ema: nn.Module, frozen: dict, args) -> None:
    """RUN/step_*/ with model.safetensors (EMA) and state.pt (what resuming takes); appears whole or not at all."""
    folder, temporary = out / f"step_{state['step']:07d}", out / ".step.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        meta = {key: value for key, value in frozen.items() if key != "tensors"}
        meta |= {key: state[key] for key in ("step", "seconds", "args")}
        save_model(temporary / "model.safetensors", ema, meta, frozen["tensors"])
        torch.save({"format": STATE_FORMAT} | state, temporary / "state.pt")
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        shutil.rmtree(folder, ignore_errors=True)  # an unreadable one, passed over when resuming
        os.rename(temporary, folder)
        flush(out)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch.save makes a RuntimeError of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{folder}: could not be written ({error}); older checkpoints are intact"
        ) from None
    point_at(folder)
    older = [
        old for old in sorted(out.glob(STEP)) if old <= folder
    ]  # newer ones are unreadable: passed over
    for old in older[: -args.keep]:
        if not (args.keep_every and int(old.name[5:]) % args.keep_every == 0):
            shutil.rmtree(old, ignore_errors=True)


def point_at(folder: Path) -> None:
    """RUN/latest names the newest checkpoint."""
    write_atomically(folder.parent / "latest", lambda path: path.write_text(folder.name))


def newest_checkpoint(out: Path) -> tuple[dict, dict] | None:
    """(state, EMA weights) of the newest readable checkpoint; an unreadable one is named and passed over.

    Raises InputError where none is, or where the newest is of another format.
    """
    folders = sorted(out.glob(STEP), reverse=True)
    for folder in folders:
        try:
            if damaged := zipfile.ZipFile(
                folder / "state.pt"
            ).testzip():  # torch.load compares no checksums
                raise ValueError(f"{damaged} does not match its checksum")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            form, weights = state["format"], read_checkpoint(folder / "model.safetensors")[1]
        except Exception as error:  # whatever a torn file makes of torch.load
            why = (
                error
                if isinstance(error, InputError)
                else f"{type(error).__name__}: {str(error)[:100]}"
            )
            print(f"{folder}: unreadable ({why}); trying the one before it", file=sys.stderr)
            continue
        if form != STATE_FORMAT:
            raise InputError(f"{folder}: checkpoint format {form}, this code reads {STATE_FORMAT}")
        return state, weights
    if folders:
        raise InputError(f"--out {out}: none of its {len(folders)} checkpoints is readable")
    return None


def restore(
    resumed: tuple[dict, dict], args, facts: dict, rank: int, model, ema, optimizer, scaler
) -> dict:
    """Fill all four from `newest_checkpoint`'s, hold its flags against these (`match_flags`), and return its state."""
    state, weights = resumed
    changed = match_flags(args, facts, state["args"])
    if changed and rank == 0:
        print("resuming with what differs from the checkpoint:", *changed, sep="\n  ")
    model.load_state_dict(state["model"])
    ema.load_state_dict({k: v for k, v in weights.items() if k in state["model"]})
    now = optimizer.state_dict()["param_groups"]  # by this time's flags
    optimizer.load_state_dict(state["optimizer"] | {"param_groups": now})
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    if rank == 0:
        point_at(Path(args.out) / f"step_{state['step']:07d}")  # lest it was stopped before
    return state


def match_flags(args, facts: dict, saved: dict) -> list[str]:
    """Hold flags and facts against those of the checkpoint: recompute accumulation, return what changed, in words."""
    changed = {
        k: (saved[k], v) for k, v in (vars(args) | facts).items() if k in saved and saved[k] != v
    }
    if "frozen" in changed or "encoder_pixels" in changed:
        raise InputError(
            f"--archive or --data: {args.out} was started with another encoder, codec or image size"
        )
    if refused := [k for k in changed if k in FIXED]:
        raise InputError(
            f"--{refused[0]}: {args.out} was started with {changed[refused[0]][0]}; it can't change"
        )
    world, global_batch = facts["processes"], saved["global_batch"]
    if global_batch % (args.batch_size * world):
        raise InputError(f"--batch_size {args.batch_size} on {world} process(es) does not divide the run's "
                         f"global batch of {global_batch}")  # fmt: skip
    flag, args.accumulate = args.accumulate, global_batch // (args.batch_size * world)
    changed.pop("accumulate", None)
    if args.accumulate != flag:
        changed["accumulate"] = (
            flag,
            f"{args.accumulate}, which keeps the global batch of {global_batch}",
        )
    if "init" in changed:
        changed["init"] = (
            changed["init"][0],
            f"{args.init}, not read: the checkpoint's weights go on",
        )
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
