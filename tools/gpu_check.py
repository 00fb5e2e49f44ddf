"""Everything that only a GPU can show, in order of worth, within a few minutes.

    python -m tools.gpu_check --minutes 9 --out out/gpu.jsonl      # or: make gpu
    python -m tools.gpu_check --minutes 9 --out out/rehearsal.jsonl --size tiny --device cpu

Each part is a process of its own with a time limit, so that none takes the others' time. A part for
which too little time is left is left out. Where one fails, its last lines are shown and the next
one starts. OUT gets a line of JSON for each result as it comes; a Markdown table ends the output.
diffusers' row needs that package; nothing is downloaded.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lib.cli import (
    ArgumentParser,
    InputError,
    available_cores,
    positive_finite_float,
    run_script,
)
from lib.files import append, check_writable, read_lines

ROOT = Path(__file__).parents[1]

# What we expect of each variant against the plain code, by the memory traffic that it saves
# (docs/performance.md); our estimates.
PREDICTED = {
    "compiler thresholds": "+3% (23 GB of memory traffic less)",
    "Triton GroupNorm": "+4% (12 of 282 ms that the compiler's reductions cost)",
    "GroupNorm by channel": "+1%",
    "bias with embedding": "+0.4% (3 GB less)",
    "expanded upsampling": "+0.3%",
    "cudnn.benchmark": "0 to +3%",
    "NCHW GroupNorm": "-2.5% (664 instead of 681 samples/s in a trial)",
    "reduce-overhead": "0, as the GPU is never idle; CUDA graphs may refuse to accumulate",
}


@dataclass
class Part:
    """What is run as one process.

    needs: seconds without which it is not started; limit: seconds after which it is stopped.
    """

    name: str
    command: list
    needs: float
    limit: float


# ------------------------------------------------------------------------------------------- parts


def make_parts(size: str, device: str, out: Path, until: float) -> list[Part]:
    """All parts in the order in which they run. until: the time at which the last one ends."""
    full = size == "full"
    seconds = 8 if full else 0.05
    micro = 192 if full else 2
    mode = "default" if full else "off"  # compiling for a CPU takes minutes

    def bench(what: str, *flags) -> list:
        shared = ["--size", size, "--device", device, "--seconds", seconds, "--out", out]
        return [sys.executable, "-m", "tools.bench", what, *shared, *flags]

    def train_rows(rows: str, *flags, batch: int = micro) -> list:
        more = [] if full else ["--accumulate", 1]
        return bench(
            "train", "--rows", rows, "--micro_batches", batch, "--workers", 0, *more, *flags
        )

    variants = [name for name in PREDICTED if name != "reduce-overhead"]
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", *in_parallel()]
    reading = ["--recipes", "latents", "fp8+pca", "fp16", "--micro_batches", 48 if full else 2]
    parts = [
        Part("correctness", tests, 60, 240),
        Part("our step", train_rows("ours", "--compile", mode, "--profile"), 90, 150),
        Part("variants", train_rows("ours", "--compile", mode, "--variants", *variants), 60, 120),
        Part(
            "zero123's step",
            train_rows("zero123", "--compile", "off", batch=48 if full else 2),
            30,
            45,
        ),
        Part("diffusers' UNet", train_rows("diffusers", "--compile", mode), 60, 110),
        Part("archiving", bench("archive", "--compile", mode, "--workers", *workers()), 45, 90),
        Part("reading", bench("read", "--workers", 0, *workers(), *reading), 30, 60),
        Part("sampling", bench("sample", "--steps", 50 if full else 2), 20, 60),
    ]
    for memory_gb in (80, 40, 24):
        parts.append(Part(f"{memory_gb} GB", memory_command(bench, memory_gb, full), 20, 60))
    parts.append(
        Part("deterministic", train_rows("ours", "--compile", mode, "--deterministic"), 90, 150)
    )
    if full:
        parts.append(
            Part("CUDA graphs", train_rows("ours", "--compile", "reduce-overhead"), 90, 150)
        )
    training = ["--train_until", until, "--size", size, "--device", device, "--out", out]
    parts.append(Part("training", [sys.executable, "-m", "tools.gpu_check", *training], 150, 900))
    if not full:  # a rehearsal, on a machine that may be slow and busy
        parts = [replace(part, needs=0, limit=20 * part.limit) for part in parts]
    return parts


def in_parallel() -> list:
    """pytest's flags for several processes, where pytest-xdist is installed."""
    with contextlib.suppress(ImportError):
        import xdist  # noqa: F401 (only whether it is there)

        return ["-n", min(6, available_cores()), "--dist", "load"]
    return []


