"""Nothing lost: files that appear whole or not at all, logs, locks, signals.

tests/test_faults.py pulls the plug on all of it; the README's reliability section says what is promised.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from lib.cli import InputError

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
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch.save makes a RuntimeError of a full disk
        raise InputError(f"{path}: could not be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises InputError now rather than after hours, where a file can't be written; what it holds stays."""
    there = path.exists()
    write_atomically(
        path, lambda temporary: temporary.write_bytes(path.read_bytes() if there else b"")
    )
    if not there:
        path.unlink()


def write_jsonl(path: Path, records) -> None:
    """A line of JSON a record; the file appears whole or not at all. Raises InputError naming the path."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text))


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
        for (
            stale
        ) in folder.iterdir():  # `write_atomically`'s, safetensors' own, `save_checkpoint`'s
            if stale.is_file() and re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", stale.name):
                stale.unlink()
        if (folder / ".step.tmp").exists():
            shutil.rmtree(folder / ".step.tmp")
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from None
    return file


def read_lines(path: str | Path) -> list[dict]:
    """The records of a .jsonl file, but for lines torn by a crash or still being written. Raises InputError."""
    try:
        return [
            json.loads(line) for line in Path(path).read_text().splitlines() if line.endswith("}")
        ]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error})") from None


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
