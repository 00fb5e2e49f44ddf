"""tools/slurm.sh, with stand-ins for the commands of SLURM: requeueing, and refusals."""

import os
import subprocess

import pytest
from helpers import ROOT


@pytest.fixture
def slurm(tmp_path):
    """A function that runs slurm.sh, given what scontrol and srun do, and its arguments."""

    def run(scontrol: str, srun: str, *argv) -> subprocess.CompletedProcess:
        for name, body in (("scontrol", scontrol), ("srun", srun)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        env = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
            "SLURM_JOB_ID": "7",
        }
        return subprocess.run(
            ["bash", ROOT / "tools/slurm.sh", *argv],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_it_fails_where_it_cannot_requeue(slurm):
    done = slurm('[ "$1" = show ] && echo n1', "touch preempted", "--out", ".")
    assert done.returncode == 1
    assert "error: job 7 was not requeued" in done.stderr


@pytest.mark.parametrize("argv", [["--out", "run", "--lr", "1"], ["--lr", "1", "--out=run"]])
def test_it_takes_both_spellings_of_out_and_requeues(slurm, tmp_path, argv):
    (tmp_path / "run").mkdir()
    done = slurm('echo "$@"', "sleep 0.3; touch run/preempted; exit 1", *argv)
    assert done.returncode == 0
    assert "requeue 7" in done.stdout


@pytest.mark.parametrize("argv", [["--lr", "1"], ["--lr", "1", "--out"]])
def test_it_needs_out(slurm, argv):
    done = slurm("echo", "exit 0", *argv)
    assert done.returncode == 1
    assert "error: --out OUT is needed" in done.stderr
