"""Nothing lost: files that appear whole or not at all, checkpoints, signals.

tests/test_faults.py pulls the plug on all of it; the README's reliability section says what is promised.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

import pretrained
from model import NovelViewModel
from tools.cli import InputError
from tools.scores import read_lines

# ------------------------------------------------------------------------------------------------------------- files


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write) -> None:
    """Make the folder, call write(temporary path), flush to disk, rename: the file appears whole or not at all.

    Raises InputError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save makes a RuntimeError of a full disk
        raise InputError(f"{path}: could not be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises InputError now rather than after hours, where a file can't be written; what it holds stays."""
    there = path.exists()
    write_atomically(path, lambda temporary: temporary.write_bytes(path.read_bytes() if there else b""))
    if not there:
        path.unlink()


def append(path: Path, text: str) -> None:
    """Add to a log, flushed to disk. Raises InputError naming the path."""
    try:
        with open(path, "a") as file:
            file.write(text)
        flush(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; checkpoints are intact") from None


def lock(folder: Path, flag: str):
    """Make the folder, hold FOLDER/lock while the result lives, clear away what a killed job left half-written.

    Raises InputError where another job holds it. A POSIX lock: data workers don't inherit it, and NFS has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{flag} {folder}: another job is writing there") from None
        except OSError as error:
            print(f"WARNING: {folder}: no locks here ({error.strerror}); start no second job on it")
        for stale in folder.iterdir():  # `write_atomically`'s, safetensors' own, `save_checkpoint`'s
            if stale.is_file() and re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", stale.name):
                stale.unlink()
        if (folder / ".step.tmp").exists():
            shutil.rmtree(folder / ".step.tmp")
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from None
    return file


# ------------------------------------------------------------------------------------------------------- checkpoints

STATE_FORMAT = 1
FIXED = ("width", "channel_mult", "res_blocks", "attention", "heads", "context_dim", "amalgamate", "prediction", "seed")
FIXED += ("frozen",)
STEP = "step_" + 7 * "[0-9]"


def save_checkpoint(out: Path, state: dict, ema: NovelViewModel, frozen: dict, args) -> None:
    """RUN/step_*/ with model.safetensors (EMA) and state.pt (what resuming takes); appears whole or not at all."""
    folder, temporary = out / f"step_{state['step']:07d}", out / ".step.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        meta = {key: value for key, value in frozen.items() if key != "tensors"}
        meta |= {key: state[key] for key in ("step", "seconds", "args")}
        pretrained.save_model(temporary / "model.safetensors", ema, meta, frozen["tensors"])
        torch.save({"format": STATE_FORMAT} | state, temporary / "state.pt")
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        shutil.rmtree(folder, ignore_errors=True)  # an unreadable one, passed over when resuming
        os.rename(temporary, folder)
        flush(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save makes a RuntimeError of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{folder}: could not be written ({error}); older checkpoints are intact") from None
    point_at(folder)
    older = [old for old in sorted(out.glob(STEP)) if old <= folder]  # newer ones are unreadable: passed over
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
            if damaged := zipfile.ZipFile(folder / "state.pt").testzip():  # torch.load compares no checksums
                raise ValueError(f"{damaged} does not match its checksum")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            form, weights = state["format"], pretrained.read_model(folder / "model.safetensors")[1]
        except Exception as error:  # whatever a torn file makes of torch.load
            why = error if isinstance(error, InputError) else f"{type(error).__name__}: {str(error)[:100]}"
            print(f"{folder}: unreadable ({why}); trying the one before it", file=sys.stderr)
            continue
        if form != STATE_FORMAT:
            raise InputError(f"{folder}: checkpoint format {form}, this code reads {STATE_FORMAT}")
        return state, weights
    if folders:
        raise InputError(f"--out {out}: none of its {len(folders)} checkpoints is readable")
    return None


def match_flags(args, facts: dict, saved: dict) -> list[str]:
    """Hold flags and facts against those of the checkpoint: recompute accumulation, return what changed, in words."""
    changed = {k: (saved[k], v) for k, v in (vars(args) | facts).items() if k in saved and saved[k] != v}
    if "frozen" in changed:
        raise InputError(f"--archive or --data: {args.out} was started with another encoder, codec or image size")
    if refused := [k for k in changed if k in FIXED]:
        raise InputError(f"--{refused[0]}: {args.out} was started with {changed[refused[0]][0]}; it can't change")
    world, global_batch = facts["processes"], saved["global_batch"]
    if global_batch % (args.batch_size * world):
        raise InputError(f"--batch_size {args.batch_size} on {world} process(es) does not divide the run's "
                         f"global batch of {global_batch}")  # fmt: skip
    flag, args.accumulate = args.accumulate, global_batch // (args.batch_size * world)
    changed.pop("accumulate", None)
    if args.accumulate != flag:
        changed["accumulate"] = (flag, f"{args.accumulate}, which keeps the global batch of {global_batch}")
    if "init" in changed:
        changed["init"] = (changed["init"][0], f"{args.init}, not read: the checkpoint's weights go on")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def logged(path: Path, step: int, key: str) -> bool:
    """Whether a log has a line of this step with this key."""
    return path.exists() and any(line["step"] == step and key in line for line in read_lines(path))


def trim_log(path: Path, step: int) -> None:
    """Drop log lines beyond the step resumed from, and a torn last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


# ----------------------------------------------------------------------------------------------------------- signals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def kill_workers() -> None:
    """At exit, for whatever reason: Python would wait for ever for data workers that block SIGNALS."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for worker in multiprocessing.active_children():
        worker.kill()


def catch_signals() -> list[int]:
    """SIGNALS land in the list, for the loop to see; a second one stops the process at once."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, handler)
    return caught
