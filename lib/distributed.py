"""Device and ranks: which GPU is ours, and what the processes of a job agree on."""

import argparse
import copy
import os
import resource
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.cli import InputError


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
