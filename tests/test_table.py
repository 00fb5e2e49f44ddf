"""studies.table, studies.time_to_score and studies/ablation.sh: what they print, do and refuse."""

import json
import os
import subprocess

import pytest
from helpers import ROOT, call

from lib.cli import InputError
from studies import table, time_to_score

SETTINGS = {
    "data": "d",
    "split": "val",
    "protocol": "pairs",
    "pairs": 4,
    "image_size": 32,
    "lpips_net": None,
    "val_fraction": 0.1,
}


def baseline(row: str, psnr: float, **changed) -> dict:
    """A line of evaluate.py's about no model."""
    return {**SETTINGS, "row": row, "psnr": psnr, "lpips": None, **changed}


def score(run: str, psnr: float, row: str = "samples", flags: dict | None = None, **changed):
    """A line of evaluate.py's about a run, whose name ends in its seed."""
    run_args = {
        "out": run,
        "seed": int(run[-1]),
        "archive": f"archive_of_{run}",
        "t_mean": 700,
        "layers": [3, 7],
        "steps": 90,
        "global_batch": 8,
        "weight_decay": 0.01,
    }
    return {
        **baseline(row, psnr),
        "steps": 2,
        "seed": 0,
        "sampler": "ddim",
        "checkpoint": run,
        "step": 20,
        "run_args": {**run_args, **(flags or {})},
        **changed,
    }


@pytest.fixture
def rows(tmp_path, capsys):
    """A function of lines and flags that gives the cells of the table, without its head."""
    path = tmp_path / "eval.jsonl"

    def print_table(lines: list[dict], *flags) -> list[list[str]]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        call(table, "--eval", path, "--by", "t_mean", "layers", *flags)
        printed = capsys.readouterr().out.splitlines()[2:]
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]

    return print_table


def test_the_last_checkpoint_of_each_run_and_baselines_of_the_same_pairs(rows):
    foreign = score("z0", 8.0, run_args=None, step=None)
    lines = [
        baseline("white", 1.0, pairs=8),
        baseline("white", 2.0),
        baseline("white", 3.0, split="train"),
        score("a0", 5.0, step=10),
        score("a0", 10.0),
        score("a1", 20.0),
        score("a0", 4.0, "poses shuffled"),
        foreign,
        {**foreign, "steps": 3, "psnr": 9.0},
        {**foreign, "checkpoint": "z1"},
    ]
    assert rows(lines) == [
        ["700", "[3, 7]", "samples", "2", "15 ± 7.1"],
        ["700", "[3, 7]", "poses shuffled", "1", "4"],
        ["", "", "white", "1", "2"],
        ["", "", "samples of z0", "1", "8"],
        ["", "", "samples of z1", "1", "8"],
    ]


def test_two_settings_of_one_run_are_refused(rows):
    lines = [score("a0", 5.0), score("a0", 6.0, steps=3)]
    with pytest.raises(InputError, match="--eval: steps 2 and 3 don't compare; choose by --where"):
        rows(lines)
    assert rows(lines, "--where", "steps=3") == [["700", "[3, 7]", "samples", "1", "6"]]
    with pytest.raises(InputError, match="eval.jsonl: no scores of runs that fulfil --where"):
        rows(lines, "--where", "steps=4")


def test_two_runs_of_one_out_are_not_taken_for_one(rows):
    first = score("runs/x0", 13.4, checkpoint="m0/runs/x0", weights_sha256="a")
    second = score("runs/x0", 13.3, checkpoint="m1/runs/x0", weights_sha256="b")
    with pytest.raises(InputError, match="--eval: m0/.*=a.* and m1/.*=b.*--out runs/x0, step 20"):
        rows([first, second])
    assert len(rows([first, second], "--where", "checkpoint=m0/runs/x0")) == 1
    assert len(rows([first, {**second, "weights_sha256": "a"}])) == 1


def test_samples_a_pair_are_evaluates_and_tell_lines_apart(rows):
    lines = [score("a0", 5.0, samples=1), score("a0", 6.0, samples=3)]
    with pytest.raises(InputError, match="--eval: samples 1 and 3 don't compare"):
        rows(lines)
    assert rows(lines, "--where", "samples=1")[0][-1] == "5"
    assert rows(lines, "--where", "samples=3")[0][-1] == "6"
    seen = "samples_seen=160"  # 20 steps of 8
    assert rows(lines[:1], "--where", seen)[0][-1] == "5"


@pytest.mark.parametrize("flag", ["steps", "global_batch", "weight_decay", "a_flag_of_one"])
def test_runs_of_other_flags_are_not_averaged(rows, flag):
    lines = [score("a0", 5.0), score("a1", 6.0, flags={flag: 40})]
    message = f"--eval: train.{flag} .*40.* don't compare; choose by --where, .* by --by"
    with pytest.raises(InputError, match=message):
        rows(lines)
    assert rows(lines, "--where", f"train.{flag}=40") == [["700", "[3, 7]", "samples", "1", "6"]]


