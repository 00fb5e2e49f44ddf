"""What only a GPU can show; skipped without one, so CI says nothing of it.

`pytest tests/test_gpu.py`, or `python -m tools.gpu_check`.
"""

import shutil
from itertools import repeat

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
from lib.distributed import compile_in_place
from tools.bench_train import Enough, run_train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")

TRAIN = [
    *SMALL,
    *("--device", "cuda"),
    *("--steps", 6),
    *("--batch_size", 4),
    *("--accumulate", 2),
    *("--save_every", 3),
    *("--val_every", 3),
    *("--preview_every", 6),
    *("--workers", 1),
]


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


@pytest.mark.timeout(1300)
@pytest.mark.parametrize(
    "flags",
    [["fp32"], ["fp16"], ["bf16"], ["bf16", "--compile"], ["bf16", "--checkpointing"]],
)
def test_deterministic_training_resumes_bit_for_bit(archive, tmp_path, monkeypatch, flags):
    command = ["--archive", archive, *TRAIN, "--deterministic", "--precision", *flags]
    # Separate caches, so that each process chooses its kernels itself.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache a"))
    script("train", *command, "--out", tmp_path / "a", timeout=600)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step_0000006")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache b"))
    script("train", *command, "--out", tmp_path / "b", timeout=600)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_archives_agree(tree, archive, tmp_path, flags):
    out = tmp_path / "a"
    shutil.copytree(archive, out)
    (out / "00000.safetensors").unlink()
    small = ["--workers", 1, "--batch_size", 20, "--precision", "fp32"]
    command = ["--data", tree, "--archive", out, *FROZEN, *small, "--device", "cuda"]
    script("precompute_dino", *command, *flags, timeout=600)
    assert_close_shards(out, archive, 4e-3)


@pytest.mark.parametrize("flags", [[], ["--sampler", "dpm"], ["--stochastic_conditioning"]])
def test_samples_agree(run, tree, tmp_path, flags):
    image = tree / "00011" / "000.png"
    command = ["--ckpt", run, "--image", image, "--no-crop", "--orbit", 4, "--steps", 5]
    views = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        where = ["--precision", "fp32", "--device", device, "--out", out]
        script("sample", *command, *where, *flags)
        pictures = [Image.open(out / "000" / f"{i:03d}.png") for i in range(4)]
        views[device] = np.stack(pictures).astype(int)
    assert np.abs(views["cpu"] - views["cuda"]).max() <= 2  # of 255


@pytest.mark.parametrize("batch", [2, 8])
def test_compiled_equals_eager(monkeypatch, batch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    unet, inputs = small_unet()
    inputs = [torch.cat([x] * (batch // 2)).cuda() for x in inputs]
    unet.cuda().to(memory_format=torch.channels_last)
    eager = output_and_gradients(unet, inputs)
    compile_in_place(unet)
    compiled = output_and_gradients(unet, inputs)
    assert_equal(compiled, eager, 1e-4)  # cuDNN may choose another algorithm


@pytest.mark.parametrize("flags", [["bf16"], ["fp16"], ["bf16", "--compile"]])
def test_a_step_waits_for_nothing(archive, tmp_path, flags):
    """The host looks at no tensor from one step's batches to the next one's."""

    def start_loader(train_set, *others):
        batch = {key: value.pin_memory() for key, value in train_set[[0, 1, 2, 3]].items()}

        def batches():
            yield from repeat(batch, 2)  # the first step, which compiles
            torch.cuda.set_sync_debug_mode("error")
            yield from repeat(batch, 2)
            raise Enough

        return batches()

    never = ["--log_every", 100, "--save_every", 100, "--val_every", 0, "--preview_every", 0]
    command = [*SMALL, "--device", "cuda", "--batch_size", 4, "--accumulate", 2, "--steps", 100]
    words = ["--archive", archive, "--out", tmp_path, *command, *never, "--precision", *flags]
    try:
        run_train([str(word) for word in words], train.build_model, start_loader, compile_in_place)
    finally:
        torch.cuda.set_sync_debug_mode("default")