def workers() -> list[int]:
    """Numbers of data workers that are tried."""
    return [count for count in (1, 4, 8, 16) if count <= available_cores()]


def memory_command(bench: Callable, memory_gb: int, full: bool) -> list:
    """Our eager step at growing micro-batches, until one does not fit into the memory."""
    batches = [8, 16, 32, 48, 64, 96, 128, 160, 192, 256] if full else [2, 4]
    flags = ["--rows", "ours", "--compile", "off", "--accumulate", 1, "--seconds", 0]
    return bench(
        "train", *flags, "--workers", 0, "--memory_gb", memory_gb, "--micro_batches", *batches
    )


# --------------------------------------------------------------------------------- running a part


def run_command(command: list, seconds: float, log: Path) -> str:
    """Runs it with its output in the log: "ok", "failed (exit code N)" or "stopped after N s"."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            return "ok" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its data workers, too
            process.wait()


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The end of a log; of a progress bar its last state."""
    lines = log.read_text(errors="replace").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


def run_part(part: Part, seconds_left: float, out: Path, folder: Path) -> dict:
    """Runs a part, unless too little time is left, and appends what became of it to OUT."""
    if seconds_left < part.needs:
        record = {"part": part.name, "status": "left out", "seconds": 0, "lines": []}
    else:
        print(f"{part.name} ...", flush=True)
        log = folder / "log"
        start = time.monotonic()
        status = run_command(part.command, min(part.limit, seconds_left), log)
        record = {
            "part": part.name,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "lines": last_lines(log),
        }
    append(out, json.dumps(record) + "\n")
    print(f"{part.name}: {record['status']}, {record['seconds']} s", flush=True)
    if record["status"] not in ("ok", "left out"):
        print("\n".join(record["lines"]), flush=True)
    return record


def run_parts(parts: list[Part], minutes: float, out: Path) -> bool:
    """Runs the parts within so many minutes and prints the table.

    Returns whether none failed, and all of "correctness" ran.
    """
    end = time.monotonic() + 60 * minutes
    all_ok = True
    append(out, "")
    done = len(read_lines(out))
    try:
        for part in parts:
            with tempfile.TemporaryDirectory() as folder:
                record = run_part(part, end - time.monotonic(), out, Path(folder))
            cut_short = part.name == "correctness" and record["status"] != "ok"
            all_ok = all_ok and not cut_short and not record["status"].startswith("failed")
    finally:  # after Ctrl-C, too
        print(f"\n{results_table(read_lines(out)[done:])}")
    return all_ok


# ------------------------------------------------------------------------------------- the results


def results_table(records: list[dict]) -> str:
    """A Markdown table of OUT's lines: the results of each part, and what became of it."""
    plain_rate = None
    rows = []
    results = []  # of the part whose line comes next
    for record in records:
        if "part" not in record:
            results.append(describe(record, plain_rate))
            if record.get("bench") == "train" and plain_rate is None:
                plain_rate = record.get("samples_per_second")
            continue
        if not results or record["status"] != "ok":
            last_line = record["lines"][-1] if record["lines"] else ""
            results.append((record["status"], last_line))
        for what, result in results:
            rows.append(f"| {record['part']} | {what} | {result} |")
        results = []
    return "\n".join(["| part | what | result |", "|---|---|---|", *rows])


def describe(record: dict, plain_rate: float | None) -> tuple[str, str]:
    """(what was measured, the result) of a line that tools.bench or evaluate.py wrote."""
    kind = record.get("bench")
    if kind == "train":
        return describe_train(record, plain_rate)
    if kind == "sample":
        what = f"{record['views']} views, {record['steps']} steps, {record['row']}"
        return what, f"{record['seconds']:.1f} s"
    if kind == "read":
        what = f"{record['recipe']}, {record['workers']} workers"
        return what, f"{record['samples_per_second']:.0f} samples/s"
    if kind == "archive":
        what = f"{record['row']}, compile {record.get('compile', 'off')}"
        if "workers" in record:
            what += f", {record['workers']} workers"
        return what, f"{record['views_per_second']:.0f} views/s"
    scores = [f"{key} {value:.3f}" for key, value in record.items() if isinstance(value, float)]
    return str(record.get("row", "scores")), ", ".join(scores)


