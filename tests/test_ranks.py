"""Processes: how many data workers there are by default, and waiting for the other ranks."""

import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from lib import cli
from lib.distributed import open_device


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(64, 1, 4), (2, 1, 2), (1, 1, 1), (64, 8, 4), (8, 8, 1)]
)
def test_workers_are_no_more_than_cores(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert cli.default_workers() == workers


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"),
            "/dev/shm.*--shm-size.*--workers 0",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                "that dataloader's workers are out of shared memory."
            ),
            "/dev/shm.*--shm-size.*--workers 0",
        ),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("Pin memory thread exited unexpectedly"), "ulimit -n"),
    ],
)
def test_what_workers_run_out_of_is_named(error, words):
    """PyTorch's own messages on Docker's small /dev/shm, and on a low limit of open files."""
    assert re.search(words, cli.explain(error) or "no line: a traceback")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(cli.InputError, match="--device cuda:0: .*give cuda$"):
        open_device("cuda:0", None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_others_can_be_stopped(tmp_path, number):
    """There is nothing to save yet, so the first signal ends it."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, ROOT / "train.py", "--archive", "x", "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    try:
        assert process.stdout.readline() == "waiting for 2 processes\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == -number
    finally:
        process.kill()
        process.stdout.close()


def test_a_rank_that_is_done_cannot_fail_while_python_ends():
    lines = (
        "import atexit, os",
        "from lib.cli import run_script",
        "class Last:",
        "    def __del__(self, abort=os.abort):",
        "        abort()",
        "last = Last()",
        "atexit.register(print, 'and tidied up')",
        "run_script(lambda: print('done'))",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = {**os.environ, "RANK": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\nand tidied up\n")
