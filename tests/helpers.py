"""What several test files use: how scripts are run, small settings, and how runs are compared."""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import precompute_dino
import train
from lib.cli import run_script
from model import UNet

ROOT = Path(__file__).parents[1]
# Without a look at the machine's name, which some cannot resolve.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
LONG = bool(os.environ.get("LONG"))  # LONG=1: many more kills and mutated files

# Small settings for precompute_dino.py and train.py. VIT: the image encoder's flags alone.
VIT = shlex.split(
    "--encoder vit_tiny_patch16_224 --weights random --layers 3 7 --encoder_size 64 --device cpu"
)
FROZEN = [*VIT, *shlex.split("--codec pixels --image_size 32 --val_fraction 0.25")]
SMALL = shlex.split(
    "--width 32 --channel_mult 1 2 --res_blocks 1 --attention 2 --heads 4 --context_dim 16 "
    "--prediction v --t_sampling uniform --lr 1e-3 --warmup 2 --precision fp32 --device cpu "
    "--workers 0 --log_every 1 --val_pairs 4"
)
# What the fixture `run` was trained with.
TRAIN = [
    *SMALL,
    *shlex.split("--steps 6 --batch_size 4 --accumulate 2"),
    *shlex.split("--save_every 3 --val_every 3 --preview_every 0"),
]

# Smaller still, for runs that are killed again and again.
TINY_FROZEN = [
    *FROZEN,
    *shlex.split("--encoder test_vit --layers 2 --encoder_size 32 --precision fp32 --workers 0"),
]
TINY_TRAIN = [
    *SMALL,
    *shlex.split("--channel_mult 1 --attention 1 --steps 10 --batch_size 4 --accumulate 2"),
    *shlex.split("--save_every 2 --val_every 4 --preview_every 0"),
]


# ------------------------------------------------------------------------------------- run scripts


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def set_arguments(module, argv) -> list[str]:
    """Makes these the arguments of the command line; returns the arguments of before."""
    before = sys.argv
    sys.argv = [module.__name__, *(str(argument) for argument in argv)]
    return before


def call(module, *argv) -> None:
    """Runs a script's main() with these arguments, in this process."""
    before = set_arguments(module, argv)
    try:
        module.main()
    finally:
        sys.argv = before


def parse(module, *argv) -> argparse.Namespace:
    """The flags as a script reads them."""
    before = set_arguments(module, argv)
    try:
        return module.parse_args()
    finally:
        sys.argv = before


def script(
    name: str, *argv, nproc: int = 0, check: bool = True, timeout: int = 400
) -> subprocess.CompletedProcess:
    """Runs a script as a user does; nproc: under torchrun, in so many processes."""
    command = [sys.executable]
    if nproc:
        command += [*TORCHRUN, f"--nproc_per_node={nproc}"]
    command += ["-m", name] if "." in name else [ROOT / f"{name}.py"]
    command += argv
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",  # names the threads of a process that a library aborts
    }
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # not killed: torchrun then ends its ranks
            raise
    done = subprocess.CompletedProcess(command, process.returncode, printed, errors)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    if nproc == 0:  # torchrun prints a traceback of its own when a rank fails
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


# --------------------------------------------------------------- children, which may be killed


