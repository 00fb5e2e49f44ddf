"""A small tree of shapes, its archive and a trained run, made once by the real scripts; and how tests call them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the sizes here gain nothing from more

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


def script(name: str, *argv, nproc: int = 0, check: bool = True, timeout: int = 150) -> subprocess.CompletedProcess:
    """Run a script as a user does, or under torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    module = ["-m", name] if "." in name else [ROOT / f"{name}.py"]
    command = [sys.executable, *launch, *module, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr or nproc, done.stderr[-3000:]  # torchrun has its own of ranks that fail
    return done


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    from tools import shapes

    root = tmp_path_factory.mktemp("shapes") / "tree"
    call(shapes, "--out", root, "--objects", 12, "--views", 4, "--size", 32)
    return root


@pytest.fixture(scope="session")
def archive(tree) -> Path:
    import precompute_dino

    out = tree.parent / "archive"
    call(precompute_dino, "--data", tree, "--archive", out, *FROZEN, "--workers", 0, "--precision", "fp32")
    return out


@pytest.fixture(scope="session")
def run(archive) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6."""
    import train

    out = archive.parent / "run"
    call(train, "--archive", archive, "--out", out, *SMALL, "--steps", 6, "--batch_size", 4, "--accumulate", 2,
         "--save_every", 3, "--val_every", 3, "--preview_every", 6)  # fmt: skip
    return out
