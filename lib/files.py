"""Nothing lost: files that appear whole or not at all, logs, locks.

tests/test_faults.py pulls the plug on all of it; docs/reliability.md says what is promised.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lib.cli import InputError


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Makes the folder, calls write(temporary path), flushes to disk and renames to `path`.

    The file appears whole or not at all. Raises InputError naming the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save: RuntimeError, disk full
        raise InputError(f"{path}: could not be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file that the same people may read as any other new file.

    From version 0.8 on save_file makes files that only their owner can read.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all. Raises InputError naming the path."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(path: Path) -> None:
    """Raises InputError now, rather than after hours, where a file can't be written.

    What the file holds stays.
    """
    if path.exists():
        content = path.read_bytes()
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    else:
        write_text(path, "")
        path.unlink()


# ------------------------------------------------------------------------------- JSON lines, logs


def read_lines(path: str | Path) -> list[dict]:
    """The records of a .jsonl file, without lines that are torn or still being written.

    Raises InputError naming the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unreadable ({error})") from None


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """One line of JSON a record; the file appears whole or not at all. Raises InputError."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, text: str) -> None:
    """Adds text to a log and flushes it to disk. Raises InputError naming the path."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
        flush(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; checkpoints are intact") from None


def trim_log(path: Path, step: int, held_out: bool = True) -> None:
    """Drops the lines after this step, from which training resumes, and a torn last one.

    held_out: False drops this step's held-out loss, too, because it is computed again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            again = record["step"] == step and "val_loss" in record and not held_out
            if record["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


# ------------------------------------------------------------------------------------------- locks


def lock(folder: Path, flag: str):
    """Makes the folder and locks it for this job, as long as the returned file stays open.

    What a killed job left half-written is cleared away. The lock is a POSIX lock, which data
    workers do not inherit and which NFS has. Raises InputError where another job holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a")  # noqa: SIM115 (closing it would release the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{flag} {folder}: another job is writing there") from None
        except OSError as error:
            print(f"WARNING: {folder}: no locks here ({error.strerror}); start no second job on it")
        remove_leftovers(folder)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from None
    return file


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files: write_atomically's, safetensors' own, save_checkpoint's folder."""
    for path in folder.iterdir():
        if path.is_file() and re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", path.name):
            path.unlink()
    if (folder / ".step.tmp").exists():
        shutil.rmtree(folder / ".step.tmp")