def fork(work: Callable, log: Path, setup: Callable | None = None) -> int:
    """Starts setup() and then a script's main `work` in a child; returns its process id.

    The child is forked from this process, which has imported everything: a kill costs a second.
    What it prints goes to `log`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # Another thread of the parent may have held the lock as it forked. See conftest.py, too.
        tqdm.set_lock(threading.RLock())
        output = open(log, "w", buffering=1)  # noqa: SIM115 (open until the child ends)
        sys.stdout = output
        sys.stderr = output
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        if setup is not None:
            setup()
        run_script(work)
        code = 0
    except SystemExit as stop:
        print(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 400) -> int | None:
    """The child's exit code, or minus the signal that ended it; None if it runs for longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def wait_or_kill(pid: int) -> int | None:
    """The child's exit code; None, and it is killed, if it does not end in time."""
    code = wait(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code


def run_child(work: Callable, log: Path, setup: Callable | None = None) -> int | None:
    """The exit code of a script's main `work` in a child; see `fork`."""
    return wait_or_kill(fork(work, log, setup))


def archiving(tree: Path, out: Path, seed: int = 0) -> Callable:
    """precompute_dino.py's main, with small settings."""

    def main():
        torch.manual_seed(seed)  # of the random encoder
        call(precompute_dino, "--data", tree, "--archive", out, *TINY_FROZEN)

    return main


def training(archive: Path, out: Path, *flags) -> Callable:
    """train.py's main, with small settings."""

    def main():
        call(train, "--archive", archive, "--out", out, *TINY_TRAIN, *flags)

    return main


def at_step(step: int, action: Callable) -> None:
    """Makes `action()` happen as optimiser step `step`, counted from 0, begins.

    It stays so: call it in a child, or in a test that restores train.learning_rate.
    """
    learning_rate = train.learning_rate

    def act_and_compute(now, args):
        if now == step:
            action()
        return learning_rate(now, args)

    train.learning_rate = act_and_compute


def signal_itself(number: int) -> Callable:
    """An action: this process gets the signal."""
    return lambda: os.kill(os.getpid(), number)


def stop_in_step_3() -> None:
    at_step(3, signal_itself(signal.SIGUSR1))


# ------------------------------------------------------------------------------------ compare runs


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    """The EMA weights of a checkpoint."""
    return load_file(run / f"step_{step:07d}" / "model.safetensors")


def load_state(run: Path, step: int) -> dict:
    """What state.pt of a checkpoint holds."""
    return torch.load(run / f"step_{step:07d}" / "state.pt", "cpu", weights_only=True)


def raw_weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that are not averaged."""
    return load_state(run, step)["model"]


CLOCKED = ("seconds", "samples_per_second", "tflops", "peak_memory_gb")


def log_lines(run: Path) -> list[dict]:
    """log.jsonl without what depends on the clock."""
    lines = []
    for text in (run / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({key: value for key, value in line.items() if key not in CLOCKED})
    return lines


def logged(run: Path, key: str) -> list:
    """The values of this key in log.jsonl, of the lines that have it: "loss" or "val_loss"."""
    return [line[key] for line in log_lines(run) if key in line]


def steps_with(run: Path, key: str) -> list[int]:
    """The steps whose line of log.jsonl has this key."""
    return [line["step"] for line in log_lines(run) if key in line]


def same(a, b) -> bool:
    """Equal bit for bit, through dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


RESULTS = ("step", "model", "optimizer", "scaler", "skipped", "losses", "validated")


def assert_same_run(a: Path, b: Path, step: int = 6) -> None:
    """Log, EMA weights, raw weights and optimiser after so many steps are equal bit for bit."""
    assert log_lines(a) == log_lines(b)
    assert same(weights(a, step), weights(b, step))
    state_a = load_state(a, step)
    state_b = load_state(b, step)
    for key in RESULTS:
        assert same(state_a[key], state_b[key]), key


def assert_close_shards(a: Path, b: Path, tolerance: float) -> None:
    ours = load_file(a / "00000.safetensors")
    theirs = load_file(b / "00000.safetensors")
    assert torch.equal(ours.pop("view_offset"), theirs.pop("view_offset"))
    for key in theirs.keys() - {"crc32"}:
        torch.testing.assert_close(
            ours[key].float(), theirs[key].float(), atol=tolerance, rtol=tolerance
        )


# --------------------------------------------------------------------------------- a UNet by itself


def small_unet(channel_mult=(1, 2), attention_resolutions=(1, 2)) -> tuple[UNet, tuple]:
    """A UNet without zeros in its parameters, and inputs for it."""
    torch.manual_seed(0)
    unet = UNet(
        model_channels=32,
        channel_mult=channel_mult,
        num_res_blocks=1,
        attention_resolutions=attention_resolutions,
        num_heads=4,
        context_dim=16,
        feature_dim=12,
        feature_tokens=16,
        latent_size=8,
    )
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.1)
        else:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    inputs = (
        torch.randn(2, 8, 8, 8),
        torch.tensor([3, 900]),
        torch.randn(2, 1, 16),
        torch.randn(2, 16, 12),
    )
    return unet, inputs


def output_and_gradients(unet: UNet, inputs: tuple) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    x = inputs[0].clone().requires_grad_()
    output = unet(x, *inputs[1:])
    output.square().mean().backward()
    found = {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad}
    found["output"] = output.detach()
    found["input's gradient"] = x.grad
    return found


def assert_equal(a: dict, b: dict, tolerance: float = 3e-5) -> None:
    """Each tensor of `a` is within this share of the norm of b's.

    Gradients that are zero up to rounding are compared with a thousandth of the largest norm.
    """
    assert a.keys() == b.keys()
    floor = 1e-3 * max(float(value.norm()) for value in b.values())
    for name, value in b.items():
        error = float((a[name] - value).norm() / value.norm().clamp(min=floor))
        assert error < tolerance, (name, error)
