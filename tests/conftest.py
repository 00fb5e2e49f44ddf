"""A small tree of shapes, its archive and runs on it, made once by the real scripts."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import FROZEN, TRAIN, archiving, call, run_child, stop_in_step_3, training
from tqdm import tqdm

import data
import precompute_dino
import train
from tools import shapes

torch.set_num_threads(1)  # the sizes here gain nothing from more

# Where the first backward pass comes after a torch.compile, autograd starts threads, and no child
# that is forked later can go backward.
torch.ones(1, requires_grad=True).backward()

# Before any bar is drawn: a bar's class then makes no lock of processes, which a child that is
# killed would hold for ever, and no thread holds the lock while a test forks.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """12 objects of 4 views, 32 x 32."""
    root = tmp_path_factory.mktemp("shapes") / "tree"
    call(shapes, "--out", root, "--kind", "blocks", "--objects", 12, "--views", 4, "--size", 32)
    return root


@pytest.fixture(scope="session")
def archive(tree) -> Path:
    """The tree's archive, with a random image encoder: 9 objects train, 3 are held out."""
    out = tree.parent / "archive"
    flags = [*FROZEN, "--workers", 0, "--precision", "fp32"]
    call(precompute_dino, "--data", tree, "--archive", out, *flags)
    return out


@pytest.fixture(scope="session")
def run(archive) -> Path:
    """A run of 6 steps on the archive, with checkpoints at 3 and 6."""
    out = archive.parent / "run"
    call(train, "--archive", archive, "--out", out, *TRAIN, "--preview_every", 6)
    return out


@pytest.fixture(scope="session")
def small(tree) -> Path:
    """A folder with an archive of six shards, and runs of 10 steps on it.

    at4: a signal stopped it in its fourth step. run: the same, which then went on to the end.
    whole: it was never stopped.
    """
    root = tree.parent / "small"
    root.mkdir()
    log = root / "log"
    archive = root / "archive"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD_OBJECTS", 2)
        assert run_child(archiving(tree, archive), log) == 0, log.read_text()
        stopped = training(archive, root / "at4")
        assert run_child(stopped, log, setup=stop_in_step_3) == 0, log.read_text()
        shutil.copytree(root / "at4", root / "run")
        for name in ("run", "whole"):
            assert run_child(training(archive, root / name), log) == 0, log.read_text()
    return root


@pytest.fixture
def at4(small, tmp_path) -> Path:
    """A copy of the run that a signal stopped in its fourth step."""
    return Path(shutil.copytree(small / "at4", tmp_path / "run"))