def describe_train(record: dict, plain_rate: float | None) -> tuple[str, str]:
    changed = record["compile"] if record["variant"] == "plain" else record["variant"]
    what = f"{record['row']}, {changed}, batch {record['micro_batch']}"
    if record["memory_limit_gb"]:
        what += f", at most {record['memory_limit_gb']:g} GB"
    if record["status"] != "ok":
        return what, record["status"]
    rate = record["samples_per_second"]
    result = (
        f"{rate:.0f} samples/s, {record['tflops']:.3g} TFLOP/s, {record['mfu']:.0%} of a product's"
    )
    if record["memory_gb"]:
        result += f", {record['memory_gb']:.1f} GB"
    if record["compile"] != "off":
        result += f", compiled in {record['compile_seconds']:.0f} s"
    if changed in PREDICTED and plain_rate:
        result += f"; predicted {PREDICTED[changed]}, measured {rate / plain_rate - 1:+.1%}"
    return what, result


# -------------------------------------------------------------------------------- a small training


def run_script_for(words: list, seconds: float | None = None) -> None:
    """Runs one of our scripts. After so many seconds it is asked to end; train.py then saves."""
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    if process.wait() != 0:
        raise SystemExit(process.returncode)


def train_small(size: str, device: str, out: Path, until: float) -> None:
    """Trains presets/small.txt at 64 px until the time is nearly over, and scores it.

    OUT gets the scores; a grid of samples comes beside it.
    """
    full = size == "full"
    pixels = 64 if full else 32
    with tempfile.TemporaryDirectory() as folder:
        tree, archive, run, scores = (
            Path(folder, name) for name in ("tree", "ar", "run", "scores")
        )
        objects = 1024 if full else 32
        run_script_for(
            ["-m", "tools.shapes", "--out", tree, "--objects", objects, "--size", pixels]
            + ([] if full else ["--views", 2])
        )
        run_script_for(
            ["precompute_dino.py", "@presets/frozen-small.txt", "--image_size", pixels]
            + ["--data", tree, "--archive", archive, "--device", device]
        )
        batch = ["--batch_size", 256, "--compile"]
        if not full:
            batch = ["--batch_size", 4, "--steps", 4, "--val_pairs", 8]
        reserve = 45 if full else 20  # seconds for the scores
        run_script_for(
            ["train.py", "@presets/small.txt", "--archive", archive, "--out", run]
            + ["--lr_schedule", "constant", "--preview_every", 0, "--save_every", 10**6]
            + ["--device", device, *batch],
            seconds=max(10, until - time.time() - reserve),
        )
        pairs = ["--pairs", 256, "--steps", 25] if full else ["--pairs", 2, "--steps", 2]
        run_script_for(
            ["evaluate.py", "--ckpt", run, "--data", tree, "--shuffled", "--scale", 2, *pairs]
            + ["--lpips", "none", "--out", scores, "--grid", out.with_suffix(".png")]
            + ["--device", device]
        )
        for record in read_lines(scores):
            append(out, json.dumps(record) + "\n")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.gpu_check")
    flag = parser.add_argument
    flag("--minutes", type=positive_finite_float, default=9, help="for all parts together")
    flag("--out", type=Path, default=Path("out/gpu.jsonl"), help="JSON lines, appended to")
    flag("--parts", nargs="+", help="these parts alone, by name")
    flag("--size", choices=["full", "tiny"], default="full", help="shapes; tiny: to rehearse")
    flag("--device", default="cuda", help="cuda, or cpu to rehearse")
    flag("--train_until", type=float, help="the part `training`, by itself, up to this UNIX time")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out.absolute()
    if args.train_until is not None:
        train_small(args.size, args.device, out, args.train_until)
        return
    parts = make_parts(args.size, args.device, out, time.time() + 60 * args.minutes)
    names = [part.name for part in parts]
    for name in args.parts or ():
        if name not in names:
            raise InputError(f"--parts {name}: none of {', '.join(names)}")
    chosen = [part for part in parts if not args.parts or part.name in args.parts]
    check_writable(out)
    if not run_parts(chosen, args.minutes, out):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
