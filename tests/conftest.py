"""A small tree of shapes, its archive and a trained run, made once by the real scripts."""

from pathlib import Path

import pytest
import torch
from helpers import FROZEN, SMALL, call

torch.set_num_threads(1)  # the sizes here gain nothing from more


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    from tools import shapes

    root = tmp_path_factory.mktemp("shapes") / "tree"
    call(shapes, "--out", root, "--kind", "blocks", "--objects", 12, "--views", 4, "--size", 32)
    return root


@pytest.fixture(scope="session")
def archive(tree) -> Path:
    import precompute_dino

    out = tree.parent / "archive"
    call(
        precompute_dino,
        "--data",
        tree,
        "--archive",
        out,
        *FROZEN,
        "--workers",
        0,
        "--precision",
        "fp32",
    )
    return out


@pytest.fixture(scope="session")
def run(archive) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6."""
    import train

    out = archive.parent / "run"
    call(train, "--archive", archive, "--out", out, *SMALL, "--steps", 6, "--batch_size", 4, "--accumulate", 2,
         "--save_every", 3, "--val_every", 3, "--preview_every", 6)  # fmt: skip
    return out
