"""tools/gpu_check.py: what it does with parts that fail, hang or don't fit; and a rehearsal."""

import json
import sys
import time
from pathlib import Path

import pytest
from helpers import call

from lib.cli import InputError
from tools import gpu_check
from tools.gpu_check import Part


def python(code: str) -> list:
    return [sys.executable, "-c", code]


def test_parts_that_fail_hang_or_do_not_fit_take_nothing_from_the_others(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"part": "of an earlier run", "status": "ok", "lines": []}) + "\n")
    started = tmp_path / "started"
    line = json.dumps({"bench": "sample", "row": "x", "views": 1, "steps": 2, "seconds": 3})
    parts = [
        Part("good", python(f"open({str(out)!r}, 'a').write({line!r} + chr(10))"), 0, 30),
        Part("bad", python("print('first'); raise SystemExit('last words')"), 0, 30),
        Part("hangs", python("import time; time.sleep(60)"), 0, 1),
        Part("large", python(f"open({str(started)!r}, 'w')"), 1000, 2000),
        Part("after", python("print('still here')"), 0, 30),
    ]
    begin = time.monotonic()
    assert not gpu_check.run_parts(parts, 1, out)
    assert time.monotonic() - begin < 30
    assert not started.exists()

    records = [json.loads(line) for line in out.read_text().splitlines()]
    status = {record["part"]: record["status"] for record in records if "part" in record}
    assert status == {
        "of an earlier run": "ok",
        "good": "ok",
        "bad": "failed (exit code 1)",
        "hangs": "stopped after 1 s",
        "large": "left out",
        "after": "ok",
    }
    printed = capsys.readouterr().out
    assert "first\nlast words" in printed
    table = printed[printed.index("| part |") :].splitlines()[2:]
    assert table == [
        "| good | 1 views, 2 steps, x | 3.0 s |",
        "| bad | failed (exit code 1) | last words |",
        "| hangs | stopped after 1 s |  |",
        "| large | left out |  |",
        "| after | ok | still here |",
    ]


@pytest.mark.parametrize(("name", "well"), [("correctness", False), ("our step", True)])
def test_correctness_that_is_cut_short_is_a_failure(tmp_path, name, well):
    parts = [Part(name, python("import time; time.sleep(60)"), 0, 0.2)]
    assert gpu_check.run_parts(parts, 1, tmp_path / "out.jsonl") == well


def test_what_a_hanging_part_has_started_ends_with_it(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_check.run_command(python(parent), 1, tmp_path / "log") == "stopped after 1 s"
    time.sleep(3)
    assert not alive.exists()


def test_a_variant_stands_beside_the_plain_step():
    plain = {
        "bench": "train",
        "row": "ours",
        "variant": "plain",
        "compile": "default",
        "micro_batch": 192,
        "memory_limit_gb": None,
        "status": "ok",
        "samples_per_second": 700.0,
        "tflops": 370.0,
        "mfu": 0.5,
        "memory_gb": 57.0,
        "compile_seconds": 80.0,
    }
    variant = {**plain, "variant": "bias with embedding", "samples_per_second": 714.0}
    ended = {"part": "our step", "status": "ok", "lines": []}
    table = gpu_check.results_table([plain, variant, ended])
    assert "ours, default, batch 192 | 700 samples/s, 370 TFLOP/s, 50% of a product's" in table
    assert "57.0 GB, compiled in 80 s |" in table
    assert "measured +2.0%" in table


def test_an_unknown_part_is_refused(tmp_path):
    with pytest.raises(InputError, match="--parts speed: none of correctness, our step, "):
        call(gpu_check, "--parts", "speed", "--out", tmp_path / "out.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 80 s on two free cores
def test_rehearsal(tmp_path, capsys):
    """Every part at tiny shapes on the CPU; without a GPU its own tests are skipped."""
    out = tmp_path / "out.jsonl"
    tiny = ["--size", "tiny", "--device", "cpu", "--minutes", 60]
    call(gpu_check, *tiny, "--out", out)
    parts = gpu_check.make_parts("tiny", "cpu", out, 0.0)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    status = {record["part"]: record["status"] for record in records if "part" in record}
    assert status == {part.name: "ok" for part in parts}
    trained = [record for record in records if record.get("bench") == "train"]
    without_gpu = {r["variant"] for r in trained if r["status"].startswith("not run: Triton")}
    assert without_gpu <= {"Triton GroupNorm"}
    assert {r["status"] for r in trained if r["variant"] not in without_gpu} == {"ok"}
    table = capsys.readouterr().out
    for name in gpu_check.PREDICTED:
        assert name == "reduce-overhead" or f"| ours, {name}, " in table
    assert Path(tmp_path / "out.png").exists()  # the small training's samples