def test_runs_of_other_length_are_not_averaged(rows):
    lines = [score("a0", 5.0), score("a1", 6.0, step=40)]
    with pytest.raises(InputError, match="--eval: step 20 and 40 don't compare"):
        rows(lines)
    assert rows(lines, "--where", "step=40") == [["700", "[3, 7]", "samples", "1", "6"]]


def test_flags_of_rows_may_differ_and_so_may_what_changes_no_result(rows):
    lines = [
        score("a0", 5.0, flags={"workers": 1, "log_every": 10}),
        score("a1", 7.0, flags={"workers": 8, "device": "cuda"}),
        score("b0", 9.0, flags={"t_mean": 500}),
    ]
    assert rows(lines) == [
        ["700", "[3, 7]", "samples", "2", "6 ± 1.4"],
        ["500", "[3, 7]", "samples", "1", "9"],
    ]


def test_a_default_and_the_same_number_as_a_flag_are_one_row(rows):
    lines = [score("a0", 5.0), score("a1", 7.0, flags={"t_mean": 700.0, "steps": 90.0})]
    assert rows(lines) == [["700", "[3, 7]", "samples", "2", "6 ± 1.4"]]


def test_flags_that_no_run_has(rows):
    with pytest.raises(InputError, match="--by t_std: not a flag of a0"):
        rows([score("a0", 5.0)], "--by", "t_std")


@pytest.mark.parametrize(
    "stopped_run, trained, scored",
    [("pretrained", 1, 0), ("runs/zero123-0", 2, 0), (None, 6, 5)],
)
def test_the_ablation_stops_where_its_training_was_stopped(tmp_path, stopped_run, trained, scored):
    """After Ctrl-C train.py leaves RUN/preempted and exits with 0. Its run must not be scored."""
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for row in ("zero123", "gaussian", "ours", "mlp", "mean0"):
        (out / "runs" / f"{row}-0").mkdir(parents=True)
    if stopped_run:
        (out / stopped_run).mkdir(exist_ok=True)
        (out / stopped_run / "preempted").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "OUT": str(out), "SEEDS": "0", "MEANS": "0", "STDS": ""}
    done = subprocess.run(
        ["bash", ROOT / "studies/ablation.sh"], env={**os.environ, **settings}, timeout=60
    )
    calls = (tmp_path / "calls").read_text()
    assert calls.count("train.py") == trained
    assert calls.count("evaluate.py") == scored
    assert (done.returncode == 0) == (stopped_run is None)


def checkpoints(run: str, *points: tuple[int, float, float]) -> list[dict]:
    """Lines of a run's scored checkpoints, from (step, seconds, PSNR)."""
    return [score(run, psnr, step=step, seconds=seconds) for step, seconds, psnr in points]


@pytest.fixture
def compare(tmp_path, capsys):
    """A function of lines and flags that gives what studies.time_to_score prints, line by line."""
    path = tmp_path / "eval.jsonl"

    def run(lines: list[dict], *flags) -> list[str]:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        call(time_to_score, "--eval", path, "--metric", "psnr", *flags)
        return capsys.readouterr().out.splitlines()

    return run


def test_the_time_to_the_baselines_score(compare):
    """By hand: b0 has 12 dB half-way from 20 s to 40 s, b1 from its first checkpoint on."""
    lines = [
        *checkpoints("a0", (10, 150.0, 13.0), (20, 300.0, 12.0)),
        *checkpoints("a1", (10, 150.0, 10.0), (20, 300.0, 11.0)),
        *checkpoints("b0", (20, 40.0, 14.0), (10, 20.0, 10.0)),  # not in the order of steps
        *checkpoints("b1", (10, 20.0, 11.5), (20, 40.0, 13.0)),
    ]
    printed = compare(lines, "--base", "a0,a1", "--ours", "b0,b1")
    assert printed == [
        "a0: psnr 12 after 300 s of training",
        "b0: the same after 30 s",
        "a1: psnr 11 after 300 s of training",
        "b1: the same after 20 s or less: at its first scored checkpoint",
        "ratio: 12.5 ± 3.5 over 2 of 2 pairs",
    ]


def test_a_score_that_is_never_reached(compare):
    lines = [
        *checkpoints("a0", (20, 300.0, 12.0)),
        *checkpoints("b0", (10, 20.0, 11.5), (20, 40.0, 11.0)),
    ]
    printed = compare(lines, "--base", "a0", "--ours", "b0")
    assert printed[1:] == ["b0: not reached in 40 s, best 11.5"]
    with pytest.raises(InputError, match="--ours: 1 runs; --base has 2"):
        compare(lines, "--base", "a0,a1", "--ours", "b0")
    with pytest.raises(InputError, match="--eval: no psnr of c0"):
        compare(lines, "--base", "a0", "--ours", "c0")
