"""What only a GPU can show; skipped without one, so that CI says nothing of it. `pytest tests/test_gpu.py`."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    FROZEN,
    SMALL,
    assert_close_shards,
    assert_equal,
    assert_same_run,
    output_and_gradients,
    script,
    small_unet,
)
from PIL import Image

import train
from tools import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")

TRAIN = [
    *SMALL,
    "--device",
    "cuda",
    "--steps",
    6,
    "--batch_size",
    4,
    "--accumulate",
    2,
    "--save_every",
    3,
]
TRAIN += ["--val_every", 3, "--preview_every", 6, "--workers", 1]


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "flags", [["fp32"], ["fp16"], ["bf16"], ["bf16", "--compile"], ["bf16", "--checkpointing"]]
)
def test_deterministic_training_resumes_bit_for_bit(archive, tmp_path, monkeypatch, flags):
    command = ["--archive", archive, *TRAIN, "--deterministic", "--precision", *flags]
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache a")
    )  # each chooses its kernels anew
    script("train", *command, "--out", tmp_path / "a", timeout=600)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step_0000006")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache b"))
    script("train", *command, "--out", tmp_path / "b", timeout=600)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_archives_agree(tree, archive, tmp_path, flags):
    shutil.copytree(archive, tmp_path / "a")
    (tmp_path / "a" / "00000.safetensors").unlink()
    script("precompute_dino", "--data", tree, "--archive", tmp_path / "a", *FROZEN, "--workers", 1, "--device", "cuda",
           "--batch_size", 20, "--precision", "fp32", *flags, timeout=600)  # fmt: skip
    assert_close_shards(tmp_path / "a", archive, 4e-3)


@pytest.mark.parametrize("flags", [[], ["--sampler", "dpm"], ["--stochastic_conditioning"]])
def test_samples_agree(run, tree, tmp_path, flags):
    views = {}
    for device in ("cpu", "cuda"):
        script("sample", "--ckpt", run, "--image", tree / "00011" / "000.png", "--no-crop", "--orbit", 4, "--steps", 5,
               "--precision", "fp32", "--device", device, "--out", tmp_path / device, *flags)  # fmt: skip
        views[device] = np.stack(
            [Image.open(tmp_path / device / "000" / f"{i:03d}.png") for i in range(4)]
        ).astype(int)
    assert np.abs(views["cpu"] - views["cuda"]).max() <= 2  # of 255


@pytest.mark.parametrize("batch", [2, 8])
def test_compiled_equals_eager(monkeypatch, batch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    unet, inputs = small_unet()
    inputs = [torch.cat([x] * (batch // 2)).cuda() for x in inputs]
    unet.cuda().to(memory_format=torch.channels_last)
    eager = output_and_gradients(unet, inputs)
    unet.compile(options=train.COMPILE)
    assert_equal(
        output_and_gradients(unet, inputs), eager, 1e-4
    )  # cuDNN may choose another algorithm


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_waits_for_nothing(compiled):
    """No tensor is looked at by the host within an optimiser step, of which tools.bench has a copy."""
    device, spec = torch.device("cuda", 0), {"cls_dim": 192, "feature_dim": 384, "tokens": 4}
    size = bench.SIZES["tiny"]
    model = bench.make_model(size, device, spec).train()
    shapes = {"latent": (4, 4, 4), "cls": (192,), "patch": (4, 384), "pose": (4,)}
    batch = {key: torch.randn(2, *shape).pin_memory() for key, shape in shapes.items()}
    mean, logvar = torch.zeros(2, 2, 4, 4, 4, device=device)

    def prepare():
        return (
            mean,
            logvar,
            {key: value.to(device, non_blocking=True) for key, value in batch.items()},
        )

    step = bench.make_step(model, prepare, 2, 2, "bf16", False)
    if compiled:
        model.unet.compile(options=train.COMPILE)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
