"""What all scripts share: errors in one line, help with defaults, device and ranks, checks of flags and metadata."""

import argparse
import contextlib
import re
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm


class InputError(ValueError):
    """Something that the user gave is wrong: one line that names the file or the flag."""


@contextlib.contextmanager
def hint(text: str):
    """Adds the text to an InputError from within."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}{text}") from None


def run_script(main):
    """Calls `main()`: an InputError (a DataLoader worker's too), a full GPU and a dead worker become one line and exit
    code 1, Ctrl-C code 130."""
    try:
        main()
    except InputError as error:
        # A DataLoader re-raises its worker's error with the traceback as the message: the last line is the message.
        message = str(error).strip().splitlines()[-1] if str(error).strip() else "invalid input"
        end_bars()
        sys.exit("error: " + re.sub(r"^[\w.]*InputError: ", "", message))
    except (RuntimeError, ConnectionError, EOFError) as error:
        if out_of_memory(error):
            end_bars()
            tried = str(error).split(" GPU ")[0].rstrip(". ")  # what follows are advice and numbers, a paragraph
            less = "a smaller --batch_size takes less (train.py: with more --accumulate), or --checkpointing"
            sys.exit(f"error: {tried}; {less}")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise once more
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        end_bars()  # what a dead worker had still to hand over is a connection error
        what = str(error).splitlines()[0] if isinstance(error, RuntimeError) else f"DataLoader worker died ({error!r})"
        sys.exit(f"error: {what}; was it killed, for want of memory say? Rerun to go on")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory was too small; cuBLAS and cuDNN have words of their own for that."""
    theirs = "STATUS_ALLOC_FAILED", "unable to find an engine to execute"
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in theirs)


def end_bars() -> None:
    """Close progress bars, so that what is printed next has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each flag's default, where it has one."""

    def _get_help_string(self, action):
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == []
        return action.help if silent else super()._get_help_string(action)


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raises InputError naming the first of the flags that is not above zero, or a --seed, --workers, ... below it."""
    for flag in flags:
        if not getattr(args, flag) > 0:  # NaN is not
            raise InputError(f"--{flag} {getattr(args, flag)}: must be above 0")
    for flag in ("seed", "workers", "orbit", "save_x0"):
        if getattr(args, flag, 0) < 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must not be negative")
    if getattr(args, "seed", 0) >= 2**63:
        raise InputError(f"--seed {args.seed}: below 2^63")


SPECS = {
    "": {"image_size": int, "val_fraction": float},
    "encoder": {"name": str, "weights": str, "layers": list, "image_size": int, "cls_dim": int, "feature_dim": int,
                "tokens": int, "sha256": str},
    "codec": {"name": str, "channels": int, "factor": int, "scale": float, "sha256": str},
}  # fmt: skip


def check_specs(path: Path, meta: dict) -> None:
    """Whether what a manifest or a checkpoint says of the frozen networks could be so: types, and sizes to allocate.

    Raises InputError naming the file.
    """
    for part, kinds in SPECS.items():
        spec = meta.get(part) if part else meta
        for key, kind in kinds.items():
            value = spec.get(key) if isinstance(spec, dict) else None
            ok = type(value) is kind or (kind is float and type(value) is int)
            if ok and kind in (int, float):
                ok = (kind is int and key != "feature_dim") <= value <= (4096 if "size" in key else 2**20)
            if not ok or (kind is list and any(type(each) is not int for each in value)):
                raise InputError(f"{path}: malformed metadata, {f'{part} {key}'.strip()} {str(value)[:50]!r}")
    codec = meta["codec"]
    if meta["image_size"] % codec["factor"] or not isinstance(codec.get("source"), (str, type(None))):
        raise InputError(f"{path}: malformed metadata, codec {str(codec)[:200]}")
