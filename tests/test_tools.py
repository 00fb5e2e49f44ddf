"""studies/table.py, consistency.py, steps.py and slurm.sh: what they print, write and refuse."""

import json
import os
import subprocess

import pytest
from helpers import ROOT, call

from lib.cli import InputError
from studies import consistency, steps, table
from tools import shapes


def test_consistency_of_orbits_that_show_too_little(run, tmp_path):
    for views, words in (
        (1, "00000 has 1 view"),
        (2, "00000 has 2 view"),
        (3, "neighbouring views of no orbit"),
    ):
        call(
            shapes,
            "--out",
            tmp_path / str(views),
            "--objects",
            1,
            "--views",
            views,
            "--size",
            32,
            "--orbit",
        )
        with pytest.raises(InputError, match=f"--data .*/{views}: {words}"):
            call(
                consistency,
                "--ckpt",
                run,
                "--data",
                tmp_path / str(views),
                "--out",
                tmp_path / "x.jsonl",
            )


def test_consistencys_seeds_are_one_flag_and_the_recorded_ones(run, tmp_path, capsys):
    call(shapes, "--out", tmp_path / "orbit", "--objects", 1, "--views", 8, "--size", 32, "--orbit")
    scores = []
    for argv in (("--seed", 3), ("--seeds", 3, 4)):
        call(consistency, "--ckpt", run, "--data", tmp_path / "orbit", "--steps", 1, "--scale", 1, *argv,
             "--out", tmp_path / "new/x.jsonl")  # fmt: skip
        scores.append(
            [json.loads(line) for line in (tmp_path / "new/x.jsonl").read_text().splitlines()]
        )
    assert len(scores[0]) == 4 and scores[0] == [line for line in scores[1] if line["seed"] == 3]
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("tool", [consistency, steps])
def test_wrong_flags_fail_before_the_hour(tool, tmp_path):
    (tmp_path / "file").touch()
    for steps_, out, words in (
        (0, "x", "--steps 0"),
        (1001, "x", "--steps 1001"),
        (2, "file/x", "could not be writ"),
    ):
        with pytest.raises(InputError, match=words):
            call(
                tool, "--ckpt", "none", "--data", "none", "--steps", steps_, "--out", tmp_path / out
            )
    (tmp_path / "x.jsonl").write_text("kept")
    out = tmp_path / ("x" if tool is steps else "x.jsonl")
    with pytest.raises(InputError, match="none"):
        call(
            tool,
            "--ckpt",
            tmp_path / "none",
            "--data",
            "none",
            "--steps",
            2,
            "--out",
            out,
            "--device",
            "cpu",
        )
    assert (tmp_path / "x.jsonl").read_text() == "kept"


def test_slurm_fails_where_it_cannot_requeue(tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo n1\n')
    (tmp_path / "srun").write_text("#!/bin/sh\ntouch preempted\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1",
           "SLURM_JOB_ID": "7"}  # fmt: skip
    done = subprocess.run(["bash", ROOT / "tools/slurm.sh", "--out", "."], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1 and "error: job 7 was not requeued" in done.stderr, done


def test_slurm_takes_both_spellings_of_out_and_requeues(tmp_path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").write_text("#!/bin/sh\nsleep 0.3\ntouch run/preempted\nexit 1\n")
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1",
           "SLURM_JOB_ID": "7"}  # fmt: skip
    for argv, words in (
        (["--out", "run", "--lr", "1"], "requeue 7"),
        (["--lr", "1", "--out=run"], "requeue 7"),
        (["--lr", "1"], "error: --out OUT is needed"),
        (["--lr", "1", "--out"], "error: --out OUT is needed"),
    ):
        done = subprocess.run(["bash", ROOT / "tools/slurm.sh", *argv], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=60)  # fmt: skip
        assert words in done.stdout + done.stderr and done.returncode == ("error" in words), done
