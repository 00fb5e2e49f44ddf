"""What several test files use: how a script is run, small settings, and how two runs are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import UNet

ROOT = Path(__file__).parents[1]
LONG = bool(os.environ.get("LONG"))

FROZEN = (
    "--device cpu --codec pixels --image_size 32 --encoder vit_tiny_patch16_224 --weights random --layers 3 7 "
    "--encoder_size 64 --val_fraction 0.25"
).split()
SMALL = (
    "--width 32 --channel_mult 1 2 --res_blocks 1 --attention 2 --heads 4 --context_dim 16 --prediction v --lr 1e-3 "
    "--t_sampling uniform --precision fp32 --workers 0 --warmup 2 --log_every 1 --val_pairs 4 --device cpu"
).split()


def call(module, *argv) -> None:
    """Run a script's main() with these arguments, in this process."""
    old = sys.argv
    sys.argv = [module.__name__, *map(str, argv)]
    try:
        module.main()
    finally:
        sys.argv = old


def script(
    name: str, *argv, nproc: int = 0, check: bool = True, timeout: int = 150
) -> subprocess.CompletedProcess:
    """Run a script as a user does, or under torchrun."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc
        else []
    )
    module = ["-m", name] if "." in name else [ROOT / f"{name}.py"]
    command = [sys.executable, *launch, *module, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=env, timeout=timeout
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr or nproc, done.stderr[
        -3000:
    ]  # torchrun has its own of ranks that fail
    return done


def weights(run, step=6):
    return load_file(run / f"step_{step:07d}" / "model.safetensors")


def assert_same_run(a, b):
    """Log, EMA and raw weights after step 6, bit for bit."""
    assert log_lines(a) == log_lines(b)
    for ours, theirs in ((weights(a), weights(b)), (raw_weights(a), raw_weights(b))):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def raw_weights(run, step=6):
    return torch.load(run / f"step_{step:07d}" / "state.pt", "cpu", weights_only=True)["model"]


def log_lines(run):
    """log.jsonl without what depends on the clock."""
    clocked = ("seconds", "samples_per_second", "tflops", "peak_memory_gb")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocked} for line in lines]


def assert_close_shards(a, b, tolerance):
    ours, theirs = (load_file(folder / "00000.safetensors") for folder in (a, b))
    assert torch.equal(ours.pop("view_offset"), theirs.pop("view_offset"))
    for key in theirs.keys() - {"crc32"}:
        torch.testing.assert_close(
            ours[key].float(), theirs[key].float(), atol=tolerance, rtol=tolerance
        )


def small_unet(channel_mult=(1, 2), attention_resolutions=(1, 2)) -> tuple[UNet, tuple]:
    torch.manual_seed(0)
    shape = dict(
        channel_mult=channel_mult,
        attention_resolutions=attention_resolutions,
        num_heads=4,
        context_dim=16,
    )
    unet = UNet(
        model_channels=32,
        num_res_blocks=1,
        feature_dim=12,
        feature_tokens=16,
        latent_size=8,
        **shape,
    )
    for p in unet.parameters():
        torch.nn.init.normal_(p, 0.5 * (p.ndim == 1), 0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
    return unet, (
        torch.randn(2, 8, 8, 8),
        torch.tensor([3, 900]),
        torch.randn(2, 1, 16),
        torch.randn(2, 16, 12),
    )


def output_and_gradients(unet, inputs) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    x = inputs[0].clone().requires_grad_()
    output = unet(x, *inputs[1:])
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad}
    return gradients | {"output": output.detach(), "input's gradient": x.grad}


def assert_equal(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    """Within this share of each tensor's norm; gradients that are zero but for rounding count against the largest."""
    floor = 1e-3 * max(float(v.norm()) for v in b.values())
    wrong = {k: float((a[k] - b[k]).norm() / b[k].norm().clamp(min=floor)) for k in b}
    assert a.keys() == b.keys() and max(wrong.values()) < tolerance, max(wrong, key=wrong.get)
