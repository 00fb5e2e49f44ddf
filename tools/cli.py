"""What all scripts share: errors in one line, help with defaults, device and ranks, checks of flags and metadata."""

import argparse
import contextlib
import copy
import os
import re
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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


def set_up(args: argparse.Namespace, backend: str = "gloo") -> tuple[torch.device, int, int]:
    """(device, rank, world size) by --device and torchrun, whose process group is joined; --precision's default, TF32.

    "auto" is this process's GPU where there is one. Raises InputError naming --device.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: not a device") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: cpu or cuda")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if "RANK" not in os.environ:
        return device, 0, 1
    dist.init_process_group(backend, timeout=timedelta(days=2) if backend == "gloo" else None)
    return device, dist.get_rank(), dist.get_world_size()


def from_rank_0(value, world: int):
    """Rank 0's value, on every rank."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def agree(flag: bool, world: int) -> bool:
    """Whether any rank's flag is set; over gloo, so that no GPU is waited for."""
    if world == 1:
        return flag
    reduced = torch.tensor(int(flag))
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return bool(reduced)


def flops_per_sample(model: torch.nn.Module, condition: dict[str, torch.Tensor]) -> int:
    """Forward and backward of one sample, counted on the plain graph; nothing is computed."""
    from torch.utils.flop_counter import FlopCounterMode  # here: it takes .2 s, and few scripts need it

    shadow = copy.deepcopy(model).to("meta")
    one = {key: value[:1].to("meta", torch.float32) for key, value in condition.items()}
    with FlopCounterMode(display=False) as counter:
        shadow(one["latent"], torch.zeros(1, device="meta"), one)
    return 3 * counter.get_total_flops()


def peak_memory(device: torch.device) -> float:
    """GB, of the device or, on the CPU, of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


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
