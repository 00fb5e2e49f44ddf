"""studies/table.py, consistency.py, steps.py and slurm.sh: what they print, write and refuse."""

import json
import os
import subprocess

import pytest
from helpers import ROOT, call

from lib.cli import InputError
from studies import consistency, steps, table
from tools import shapes

BLANK = {"data": "d", "split": "val", "protocol": "pairs", "pairs": 4, "image_size": 32, "lpips_net": None,
         "val_fraction": 0.1}  # fmt: skip


def score(run: str | None, psnr: float, row: str = "samples", step: int = 20, **changed) -> dict:
    """A line of evaluate.py's, a baseline's without a run."""
    line = BLANK | {"row": row, "psnr": psnr, "lpips": None} | changed
    flags = {
        "out": run,
        "seed": run and int(run[-1]),
        "t_mean": 700,
        "layers": [3, 7],
        "steps": 90,
        "global_batch": 8,
    }
    own = {
        "steps": 2,
        "seed": 0,
        "sampler": "ddim",
        "checkpoint": run,
        "step": step,
        "run_args": flags,
    }
    return own | line if run else line


def rows(path, lines, capsys, *argv) -> list[list[str]]:
    """The table's cells, below its head, of the lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    call(table, "--eval", path, "--by", "t_mean", "layers", *argv)
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]


def test_table_has_the_last_checkpoint_of_each_run_and_baselines_of_the_same_pairs(
    tmp_path, capsys
):
    lines = [
        score(None, 1.0, "white", pairs=8),
        score(None, 2.0, "white"),
        score(None, 3.0, "white", split="train"),
    ]
    lines += [
        score("a0", 5.0, step=10),
        score("a0", 10.0),
        score("a1", 20.0),
        score("a0", 4.0, "poses shuffled"),
    ]
    foreign = score("z0", 8.0) | {"run_args": None, "step": None}
    lines += [foreign, foreign | {"steps": 3, "psnr": 9.0}, foreign | {"checkpoint": "z1"}]
    assert rows(tmp_path / "eval.jsonl", lines, capsys) == [
        ["700", "[3, 7]", "samples", "2", "15 ± 7.1"],
        ["700", "[3, 7]", "poses shuffled", "1", "4"],
        ["", "", "white", "1", "2"],
        ["", "", "samples of z0", "1", "8"],
        ["", "", "samples of z1", "1", "8"],
    ]  # fmt: skip


def test_table_refuses_two_settings_of_one_run(tmp_path, capsys):
    path, lines = tmp_path / "eval.jsonl", [score("a0", 5.0), score("a0", 6.0, steps=3)]
    with pytest.raises(InputError, match="--eval: steps 2 and 3 don't compare; choose by --where"):
        rows(path, lines, capsys)
    assert rows(path, lines, capsys, "--where", "steps=3") == [
        ["700", "[3, 7]", "samples", "1", "6"]
    ]
    with pytest.raises(InputError, match="eval.jsonl: no scores of runs that fulfil --where"):
        rows(path, lines, capsys, "--where", "steps=4")


@pytest.mark.parametrize("key", ["step", "steps", "global_batch"])
def test_table_refuses_to_average_runs_that_were_not_trained_equally_long(tmp_path, capsys, key):
    path, lines = tmp_path / "eval.jsonl", [score("a0", 5.0), score("a1", 6.0)]
    flags = lines[1] if key == "step" else lines[1]["run_args"]
    flags[key] = 40
    name = key if key == "step" else f"train.{key}"
    with pytest.raises(InputError, match=f"--eval: {name} .*40.* don't compare; choose by --where"):
        rows(path, lines, capsys)
    assert rows(path, lines, capsys, "--where", f"{name}=40") == [
        ["700", "[3, 7]", "samples", "1", "6"]
    ]


def test_samples_a_pair_are_evaluates_and_tell_lines_apart(tmp_path, capsys):
    path, lines = (
        tmp_path / "eval.jsonl",
        [score("a0", 5.0, samples=1), score("a0", 6.0, samples=3)],
    )
    with pytest.raises(InputError, match="--eval: samples 1 and 3 don't compare"):
        rows(path, lines, capsys)
    for condition, psnr in (("samples=1", "5"), ("samples=3", "6")):
        assert rows(path, lines, capsys, "--where", condition)[0][-1] == psnr
    assert (
        rows(path, lines[:1], capsys, "--where", "samples_seen=160")[0][-1] == "5"
    )  # 20 steps of 8


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


def test_the_ablation_stops_where_its_training_was_stopped(tmp_path):
    """A Ctrl-C ends train.py with a checkpoint and 0; what was half trained must not be scored."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in train.py*) mkdir -p {tmp_path}/out/$STOP; '
                    f"touch {tmp_path}/out/$STOP/preempted;; esac\n")  # fmt: skip
    stub.chmod(0o755)
    (tmp_path / "out" / "data").mkdir(parents=True)
    for stop, trained, scored in (("pretrained", 1, 0), ("runs/uniform-0", 2, 0), ("none", 4, 3)):
        (tmp_path / "calls").write_text("")
        env = os.environ | {
            "PYTHON": str(stub),
            "OUT": str(tmp_path / "out"),
            "SEEDS": "0",
            "MEANS": "0",
            "STDS": "",
        }
        for name in ("uniform-0", "mean0-0", "amalgamate-0"):
            (tmp_path / "out" / "runs" / name).mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["bash", ROOT / "studies/ablation.sh"], env=env | {"STOP": stop}, timeout=60
        )
        calls = (tmp_path / "calls").read_text()
        assert (calls.count("train.py"), calls.count("evaluate.py")) == (trained, scored)
        assert (done.returncode == 0) == (stop == "none")
        for file in (tmp_path / "out").rglob("preempted"):
            file.unlink()


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
