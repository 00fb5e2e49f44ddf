"""Device and ranks: which GPU is ours, and what the processes of one job agree on.

A rank is one of the processes that torchrun starts; the world size is their number.
"""

import copy
import inspect
import os
import resource
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lib.cli import InputError
from lib.signals import start_workers_unstoppable


def open_device(name: str, precision: str | None) -> tuple[torch.device, str]:
    """The device and the precision that --device and --precision ask for; sets TF32 accordingly.

    name: "auto" is this process's GPU where there is one, else the CPU. precision: bf16, fp16, fp32
    or None, which is bf16 on a GPU and fp32 on a CPU. Raises InputError naming --device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: not a device") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: cpu or cuda")
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise InputError(f"--device {name}: torchrun gives each process its GPU; give cuda")
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if precision is None:
        precision = "bf16" if device.type == "cuda" else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return device, precision


def join_ranks(backend: str = "gloo") -> tuple[int, int]:
    """(rank, world size). Joins torchrun's process group; without torchrun there is one rank.

    Raises InputError where only some of torchrun's variables are set.
    """
    if "RANK" not in os.environ:
        return 0, 1
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"the environment has RANK={os.environ['RANK']} but no {name}: "
                "start this script with torchrun, or unset RANK"
            )
    # Over gloo alone ranks wait for hours while rank 0 works. With NCCL they wait for a preview or
    # a checkpoint at most, and a peer that died must not hold the others for long.
    timeout = timedelta(days=2) if backend == "gloo" else timedelta(minutes=30)
    # While it waits, Python's own handler of Ctrl-C does not run, and the process would not end.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] != "1":
        print(f"waiting for {os.environ['WORLD_SIZE']} processes", flush=True)
    dist.init_process_group(backend, timeout=timeout)
    signal.signal(signal.SIGINT, handler)
    return dist.get_rank(), dist.get_world_size()


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all(world: int) -> None:
    """Returns once every rank has called it."""
    if world > 1:
        dist.barrier()


def from_rank_0(value, world: int):
    """Rank 0's value, on every rank."""
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(work, rank: int, world: int):
    """What work() returns on rank 0, on every rank. Its InputError is raised on every rank, too."""
    result, message = None, None
    if rank == 0:
        try:
            result = work()
        except InputError as error:
            message = str(error)
    result, message = from_rank_0((result, message), world)
    if message is not None:
        raise InputError(message)
    return result


def gather_objects(value, world: int) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, world: int) -> bool:
    """Whether the flag is set on any rank. The tensor is on the CPU, so nobody waits for a GPU."""
    if world == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def sum_over_ranks(tensor: Tensor, world: int) -> Tensor:
    """The sum of all ranks' tensors; the argument stays as it is."""
    total = tensor.clone()
    if world > 1:
        dist.all_reduce(total)
    return total


def check_alike(facts: dict, world: int, where: str) -> None:
    """Raises InputError, on every rank, where one finds other facts than rank 0: other files, say.

    facts: {what, in words: value}; where: the flags to look at.
    """
    of_all = gather_objects(facts, world)
    for rank, theirs in enumerate(of_all):
        for what, value in of_all[0].items():
            if theirs[what] != value:
                raise InputError(
                    f"{where}: rank {rank} finds other {what}: {theirs[what]}, rank 0 {value}; "
                    "is one being written?"
                )


def wrap_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP around a model whose buffers never change and so are not synchronised."""
    parameters = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # The compiler cuts its graph at each bucket: by default 130 for the paper's model.
        bucket_cap_mb=256,
        **{sync: False},
    )


def without_compiler():
    """A block in which compiled code runs eagerly: the compiler would specialise on its sizes."""
    return torch.compiler.set_stance("force_eager")


def compile_in_place(module: nn.Module) -> None:
    """torch.compile that keeps the parameters' names. Signals do not end its processes."""
    with start_workers_unstoppable():
        # torch 2.6 starts its processes when this is imported; newer versions when they are asked.
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
    if torch.__version__ < "2.14" and getattr(module, "checkpointing", False):
        # torch 2.6 fails where it cuts a graph that recomputes at DDP's buckets.
        torch._dynamo.config.optimize_ddp = False
    options = {}
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        # A fusion for GPUs that fails an assertion of torch 2.14.1 at some shapes.
        options["triton.mix_order_reduction"] = False
    module.compile(options=options)


def flops_per_sample(model: nn.Module, condition: dict[str, Tensor]) -> int:
    """Forward and backward of one sample, counted on the "meta" device: nothing is computed.

    condition: as NovelViewModel.forward takes it, of any batch size.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here: this import takes 0.2 s

    shadow = copy.deepcopy(model).to("meta")
    one = {key: value[:1].to("meta", torch.float32) for key, value in condition.items()}
    with FlopCounterMode(display=False) as counter:
        shadow(one["latent"], torch.zeros(1, device="meta"), one)
    return 3 * counter.get_total_flops()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def peak_memory(device: torch.device) -> float:
    """The peak so far in GB: of the GPU or, on the CPU, of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
